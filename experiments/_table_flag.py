"""The flag that says which table is wanted; each module has tables of its own."""

from collections.abc import Iterable

from absl import flags

from experiments._settings import known
from l2t_jax.runs.config import UsageError

flags.DEFINE_string("table", None, "Which table; the text above names them.")


def table(names: Iterable[str], default: str | None = None) -> str:
    """What the flag says.

    Raises:
      UsageError: it is not given and has no default here, or the table is unknown.
    """
    given = flags.FLAGS.table or default
    if given is None:
        raise UsageError(f"--table is not given: say which, one of {', '.join(names)}.")
    return known("table", given, names)
