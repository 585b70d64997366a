"""The record of a run is whole at any moment, and a directory takes only the run it belongs to."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import Child, execute, until

import l2t_jax
from l2t_jax.runs import records
from l2t_jax.runs.environment import environment
from l2t_jax.runs.records import (
    Metrics,
    RunDirectory,
    WorkdirError,
    load_arrays,
    open_run,
    read_record,
    save_arrays,
    write_json,
    write_record,
)

CONFIG = {"method": "l2t_dln", "lr": 0.1, "seeds": (0, 1), "student": {"name": "lenet", "width": 20}}


def refused(path: Path, config: dict[str, Any] = CONFIG, resume: bool = False) -> str:
    """The message with which a run is refused, which is one line."""
    with pytest.raises(WorkdirError) as caught:
        open_run(path, config, resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json_is_strict(tmp_path: Path) -> None:
    row = {
        "nan": float("nan"),
        "inf": [np.float32("inf"), jnp.float32(-jnp.inf)],
        "half": jnp.bfloat16(1.5),
        "array": jnp.arange(3),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "path": Path("a/b"),
        5: None,
    }
    write_json(tmp_path / "a.json", row)
    expected = {"nan": None, "inf": [None, None], "half": 1.5, "array": [0, 1, 2], "count": 3, "flag": True}
    assert json.loads((tmp_path / "a.json").read_text()) == {**expected, "path": "a/b", "5": None}


def test_json_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before = path.stat().st_ino
    with pytest.raises(TypeError, match="A object cannot be written as JSON"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 2})
    assert path.stat().st_ino != before  # another file took its place
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def cell(commit: str, score: float) -> dict[str, Any]:
    """What a run of a table's cell says of itself."""
    return {
        "methods": {"focal": {"score": score}},
        "environment": {"git": {"commit": commit, "dirty": False}},
        "metric": {"name": "error", "unit": ""},
        "baseline": "cross_entropy",
    }


def test_a_table_keeps_an_environment_once(tmp_path: Path) -> None:
    cells = {"a": cell("one", 0.1), "b": cell("one", 0.2), "c": cell("two", 0.3)}
    for name, record in cells.items():
        write_record(tmp_path / "records" / f"{name}.json", record)
    assert {name: read_record(tmp_path / "records" / f"{name}.json") for name in cells} == cells
    kept = json.loads((tmp_path / "environments.json").read_text())
    assert list(kept.values()) == [cells["a"]["environment"], cells["c"]["environment"]]
    keys = [json.loads((tmp_path / "records" / f"{name}.json").read_text())["environment"] for name in cells]
    assert keys == [list(kept)[number] for number in (0, 0, 1)] and all(len(key) == 12 for key in kept)


