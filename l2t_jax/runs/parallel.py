"""Seeds, devices and processes: the only file that knows how many there are.

A program computes several runs at once. On one device their states are stacked (vmap); over devices either every batch
is divided (shard "batch": same numbers up to rounding, each device holding all states) or the runs are (shard "seeds":
nothing is communicated but what is written). Everything else sees runs, one by one.

Legend: G runs of a program, K of them on one device, D devices of all processes, L of this one, R rounds of a dispatch.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l2t_jax.inputs import known
from l2t_jax.types import Array, Key, MethodState, PyTree

AXIS = "devices"  # the mapped axis over which batches are divided
SHARDS = ("batch", "seeds")
MOST_SIMULATED = 64  # devices on a CPU; XLA dies of thousands
T = TypeVar("T")


class ParallelError(ValueError):
    """A layout that cannot be had; one line says why and what to do."""


class LostError(RuntimeError):
    """Another process of this run has ended."""


class Dispatch(NamedTuple):
    """The host's input to some rounds of one run; rows past `wanted` are padding, so that one program serves any."""

    train: Array | np.ndarray  # [R, S, N, B] int32
    validation: Array | np.ndarray  # [R, S, V] int32
    round: Array | np.ndarray  # [R] int32
    first_of_epoch: Array | np.ndarray  # [R] bool
    wanted: Array | np.int32  # [] rounds to run
    key: Any  # uint32, data of a PRNG key, from which all random draws of the run come


