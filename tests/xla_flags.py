"""XLA's flags for tests: only those that the installed jaxlib knows."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"
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
