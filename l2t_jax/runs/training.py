"""The one outer loop: rounds in dispatches, records, snapshots, checkpoints, resuming. It knows no paper.

Legend: R rounds of a dispatch, S data stages of a round, N unroll length, B batch, V validation batch.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from l2t_jax.data.order import Plan
from l2t_jax.runs.checkpoints import Checkpoints, digest
from l2t_jax.runs.parallel import ONE, Dispatch, Layout, Program, Rounds, anywhere, everywhere, from_leader, keys_of
from l2t_jax.runs.streaming import Buckets, Stream
from l2t_jax.types import Array, Method, MethodState, PyTree, RoundBatches, Task

MOST_ROUNDS = 32  # a dispatch runs at most this many rounds
STREAMED_ROUNDS = 1  # of examples that are read on the host: those of the next round are read while this one computes
RANDOM_DRAWS = 0  # what a seed's key is folded with for draws during training; other numbers are free for others
SECONDS_PER_DISPATCH = 1.0  # and about this long, so that progress is seen and an interruption costs little


class Failure(NamedTuple):
    """Where a run became non-finite."""

    round: int
    stage: str
    leaf: str

    def __str__(self) -> str:
        return f"round {self.round}: {self.stage} is not finite (leaf {self.leaf})"


class Run(NamedTuple):
    """One (method, seed): what it computes and where it keeps it."""

    name: str
    seed: int
    state: MethodState  # at round 0
    checkpoints: Checkpoints | None  # None in a process that is not the leader: it writes nothing and is told the state
    write: Callable[[list[dict[str, Any]]], None]  # rows of metrics, durable when it returns
    forget: Callable[[int], None]  # drops this run's rows of this round and later ones
    snapshot: Callable[[int, MethodState], None]  # called at each of `snapshot_rounds`
    snapshot_rounds: tuple[int, ...]
    progress: Callable[[int, dict[str, Any] | None], None]  # rounds done, last row
    report: Callable[[str], None]  # one line for the user
    checkpoint_seconds: float
    frozen: bool = False  # whether its teacher stays as it is at round 0: a checkpoint with another is of another run


class Outcome(NamedTuple):
    """How a run ended."""

    state: MethodState
    wall_time_s: float  # training only, over all interruptions; compilation included
    failure: Failure | None


def compile_rounds(method: Method, task: Task, layout: Layout = ONE) -> Program:
    """Compile several rounds of a method, for as many runs as the layout holds, into one dispatch."""
    return Program(some_rounds(method, task, axis_name=layout.axis_name), layout)


def some_rounds(method: Method, task: Task, *, axis_name: str | None = None) -> Rounds:
    """Build several rounds of one run.

    Returns:
      rounds(state, data, dispatch) -> state, metrics (leaves [R, ...]), rounds done []. It stops early after the first
      round of which any value is not finite. The round's number is all that random draws depend on, so how rounds are
      divided into dispatches changes nothing.
    """

    @jax.jit  # traced once, for its shapes and for the loop
    def one_round(state: MethodState, data: PyTree, dispatch: Dispatch, r: Array) -> tuple[MethodState, Any]:
        key = jax.random.wrap_key_data(dispatch.key)
        keys = jax.random.split(jax.random.fold_in(key, dispatch.round[r]))
        train, validation = (
            task.gather(data, x, keys_of(k, x, axis_name) if task.draws else None)
            for k, x in zip(keys, (dispatch.train[r], dispatch.validation[r]), strict=True)
        )
        return method.round(state, RoundBatches(train, validation, dispatch.first_of_epoch[r]))

    def rounds(state: MethodState, data: PyTree, dispatch: Dispatch) -> tuple[MethodState, PyTree, Array]:
        _, shapes = one_round.eval_shape(state, data, dispatch, jnp.int32(0))
        rows = dispatch.round.shape[0]
        buffers = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), shapes)

        def body(carry: Any) -> Any:
            state, buffers, done, _ = carry
            state, metrics = one_round(state, data, dispatch, done)
            buffers = jax.tree.map(lambda buffer, value: buffer.at[done].set(value), buffers, metrics)
            alive = jnp.all(jnp.stack(jax.tree.leaves(metrics["finite"])))
            return state, buffers, done + 1, everywhere(axis_name, alive)

        def unfinished(carry: Any) -> Array:
            _, _, done, alive = carry
            return alive & (done < dispatch.wanted)

        state, buffers, done, _ = lax.while_loop(unfinished, body, (state, buffers, jnp.int32(0), jnp.bool_(True)))
        return state, buffers, done

    return rounds


class StoppedError(Exception):
    """A run that was asked to stop, and whose last round is saved."""


@dataclasses.dataclass
class _Progress:
    """How far a run of a group is."""

    run: Run
    done: int
    spent: float
    failure: Failure | None = None

    def active(self, plan: Plan) -> bool:
        return self.failure is None and self.done < plan.rounds

    def count(self, wanted: int, plan: Plan) -> int:
        """How many of the wanted rounds it takes: none past its next snapshot, none once it has ended."""
        if not self.active(plan):
            return 0
        until = min(stop for stop in (*self.run.snapshot_rounds, plan.rounds) if stop > self.done)
        return min(wanted, until - self.done)


def train(
    runs: list[Run],
    plan: Plan,
    program: Program,
    data: Any,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Train some runs of one method side by side to their last round, each from its newest good checkpoint if any.

    Args:
      runs: see `Run`; at most as many as the program's layout holds.
      plan: see `Plan`.
      program: of `compile_rounds`; may serve any number of groups of runs.
      data: the training examples, of `program.data`, or a `Stream` that reads them, or `Buckets` that cut them.
      stopped: asked after every dispatch; where it says so in any process, all is saved and the work ends.
    Returns:
      an `Outcome` for each. On a failure its state is the last good one that was saved (the initial one if none was).
      The wall time of a dispatch is divided evenly among the runs that took part in it.
    Raises:
      StoppedError: it was stopped.
    """
    begun = [_resume(run) for run in runs]
    group = [_Progress(run, done, spent) for run, (_, done, spent) in zip(runs, begun, strict=True)]
    states = program.place([state for state, _, _ in begun])
    streamed = isinstance(data, (Stream, Buckets))
    rows = STREAMED_ROUNDS if streamed else MOST_ROUNDS
    for member in group:
        member.run.progress(member.done, None)
    saved_at = time.monotonic()
    durations: list[float] = []
    while active := [i for i, member in enumerate(group) if member.active(plan)]:
        begin = time.monotonic()
        wanted = int(from_leader(np.int32(_wanted(durations))))  # clocks differ
        counts = [m.count(min(wanted, rows), plan) for m in group]
        dispatches = [_dispatch(m.run.seed, m.done, n, plan, rows) for m, n in zip(group, counts, strict=True)]
        if streamed:
            block, dispatches = data.take(dispatches)
            data.begin(  # what comes next, unless this is where a run ends
                [
                    _dispatch(m.run.seed, m.done + n, int(0 < n < plan.rounds - m.done), plan, rows)
                    for m, n in zip(group, counts, strict=True)
                ]
            )
        states, metrics, finished = program(states, block if streamed else data, dispatches)
        elapsed = time.monotonic() - begin
        durations.append(elapsed / max(finished))
        for i in active:
            group[i].spent += elapsed / len(active)
            _note(group[i], plan, metrics[i], finished[i])
        good = [i for i in active if group[i].failure is None]
        stop = anywhere(stopped())
        due = stop or time.monotonic() - saved_at >= runs[0].checkpoint_seconds
        snapshots = [i for i in good if group[i].done in group[i].run.snapshot_rounds]
        saves = [i for i in good if due or group[i].done == plan.rounds]
        fetched = program.take(states) if snapshots or saves else []
        for i in snapshots:
            group[i].run.snapshot(group[i].done, fetched[i])
        for i in saves:
            _save(group[i], fetched[i])
        saved_at = time.monotonic() if due else saved_at
        if stop and any(member.active(plan) for member in group):
            raise StoppedError
    return [_outcome(member, state) for member, state in zip(group, program.take(states), strict=False)]


