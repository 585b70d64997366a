"""The flags of wrong labels."""

from absl import flags

from experiments._flags import KINDS_OF_LABELS, given, spec
from experiments._settings import known
from l2t_jax.data.noise import NOISES
from l2t_jax.runs.config import Noise, UsageError
from l2t_jax.runs.setting import FEW, META
from l2t_jax.tasks import is_path

OF_NOISE = ("noise", "noise_ratio", "meta", "noise_seed")

flags.DEFINE_string(
    "noise",
    None,
    f"{' | '.join(NOISES)}. What a wrong label is: one other class for each class, two of them, or any class at all "
    "(the right one too). Default: flip2; none where --labels gives them, or the data are your own.",
)
flags.DEFINE_float("noise_ratio", 0.4, "Probability of a label to be drawn anew, in [0, 1].")
flags.DEFINE_integer(
    "meta",
    None,
    "Clean examples, as many of each class, that are kept apart to measure the validation error; 0: none, then the "
    f"noisy set is divided as in experiments.classification. Default: {META}, and {META // 10} where there are fewer "
    f"than {FEW} examples.",
    lower_bound=0,
)
flags.DEFINE_integer("noise_seed", 1, "Of the wrong labels and of the meta set, for all --seeds.", lower_bound=0)


def from_flags() -> Noise | None:
    """What the flags say; None where labels are given as they are.

    Raises:
      UsageError: the kind is unknown, or the ratio is none.
    """
    values = flags.FLAGS
    if values.labels == "clean":
        raise UsageError("--labels=clean: labels are made wrong here; use experiments.classification.")
    own = values.labels is not None or is_path(given("dataset"), spec())
    if own and values.labels not in KINDS_OF_LABELS:
        asked = [f"--{name}" for name in OF_NOISE if values[name].present]
        if values.labels is not None and asked:
            raise UsageError(f"{asked[0]} would make labels wrong that --labels gives: leave one of the two out.")
        if not asked:
            return None
    if not 0 <= values.noise_ratio <= 1:
        raise UsageError(f"--noise_ratio={values.noise_ratio} must lie between 0 and 1.")
    kind = "flip2" if values.noise is None else values.noise
    return Noise(known("noise", kind, NOISES), values.noise_ratio, values.meta, values.noise_seed)


def of_labels(labels: str) -> Noise | None:
    """What the flags say where a table is of "noisy" labels; none where it is of "clean" or of given ones.

    Raises:
      UsageError: as `from_flags`; or the labels are clean and a flag describes wrong ones.
    """
    if labels == "noisy":
        return from_flags()
    for name in OF_NOISE:
        if flags.FLAGS[name].present:
            raise UsageError(f"--{name} is of wrong labels, and the labels are {labels} here: ask for noisy ones.")
    return None
