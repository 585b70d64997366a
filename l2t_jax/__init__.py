"""Learned loss functions by learning to teach, in JAX."""

from typing import Any

__version__ = "0.2.0"
_FROM_DATA = ("Dataset",)
_OWN = ("from_arrays", "from_csv", "from_folder", "from_npz")
_API = ("Result", "train")
_READ = ("read_run",)

__all__ = ["Dataset", "Result", "from_arrays", "from_csv", "from_folder", "from_npz", "read_run", "train"]


def __getattr__(name: str) -> Any:
    """What a script of one's own begins with, imported when it is asked for: the library alone stays light."""
    import importlib

    for module, names in (("data", _FROM_DATA), ("tasks.own", _OWN), ("runs.api", _API), ("runs.frames", _READ)):
        if name in names:
            return getattr(importlib.import_module(f"l2t_jax.{module}"), name)
    raise AttributeError(f"module 'l2t_jax' has no attribute {name!r}")
