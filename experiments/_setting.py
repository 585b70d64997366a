"""What the entries of an experiment share, and how its programs are kept."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments._flags import Config, Options
from l2t_jax.data import Dataset
from l2t_jax.parallel import Layout
from l2t_jax.training import Schedule
from l2t_jax.types import Array, Method, Student, Task


class Entry(NamedTuple):
    """A row of the table: a method, and whose trained teacher it takes over, if any."""

    name: str
    method: Method
    teacher_of: str | None = None


class Setting(NamedTuple):
    """What all entries of one experiment share."""

    config: Config
    options: Options
    dataset: Dataset
    student: Student
    task: Task
    schedule: Schedule
    layout: Layout


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second run starts fast; JAX_COMPILATION_CACHE_DIR moves them."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2t_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def example_inputs(dataset: Dataset) -> Array:
    """Inputs [2, H, W, c] of the right shape, for a student's initialisation."""
    return jnp.zeros((2, *dataset.train_images.shape[1:]))