def _note(member: _Progress, plan: Plan, metrics: dict[str, Any], count: int) -> None:
    """Write the rows of a dispatch."""
    rows, member.failure = _rows(member.run, plan, member.done, metrics, count)
    member.run.write(rows)
    member.done += count
    member.run.progress(member.done, rows[-1])


def _save(member: _Progress, state: MethodState) -> None:
    if member.run.checkpoints is not None:
        info = {"round": member.done, "wall_time_s": member.spent}
        member.run.checkpoints.save(member.done, state, info)


def _outcome(member: _Progress, state: MethodState) -> Outcome:
    if member.failure is not None:
        state = _restored(member.run)[0]
    return Outcome(state, member.spent, member.failure)


def _resume(run: Run) -> tuple[MethodState, int, float]:
    state, done, spent = _restored(run)
    run.forget(done)
    if done == 0 and 0 in run.snapshot_rounds:
        run.snapshot(0, state)
    return state, done, spent


def _restored(run: Run) -> tuple[MethodState, int, float]:
    """The newest good checkpoint, or the beginning: state, rounds done, seconds spent on them."""
    found = run.state, 0, 0.0
    if run.checkpoints is not None:
        restored = run.checkpoints.restore(run.state)
        for line in restored.skipped:
            run.report(f"{run.name}, seed {run.seed}: {line}")
        if restored.step is not None and run.frozen and digest(restored.state.teacher) != digest(run.state.teacher):
            run.report(f"{run.name}, seed {run.seed} begins anew: the teacher that it takes over has learned more")
            run.checkpoints.clear()
        elif restored.step is not None:
            found = restored.state, restored.step, restored.info["wall_time_s"]
    state, done, spent = from_leader((found[0], np.int32(found[1]), np.float64(found[2])))
    return state, int(done), float(spent)


