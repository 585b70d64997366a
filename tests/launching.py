"""An experiment's command as a user gives it, run in this process; and processes, waited for as long as they get on."""

import contextlib
import dataclasses
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from absl.testing import flagsaver

from experiments import _flags
from l2t_jax.runs.records import Metrics, write_json
from l2t_jax.types import Metric

# With a memory mode, since auto traces four to choose one.
SMALL = ("--rounds=2", "--unroll_length=2", "--width=8", "--checkpoint_seconds=0", "--memory=save")
QUIET = 120.0  # seconds without progress after which a process hangs
AWAKE = 2.0  # seconds of processor time that are progress: a process that only waits spends some too
MOST = 900.0  # seconds of processor time that no process of this suite needs: it is in a loop


def write_record(workdir, name, config, per_seed, rows):
    """What a cell of a table leaves, trained by nobody: the same accuracies for each of its rows."""
    accuracy = {"mean": sum(per_seed) / len(per_seed), "std": 0.07, "per_seed": per_seed}
    outcome = {"score": accuracy, "failed": [], "student_steps": 50, "wall_time_s": 4.0}
    record = {
        "methods": dict.fromkeys(rows, outcome),
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "metric": Metric("accuracy", "%")._asdict(),
        "baseline": "cross_entropy",
        "seeds": list(config.seeds),
        **{"dataset": config.dataset, "student": config.student, "preset": config.preset, "unroll_length": 25},
    }
    write_json(workdir / "records" / f"{name}.json", record)


@contextlib.contextmanager
def failing_disk(when):
    """A disk that is full, once the rows of a dispatch are written, where `when` (how many were, the rows) says so."""
    append, calls = Metrics.append, []

    def failing(self, rows):
        append(self, rows)
        calls.append(rows)
        if when(len(calls), rows):
            raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "append", failing)
        yield


def launch(module, *arguments):
    """Run `python -m MODULE ARGUMENTS`; returns its exit code."""
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        _flags.parse_arguments([f"{module.__name__.rpartition('.')[2]}.py", *map(str, arguments)])
        module.main([])
    return stop.value.code


class Child:
    """A process whose output is read as it comes, and which is killed where its `with` ends before it does."""

    def __init__(self, command, **given):
        """Start it; `given` is of `subprocess.Popen`."""
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **given)
        pipes, self._pieces = (self.process.stdout, self.process.stderr), ([], [])
        pairs = zip(pipes, self._pieces, strict=True)
        self._readers = [threading.Thread(target=_drain, args=pair, daemon=True) for pair in pairs]
        for reader in self._readers:
            reader.start()

    def __enter__(self):
        """Nothing to do."""
        return self

    def __exit__(self, *_):
        """Kill it, if it has not ended."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        for reader in self._readers:
            reader.join()

    @property
    def ended(self):
        return self.process.poll() is not None

    @property
    def said(self):
        """Its stdout and stderr so far."""
        return tuple(b"".join(pieces).decode() for pieces in self._pieces)


def _drain(pipe, pieces):
    with pipe:
        while piece := pipe.read1():
            pieces.append(piece)


def execute(command, *, check=False, **given):
    """As `subprocess.run` with the output as text; waited for as `finished` does."""
    with Child(command, **given) as child:
        ((out, err, code),) = finished(child)
    assert code == 0 or not check, err
    return subprocess.CompletedProcess(command, code, out, err)


def finished(*children, quiet=QUIET):
    """Wait for the end of processes, as long as they get on; stdout, stderr and exit code of each."""
    _wait(lambda: all(child.ended for child in children), children, quiet)
    for child in children:
        child.__exit__()  # all that it wrote is read
    return [(*child.said, child.process.returncode) for child in children]


def until(met, *children):
    """Wait until `met()`, as long as the processes get on; whether it was, and not where one of them ended before."""
    _wait(lambda: met() or any(child.ended for child in children), children)
    return met()


def _wait(over, children, quiet=QUIET):
    """Wait on progress, not on a clock: on a loaded machine all takes ten times as long.

    Progress is what the processes write and, where the system tells, their processor time: of them all, since one may
    wait for another.
    """
    before, since, looked = (0, 0.0), time.monotonic(), 0.0
    while not over():
        now = time.monotonic()
        if now - looked >= 1:  # seconds; it reads all of /proc
            looked = now
            written = sum(len(piece) for child in children for pieces in child._pieces for piece in list(pieces))
            spent = processor_time([child.process.pid for child in children])
            assert spent < MOST, f"in a loop: {[child.said for child in children]}"
            # Less is progress too: the time of one that has ended is not told.
            if written > before[0] or not 0 <= spent - before[1] < AWAKE:
                before, since = (written, spent), now
            assert now - since < quiet, f"it hangs: {[child.said for child in children]}"
        time.sleep(0.005)


def processor_time(processes):
    """Seconds that living processes and all below them have spent; 0 on systems that do not tell."""
    ticks, below = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_bytes().rpartition(b")")[2].split()  # from the third on: state, parent, ...
        except OSError:  # it has just ended
            continue
        number = int(path.parent.name)
        ticks[number] = sum(map(int, fields[11:15]))  # in user and system mode, with that of children that have ended
        below.setdefault(int(fields[1]), []).append(number)
    family = list(processes)
    for number in family:
        family += below.get(number, [])
    return sum(ticks.get(number, 0) for number in family) / os.sysconf("SC_CLK_TCK")
