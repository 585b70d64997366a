"""Whatever ends a run, nothing computed is lost and nothing comes twice: kills, signals, a full disk, a lost directory.

KILLS=50 python -m pytest tests/test_interruption.py -k killed  kills more often than the suite does.
"""

import errno
import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from launching import Child, finished, launch, until
from test_experiments import last_checkpoints, numbers

from experiments import classification
from l2t_jax.runs.records import Metrics

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "2"))
ROUNDS = 6 if KILLS < 10 else 40
# A dispatch of a single round each, so that there are many saves to be interrupted. It takes less time with rare
# collections, a small LSTM, a given memory mode and no pictures.
CODE = """import gc; gc.set_threshold(50_000, 10, 10)
from l2t_jax.runs import reporting, training; training.MOST_ROUNDS = 1; reporting.draw = lambda *_: None
import importlib; importlib.import_module("l2t_jax.teachers.coordinate_lstm").UNITS = (8, 1)
from experiments import _command, classification; _command.start(classification.main)"""
SMALL = ["--unroll_length=2", "--width=8", "--seeds=1,", "--memory=save"]
COMMAND = [sys.executable, "-c", CODE, f"--rounds={ROUNDS}", *SMALL]
LINES = 3 * ROUNDS  # of two protocols and of cross entropy


def lines(workdir):
    metrics = workdir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def reached(workdir, wanted):
    return lines(workdir) >= wanted


def start(workdir, *flags, before=()):
    return Child([*before, *COMMAND, f"--workdir={workdir}", *flags], cwd=ROOT)


def complete(workdir, *flags):
    """Run it, from where it was."""
    with start(workdir, *flags) as child:
        ((_, said, code),) = finished(child)
    assert code == 0, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run without an interruption."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    complete(workdir, "--checkpoint_seconds=0")
    assert lines(workdir) == LINES
    return workdir


def assert_same(workdir, whole):
    assert numbers(workdir) == numbers(whole)
    assert last_checkpoints(workdir) == last_checkpoints(whole)
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_killed_at_random_moments_and_resumed_is_bit_identical(whole, tmp_path):
    """SIGKILL, also in the midst of saves; then the same numbers, metrics and parameters as without."""
    workdir, moments, killed = tmp_path / "run", random.Random(0), 0
    for kill in range(KILLS):
        resume = ["--resume"] if workdir.exists() else []
        with start(workdir, "--checkpoint_seconds=0", *resume) as child:
            left = LINES - lines(workdir)
            wanted = lines(workdir) + moments.randint(1, max(1, 2 * left // (KILLS - kill + 1)))
            if until(partial(reached, workdir, min(wanted, LINES - 1)), child):
                time.sleep(moments.uniform(0, 0.1))
                killed += not child.ended
                child.process.kill()
    assert killed > KILLS / 2
    complete(workdir, "--checkpoint_seconds=0", "--resume")
    assert_same(workdir, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_say_how_to_go_on(tmp_path, number):
    workdir, rounds = tmp_path / "run", 100_000  # which it would take hours for
    with start(workdir, "--checkpoint_seconds=1000", "--method=cross_entropy", f"--rounds={rounds}") as child:
        assert until(partial(reached, workdir, 3), child), child.said
        child.process.send_signal(number)
        ((_, said, code),) = finished(child)
    assert code == 130, said
    assert f"{number.name}: finishing and saving these rounds" in said
    assert f"--workdir={workdir} --resume" in said and "Traceback" not in said
    newest = max(int(p.name) for p in (workdir / "checkpoints/cross_entropy/seed_1").iterdir() if p.name.isdigit())
    assert newest == lines(workdir) < rounds


def test_full_disk_ends_the_run_and_keeps_what_was_saved(tmp_path):
    """A limit on the size of files stands for the full disk: the write that passes it fails in the same way."""
    workdir, rounds = tmp_path / "run", 160
    flags = ["--checkpoint_seconds=0.2", "--method=cross_entropy", f"--rounds={rounds}"]
    full = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"]  # blocks of 512 or 1024 bytes
    with start(workdir, *flags, before=full) as child:
        ((_, said, code),) = finished(child)
    assert code == 1, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "make room" in last and "--resume" in last and "Traceback" not in said
    assert 0 < lines(workdir) < rounds
    for run, (step, _) in last_checkpoints(workdir).items():
        assert run.endswith("cross_entropy/seed_1") and step > 0
    complete(workdir, *flags, "--resume")
    rows = Metrics.read(workdir / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(rounds))


def test_directory_that_becomes_read_only_ends_the_run(tmp_path, monkeypatch, capsys):
    workdir, real = tmp_path / "run", Metrics.append

    def append(self, rows):
        if rows[0]["method"] == "cross_entropy":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.path))
        real(self, rows)

    small = ["--rounds=2", *SMALL, "--method=focal,cross_entropy", f"--workdir={workdir}"]
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "append", append)
        assert launch(classification, *small) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Read-only file system" in said and f"--workdir={workdir} --resume" in said
    assert (workdir / "checkpoints/focal/seed_1/2").is_dir()
    assert launch(classification, *small, "--resume") == 0
    assert len(Metrics.read(workdir / "metrics.jsonl")) == 4
    assert json.loads((workdir / "summary.json").read_text())["methods"]["cross_entropy"]["failed"] == []
