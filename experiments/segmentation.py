"""L2T-DLN and the fixed loss on segmentation: the class of every pixel, scored by the mean IoU.

With no flags: pspnet_small on shapes that the package draws itself, L2T-DLN and cross entropy, 3 seeds.

  python -m experiments.segmentation
  python -m experiments.segmentation --dataset=coco_voc_seg_mini --data_dir=DIR --rounds=200
  python -m experiments.segmentation --dataset=VOCdevkit/VOC2012 --student=pspnet50 --weights=resnet50.safetensors
  python -m experiments.segmentation --dataset=VOCdevkit/VOC2012 --scales=0.5+0.75+1+1.25+1.5+1.75 --mirror

A data set is one of those by name, or the path of a folder laid out as VOC is: JPEGImages, SegmentationClass and lists
of names in ImageSets/Segmentation. Beside the files of experiments.classification, plots/seen.png shows maps.
"""

from absl import flags

from experiments import _flags
from experiments._command import command, run_one, start

flags.adopt_module_key_flags(_flags)

main = command("segmentation", run_one, task="segmentation")

if __name__ == "__main__":
    start(main)
