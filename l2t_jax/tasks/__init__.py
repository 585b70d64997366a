"""Tasks by name: what is learned, from which data, and how a student is scored. A new task is one file and one line."""

import dataclasses
import inspect
import os
from pathlib import Path

from l2t_jax.data import DataError, Dataset, require
from l2t_jax.inputs import known
from l2t_jax.tasks import own
from l2t_jax.tasks.classification import CLASSIFICATION
from l2t_jax.tasks.detection import DETECTION
from l2t_jax.tasks.evaluation import evaluate, measure_all
from l2t_jax.tasks.metric_learning import METRIC_LEARNING
from l2t_jax.tasks.ranking import RANKING
from l2t_jax.tasks.segmentation import SEGMENTATION
from l2t_jax.tasks.spec import Panel, TaskSpec, settings_for
from l2t_jax.tasks.translation import TRANSLATION

TASKS: dict[str, TaskSpec] = {
    "classification": dataclasses.replace(CLASSIFICATION, open=own.open_path),
    "ranking": RANKING,
    "segmentation": SEGMENTATION,
    "detection": DETECTION,
    "metric_learning": METRIC_LEARNING,
    "translation": TRANSLATION,
}


def is_path(name: str, spec: TaskSpec) -> bool:
    """Whether a data set is named by a path: it is no known name, and has a slash or an ending, or is there."""
    return (
        bool(name.strip())
        and name not in spec.datasets
        and ("/" in name or Path(name).suffix != "" or Path(name).expanduser().exists())
    )


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    *,
    task: str = "classification",
    skip_broken: bool = False,
) -> Dataset:
    """Load and check a data set.

    Args:
      name: one of the task's `datasets`, or the path of your own data, see `is_path`.
      data_dir: where prepared TFDS data lie; by default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets.
      download: whether to download and prepare data that are missing, which needs TensorFlow and a network.
      task: one of `TASKS`.
      skip_broken: of images in a folder or a table leave out those that cannot be read, and say which.
    Returns:
      The data set, in memory; images of several sizes, or of more than a GiB, as places where they lie.
    Raises:
      DataError: a name is unknown, or the data are missing, unreadable or not valid.
    """
    spec = TASKS[known(f"task {task!r}", task, TASKS, DataError)]
    if spec.open is not None and is_path(name, spec):
        how = {"skip_broken": True} if skip_broken else {}
        unable = skip_broken and "skip_broken" not in inspect.signature(spec.open).parameters
        require(not unable, f"skip_broken is of images in classes, not of --task={task}.")
        return spec.open(Path(name).expanduser(), **how)
    require(not skip_broken, f"skip_broken is of your own images, and {name} is a prepared set.")
    build = spec.datasets[known(f"data set {name!r}", name, spec.datasets, DataError)]
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    dataset = build(Path(data_dir or default).expanduser(), download)
    spec.check(dataset)
    return dataset


__all__ = ["TASKS", "Panel", "TaskSpec", "evaluate", "is_path", "load", "measure_all", "settings_for"]
