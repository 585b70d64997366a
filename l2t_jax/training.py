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

from l2t_jax import data as data_lib
from l2t_jax.checkpoints import Checkpoints
from l2t_jax.types import Array, Key, Method, MethodState, PyTree, RoundBatches, Task

MOST_ROUNDS = 32  # a dispatch runs at most this many rounds
RANDOM_DRAWS = 0  # what a seed's key is folded with for draws during training; other numbers are free for others
SECONDS_PER_DISPATCH = 1.0  # and about this long, so that progress is seen and an interruption costs little


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a run is and which examples a round reads. Sizes in examples, `rounds` over the whole run."""

    rounds: int
    unroll_length: int
    batch_size: int
    validation_batch_size: int
    validation_ratio: float
    examples: int
    stages: int

    def __post_init__(self) -> None:
        data_lib.check_sizes(**self.sizes)

    @property
    def sizes(self) -> dict[str, Any]:
        """What the order of data depends on, beside the seed and the round."""
        fields = dataclasses.asdict(self)
        return {("n" if name == "examples" else name): value for name, value in fields.items() if name != "rounds"}

    @property
    def rounds_per_epoch(self) -> int:
        """An epoch reads the validation part once."""
        _, validation = data_lib.split_sizes(self.examples, self.validation_ratio)
        return data_lib.rounds_per_epoch(validation, self.stages, self.validation_batch_size)


class Dispatch(NamedTuple):
    """The host's input to one dispatch; rows past `wanted` are padding, so that one compilation serves any number."""

    train: Array | np.ndarray  # [R, S, N, B] int32
    validation: Array | np.ndarray  # [R, S, V] int32
    round: Array | np.ndarray  # [R] int32
    first_of_epoch: Array | np.ndarray  # [R] bool
    wanted: Array | np.int32  # [] rounds to run


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
    checkpoints: Checkpoints
    write: Callable[[list[dict[str, Any]]], None]  # rows of metrics, durable when it returns
    forget: Callable[[int], None]  # drops this run's rows of this round and later ones
    snapshot: Callable[[int, MethodState], None]  # called at each of `snapshot_rounds`
    snapshot_rounds: tuple[int, ...]
    progress: Callable[[int, dict[str, Any] | None], None]  # rounds done, last row
    report: Callable[[str], None]  # one line for the user
    checkpoint_seconds: float


class Outcome(NamedTuple):
    """How a run ended."""

    state: MethodState
    wall_time_s: float  # training only, over all interruptions; compilation included
    failure: Failure | None


def compile_rounds(method: Method, task: Task, augment: bool) -> Callable[..., tuple[MethodState, PyTree, Array]]:
    """Compile several rounds of a method into one dispatch.

    Returns:
      run(state (donated), data, dispatch, key) -> state, metrics (leaves [R, ...]), rounds done []. It stops early
      after the first round of which any value is not finite. The round's number is all that random draws depend on,
      so how rounds are divided into dispatches changes nothing.
    """

    @jax.jit  # traced once, for its shapes and for the loop
    def one_round(state: MethodState, data: PyTree, dispatch: Dispatch, r: Array, key: Key) -> tuple[MethodState, Any]:
        k_train, k_validation = jax.random.split(jax.random.fold_in(key, dispatch.round[r]))
        batches = RoundBatches(
            train=task.gather(data, dispatch.train[r], k_train if augment else None),
            validation=task.gather(data, dispatch.validation[r], k_validation if augment else None),
            first_of_epoch=dispatch.first_of_epoch[r],
        )
        return method.round(state, batches)

    def run(state: MethodState, data: PyTree, dispatch: Dispatch, key: Key) -> tuple[MethodState, PyTree, Array]:
        _, shapes = one_round.eval_shape(state, data, dispatch, jnp.int32(0), key)
        rows = dispatch.round.shape[0]
        buffers = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), shapes)

        def body(carry: Any) -> Any:
            state, buffers, done, _ = carry
            state, metrics = one_round(state, data, dispatch, done, key)
            buffers = jax.tree.map(lambda buffer, value: buffer.at[done].set(value), buffers, metrics)
            alive = jnp.all(jnp.stack(jax.tree.leaves(metrics["finite"])))
            return state, buffers, done + 1, alive

        def unfinished(carry: Any) -> Array:
            _, _, done, alive = carry
            return alive & (done < dispatch.wanted)

        state, buffers, done, _ = lax.while_loop(unfinished, body, (state, buffers, jnp.int32(0), jnp.bool_(True)))
        return state, buffers, done

    return jax.jit(run, donate_argnums=0)


