"""The outer loop: dispatches change nothing, interruptions lose nothing, failures are named."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.data.order import Plan
from l2t_jax.methods import l2t_dln
from l2t_jax.runs import training
from l2t_jax.runs.checkpoints import Checkpoints
from l2t_jax.runs.parallel import Layout
from l2t_jax.runs.training import Run, StoppedError, compile_rounds, train
from l2t_jax.teachers import TEACHERS
from l2t_jax.types import Loss, Teacher

EXAMPLES, ROUNDS = 60, 7
PLAN = Plan(
    rounds=ROUNDS,
    unroll_length=2,
    batch_size=4,
    validation_batch_size=5,
    validation_ratio=0.5,
    examples=EXAMPLES,
    stages=1,
)
DATA = toy.batch(9, EXAMPLES)


def noisy_gather(data, indices, keys):
    """An augmentation that draws at random, so that a draw that depended on the dispatch would show."""
    batch = toy.task.gather(data, indices, None)
    noise = jax.vmap(lambda key: jax.random.normal(key, batch.inputs.shape[-1:]))(keys.reshape(-1))
    return batch._replace(inputs=batch.inputs + 0.1 * noise.reshape(batch.inputs.shape))


NOISY = toy.task._replace(gather=noisy_gather, draws=True)


def temperature_loss():
    def apply(params, outputs, targets):
        return toy.task.error(outputs * params["temperature"], targets) + params["unused"] * 0

    return Loss(lambda key: {"temperature": jnp.array(1.0), "unused": jnp.array(0.0)}, apply)


def sabotaged(at, leaf):
    """An Adam teacher whose update of one leaf is NaN at one update."""
    adam = TEACHERS["adam"](0.01)

    def update(params, memory, hypergradient, phi):
        count, inside = memory
        step, inside = adam.update(params, inside, hypergradient, phi)
        bad = jnp.where(count == at, jnp.nan, 0.0)
        return step | {leaf: step[leaf] + bad}, (count + 1, inside)

    return Teacher(adam.init, lambda phi: (jnp.array(0), adam.hidden(phi)), update)


class Runner:
    """One (method, seed) with its checkpoints on disk and its rows in a list."""

    def __init__(self, path, teacher=None, stop_after=None, seed=0):
        teacher = TEACHERS["adam"](0.01) if teacher is None else teacher
        self.method = l2t_dln(
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
        self.program = compile_rounds(self.method, NOISY)

    def write(self, rows):
        self.rows += rows
        if self.stop_after is not None and len(self.rows) >= self.stop_after:
            self.stop_after = None
            raise KeyboardInterrupt

    def forget(self, done):
        self.rows = [row for row in self.rows if row["round"] < done]

    def train(self):
        return train([self.run()], PLAN, self.program, DATA)[0]

    def run(self):
        return Run(
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, one round a dispatch."""
    runner = Runner(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_wanted", lambda durations: 1)
        return runner, runner.train()


def test_rounds_divide_into_dispatches_in_any_way(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_wanted", lambda durations: 4)
    runner = Runner(tmp_path)
    outcome = runner.train()
    chex.assert_trees_all_equal(outcome.state, whole[1].state)
    assert runner.rows == whole[0].rows
    assert [row["round"] for row in runner.rows] == list(range(ROUNDS))
    assert [row["student_steps"] for row in runner.rows] == [2 * (r + 1) for r in range(ROUNDS)]


def test_dispatches_last_about_a_second_and_stop_at_snapshots_and_at_the_end():
    assert training._wanted([]) == training._wanted([1.0]) == training._wanted([1.0, 60.0]) == 1
    assert training._wanted([1.0, 0.1]) == 10
    assert training._wanted([1.0, 1e-6]) == training.MOST_ROUNDS
    plan = dataclasses.replace(PLAN, rounds=100)
    run = Run("toy", 0, *[None] * 5, (0, 20, 100), *[None] * 3)
    counts = {done: training._Progress(run, done, 0.0).count(32, plan) for done in (0, 2, 20, 96, 100)}
    assert counts == {0: 20, 2: 18, 20: 32, 96: 4, 100: 0}


def test_snapshots_are_taken_where_asked(whole):
    runner, outcome = whole
    assert sorted(runner.snapshots) == [0, 3, ROUNDS]
    assert runner.snapshots[0]["temperature"] == 1
    chex.assert_trees_all_equal(runner.snapshots[ROUNDS], jax.device_get(outcome.state.loss))


@pytest.mark.parametrize("stop_after", range(1, ROUNDS + 1))
def test_interrupted_anywhere_and_resumed_is_bit_identical(whole, tmp_path, stop_after, monkeypatch):
    monkeypatch.setattr(training, "_wanted", lambda durations: 2)
    runner = Runner(tmp_path, stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    outcome = runner.train()
    chex.assert_trees_all_equal(outcome.state, whole[1].state)
    assert runner.rows == whole[0].rows


def test_damaged_checkpoint_is_named_and_the_one_before_used(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_wanted", lambda durations: 1)
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
    monkeypatch.setattr(training, "_wanted", lambda durations: 1)
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
    assert PLAN.rounds_per_epoch == 6  # 30 validation examples, 5 a round
    first = training._dispatch(0, 5, 3, PLAN).first_of_epoch
    np.testing.assert_array_equal(np.asarray(first)[:3], [False, True, False])


def test_schedule_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="fewer than batch_size=31"):
        Plan(1, 1, 31, 5, 0.5, EXAMPLES, 1)


POISON = EXAMPLES - 1  # the example that the test below makes NaN


def test_a_seed_that_diverges_never_touches_those_beside_it(tmp_path, monkeypatch):
    """Three seeds in one program; the one in the middle meets a NaN. The others end as they do without it."""
    real, data = training._dispatch, DATA._replace(inputs=DATA.inputs.at[POISON].set(jnp.nan))

    def dispatch(poisoned, seed, *rest):
        given = real(seed, *rest)
        safe = given._replace(
            **{name: np.minimum(getattr(given, name), POISON - 1) for name in ("train", "validation")}
        )
        late = poisoned and seed == 1
        hole = np.where((given.round >= 2)[:, None, None], POISON, safe.validation)
        return safe._replace(validation=hole) if late else safe

    def group(folder, poisoned):
        monkeypatch.setattr(training, "_dispatch", functools.partial(dispatch, poisoned))
        runners = [Runner(folder / str(seed), seed=seed) for seed in range(3)]
        program = compile_rounds(runners[0].method, NOISY, Layout(3))
        return runners, train([runner.run() for runner in runners], PLAN, program, data)

    runners, outcomes = group(tmp_path / "with", True)
    clean, expected = group(tmp_path / "without", False)
    assert outcomes[1].failure == (2, "validation error of stage one", "e_val")
    assert [row["round"] for row in runners[1].rows] == [0, 1, 2]
    chex.assert_tree_all_finite(outcomes[1].state.student.params)
    for i in (0, 2):
        assert outcomes[i].failure is None and runners[i].rows == clean[i].rows and len(clean[i].rows) == ROUNDS
        chex.assert_trees_all_equal(outcomes[i].state, expected[i].state)
        chex.assert_trees_all_equal(runners[i].snapshots, clean[i].snapshots)
    monkeypatch.setattr(training, "_dispatch", functools.partial(dispatch, False))
    single = compile_rounds(runners[0].method, NOISY)
    (alone,) = train([Runner(tmp_path / "alone", seed=2).run()], PLAN, single, data)
    chex.assert_trees_all_close(alone.state, expected[2].state, rtol=1e-5, atol=1e-6)


def test_seeds_one_after_another_are_bit_equal_to_single_runs(whole, tmp_path):
    """Whatever ran before in the same program."""
    other, again = Runner(tmp_path / "other", seed=5), Runner(tmp_path / "again")
    again.program = other.program
    other.train()
    chex.assert_trees_all_equal(again.train().state, whole[1].state)
    assert again.rows == whole[0].rows


def test_a_group_goes_on_from_where_each_of_its_runs_was(whole, tmp_path, monkeypatch):
    """An interruption between the saves of a group leaves them at different rounds."""
    monkeypatch.setattr(training, "_wanted", lambda durations: 2)
    ahead = Runner(tmp_path / "0", stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        ahead.train()
    behind = Runner(tmp_path / "1", seed=1)
    program = compile_rounds(ahead.method, NOISY, Layout(2))
    outcomes = train([ahead.run(), behind.run()], PLAN, program, DATA)
    chex.assert_trees_all_close(outcomes[0].state, whole[1].state, rtol=1e-5, atol=1e-6)
    for runner in (ahead, behind):
        assert [row["round"] for row in runner.rows] == list(range(ROUNDS))


def test_a_wish_to_stop_is_granted_after_the_dispatch_and_loses_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_wanted", lambda durations: 2)
    runner, asked = Runner(tmp_path), iter([False, True])
    with pytest.raises(StoppedError):
        train([runner.run()._replace(checkpoint_seconds=1e9)], PLAN, runner.program, DATA, lambda: next(asked))
    assert len(runner.rows) == 3  # a dispatch of 2 rounds and one up to the snapshot at 3
    assert Checkpoints(tmp_path).restore(runner.run().state).step == 3
    chex.assert_trees_all_equal(runner.train().state, whole[1].state)
    assert runner.rows == whole[0].rows
