"""Settings every test shares: compiled programs are kept between runs, and float64 can be switched on."""

import gc
import importlib
import os
from pathlib import Path

from xla_flags import CACHE, known_flags

# Before jax is imported. The second run of the suite is several times faster.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("XLA_FLAGS", known_flags())

import jax
import pytest

gc.set_threshold(50_000, 10, 10)  # tracing makes many objects, and looking through them often is a tenth of the time


RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def pytest_collection_modifyitems(items):
    """A source distribution has no results: what reads them is skipped there."""
    if not RESULTS.is_dir():
        for item in items:
            if item.get_closest_marker("results"):
                item.add_marker(pytest.mark.skip(reason="reads results, which a source distribution does not hold"))


@pytest.fixture
def x64():
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def small_lstm():
    """A teacher of two layers, 8-1, in place of 64-64-64-1: compiled in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        # The package has a function of the module's name, so the module is asked for by its own.
        patch.setattr(importlib.import_module("l2t_jax.teachers.coordinate_lstm"), "UNITS", (8, 1))
        yield
