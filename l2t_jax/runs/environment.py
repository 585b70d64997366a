"""Where a run is: versions, the commit, the machine and its devices. Nothing here is ever an error.

It imports neither JAX nor what needs it before it is asked for devices, so that it tells of an installation whose JAX
does not start.
"""

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import l2t_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")  # those that a number may depend on


def environment() -> dict[str, Any]:
    """Versions, the commit of the source tree (None where there is none) and the hardware."""
    return {"versions": versions(PACKAGES), "git": commit(), "hardware": machine() | devices()}


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of Python, of this library and of `packages`; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "l2t_jax": l2t_jax.__version__}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> dict[str, Any] | None:
    """Commit of the tree this package is tracked in; dirty if any Python file of it is changed or new."""
    try:
        _git_output(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # else the repository is a stranger around an installation
        dirty = bool(_git_output("status", "--porcelain", "--untracked-files=all", "--", ":/*.py"))
        return {"commit": _git_output("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Operating system, CPU, cores this process may use, bytes of memory."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
    }


def devices() -> dict[str, Any]:
    """JAX's backend and the kind of each device; where JAX does not start, none, and the first line of its error."""
    try:
        import jax

        return {"backend": jax.default_backend(), "devices": [device.device_kind for device in jax.devices()]}
    except Exception as error:  # whatever a broken installation raises
        line = next(iter(str(error).splitlines()), "nothing said")
        return {"backend": None, "devices": [], "error": f"{type(error).__name__}: {line}"}


def _git_output(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[1]), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _cpu_model() -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None
