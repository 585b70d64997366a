"""L2T-DLN, ALA and fixed losses on metric learning: embeddings, scored by recall@k on classes that did not train.

With no flags: mlp on the digits, of which 0 to 4 train and 5 to 9 test, L2T-DLN and the triplet loss, 3 seeds.

  python -m experiments.metric_learning
  python -m experiments.metric_learning --method=l2t_dln,ala,triplet,margin,nca --embedding=32 --per_class=5
  python -m experiments.metric_learning --loss=focal_triplet --method=ala,triplet
  python -m experiments.metric_learning --dataset=omniglot/images_background --student=lenet --side=28
  python -m experiments.metric_learning --dataset=stanford_online_products --data_dir=DIR --student=resnet20 --side=64
  python -m experiments.metric_learning --method=ala --teacher_from=runs/one --dataset=mnist --data_dir=DIR

A data set is one of those by name, or the path of a folder of class folders: its first classes train, the others test;
or of a folder with train/ and test/, whose classes differ. Classification sets have their classes divided likewise.
--loss is what L2T-DLN and ALA teach. ALA's policy sees one parameter of the loss at a time, so that a trained one can
teach on another data set, or another loss: --teacher_from. docs/metric_learning.md has the losses and the results.
"""

from absl import flags

from experiments import _flags
from experiments._command import command, run_one, start

flags.adopt_module_key_flags(_flags)

main = command("metric_learning", run_one, task="metric_learning")

if __name__ == "__main__":
    start(main)
