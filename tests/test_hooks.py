"""Who is told of a run: every row once, in order, whatever raises or stops; TensorBoard is told as others are."""

import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
from launching import SMALL, launch

from experiments import classification
from l2t_jax import train
from l2t_jax.runs import reporting
from l2t_jax.runs.config import Options, UsageError
from l2t_jax.runs.hooks import Hooks, Told, tensorboard, told_by
from l2t_jax.runs.records import Metrics, RunDirectory, WorkdirError

pytestmark = pytest.mark.usefixtures("no_pictures")
PAGE = Path(__file__).parents[1] / "docs" / "reading_results.md"
FEW = {"student_knobs": {"width": 8}, "memory": "save", "unroll_length": 2, "seeds": 2}


@pytest.fixture(scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "draw", lambda *_: None)
        yield


def rounds(rows):
    return [(row["method"], row["seed"], row["round"]) for row in rows]


def row(number, **values):
    return {"method": "mae", "seed": 0, "round": number, "validation_error": 0.5, "finite": {"student": True}, **values}


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path)


def told(directory, *functions, lines=None):
    """Hooks that are told rows, by the names a, b, ..."""
    names = dict(zip("abc", functions, strict=False))
    return Hooks(Told(names, None), directory, [].append if lines is None else lines.append)


def test_rows_of_a_run_and_its_summary(tmp_path):
    seen, ends = [], []
    result = train("mae", "digits", rounds=3, workdir=tmp_path / "r", on_row=seen.append, on_summary=ends.append, **FEW)
    assert seen == Metrics.read(tmp_path / "r" / "metrics.jsonl")  # in its order, and nothing else
    assert rounds(seen) == [("mae", seed, number) for seed in (0, 1) for number in range(3)]
    assert ends == [json.loads((tmp_path / "r" / "summary.json").read_text())]
    assert ends[0]["methods"]["mae"]["score"]["mean"] == result.score


def test_a_row_is_told_once_it_is_on_the_disk(tmp_path):
    there = []

    def on_row(given):
        there.append(rounds([given])[0] in rounds(Metrics.read(tmp_path / "r" / "metrics.jsonl")))

    train("mae", "digits", rounds=2, workdir=tmp_path / "r", on_row=on_row, **FEW)
    assert there == [True] * 4


def test_a_hook_that_raises_is_told_no_more_and_the_run_goes_on(tmp_path):
    seen = []

    def on_row(given):
        if given["seed"] == 0 and given["round"] == 1:
            raise ConnectionError("no route\nto the tracker")
        seen.append(given)

    def on_summary(summary):
        raise KeyError("score")

    with pytest.warns(UserWarning) as warned:
        # Where there is progress the lines stand in it.
        told = {"on_row": on_row, "on_summary": on_summary, "quiet": True}
        result = train("mae", "digits", rounds=3, workdir=tmp_path / "r", **told, **FEW)
    lines = [str(one.message) for one in warned if issubclass(one.category, UserWarning)]
    assert (
        lines[0]
        == lines[1]
        == (
            "on_row raised ConnectionError: no route to the tracker at mae, seed 0, round 1; the run goes on without "
            "it, resuming gives it the rows that it lacks"
        )
    )
    assert lines[2] == "on_summary raised KeyError: 'score'; the run goes on without it, summary.json holds all"
    assert len(result.scores) == 2 and None not in result.scores and len(result.to_frame()) == 6
    assert rounds(seen) == [("mae", 0, 0)]
    late = []
    train("mae", "digits", rounds=3, workdir=tmp_path / "r", resume=True, on_row=late.append, **FEW)
    assert rounds(late) == [("mae", 0, 1), ("mae", 0, 2), *(("mae", 1, number) for number in range(3))]


def test_a_hook_may_change_what_it_is_given(directory):
    seen = []
    both = told(directory, lambda given: given.clear(), seen.append)
    rows = [row(0)]
    both.rows(rows)
    assert rows == seen == [row(0)]


def test_one_that_raises_takes_no_other_with_it(directory):
    seen, lines = [], []

    def fails(given):
        raise ValueError("x")

    both = told(directory, fails, seen.append, lines=lines)
    both.rows([row(0), row(1)])
    both.rows([row(2)])
    assert rounds(seen) == [("mae", 0, number) for number in range(3)] and len(lines) == 1
    assert json.loads((directory.path / "given.json").read_text()) == {"a": {}, "b": {"mae, seed 0": 3}}


