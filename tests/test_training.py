"""The outer loop: dispatches change nothing, interruptions lose nothing, failures are named."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax import training
from l2t_jax.checkpoints import Checkpoints
from l2t_jax.methods import METHODS
from l2t_jax.teachers import TEACHERS
from l2t_jax.training import Run, Schedule, compile_rounds, train
from l2t_jax.types import Loss, Teacher

EXAMPLES, ROUNDS = 60, 7
SCHEDULE = Schedule(
    rounds=ROUNDS,
    unroll_length=2,
    batch_size=4,
    validation_batch_size=5,
    validation_ratio=0.5,
    examples=EXAMPLES,
    stages=1,
)
DATA = toy.batch(9, EXAMPLES)


def noisy_gather(data, indices, key):
    """An augmentation that draws at random, so that a draw that depended on the dispatch would show."""
    batch = toy.task.gather(data, indices, None)
    return batch._replace(inputs=batch.inputs + 0.1 * jax.random.normal(key, batch.inputs.shape))


NOISY = toy.task._replace(gather=noisy_gather)


def temperature_loss():
    def apply(params, outputs, targets):
        return toy.task.error(outputs * params["temperature"], targets) + params["unused"] * 0

    return Loss(lambda key: {"temperature": jnp.array(1.0), "unused": jnp.array(0.0)}, apply)


def sabotaged(at, leaf):
    """An Adam teacher whose update of one leaf is NaN at one update."""
    adam = TEACHERS["adam"](0.01)

    def update(params, memory, hypergradient, loss_params):
        count, inside = memory
        step, inside = adam.update(params, inside, hypergradient, loss_params)
        bad = jnp.where(count == at, jnp.nan, 0.0)
        return step | {leaf: step[leaf] + bad}, (count + 1, inside)

    return Teacher(adam.init, lambda phi: (jnp.array(0), adam.memory(phi)), update)


class Runner:
    """One (method, seed) with its checkpoints on disk and its rows in a list."""

    def __init__(self, path, teacher=None, stop_after=None, seed=0):
        teacher = TEACHERS["adam"](0.01) if teacher is None else teacher
        self.method = METHODS["l2t_dln"](
            toy.student,
            toy.task,
            temperature_loss(),
            teacher,
            optax.sgd(0.1),
            optax.adam(1e-3),
            second_stage="restart",
        )
        self.path, self.rows, self.stop_after, self.seed = path, [], stop_after, seed
        self.snapshots, self.lines = {}, []
        self.execute = compile_rounds(self.method, NOISY, augment=True)

    def write(self, rows):
        self.rows += rows
        if self.stop_after is not None and len(self.rows) >= self.stop_after:
            self.stop_after = None
            raise KeyboardInterrupt

    def forget(self, done):
        self.rows = [row for row in self.rows if row["round"] < done]

    def train(self):
        run = Run(
            name="l2t_dln",
            seed=self.seed,
            state=self.method.init(jax.random.key(self.seed), jnp.zeros((2, 5))),
            checkpoints=Checkpoints(self.path),
            write=self.write,
            forget=self.forget,
            snapshot=lambda done, state: self.snapshots.update({done: jax.device_get(state.loss)}),
            snapshot_rounds=(0, 3, ROUNDS),
            progress=lambda done, row: None,
            report=self.lines.append,
            checkpoint_seconds=0.0,
        )
        return train(run, SCHEDULE, self.execute, DATA)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, one round a dispatch."""
    runner = Runner(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_count", lambda durations, done, rounds, stops: 1)
        return runner, runner.train()


def test_rounds_divide_into_dispatches_in_any_way(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_count", lambda durations, done, rounds, stops: min(4, rounds - done))
    runner = Runner(tmp_path)
    outcome = runner.train()
    chex.assert_trees_all_equal(outcome.state, whole[1].state)
    assert runner.rows == whole[0].rows
    assert [row["round"] for row in runner.rows] == list(range(ROUNDS))
    assert [row["student_steps"] for row in runner.rows] == [2 * (r + 1) for r in range(ROUNDS)]


def test_dispatches_stop_at_snapshots_and_at_the_end():
    fast = [1.0, 1e-6]
    assert training._count([], 0, 100, (0, 20, 100)) == training._count([1.0], 1, 100, (0, 20, 100)) == 1
    assert training._count(fast, 2, 100, (0, 20, 100)) == 18
    assert training._count(fast, 20, 100, (0, 20, 100)) == training.MOST_ROUNDS
    assert training._count(fast, 96, 100, (0, 20, 100)) == 4
    assert training._count([1.0, 60.0], 2, 100, (100,)) == 1


def test_snapshots_are_taken_where_asked(whole):
    runner, outcome = whole
    assert sorted(runner.snapshots) == [0, 3, ROUNDS]
    assert runner.snapshots[0]["temperature"] == 1
    chex.assert_trees_all_equal(runner.snapshots[ROUNDS], jax.device_get(outcome.state.loss))


@pytest.mark.parametrize("stop_after", range(1, ROUNDS + 1))
def test_interrupted_anywhere_and_resumed_is_bit_identical(whole, tmp_path, stop_after, monkeypatch):
    monkeypatch.setattr(training, "_count", lambda durations, done, rounds, stops: min(2, rounds - done))
    runner = Runner(tmp_path, stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    outcome = runner.train()
    chex.assert_trees_all_equal(outcome.state, whole[1].state)
    assert runner.rows == whole[0].rows


def test_damaged_checkpoint_is_named_and_the_one_before_used(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_count", lambda durations, done, rounds, stops: 1)
    runner = Runner(tmp_path)
    runner.train()
    newest = tmp_path / str(ROUNDS)
    blob = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-7])
    again = Runner(tmp_path)
    again.rows = list(runner.rows)
    outcome = again.train()
    assert len(again.lines) == 1 and str(newest) in again.lines[0]
    chex.assert_trees_all_equal(outcome.state, whole[1].state)
    assert again.rows == whole[0].rows


@pytest.mark.parametrize("leaf", ["temperature", "unused"])
def test_not_finite_is_named_and_the_last_good_state_kept(whole, tmp_path, leaf, monkeypatch):
    monkeypatch.setattr(training, "_count", lambda durations, done, rounds, stops: min(2, rounds - done))
    runner = Runner(tmp_path, teacher=sabotaged(4, leaf))
    outcome = runner.train()
    assert outcome.failure == (4, "DLN update", leaf)
    assert str(outcome.failure) == f"round 4: DLN update is not finite (leaf {leaf})"
    assert [row["round"] for row in runner.rows] == [0, 1, 2, 3, 4]  # the failed round too, and none after it
    assert not runner.rows[4]["finite"]["DLN update"] and runner.rows[4]["finite"]["hypergradient of stage one"]
    assert all(all(row["finite"].values()) for row in runner.rows[:4])
    restored = Checkpoints(tmp_path).restore(outcome.state)
    assert restored.step == 4
    chex.assert_tree_all_finite(outcome.state.loss)
    chex.assert_trees_all_equal(restored.state, outcome.state)


def test_not_finite_at_once_keeps_the_initial_state(tmp_path):
    runner = Runner(tmp_path, teacher=sabotaged(0, "unused"))
    outcome = runner.train()
    assert outcome.failure.round == 0 and len(runner.rows) == 1
    chex.assert_tree_all_finite(outcome.state.loss)
    assert outcome.state.loss["temperature"] == 1


def test_schedule_counts_epochs():
    assert SCHEDULE.rounds_per_epoch == 6  # 30 validation examples, 5 a round
    first = training._dispatch(0, 5, 3, SCHEDULE).first_of_epoch
    np.testing.assert_array_equal(np.asarray(first)[:3], [False, True, False])


def test_schedule_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="fewer than batch_size=31"):
        Schedule(1, 1, 31, 5, 0.5, EXAMPLES, 1)
