"""`python -m l2t_jax` prints what a report of a bug has to say of the installation. No paths, and no names of people.

Devices are asked for in a process of their own: XLA ends the process that starts with a flag it does not know, and a
driver may hang. All the rest is printed then too.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from l2t_jax.runs.environment import PACKAGES, commit, devices, machine, versions

USAGE = """usage: python -m l2t_jax
Prints what a report of a bug has to say of this installation: versions, platform, devices, settings of JAX.
It names no paths, users or hosts, and trains nothing: l2t_jax.train does that from Python, and the commands of
experiments from a checkout or a source distribution."""
VARIABLES = re.compile(r"(JAX|JAXLIB|XLA|TF_CPP|CUDA|NVIDIA|ROCR|HIP|LIBTPU|TPU|OMP|MKL)_\w+|NPROC")
# Where something lies, or which machine it is.
HIDDEN = re.compile(r"_(DIR|PATH|FILE|HOME|ROOT|CACHE|ADDRESS\w*|HOSTNAMES?|NAME)$")
PLUGINS = re.compile(r"(jax[-_](cuda|rocm|metal)|libtpu)")  # what JAX finds accelerators by
PATIENCE = 120.0  # seconds in which devices start


def report() -> Iterator[str]:
    """The lines of the report, `what: value`; devices last, since they may take long."""
    here, needed, extras = machine(), *_requirements()
    installed = versions([*needed, *extras])
    own, tree = installed.pop("l2t_jax"), commit()
    source = f", commit {tree['commit'][:12]}{' and changes' if tree['dirty'] else ''}" if tree else ""
    memory = f", {here['memory_bytes'] / 2**30:.0f} GiB" if here["memory_bytes"] else ""
    yield f"l2t_jax: {own}{source}"
    yield f"python: {installed.pop('python')}"
    yield f"platform: {here['platform']}, {here['cores']} cores{memory}, {here['cpu']}"
    for title, names in (("dependencies", needed), ("extras", extras)):
        yield f"{title}:"
        yield from (f"  {name} {installed[name] or 'not installed'}" for name in sorted(names, key=str.lower))
    yield "environment variables:"
    set_here = sorted((name, value) for name, value in os.environ.items() if VARIABLES.fullmatch(name))
    yield from (f"  {name}={_shown(name, value)}" for name, value in set_here)
    yield from _of_jax()


def jax_here() -> dict[str, Any]:
    """What JAX says of itself in this process: `devices()`, its settings that change results, and its warnings."""
    kept = _Kept(logging.WARNING)
    logging.getLogger("jax").addHandler(kept)
    found = devices() | {"warned": kept.lines}
    if "error" not in found:
        import jax

        config: Any = jax.config
        found["x64"] = bool(config.jax_enable_x64)
        found["precision"] = config.jax_default_matmul_precision
        found["cache"] = bool(config.jax_enable_compilation_cache and config.jax_compilation_cache_dir)
    return found


def main(argv: list[str]) -> int:
    """Print the report; exit code 2 where anything but --help is asked."""
    if argv[1:] in (["--help"], ["-h"]):
        print(USAGE)
    elif argv[1:]:
        print(f"error: {' '.join(argv[1:])!r} is not known: give nothing, or --help.", file=sys.stderr)
        return 2
    else:
        for line in report():
            print(line, flush=True)
    return 0


class _Kept(logging.Handler):
    """Keeps what is logged, a line each."""

    def __init__(self, level: int) -> None:
        """Keep nothing below `level`."""
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it, with the first line of its exception."""
        error = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"{_line(record.getMessage())}{f' {_line(str(error))}' if error else ''}")


def _requirements() -> tuple[list[str], list[str]]:
    """What is always installed with this library, and what only extras ask for; the former alone in a bare checkout."""
    needed, extras = set(PACKAGES), set[str]()
    try:
        asked = metadata.requires("l2t_jax") or []
    except metadata.PackageNotFoundError:
        asked = []
    for requirement in asked:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        (extras if "extra ==" in requirement else needed).add(name)
    there = [str(part.metadata["Name"]) for part in metadata.distributions()]
    needed.update(name for name in there if PLUGINS.match(name))
    return list(needed), list(extras - needed)


def _of_jax() -> list[str]:
    """Lines of what a new process finds."""
    code = "import json; from l2t_jax.__main__ import jax_here; print(json.dumps(jax_here()))"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": _last(done)}
    except subprocess.TimeoutExpired:
        found = {"error": f"no answer in {PATIENCE:.0f} s"}
    except (OSError, ValueError, IndexError) as error:
        found = {"error": str(error)}
    if "error" in found:
        lines = [f"devices: none, JAX does not start: {_line(found['error'])}"]
    else:
        kinds = {kind: found["devices"].count(kind) for kind in found["devices"]}
        lines = [
            f"devices: {found['backend']}, {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}",
            f"x64: {'on' if found['x64'] else 'off'}",
            f"matmul precision: {found['precision'] or 'default'}",
            f"compilation cache: {'on' if found['cache'] else 'off, but in commands of experiments'}",
        ]
    return lines + [f"JAX warns: {said}" for said in found.get("warned", ())]


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """What a process that failed said last, and how it ended."""
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith((" ", "***"))]
    return f"{said[-1]} ({ended})" if said else ended


def _line(text: str) -> str:
    """The first line, without paths and not without end."""
    return _without_paths(next(iter(text.strip().splitlines()), ""))[:300]


def _shown(name: str, value: str) -> str:
    return "(set)" if HIDDEN.search(name) else _line(value)


def _without_paths(text: str) -> str:
    """Every word with a slash is `PATH`: it may hold a user's name."""
    return re.sub(r"[^\s=,;:'\"()]*[/\\][^\s,;'\"()]*", "PATH", text)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what reads it may stop early, as `head` does
    sys.exit(main(sys.argv))
