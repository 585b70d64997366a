"""L2T-DLN, ALA and losses of rank where rare classes decide: each class against the others, scored by AUCPR.

With no flags: mlp on the digits, L2T-DLN and cross entropy, 3 seeds.

  python -m experiments.ranking
  python -m experiments.ranking --imbalance=20 --method=cross_entropy,aucpr,pairwise_aucroc,ala,l2t_dln
  python -m experiments.ranking --imbalance=20 --method=aucpr --set=aucpr.anchors=50,aucpr.low=0.5
  python -m experiments.ranking --dataset=mnist --data_dir=DIR --student=lenet --imbalance=100

--imbalance makes classes rare in training; the test set stays as it is. AUCPR is the average precision of a class among
all test examples, averaged over classes. aucpr is its Lagrangian (Eban et al. 2017), pairwise_aucroc the area under the
ROC curve; ALA's policy is rewarded where the AUCPR of validation batches rises.
"""

from absl import flags

from experiments import _flags
from experiments._command import command, run_one, start

flags.adopt_module_key_flags(_flags)

main = command("ranking", run_one, task="ranking")

if __name__ == "__main__":
    start(main)
