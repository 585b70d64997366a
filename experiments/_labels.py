"""Whether labels are right or wrong, of modules that have both: what --labels says there."""

from absl import flags

from experiments._flags import KINDS_OF_LABELS, given_labels
from experiments._noise import of_labels
from l2t_jax.runs.config import Noise

FLAGS = flags.FLAGS


def kind() -> str:
    """What --labels says: clean (the default), noisy as --noise describes, or given, by a file."""
    if given_labels() is not None:
        return "given"
    return FLAGS.labels or KINDS_OF_LABELS[0]


def noise() -> Noise | None:
    """The wrong labels that --labels and the flags of noise ask for.

    Raises:
      UsageError: see `of_labels`.
    """
    return of_labels(kind())