def train(run: Run, schedule: Schedule, execute: Callable[..., Any], data: PyTree) -> Outcome:
    """Train one run to its last round, from its newest good checkpoint if it has one.

    Args:
      run: see `Run`.
      schedule: see `Schedule`.
      execute: of `compile_rounds`; shared by all seeds.
      data: the training examples on the device.
    Returns:
      an `Outcome`. On a failure its state is the last good one that was saved (the initial one if none was).
    """
    state, done, spent = _resume(run)
    run.progress(done, None)
    saved_at = time.monotonic()
    durations: list[float] = []
    key = jax.random.fold_in(jax.random.key(run.seed), RANDOM_DRAWS)
    while done < schedule.rounds:
        begin = time.monotonic()
        count = _count(durations, done, schedule.rounds, run.snapshot_rounds)
        state, metrics, finished = execute(state, data, _dispatch(run.seed, done, count, schedule), key)
        rows, failure = _rows(run, schedule, done, jax.device_get(metrics), int(finished))
        durations.append((time.monotonic() - begin) / len(rows))
        spent += time.monotonic() - begin
        run.write(rows)
        if failure is not None:
            return Outcome(_last_good(run), spent, failure)
        done += len(rows)
        run.progress(done, rows[-1])
        if done in run.snapshot_rounds:
            run.snapshot(done, state)
        if done == schedule.rounds or time.monotonic() - saved_at >= run.checkpoint_seconds:
            run.checkpoints.save(done, state, {"round": done, "wall_time_s": spent})
            saved_at = time.monotonic()
    return Outcome(state, spent, None)


def _resume(run: Run) -> tuple[MethodState, int, float]:
    restored = run.checkpoints.restore(run.state)
    for line in restored.skipped:
        run.report(f"{run.name}, seed {run.seed}: {line}")
    if restored.step is None:
        run.forget(0)
        if 0 in run.snapshot_rounds:
            run.snapshot(0, run.state)
        # A copy: the first dispatch takes the state's buffers, and a failure must find the initial state intact. Its
        # dtypes are said: those of `jnp.array(1.0)` are weak, a round's results are not, and that would compile anew.
        return jax.tree.map(lambda x: jnp.array(x, x.dtype), run.state), 0, 0.0
    run.forget(restored.step)
    return restored.state, restored.step, restored.info["wall_time_s"]


def _last_good(run: Run) -> MethodState:
    restored = run.checkpoints.restore(run.state)
    return run.state if restored.step is None else restored.state


def _count(durations: list[float], done: int, rounds: int, stops: tuple[int, ...]) -> int:
    """Rounds of the next dispatch: one while the first compiles and one to be timed, then about a second's worth."""
    wanted = 1 if len(durations) < 2 else int(SECONDS_PER_DISPATCH / max(durations[-1], 1e-9))
    until = min([stop for stop in (*stops, rounds) if stop > done])
    return max(1, min(wanted, MOST_ROUNDS, until - done))


def _dispatch(seed: int, done: int, count: int, schedule: Schedule) -> Dispatch:
    rounds = done + np.arange(MOST_ROUNDS)
    orders = [data_lib.round_indices(seed, int(r), **schedule.sizes) for r in rounds[:count]]
    train, validation = (np.stack([order[i] for order in orders]) for i in (0, 1))
    pad = lambda x: np.concatenate([x, np.zeros((MOST_ROUNDS - count, *x.shape[1:]), x.dtype)])  # noqa: E731
    first = rounds % schedule.rounds_per_epoch == 0
    return Dispatch(pad(train), pad(validation), rounds.astype(np.int32), first, np.int32(count))


def _rows(
    run: Run, schedule: Schedule, done: int, metrics: dict[str, Any], count: int
) -> tuple[list[dict[str, Any]], Failure | None]:
    """Turn a dispatch's metrics (leaves [R, ...]) into rows, a line a round; the last one may be where it failed."""
    steps = schedule.unroll_length * schedule.stages
    rows, failure = [], None
    for i in range(count):
        finite = {stage: all(bool(x[i]) for x in jax.tree.leaves(tree)) for stage, tree in metrics["finite"].items()}
        rows.append(
            {
                "method": run.name,
                "seed": run.seed,
                "round": done + i,
                "epoch": (done + i) // schedule.rounds_per_epoch,
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
