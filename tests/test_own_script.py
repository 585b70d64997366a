"""A script of one's own around an experiment: its help, its resume line, and a second call in one process."""

import os
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from launching import execute

from experiments import _flags, classification  # noqa: F401  the second for its flags

ROOT = Path(__file__).parents[1]
SCRIPT = """
from experiments._command import command, run_one, start
from l2t_jax.runs import records

def failing(self, rows):
    raise OSError("No space left on device")

records.Metrics.append = failing
start(command("mine", run_one))
"""


def run(tmp_path, *arguments):
    (tmp_path / "mine.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "mine.py"), *arguments]
    return execute(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_its_help_teaches(tmp_path):
    said = run(tmp_path, "--help").stdout
    for name in ("--dataset", "--student", "--rounds", "--memory"):
        assert name in said


def test_its_resume_line_names_it(tmp_path):
    said = run(tmp_path, "--rounds=1", "--width=8", "--seeds=1", "--method=mae", f"--workdir={tmp_path}/r").stderr
    assert f"go on with: python {tmp_path}/mine.py --rounds=1" in said and "--resume" in said


def test_a_second_call_has_no_flags_of_the_first():
    with flagsaver.flagsaver():
        _flags.parse_arguments(["x.py", "--rounds=5", "--width=8", "--tensorboard", "--set=odd=true"])
        first, _ = _flags.resolve("x")
        _flags.parse_arguments(["x.py"])
        second, options = _flags.resolve("x")
    assert first.rounds == 5 and first.student_knobs == {"width": 8} and first.settings.odd
    assert second.rounds is None and second.student_knobs == {} and not options.tensorboard
    assert not flags.FLAGS["rounds"].present


def test_a_bad_flag_leaves_nothing_either():
    with flagsaver.flagsaver():
        with pytest.raises(SystemExit):
            _flags.parse_arguments(["x.py", "--rounds=5", "--width=x"])
        _flags.parse_arguments(["x.py"])
        assert _flags.resolve("x")[0].rounds is None
