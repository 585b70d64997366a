"""Training labels that are partly wrong, a few clean examples apart, a clean test set: what each method makes of it.

With no flags: L2T-DLN and cross entropy on the UCI digits with 40 % wrong labels and 100 clean ones, 3 seeds, about a
minute on two cores. The preset is `cheap` here, unless another is given.

  python -m experiments.noisy_labels
  python -m experiments.noisy_labels --method=l2t_dln,meta_weight_net,l2rw,mentornet,generalized_cross_entropy
  python -m experiments.noisy_labels --noise=uniform --noise_ratio=0.6 --meta=0 --rounds=200
  python -m experiments.noisy_labels --noise_ratio=0 --imbalance=100
  python -m experiments.noisy_labels --dataset=cifar10 --data_dir=DIR --student=resnet32 --noise_ratio=0.2

The clean examples measure the validation error of the methods that have one; nothing is trained on them otherwise, but
with --train_on_clean, which is how a method that has no use of them may be compared fairly. An
epoch is a pass over the others. Beside the files of experiments.classification it writes observations.jsonl: at 41
moments, how many of the wrong labels the student has learned, how many it sees through, and how much of the
gradient comes from them.
"""

from absl import flags

from experiments import _flags, _noise
from experiments._command import command, run_one, start
from l2t_jax.runs.config import Noise

flags.adopt_module_key_flags(_flags)
flags.adopt_module_key_flags(_noise)


def _prepare() -> Noise | None:
    _flags.set_defaults(preset="cheap")
    return _noise.from_flags()


main = command("noisy_labels", run_one, _prepare, task="classification")

if __name__ == "__main__":
    start(main)