def test_an_interruption_passes_through(directory):
    """Ctrl-C said twice stops at once, also where a hook hangs; what was given is known."""

    def hangs(given):
        if given["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        told(directory, hangs).rows([row(0), row(1)])
    assert json.loads((directory.path / "given.json").read_text()) == {"a": {"mae, seed 0": 1}}


def test_a_resumed_run_gives_what_was_not_given(directory):
    """Rounds after the checkpoint are computed again: two were given, one was not; a new hook is given all."""
    first, second = [], []
    told(directory, first.append).rows([row(0), row(1), row(2)])
    directory.metrics.append([row(0), row(1, validation_error=math.nan)])  # what truncation to the checkpoint left
    again = told(directory, first.append, second.append)
    again.catch_up("mae", 0)
    again.catch_up("mae", 1)
    again.rows([row(2), row(3)])
    assert rounds(first) == rounds(second) == [("mae", 0, number) for number in range(4)]
    assert math.isnan(second[1]["validation_error"])


def test_a_run_that_lost_its_disk_gives_each_row_once(tmp_path, capsys, monkeypatch):
    """The same on the command line, with a module of the user's own; rounds 0 and 1 are computed twice."""
    (tmp_path / "mine_once.py").write_text("rows, ends = [], []\non_row, on_summary = rows.append, ends.append\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = [*SMALL, "--seeds=1", "--rounds=4", "--method=mae", f"--workdir={tmp_path / 'r'}", "--resume"]
    given += ["--on_row=mine_once:on_row", "--on_summary=mine_once:on_summary", "--checkpoint_seconds=1000"]
    with pytest.MonkeyPatch.context() as patch:

        def interrupts(self, rows):
            whole(self, rows)
            if any(one["round"] == 1 for one in rows):
                raise OSError("No space left on device")

        whole = Hooks.rows
        patch.setattr(Hooks, "rows", interrupts)
        assert launch(classification, *given) == 1
    import mine_once

    assert rounds(mine_once.rows) == [("mae", 0, 0), ("mae", 0, 1)] and not mine_once.ends
    assert not list((tmp_path / "r" / "checkpoints").rglob("record"))  # so it begins anew
    assert launch(classification, *given) == 0
    assert rounds(mine_once.rows) == [("mae", 0, number) for number in range(4)]
    assert len(mine_once.ends) == 1 and mine_once.ends[0]["methods"].keys() == {"mae"}
    # The exit code is that of the run, and the line comes at once and at the end.
    (tmp_path / "mine_bad.py").write_text("def on_row(row):\n    raise RuntimeError('quota')\n")
    capsys.readouterr()
    bad = [*SMALL, "--seeds=1", "--method=mae", f"--workdir={tmp_path / 'b'}", "--on_row=mine_bad:on_row"]
    assert launch(classification, *bad) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "RuntimeError: quota at mae, seed 0, ro" in line]
    assert len(said) == 2


@pytest.mark.parametrize("content", ["[]", "{", '{"on_row": 3}'])
def test_what_was_given_is_damaged(directory, content):
    (directory.path / "given.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"given.json is damaged: delete it") as error:
        told(directory, print)
    assert "\n" not in str(error.value)
    told(directory)  # nobody is told


@pytest.mark.parametrize("name", ["on_row", "on_summary"])
def test_what_is_no_function_is_refused_before_anything_is_made(name, tmp_path):
    with pytest.raises(UsageError, match=f"{name} is an object of type str: give a function"):
        train("mae", "digits", workdir=tmp_path / "r", **{name: "mine:log"}, **FEW)
    with pytest.raises(UsageError, match=rf"--{name}=json:nothing: json has no function nothing: give MODULE:FUNCTION"):
        told_by(Options(workdir="", **{name: "json:nothing"}))
    assert not (tmp_path / "r").exists()


@pytest.mark.versions
def test_tensorboard_is_one_of_them(tmp_path):
    pytest.importorskip("tensorboardX")
    on_row = tensorboard(tmp_path)
    for seed in (0, 1):
        on_row(row(3, seed=seed, epoch=0, student_steps=8))
    for seed in (0, 1):
        (events,) = (tmp_path / "mae" / f"seed_{seed}").iterdir()
        for _ in range(300):  # on the disk within seconds, not only at the end
            if b"student_steps" in (content := events.read_bytes()) and b"validation_error" in content:
                break
            time.sleep(0.05)
        assert b"validation_error" in content and b"student_steps" in content and b"finite" not in content


def test_tensorboard_that_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install l2t_jax\[tensorboard\]"):
        told_by(Options(workdir=str(tmp_path), tensorboard=True))


def of_page(library):
    (block,) = [b for b in re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL) if f"import {library}" in b]
    return block


def test_mlflow_as_the_page_has_it(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    names = {}
    exec(compile(of_page("mlflow"), PAGE.name, "exec"), names)
    result = train(
        "mae",
        "digits",
        rounds=3,
        workdir=tmp_path / "r",
        on_row=names["on_row"],
        on_summary=names["on_summary"],
        **FEW,
    )
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED" and run.data.metrics["mae/score"] == pytest.approx(result.score)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "mae/1/validation_error")
    mine = result.to_frame().query("seed == 1")
    assert [(m.step, m.value) for m in history] == list(zip(mine["round"], mine["validation_error"], strict=True))


def test_wandb_as_the_page_has_it(tmp_path, monkeypatch):
    """With a stand-in that takes what wandb takes: one dict, and a step that is not given."""

    class Wandb:
        logged, summary, done = [], {}, []
        init = define_metric = staticmethod(lambda *_, **__: None)
        log = staticmethod(lambda data, step=None, commit=None: Wandb.logged.append((data, step)))
        finish = staticmethod(lambda: Wandb.done.append(True))

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    names = {}
    exec(compile(of_page("wandb"), PAGE.name, "exec"), names)
    names["on_row"](row(3, student_steps=8))
    assert Wandb.logged == [({"round": 3, "mae/0/validation_error": 0.5}, None)]
    names["on_summary"]({"methods": {"mae": {"score": {"mean": 0.25}}}})
    assert Wandb.summary == {"mae/score": 0.25} and Wandb.done