# (state, data, dispatch) -> state, metrics (leaves [R, ...]), rounds done []
Rounds = Callable[[MethodState, PyTree, Dispatch], tuple[MethodState, PyTree, Array]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How runs are spread: K on each device at once (vmap), D devices, and what is divided over them."""

    seeds: int = 1
    devices: int = 1
    shard: str = "batch"

    def __post_init__(self) -> None:
        known(f"shard {self.shard!r}", self.shard, SHARDS, ParallelError)
        if self.seeds < 1 or self.devices < 1:
            raise ParallelError(f"{self.seeds} seeds on {self.devices} devices: both must be at least 1.")

    @property
    def runs(self) -> int:
        """G."""
        return self.seeds * (self.devices if self.shard == "seeds" else 1)

    @property
    def axis_name(self) -> str | None:
        """What methods and students take means over."""
        return AXIS if self.shard == "batch" and self.devices > 1 else None


ONE = Layout()  # one run on one device


def start(
    devices: int, coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Join the processes of a run and prepare simulated devices. Call it before anything touches a device.

    Args:
      devices: D. On CPU so many are simulated, up to `MOST_SIMULATED`; of accelerators the first D are taken.
      coordinator: HOST:PORT of process 0, the same for all; "auto" asks the cluster's own environment (Slurm, Open MPI,
        Kubernetes, Cloud TPU); None is a run of one process.
      processes, process: how many there are and which this is, from 0 on; both with a HOST:PORT only.
    Raises:
      ParallelError: the three do not fit, the processes do not find each other, or no device starts.
    """
    explicit = coordinator not in (None, "auto")
    if explicit != (processes is not None) or explicit != (process is not None):
        raise ParallelError("coordinator=HOST:PORT, num_processes and process_id go together: give all three or none.")
    if explicit and not 0 <= (process or 0) < (processes or 0):
        raise ParallelError(f"process_id={process} is not one of {processes}: give 0 to {(processes or 1) - 1}.")
    if devices % (processes or 1):
        raise ParallelError(f"{devices} devices cannot be shared evenly by {processes} processes.")
    if devices > 1:
        simulated = min(devices // (processes or 1), MOST_SIMULATED)
        # Simulated devices wait for each other in threads of one pool, and for ever where it has fewer than there are.
        os.environ.setdefault("NPROC", str(max(4 * simulated, os.cpu_count() or 1)))
        try:
            jax.config.update("jax_num_cpu_devices", simulated)
        except RuntimeError as error:
            raise ParallelError("devices must be chosen before the first of them is used.") from error
    if coordinator is not None:
        try:
            # All three are None where the cluster says what they are.
            jax.distributed.initialize(coordinator if explicit else None, processes, process)
        except (RuntimeError, ValueError) as error:
            raise ParallelError(f"the processes did not find each other ({_first_line(error)}).") from error
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX_PLATFORMS names what is not installed
        why = "it is not installed" if isinstance(error, AssertionError) else _first_line(error)
        raise ParallelError(
            f"no device starts with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} ({why}): unset it, or give "
            "cpu; python -m l2t_jax says what is there."
        ) from error


def layout_of(seeds: int, devices: int, shard: str, seeds_at_once: int | None) -> Layout:
    """The layout for so many seeds: side by side on an accelerator, one after another on a CPU, where vmap is slower.

    Args:
      seeds_at_once: on each device, instead of that choice.
    """
    if shard == "seeds":
        processes = jax.process_count()
        devices = min(devices, -(-seeds // processes) * processes)  # as many in each
    each = -(-seeds // devices) if shard == "seeds" else seeds
    if seeds_at_once is None:
        seeds_at_once = 1 if jax.default_backend() == "cpu" else each
    return Layout(min(seeds_at_once, each), devices, shard)


def check(layout: Layout, **sizes: int) -> None:
    """Refuse a layout that the machine or the sizes of batches (name=examples) do not allow.

    A mean over devices of means over equal parts is the mean; with unequal parts it is not, so these are refused.

    Raises:
      ParallelError: says what would do.
    """
    there = jax.device_count()
    if layout.devices > there:
        raise ParallelError(f"{layout.devices} devices were asked for, and there are {there}.")
    if layout.devices % jax.process_count():
        raise ParallelError(f"{layout.devices} devices cannot be shared evenly by {jax.process_count()} processes.")
    if layout.axis_name is None:
        return
    for name, size in sizes.items():
        if size % layout.devices:
            lower = size - size % layout.devices
            near = " or ".join(str(x) for x in (lower, lower + layout.devices) if x)
            raise ParallelError(f"{name}={size} does not divide over {layout.devices} devices: give {near}.")


def leave(code: int) -> NoReturn:
    """End this process, and where there are several at once: Python's own end would wait for the others."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_leader() -> bool:
    """Whether this process is the one that reads and writes files."""
    return jax.process_index() == 0


def from_leader(tree: T) -> T:
    """The leader's arrays and numbers, in every process; they must have one structure, shape and dtype everywhere."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    with _together():
        return multihost_utils.broadcast_one_to_all(tree)


def leader_first(work: Callable[[], T]) -> T | None:
    """Do `work` in the leader alone; where it fails there, every other process raises a ParallelError."""
    error: Exception | None = None
    result = None
    if is_leader():
        try:
            result = work()
        except Exception as caught:
            error = caught
    if not bool(from_leader(np.bool_(error is None))):
        raise error or ParallelError("process 0 stopped; its message says why.")
    return result


def anywhere(flag: bool) -> bool:
    """Whether any process says so."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    with _together():
        return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def everywhere(axis_name: str | None, flag: Array) -> Array:
    """Whether all devices of a mapped axis say so, so that a loop ends on all of them at once."""
    return flag if axis_name is None else lax.pmin(flag.astype("int32"), axis_name) > 0


def keys_of(key: Key, indices: Array, axis_name: str | None) -> Key:
    """A key for each example [..., B], the same however the batches are divided over devices.

    Args:
      indices: [..., B / D]: this device's part.
    """
    if axis_name is None:
        return jax.random.split(key, indices.shape)
    part = indices.shape[-1]
    whole = jax.random.split(key, (*indices.shape[:-1], part * lax.axis_size(axis_name)))
    return lax.dynamic_slice_in_dim(whole, part * lax.axis_index(axis_name), part, axis=indices.ndim - 1)


class Program:
    """Some rounds of up to G runs at once, compiled once."""

    def __init__(self, rounds: Rounds, layout: Layout) -> None:
        """Take what one run does; with a `layout.axis_name` it must take its means over that axis."""
        self.layout = layout
        over_devices = layout.devices > 1 and layout.shard == "seeds"
        self._lead = (layout.devices,) * over_devices + (layout.seeds,) * (layout.seeds > 1)  # axes that are the G runs
        each = layout.devices // jax.process_count()
        self._apart = over_devices and jax.process_count() > 1  # whether processes hold other runs
        there = [[d for d in jax.devices() if d.process_index == p][:each] for p in range(jax.process_count())]
        self._local = there[jax.process_index()]
        function = jax.vmap(rounds, in_axes=(0, None, 0)) if layout.seeds > 1 else rounds
        if layout.devices > 1:
            devices = [device for process in there for device in process]
            self._sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
            self.call = jax.pmap(function, axis_name=AXIS, donate_argnums=0, devices=devices)
        else:
            self.call = jax.jit(function, donate_argnums=0)

    def data(self, tree: PyTree) -> PyTree:
        """What all runs read, on every device."""
        if self.layout.devices == 1:
            return jax.device_put(tree)
        return self._put(jax.tree.map(lambda x: np.broadcast_to(x, (len(self._local), *np.shape(x))), tree))

    def part(self, x: np.ndarray) -> np.ndarray:
        """Of batches [..., B] what the devices of this process read, [..., B L / D]; all where none is divided."""
        if self.layout.axis_name is None:
            return x
        each = x.shape[-1] // self.layout.devices * len(self._local)
        return x[..., jax.process_index() * each : (jax.process_index() + 1) * each]

    def owns(self, g: int) -> bool:
        """Whether a device of this process computes run g."""
        return not self._apart or g // self.layout.seeds // len(self._local) == jax.process_index()

    def place(self, states: list[MethodState]) -> PyTree:
        """The states of up to G runs, as a call takes them; what was given stays valid, since these are copies."""
        return self._put(self._spread(_stack(self._filled(states))))

    def __call__(
        self, states: PyTree, data: PyTree, dispatches: list[Dispatch]
    ) -> tuple[PyTree, list[PyTree], list[int]]:
        """Run some rounds, and wait for them: simulated devices dead-lock where calls pile up.

        Args:
          states: of `place` or of the last call; donated.
          dispatches: one for each run that was placed.
        Returns:
          states; for each run its metrics (NumPy, leaves [R, ...]) and the rounds it has done.
        """
        idle = dispatches[-1]._replace(wanted=np.int32(0))
        stacked = _stack([*dispatches, *[idle] * (self.layout.runs - len(dispatches))])
        with _together():
            states, *results = jax.block_until_ready(self.call(states, data, self._divided(stacked)))
        runs = self.take(results)[: len(dispatches)]
        return states, [metrics for metrics, _ in runs], [int(done) for _, done in runs]

    def take(self, results: PyTree) -> list[Any]:
        """Each run's part of what a call returned, in NumPy and in every process: fetched once for all G."""
        layout = self.layout
        if self._apart:
            from jax.experimental import multihost_utils

        def host(x: Array) -> np.ndarray:  # [G, ...]
            if self._apart:
                array = multihost_utils.process_allgather(x, tiled=True)
            else:
                # With an axis all devices hold the same. A copy, since the next call takes the buffers.
                array = np.array(x.addressable_data(0))[0] if layout.axis_name else np.array(x)
            return array.reshape((layout.runs, *array.shape[len(self._lead) :]))

        with _together():
            fetched = jax.tree.map(host, results)
        return [jax.tree.map(lambda x, i=i: np.asarray(x[i]), fetched) for i in range(layout.runs)]

    def _put(self, tree: PyTree) -> PyTree:
        """Put leaves where a call leaves its results: from elsewhere it would be compiled anew."""
        if self.layout.devices == 1:
            return jax.tree.map(jnp.array, tree)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._sharding, x), tree)

    def _filled(self, runs: list[T]) -> list[T]:
        return [*runs, *[runs[-1]] * (self.layout.runs - len(runs))]

    def _spread(self, tree: PyTree) -> PyTree:
        """Leaves [G, ...] in the form of a call, [D or L, K, ...], with no axis for one device or for one run on it."""
        tree = jax.tree.map(lambda x: x.reshape((*self._lead, *x.shape[1:])), tree)
        if self._apart:
            first, count = jax.process_index() * len(self._local), len(self._local)
            return jax.tree.map(lambda x: x[first : first + count], tree)
        if self.layout.axis_name is None:
            return tree
        return jax.tree.map(lambda x: np.stack([x] * len(self._local)), tree)

    def _divided(self, dispatch: Dispatch) -> Dispatch:
        """Spread the input, and leave to each device its part of every batch."""
        spread = self._spread(dispatch)
        if self.layout.axis_name is None:
            return spread

        def part(x: np.ndarray) -> np.ndarray:  # [L, ..., B] -> [L, ..., B / D]
            return np.stack([np.split(self.part(y), len(self._local), axis=-1)[i] for i, y in enumerate(x)])

        return spread._replace(train=part(spread.train), validation=part(spread.validation))


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What several processes compute together fails where one of them has ended."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # The first call of a function, which compiles it, raises a plain ValueError where the connection is lost.
        if jax.process_count() == 1 or not (isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)):
            raise
        raise LostError(f"another process of this run has ended ({_first_line(error)})") from error


def _stack(trees: list[T]) -> T:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
