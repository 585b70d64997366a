"""Settings every test shares: compiled programs are kept between runs, and float64 can be switched on."""

import gc
import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"
# Before jax is imported. The second run of the suite is several times faster.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

# Nearly all of the suite's time is compilation of programs that run for milliseconds: let LLVM not try hard, give it
# the loops of the older emitters, half as long to compile, and each program in one piece.
FASTER = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def known_flags() -> str:
    """Those of `FASTER` that this jaxlib knows: XLA ends the process on one that it does not. Tried once a version."""
    found = CACHE / f"xla_flags_{importlib.metadata.version('jaxlib')}"
    if not found.exists():
        known = FASTER if _starts(*FASTER) else tuple(flag for flag in FASTER if _starts(flag))
        found.parent.mkdir(exist_ok=True)
        found.write_text(" ".join(known))
    return found.read_text()


def _starts(*flags: str) -> bool:
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = known_flags()

import jax
import pytest

gc.set_threshold(50_000, 10, 10)  # tracing makes many objects, and looking through them often is a tenth of the time


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