def test_a_record_may_hold_its_environment(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", cell("one", 0.1))
    assert read_record(tmp_path / "summary.json") == cell("one", 0.1)


def test_a_killed_write_leaves_no_record_without_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "records" / "a.json", records.write_json

    def killed(at: Path, content: Any) -> None:
        if at == path:
            raise KeyboardInterrupt
        whole(at, content)

    monkeypatch.setattr(records, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_record(path, cell("one", 0.1))
    assert not path.exists() and len(json.loads((tmp_path / "environments.json").read_text())) == 1
    monkeypatch.undo()
    write_record(path, cell("one", 0.1))
    assert read_record(path) == cell("one", 0.1)


@pytest.mark.parametrize("found", [None, "{}", "[]", '{"5cb'], ids=["absent", "another", "a list", "torn"])
def test_an_environment_that_is_lost_is_one_line(tmp_path: Path, found: str | None) -> None:
    path, file = tmp_path / "records" / "a.json", tmp_path / "environments.json"
    write_record(path, cell("one", 0.1))
    file.unlink()
    if found is not None:
        file.write_text(found)
    with pytest.raises(WorkdirError, match="restore") as caught:
        read_record(path)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_metrics_grow_line_by_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert Metrics.read(metrics.path) == []
    metrics.append([{"round": 1, "error": jnp.float32(0.5)}, {"round": 2, "error": np.nan}])
    metrics.append([{"round": 3}])
    metrics.append([])
    assert Metrics.read(metrics.path) == [{"round": 1, "error": 0.5}, {"round": 2, "error": None}, {"round": 3}]


@pytest.mark.parametrize("torn", ['{"rou', '{"round": 9}', '{"round": 9, "a": "\\u00e9'])
def test_a_torn_last_line_does_not_count(tmp_path: Path, torn: str) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.path.write_text('{"round": 1}\n' + torn)
    assert Metrics.read(metrics.path) == [{"round": 1}]
    metrics.append([{"round": 2}])
    assert metrics.path.read_text() == '{"round": 1}\n{"round": 2}\n'


def test_a_file_of_one_torn_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.path.write_text("{")
    metrics.append([{"round": 1}])
    assert metrics.path.read_text() == '{"round": 1}\n'


def test_truncate_keeps_what_is_asked(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.truncate(lambda row: True)  # nothing there is fine
    metrics.append([{"round": number} for number in range(5)])
    with metrics.path.open("a") as file:
        file.write('{"round": 1')
    metrics.truncate(lambda row: row["round"] < 3)
    assert metrics.path.read_text() == "".join(f'{{"round": {number}}}\n' for number in range(3))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"ro\n{"round": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is not JSON"):
        Metrics.read(tmp_path / "metrics.jsonl")


@pytest.mark.versions
def test_environment_has_what_a_reader_needs() -> None:
    here = json.loads(json.dumps(environment()))
    assert here["versions"]["jax"] == jax.__version__
    assert here["versions"]["l2t_jax"] == l2t_jax.__version__
    assert set(here["versions"]) >= {"python", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    hardware = here["hardware"]
    assert hardware["cores"] >= 1 and hardware["memory_bytes"] > 2**20 and hardware["cpu"]
    assert len(hardware["devices"]) == jax.device_count()
    assert here["git"] is None or (len(here["git"]["commit"]) == 40 and here["git"]["dirty"] in (True, False))


def test_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] is None


def test_fresh_run_and_resumption(tmp_path: Path) -> None:
    run = open_run(tmp_path / "deep" / "run", CONFIG, resume=False)
    record = json.loads(run.config_path.read_text())
    assert record["config"] == {**CONFIG, "seeds": [0, 1]}
    assert record["environment"]["versions"]["jax"] == jax.__version__
    assert record["command"]
    assert run.checkpoints_dir("l2t_dln", 3) == run.path / "checkpoints" / "l2t_dln" / "seed_3"
    assert run.metrics.path == run.path / "metrics.jsonl"
    assert (run.plots_dir.name, run.snapshots_dir.name) == ("plots", "snapshots")
    for times in (1, 2):
        open_run(run.path, CONFIG, resume=True)
        again = json.loads(run.config_path.read_text())
        assert again["environment"] == record["environment"]
        assert len(again["resumed"]) == times


def test_resume_without_a_run_starts_one(tmp_path: Path) -> None:
    assert open_run(tmp_path, CONFIG, resume=True).config_path.exists()


def test_the_same_run_wants_resume(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG, resume=False)
    assert "pass --resume to go on with it, or choose another --workdir" in refused(tmp_path)


@pytest.mark.parametrize("resume", [False, True])
def test_another_run_is_refused_with_the_differences(tmp_path: Path, resume: bool) -> None:
    open_run(tmp_path, CONFIG, resume=False)
    before = (tmp_path / "config.json").read_bytes()
    other = {"method": "l2t_dln", "lr": 0.2, "student": {"name": "lenet", "width": 6}, "seeds": [0, 1], "new": True}
    message = refused(tmp_path, other, resume)
    assert "(lr: there 0.1, asked 0.2; new: there absent, asked true; student.width: there 20, asked 6)" in message
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}', "\x00\x01"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert refused(tmp_path, resume=True).startswith(f"{tmp_path / 'config.json'} is damaged")


def test_results_without_a_config_are_refused(tmp_path: Path) -> None:
    Metrics(tmp_path / "metrics.jsonl").append([{"round": 1}])
    assert "holds a run without its config.json" in refused(tmp_path, resume=True)


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        assert refused(path).startswith(f"{path} cannot be used as a run directory")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_place_that_cannot_be_written() -> None:
    # Not a chmod, which does not stop root.
    assert "cannot be used as a run directory" in refused(Path("/proc/run"))


HOLD = """
import sys
from l2t_jax.runs.records import open_run
open_run(sys.argv[1], {"a": 1}, resume=True)
print("open", flush=True)
sys.stdin.read()
"""


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with Child(command, stdin=subprocess.PIPE) as child:
        assert until(lambda: child.said[0] == "open\n", child)
        message = refused(tmp_path, {"a": 1}, resume=True)
        assert message.startswith(f"{tmp_path} is in use by process {child.process.pid}")
    run = open_run(tmp_path, {"a": 1}, resume=True)
    assert "WorkdirError" in execute(command, stdin=subprocess.DEVNULL).stderr
    run.close()
    assert execute(command, stdin=subprocess.DEVNULL).stdout == "open\n"


def test_a_refused_directory_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path)
    assert tmp_path.resolve() not in records._locks


def test_naming_a_directory_does_not_make_it(tmp_path: Path) -> None:
    assert not RunDirectory(tmp_path / "run").path.exists()


@pytest.mark.versions
def test_arrays_round_trip(tmp_path: Path) -> None:
    tree = {
        "params": {"dense/0": (jnp.arange(3), jnp.float32(2))},
        "file": np.zeros((0, 2), np.int64),
        "half": jnp.array([1.5], jnp.bfloat16),
        "key": jax.random.key(1),
    }
    save_arrays(tmp_path / "a.npz", tree)
    arrays = load_arrays(tmp_path / "a.npz")
    assert set(arrays) == {"params/dense/0/0", "params/dense/0/1", "file", "half", "key"}
    np.testing.assert_array_equal(arrays["params/dense/0/0"], [0, 1, 2])
    assert arrays["params/dense/0/1"].shape == ()
    assert (arrays["file"].dtype, arrays["file"].shape) == (np.int64, (0, 2))
    assert (arrays["half"].dtype, arrays["half"][0]) == (np.float32, 1.5)
    np.testing.assert_array_equal(arrays["key"], jax.random.key_data(jax.random.key(1)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def test_arrays_with_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the same path"):
        save_arrays(tmp_path / "a.npz", {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
