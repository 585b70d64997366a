"""`train` in a notebook: what a cell shows of it, and how the kernel's interrupt ends it."""

import ast
from pathlib import Path

import pytest
from kernel import kernel

from l2t_jax.runs.records import Metrics

ROOT = Path(__file__).parents[1]
BEGIN = """
import numpy as np
from l2t_jax import from_arrays, train

random = np.random.default_rng(0)
data = from_arrays(random.normal(size=(400, 8)), np.arange(400) % 4, name="drawn")
few = dict(student_knobs={"width": 8}, unroll_length=2, workdir="run")
"""


@pytest.mark.versions
def test_a_cell_shows_one_line_that_changes_and_an_interrupt_says_how_to_go_on(tmp_path):
    interrupted = []

    def interrupt(manager, message):
        """Once it is seen that rounds are done: the button of a notebook does the same."""
        if message["msg_type"] == "update_display_data" and not interrupted:
            interrupted.append(message["content"]["data"]["text/plain"])
            manager.interrupt_kernel()

    with kernel(tmp_path) as run:
        assert run(BEGIN).status == "ok"
        forever = 'result = train("mae", data, rounds=10**6, seeds=2, {}**few)'
        stopped = run(forever.format(""), interrupt)
        assert stopped.error == (
            "KeyboardInterrupt: train was stopped; go on by the same call with workdir='run', resume=True."
        )
        assert "SIGINT: finishing and saving these rounds" in stopped.printed
        rows = len(Metrics.read(tmp_path / "run" / "metrics.jsonl"))
        assert max(int(path.name) for path in (tmp_path / "run/checkpoints/mae/seed_0").glob("[0-9]*")) == rows > 0
        interrupted.clear()
        again = run(forever.format("resume=True, "), interrupt)
        assert again.error == stopped.error and f"round {rows}/" in again.shown[0]
        whole = run('train("mae", data, rounds=60, seeds=2, **few | {"workdir": "whole"}).scores')
        quiet = run('_ = train("mae", data, rounds=2, seeds=1, quiet=True, **few | {"workdir": "quiet"})')
    for cell in (stopped, again, whole):
        assert cell.warned == "" and "\r" not in cell.printed and "\x1b" not in cell.printed + "".join(cell.changed)
        assert "files go to" in cell.printed.splitlines()[0] and cell.shown[0].startswith("mae seed 0 (1 of 2): round")
    assert whole.status == "ok" and len(whole.shown) == 2  # the line, and the value of the cell
    assert whole.changed[-1].startswith("mae seed 1 (2 of 2): round 60/60 error ")
    assert len(whole.printed.splitlines()) == 1 and len(whole.changed) < 30
    assert quiet.status == "ok" and not (quiet.printed or quiet.warned or quiet.shown or quiet.changed)


def test_the_library_ends_no_process():
    """SystemExit would end a kernel's cell without a word: it is left to commands, by the one function they call."""
    ends, calls = {"exit", "_exit", "abort", "quit", "SystemExit", "fail"}, []
    for path in sorted((ROOT / "l2t_jax").rglob("*.py")):
        tree = ast.parse(path.read_text())
        commands = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
        inside = {id(node) for command in commands for node in ast.walk(command)}
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "leave"]:
            assert path.name == "parallel.py"
            inside |= {id(node) for node in ast.walk(function)}
        others = [node for node in ast.walk(tree) if id(node) not in inside]
        said = {node.id for node in others if isinstance(node, ast.Name)}
        said |= {node.attr for node in others if isinstance(node, ast.Attribute)}
        calls += [f"{path.name}: {name}" for name in sorted(said & (ends | {"leave"}))]
    assert calls == []
