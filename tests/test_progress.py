"""Progress: plain lines where there is no terminal, and a time left that knows methods differ in speed."""

import pytest

from l2t_jax.runs import progress as progress_lib
from l2t_jax.runs.progress import RunProgress

pytestmark = pytest.mark.versions

RUNS = [("slow", 0), ("slow", 1), ("fast", 0)]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = [0.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    return now


def test_time_left_counts_each_method_at_its_own_speed(clock):
    with RunProgress(dict.fromkeys(RUNS, 10)) as shown:
        shown.update("slow", 0, 0, None)
        clock[0] = 60.0
        shown.update("slow", 0, 1, 0.5)
        assert shown._left() == ""  # the first rounds were compiled: they say nothing of the speed
        clock[0] = 64.0
        shown.update("slow", 0, 3, 0.5)
        assert shown._left() == "0:54 left"  # 7 + 10 + 10 rounds of 2 s: of "fast" nothing is known yet
        shown.end("slow", 0)
        shown.end("slow", 1)
        shown.update("fast", 0, 0, None)
        clock[0] = 70.0
        shown.update("fast", 0, 2, 0.5)
        clock[0] = 70.5
        shown.update("fast", 0, 4, 0.5)
        assert shown._left() == "0:01 left"  # 6 rounds of 0.25 s


def test_plain_lines_without_a_terminal(clock, capsys):
    with RunProgress(dict.fromkeys(RUNS, 3)) as shown:
        shown.update("slow", 1, 1, 0.25)
        assert capsys.readouterr().err == ""  # not every round
        clock[0] = progress_lib.SECONDS_BETWEEN_LINES
        shown.update("slow", 1, 2, 0.25)
        assert capsys.readouterr().err.startswith("slow seed 1 (2 of 3): round 2/3 error 0.250")
        shown.update("slow", 1, 3, 0.125)
        assert "round 3/3 error 0.125" in capsys.readouterr().err  # the end of a run always
        shown.line("a [bracketed] line")
        assert capsys.readouterr().err == "a [bracketed] line\n"
