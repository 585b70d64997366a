"""The flag that says whether labels are right or wrong, of modules that have both."""

from absl import flags

from experiments._flags import known
from experiments._noise import LABELS, of_labels
from l2t_jax.runs.config import Noise

flags.DEFINE_string("labels", "clean", f"{' | '.join(LABELS)}. Right labels, or wrong ones as --noise says.")


def noise() -> Noise | None:
    """The wrong labels that --labels and the flags of noise ask for.

    Raises:
      UsageError: see `of_labels`, or --labels is unknown.
    """
    return of_labels(known("labels", flags.FLAGS.labels, LABELS))
