"""The flags that name several data sets and students, of modules that go over all pairs of them."""

import dataclasses
from typing import Any

from absl import flags

from experiments import _flags, _settings
from experiments._command import refuse
from l2t_jax.runs.config import Config, UsageError
from l2t_jax.students import STUDENTS
from l2t_jax.tasks import TASKS

flags.DEFINE_string(
    "datasets", None, "One or more, comma separated; takes the place of --dataset. Default: that of the task."
)
flags.DEFINE_string("students", "mlp,lenet", "One or more, comma separated; takes the place of --student.")
FLAGS = flags.FLAGS


def refuse_single() -> None:
    """Say so where --dataset or --student was given, which have no meaning here.

    Raises:
      UsageError: one of them was.
    """
    for name in ("dataset", "student"):
        refuse(name, f"one of several here: give --{name}s.")


def groups(config: Config) -> list[Config]:
    """A config for every pair of a data set and a student.

    Raises:
      UsageError: a name is unknown or given twice, or there is none.
    """
    datasets = TASKS[config.task].datasets
    names = [_names(flag, known) for flag, known in (("datasets", datasets), ("students", STUDENTS))]
    return [dataclasses.replace(config, dataset=d, student=s) for d in names[0] for s in names[1]]


def _names(flag: str, known: Any) -> list[str]:
    text = str(_flags.spec().defaults["dataset"] if FLAGS[flag].value is None else FLAGS[flag].value)
    names = [_settings.known(flag, name.strip(), known) for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--{flag}={text!r} must name each once, at least one.")
    return names
