"""L2T-DLN and the fixed loss on detection: the terms of YOLOv3's loss, and how much each counts, which is taught.

With no flags: yolov3_tiny, narrow, on shapes that the package draws itself, L2T-DLN and the sum, 3 seeds,
about 20 minutes on one core.

  python -m experiments.detection
  python -m experiments.detection --dataset=coco_mini --data_dir=DIR --student=yolov3_tiny \\
    --weights=yolov3-tiny.weights --train=head
  python -m experiments.detection --dataset=COCO_FOLDER --student=yolov3 --weights=darknet53.conv.74 --train=head
  python -m experiments.detection --dataset=coco_mini --data_dir=DIR --weights=yolov3-tiny.weights --rounds=0

A data set is one of those by name, or the path of a folder laid out as COCO is: annotations/instances_*.json and the
images. --rounds=0 trains nothing and scores the student as its weights are. plots/seen.png shows boxes.
"""

from absl import flags

from experiments import _flags
from experiments._command import command, run_one, start

flags.adopt_module_key_flags(_flags)

main = command("detection", run_one, task="detection")

if __name__ == "__main__":
    start(main)
