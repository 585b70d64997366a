"""Checkpoints come back bit for bit, or an older one does and the reason is told."""

import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import Child, execute, finished, until

from l2t_jax.runs.checkpoints import CheckpointError, Checkpoints, digest, main


class Pair(NamedTuple):
    """A record, as method states are made of."""

    first: Any
    second: Any


def state(value: float = 1.0) -> dict[str, Any]:
    """One of everything a method state may hold."""
    return {
        "weights": Pair(value * jax.random.normal(jax.random.key(0), (64, 128)), {}),
        "half": jnp.full((3,), value, jnp.bfloat16),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "flags": jnp.array([True, False]),
        "scalar": jnp.float32(value),
        "special": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "count": Pair(jnp.int32(3), ()),
        "odd/name": {"with space": jnp.arange(4, dtype=jnp.uint8)},
        "no elements": jnp.zeros((0, 3)),
        "host": np.arange(3, dtype=np.int64),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Steps 1, 2 and 3, each with weights of that value."""
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"round": step})
    return checkpoints


def biggest(checkpoints: Checkpoints, step: int) -> Path:
    """The file with the weights, which do not compress."""
    files = [path for path in (checkpoints.directory / str(step) / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    assert [leaf.dtype for leaf in jax.tree.leaves(left)] == [leaf.dtype for leaf in jax.tree.leaves(right)]
    assert digest(left) == digest(right)


@pytest.mark.versions
def test_round_trip_is_bit_exact(saved: Checkpoints) -> None:
    restored = saved.restore(state())
    assert (restored.step, restored.info, restored.skipped) == (3, {"round": 3}, [])
    assert_same(restored.state, state(3))
    assert isinstance(restored.state["weights"].first, jax.Array)
    assert isinstance(restored.state["host"], np.ndarray)
    # Typed keys go on as what they were.
    assert jnp.array_equal(jax.random.normal(restored.state["key"], (2,)), jax.random.normal(jax.random.key(7), (2,)))


@pytest.mark.versions
def test_shapes_are_enough_to_restore(tmp_path: Path) -> None:
    tree = {name: leaf for name, leaf in state().items() if name != "host"}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, tree, {})
    assert_same(checkpoints.restore(jax.eval_shape(lambda: tree)).state, tree)


def test_nothing_there(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).restore(state()) == (None, None, None, [])


@pytest.mark.versions
def test_a_state_without_arrays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"loss": {}, "empty": jnp.zeros((0,))}, {})
    assert checkpoints.restore({"loss": {}, "empty": jnp.zeros((0,))}).step == 0


@pytest.mark.versions
def test_oldest_are_dropped_and_reopening_goes_on(saved: Checkpoints) -> None:
    saved.save(4, state(4), {})
    saved.close()
    names = {path.name for path in saved.directory.iterdir()}
    assert names == {"2", "3", "4"}
    again = Checkpoints(saved.directory)
    assert_same(again.restore(state()).state, state(4))


@pytest.mark.parametrize("step", [2, 3])
def test_saving_a_step_that_is_there_is_an_error(saved: Checkpoints, step: int) -> None:
    with pytest.raises(CheckpointError, match=rf"Step {step} was not saved.*step 3 is there already"):
        saved.save(step, state(), {})


@pytest.mark.versions
def test_what_cannot_be_stored_is_an_error(saved: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="Step 4 was not saved"):
        saved.save(4, {"name": np.array("text")}, {})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.versions
@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
def test_damage_falls_back_and_the_step_can_be_saved_again(
    saved: Checkpoints, damage: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    damage(biggest(saved, 3))
    restored = saved.restore(state())
    assert restored.step == 2
    assert_same(restored.state, state(2))
    (line,) = restored.skipped
    assert line.startswith(f"{saved.directory / '3'}: ")
    assert len(line) < len(str(saved.directory)) + 250 and "\n" not in line
    assert capfd.readouterr().err == ""
    assert (saved.directory / "3.damaged").is_dir()
    saved.save(3, state(5), {})
    assert_same(saved.restore(state()).state, state(5))
    flip_bit(biggest(saved, 3))  # and once more, where 3.damaged is there already
    assert saved.restore(state()).step == 2


@pytest.mark.parametrize("part", ["record", "state", "."])
def test_missing_parts_fall_back(saved: Checkpoints, part: str) -> None:
    for path in sorted((saved.directory / "3" / part).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert Checkpoints(saved.directory).restore(state()).step == 2


def test_a_changed_record_is_damage(saved: Checkpoints) -> None:
    path = saved.directory / "3" / "record" / "metadata"
    path.write_text(path.read_text().replace('"round": 3', '"round": 2'))
    restored = saved.restore(state())
    assert restored.step == 2
    assert "its record does not have the digest" in restored.skipped[0]


def test_all_damaged(saved: Checkpoints) -> None:
    for step in (1, 2, 3):
        flip_bit(biggest(saved, step))
    restored = saved.restore(state())
    assert restored.step is None
    assert [line.split(": ")[0] for line in restored.skipped] == [str(saved.directory / name) for name in "321"]
    saved.save(1, state(), {})
    assert saved.restore(state()).step == 1


@pytest.mark.versions
@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        ("scalar", jnp.float16(0), r"leaf \['scalar'\] is float32\[\] there, float16\[\] was expected"),
        ("half", jnp.zeros((4,), jnp.bfloat16), r"bfloat16\[3\] there, bfloat16\[4\] was expected"),
        ("extra", jnp.zeros(()), r"leaf \['extra'\] is absent there"),
        ("key", jax.random.key(0, impl="rbg"), r"key<fry>\[\] there, key<rbg>\[\] was expected"),
        ("half", {}, r"leaf \['half'\] is bfloat16\[3\] there, absent was expected"),
    ],
)
def test_another_state_is_refused_and_left_in_place(saved: Checkpoints, name: str, leaf: Any, message: str) -> None:
    restored = saved.restore({**state(), name: leaf})
    assert restored.step is None
    assert len(restored.skipped) == 3
    assert all(re.search(message, line) for line in restored.skipped)
    assert saved.restore(state()).step == 3


def test_steps_of_another_state_give_way_to_an_older_good_one(saved: Checkpoints) -> None:
    saved.save(4, {"other": jnp.zeros(2)}, {})
    assert saved.restore(state()).step == 3
    saved.save(4, state(4), {})
    assert saved.restore(state()).step == 4


def test_digest_sees_values_dtypes_shapes_and_paths() -> None:
    trees = [
        {"a": jnp.zeros(4)},
        {"b": jnp.zeros(4)},
        {"a": jnp.zeros((2, 2))},
        {"a": jnp.zeros(4, jnp.int32)},
        {"a": jnp.array([0.0, -0.0, 0.0, 0.0])},
        {"a": jax.random.key(0)},
        {"a": jax.random.key_data(jax.random.key(0))},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest({"a": np.zeros(4, np.float32)}) == digest(trees[0])


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep >= 1"):
        Checkpoints(tmp_path, keep=0)


LOOP = """
import sys
import numpy as np
from l2t_jax.runs.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
step = checkpoints.restore({"a": np.zeros(100_000), "b": np.zeros(9)}).step or 0
while True:
    step += 1
    checkpoints.save(step, {"a": np.full(100_000, float(step)), "b": np.full(9, float(step))}, {"step": step})
    print(step, flush=True)
"""


def killed_while_saving(directory: Path, saves: int, delay: float) -> int:
    """The last step that a process killed during its saves had reported as saved."""
    with Child([sys.executable, "-c", LOOP, str(directory)]) as child:
        assert until(lambda: child.said[0].count("\n") >= saves, child), child.said
        time.sleep(delay)
        child.process.kill()
        return int(finished(child)[0][0].split()[-1])


def test_a_kill_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    for saves, delay in ((2, 0.0), (4, 0.013), (3, 0.031)):
        last = killed_while_saving(tmp_path, saves, delay)
        restored = Checkpoints(tmp_path).restore({"a": np.zeros(100_000), "b": np.zeros(9)})
        assert restored.skipped == []
        assert restored.step in (last, last + 1)
        assert restored.info == {"step": restored.step}
        assert all((leaf == restored.step).all() for leaf in jax.tree.leaves(restored.state))


@pytest.mark.versions
def test_a_process_ends_without_closing(tmp_path: Path) -> None:
    code = "from l2t_jax.runs.checkpoints import *; Checkpoints(sys.argv[1]).save(0, {'a': np.ones(2)}, {})"
    done = execute([sys.executable, "-c", code, str(tmp_path)])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.versions
def test_list_and_verify(saved: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step is read and compared, nothing is changed, and a step under way is left alone."""
    other = Checkpoints(tmp_path / "method" / "seed_0")
    other.save(5, {}, {"round": 5, "wall_time_s": 2.5})
    flip_bit(biggest(saved, 2))
    (saved.directory / "3" / "record").rename(saved.directory / "3" / "elsewhere")
    partial = saved.directory / "4.orbax-checkpoint-tmp"
    partial.mkdir()
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main(["checkpoints", str(tmp_path)]) == 1
    assert sorted(path for path in tmp_path.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "method" / "seed_0")
    assert lines[1].startswith("  5: good, ") and lines[1].endswith("MiB, round 5, wall_time_s 2.5")
    assert lines[2] == str(saved.directory)
    assert lines[3].startswith("  3: DAMAGED: it cannot be read")
    assert lines[4].startswith("  2: DAMAGED: its data do not have the digest they were saved with, 0.0")
    assert lines[5].startswith("  1: good, ") and len(lines) == 6
    saved.restore(state())
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert sum("put aside as damaged" in line for line in capsys.readouterr().out.splitlines()) == 2


def test_listing_tells_what_it_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints"]) == 2 and main(["checkpoints", "--help"]) == 0
    assert capsys.readouterr().out.count("usage: python -m l2t_jax.runs.checkpoints WORKDIR") == 2
    for missing in (tmp_path, tmp_path / "absent"):
        assert main(["checkpoints", str(missing)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: there is no checkpoint below") and said.count("\n") == 1
