"""L2T-DLN and the systems it is compared with on image classification: same student, training batches, steps, seeds.

With no flags: L2T-DLN and cross entropy on the embedded UCI digits, 3 seeds, about two minutes on two cores.

  python -m experiments.classification
  python -m experiments.classification --dataset=mnist --data_dir=DIR --student=lenet --seeds=5
  python -m experiments.classification --method=l2t_dlf,ala,slf,meta_weight_net,large_margin_softmax,cross_entropy
  python -m experiments.classification --preset=released --rounds=100 --workdir=runs/mine
  python -m experiments.classification --preset=released --rounds=100 --workdir=runs/mine --resume
  python -m experiments.classification --preset=released --rounds=200 --workdir=runs/mine --resume --seeds=5

Writes config.json, metrics.jsonl (a line a round), summary.json, plots/ and checkpoints/ to --workdir.
"""

from absl import flags

from experiments import _flags
from experiments._command import command, run_one, start

flags.adopt_module_key_flags(_flags)

main = command("classification", run_one, task="classification")

if __name__ == "__main__":
    start(main)
