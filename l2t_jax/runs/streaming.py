"""The examples of a round: read on the host while the device computes the round before, or cut to their lengths.

Legend: G runs of a program, R rounds of a dispatch, S stages, N unroll length, B batch, V validation batch, k examples
of a dispatch.
"""

from collections.abc import Callable

import jax
import numpy as np

from l2t_jax.runs.parallel import Dispatch, Program
from l2t_jax.tasks.reading import Held, Reader, held
from l2t_jax.types import PyTree, Student, Task

STEP = 8  # lengths that have a program are multiples of it
TRAIN, VALIDATION = 0, 1  # parts of a round, in the seeds of random draws


class Stream:
    """Gives each dispatch its examples as data, and positions in them in place of indices into the whole set.

    What is drawn at random of an example depends on the run's key, the round, the part of the round and the place in
    it, so how rounds are divided into dispatches, stages and devices changes nothing. Of divided batches a process
    reads the part of its own devices.
    """

    def __init__(self, task: Task, student: Student, examples: PyTree, program: Program) -> None:
        """Take a task with `read`, the student, all examples and the program that computes with them."""
        self._reader, self._program = Reader(task, examples), program
        self._backbone = None if student.backbone is None else program.data(student.backbone.variables)
        self._ahead: tuple[bytes, Callable[[], PyTree]] | None = None

    def begin(self, dispatches: list[Dispatch]) -> None:
        """Begin to read what these dispatches will take."""
        if any(int(dispatch.wanted) for dispatch in dispatches):
            self._ahead = _signature(dispatches), self._read(dispatches)

    def take(self, dispatches: list[Dispatch]) -> tuple[PyTree, list[Dispatch]]:
        """The data of these dispatches, on the devices, and the dispatches with positions in them."""
        signature = _signature(dispatches)
        wait = self._ahead[1] if self._ahead and self._ahead[0] == signature else self._read(dispatches)
        self._ahead = None
        block = self._program.data(self._filled(wait(), dispatches))
        data = block if self._backbone is None else Held(block, self._backbone)
        return data, [self._placed(dispatch, g) for g, dispatch in enumerate(dispatches)]

    def close(self) -> None:
        """Read no more."""
        self._reader.close()

    def _read(self, dispatches: list[Dispatch]) -> Callable[[], PyTree]:
        working = [d for d, is_read in zip(dispatches, self._working(dispatches), strict=True) if is_read]
        if not working:  # all that goes on is of other processes
            working = dispatches[:1]
        indices = np.concatenate([np.concatenate(_flat(self._own(dispatch))) for dispatch in working])
        return self._reader.begin(indices, [seeds for dispatch in working for seeds in self._seeds(dispatch)])

    def _working(self, dispatches: list[Dispatch]) -> list[bool]:
        """Of which runs this process reads examples: of its own, while they go on."""
        return [bool(int(dispatch.wanted)) and self._program.owns(g) for g, dispatch in enumerate(dispatches)]

    def _own(self, dispatch: Dispatch) -> Dispatch:
        """What this process reads of a dispatch."""
        train, validation = (self._program.part(np.asarray(x)) for x in (dispatch.train, dispatch.validation))
        return dispatch._replace(train=train, validation=validation)

    def _placed(self, dispatch: Dispatch, g: int) -> Dispatch:
        """A dispatch with the positions that its examples have in what was read; those of other processes have none."""
        train, validation = (np.zeros(np.shape(x), np.int32) for x in (dispatch.train, dispatch.validation))
        own = [self._program.part(x) for x in (train, validation)]  # views
        first = g * sum(x.size for x in own)
        for x in own:
            x[...] = first + np.arange(x.size).reshape(x.shape)
            first += x.size
        return dispatch._replace(train=train, validation=validation)

    def _seeds(self, dispatch: Dispatch) -> list[tuple[int, ...]]:
        """The seeds of what is drawn of each example, in the order of `_flat`."""
        key = [int(part) for part in np.ravel(dispatch.key)]
        rounds = [int(r) for r in np.ravel(dispatch.round)]
        return [
            (*key, r, part, int(place))
            for part, indices in ((TRAIN, dispatch.train), (VALIDATION, dispatch.validation))
            for r in rounds
            for place in self._program.part(np.arange(indices[0].size).reshape(indices[0].shape)).ravel()
        ]

    def _filled(self, block: PyTree, dispatches: list[Dispatch]) -> PyTree:
        """A place for each of the G runs: those that have ended have zeros, so that one program serves all."""
        working = self._working(dispatches)
        if all(working):
            return block
        if not any(working):
            working[0] = True
        size = sum(map(len, _flat(self._own(dispatches[0]))))

        def fill(x: np.ndarray) -> np.ndarray:
            whole = np.zeros((len(working), size, *x.shape[1:]), x.dtype)
            whole[working] = x.reshape(-1, size, *x.shape[1:])
            return whole.reshape(-1, *x.shape[1:])

        return jax.tree.map(fill, block)


class Buckets:
    """Gives each dispatch examples that are cut where all that it takes are short: a program for each length."""

    def __init__(self, task: Task, student: Student, examples: PyTree, program: Program) -> None:
        """Take a task with `lengths`, the student, all examples and the program that computes with them."""
        assert task.lengths is not None
        self._lengths, self._cut = task.lengths.of(examples), task.lengths.cut
        self._examples, self._program, self._student = examples, program, student
        self._kept: dict[int, PyTree] = {}

    def begin(self, dispatches: list[Dispatch]) -> None:
        """Nothing has to be read."""

    def take(self, dispatches: list[Dispatch]) -> tuple[PyTree, list[Dispatch]]:
        """The data of these dispatches, on the devices, and the dispatches as they are."""
        indices = np.concatenate([np.concatenate(_flat(dispatch)) for dispatch in dispatches if int(dispatch.wanted)])
        length = -(-int(self._lengths[indices].max()) // STEP) * STEP
        if length not in self._kept:
            self._kept[length] = self._program.data(held(self._student, self._cut(self._examples, length)))
        return self._kept[length], dispatches

    def close(self) -> None:
        """Nothing is read."""


def _flat(dispatch: Dispatch) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the training and of the validation examples."""
    return np.ravel(dispatch.train), np.ravel(dispatch.validation)


def _signature(dispatches: list[Dispatch]) -> bytes:
    """What tells dispatches apart that read different examples."""
    return b"".join(np.asarray(leaf).tobytes() for dispatch in dispatches for leaf in jax.tree.leaves(dispatch))
