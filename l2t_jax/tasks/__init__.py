"""Tasks: what is learned, and how its data become batches."""

from collections.abc import Callable

from l2t_jax.tasks.evaluation import evaluate, measure_all
from l2t_jax.tasks.image_classification import image_classification
from l2t_jax.types import Task

TASKS: dict[str, Callable[..., Task]] = {"image_classification": image_classification}

__all__ = ["TASKS", "evaluate", "image_classification", "measure_all"]