def _wanted(durations: list[float]) -> int:
    """Rounds of the next dispatch: one while the first compiles and one to be timed, then about a second's worth."""
    wanted = 1 if len(durations) < 2 else int(SECONDS_PER_DISPATCH / max(durations[-1], 1e-9))
    return max(1, min(wanted, MOST_ROUNDS))


def _dispatch(seed: int, done: int, count: int, plan: Plan, rows: int = MOST_ROUNDS) -> Dispatch:
    rounds = done + np.arange(rows)
    indices = [plan.indices(seed, int(r)) for r in rounds[: max(count, 1)]]
    train, validation = (np.stack([both[i] for both in indices]) for i in (0, 1))
    pad = lambda x: np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])  # noqa: E731
    first = rounds % plan.rounds_per_epoch == 0
    key = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), RANDOM_DRAWS)))
    return Dispatch(pad(train), pad(validation), rounds.astype(np.int32), first, np.int32(count), key)


def _rows(
    run: Run, plan: Plan, done: int, metrics: dict[str, Any], count: int
) -> tuple[list[dict[str, Any]], Failure | None]:
    """Turn a dispatch's metrics (leaves [R, ...]) into rows, a line a round; the last one may be where it failed."""
    steps = plan.unroll_length * plan.stages
    rows, failure = [], None
    for i in range(count):
        finite = {stage: all(bool(x[i]) for x in jax.tree.leaves(tree)) for stage, tree in metrics["finite"].items()}
        rows.append(
            {
                "method": run.name,
                "seed": run.seed,
                "round": done + i,
                "epoch": (done + i) // plan.rounds_per_epoch,
                "student_steps": (done + i + 1) * steps,
                **{name: float(x[i]) for name, x in metrics.items() if name != "finite"},
                "finite": finite,
            }
        )
        if failure is None and not all(finite.values()):
            failure = next(_failures(metrics["finite"], i, done + i))
    return rows, failure


def _failures(finite: dict[str, PyTree], i: int, round: int) -> Iterator[Failure]:
    # Stages stand in the order in which a round computes them, so the first one is the cause.
    for stage, tree in finite.items():
        for path, flags in jax.tree_util.tree_leaves_with_path(tree):
            if not bool(flags[i]):
                yield Failure(round, stage, jax.tree_util.keystr(path, simple=True, separator="/"))
