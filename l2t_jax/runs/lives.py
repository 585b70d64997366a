"""Many short lives of students, drawn at random, that one teacher lives through window by window.

Legend: n examples of a life, N unroll length, R rounds of a window.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.data.mixtures import mixtures
from l2t_jax.data.noise import NOISES, corrupt, transition
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.losses.dln import dln
from l2t_jax.methods.horizon import Taught, Window, horizon
from l2t_jax.methods.parts import dln_arguments, teacher_arguments
from l2t_jax.optimizers import clip_by_global_norm
from l2t_jax.presets import Preset
from l2t_jax.students import STUDENTS
from l2t_jax.tasks import load
from l2t_jax.teachers import build_teacher
from l2t_jax.types import Array, Batch, Key, PyTree, Student, Task
from l2t_jax.unroll import init_state

CLEAN, JUDGES = (20, 500), 300  # examples that are known to be clean, at least and at most; that judge
ROUNDS, RATES = (40, 200), (0.05, 0.5)  # of a life, and of its student at first
CLIP, FLOOR = 0.03, 1e-2  # of a life's derivative; what is added to an error before its logarithm is taken
TASK = Task(
    error=cross_entropy,
    metrics=lambda outputs, targets: {"accuracy": jnp.argmax(outputs, -1) == targets},
    gather=lambda data, indices, keys: Batch(*(x[indices] for x in data)),
)


AnyArray = Any  # NumPy where it is drawn, traced where it is read


class Kind(NamedTuple):
    """Lives of one shape, which are computed side by side."""

    source: str
    classes: int
    student: str
    width: int  # of a perceptron
    examples: int


KINDS = (
    Kind("digits", 10, "mlp", 100, 1000),
    Kind("digits", 5, "mlp", 300, 500),
    Kind("mixtures", 2, "mlp", 50, 500),
    Kind("mixtures", 4, "mlp", 100, 800),
    Kind("mixtures", 20, "mlp", 200, 2000),
    Kind("mnist", 10, "mlp", 200, 2000),
    Kind("mnist", 3, "lenet", 0, 600),
)


class Lived(NamedTuple):
    """What a life is lived on."""

    inputs: AnyArray  # [n, ...]
    labels: AnyArray  # [n], some of them wrong
    clean: tuple[AnyArray, AnyArray]  # inputs and labels [500], of which the first `count` are distinct
    count: AnyArray  # []
    judges: tuple[AnyArray, AnyArray]  # inputs and labels [300]
    rate: AnyArray  # [] of the student, at first
    rounds: AnyArray  # [] of the life, over which the rate falls to 0


@cache
def source(name: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """All training examples of a set: inputs of mean 0 and variance 1, labels."""
    dataset = load(name, data_dir, False, task="classification")
    inputs = (dataset.train["inputs"].astype(np.float32) - dataset.info.mean) / dataset.info.std
    return inputs.astype(np.float32), dataset.train["labels"].astype(np.int32)


def draw(kind: Kind, seeds: tuple[int, ...], data_dir: str | None) -> tuple[Lived, int]:
    """A life at random, and its length in rounds.

    Its examples are divided into three parts that share none: a fifth judges, a fifth is what is known to be clean, on
    the rest the student is trained.
    """
    random = np.random.default_rng(seeds)
    if kind.source == "mixtures":
        inputs, labels = mixtures(2 * kind.examples, kind.classes, seed=int(random.integers(1 << 31)))
    else:
        inputs, labels = source(kind.source, data_dir)
    chosen = random.permutation(labels.max() + 1)[: kind.classes]
    names = np.full(labels.max() + 1, -1, np.int32)
    names[chosen] = np.arange(len(chosen))
    order = random.permutation(np.flatnonzero(names[labels] >= 0))
    inputs, labels = inputs[order], names[labels[order]]
    fifth = len(order) // 5
    low, high = CLEAN
    count = min(fifth, int(np.exp(random.uniform(np.log(max(low, 2 * kind.classes)), np.log(high)))))
    clean = np.concatenate([fifth + np.arange(count), random.integers(fifth, fifth + count, high - count)])
    rest = random.choice(
        np.arange(2 * fifth, len(order)), kind.examples, replace=len(order) - 2 * fifth < kind.examples
    )
    judges = random.choice(fifth, JUDGES, replace=fifth < JUDGES)
    noise = random.choice([name for name in NOISES if name != "flip2" or kind.classes > 2])
    share = 0.0 if random.random() < 0.2 else random.uniform(0, 0.45 if noise == "flip" else 0.7)
    matrix = transition(noise, share, kind.classes, int(random.integers(1 << 31)))
    given = corrupt(labels[rest], matrix, int(random.integers(1 << 31)))
    rounds, rate = random.integers(*ROUNDS), np.exp(random.uniform(*np.log(RATES)))
    parts = [(inputs[part], labels[part]) for part in (clean, judges)]
    lived = Lived(inputs[rest], given, parts[0], np.int32(count), parts[1], np.float32(rate), np.float32(rounds))
    return lived, int(rounds)


class Lives(NamedTuple):
    """The lives of a kind that go on side by side; each leaf has a leading [lives]."""

    taught: Taught
    number: np.ndarray  # how many there were before it in its place
    left: np.ndarray  # rounds


class State(NamedTuple):
    """All that goes on."""

    windows: np.ndarray  # []
    tau: PyTree
    adam: PyTree
    lives: dict[str, Lives]  # by kind


class Trainer:
    """A teacher, the lives it goes through, and what is compiled for each kind of them."""

    def __init__(
        self,
        settings: Preset,
        optimizer: optax.GradientTransformation,
        *,
        kinds: tuple[Kind, ...],
        lives: int,
        rounds: int,
        seed: int,
        data_dir: str | None,
    ) -> None:
        """Compile nothing yet.

        Args:
          settings: of the teacher, the DLN, and the student but for its rate.
          optimizer: of the teacher.
          kinds: of lives, which take turns.
          lives: of a kind, side by side.
          rounds: R.
          seed: of all draws.
          data_dir: where prepared sets are.
        """
        self.teacher = build_teacher(**teacher_arguments("lstm", settings))
        self.loss = dln(**dln_arguments(settings))
        self.settings, self.optimizer, self.kinds, self.lives = settings, optimizer, kinds, lives
        self.rounds, self.seed, self.data_dir = rounds, seed, data_dir
        self.lived: dict[str, list[Lived]] = {}  # of each kind, by place
        build = lambda kind: (jax.jit(partial(self._begin, kind)), jax.jit(self._window(kind)))  # noqa: E731
        self.programs = {name_of(kind): build(kind) for kind in kinds}

    def begin(self) -> State:
        """Before the first window: lives are at ages at random, so that windows begin at any."""
        tau = self.teacher.init(jax.random.fold_in(jax.random.key(self.seed), 0))
        lives = {}
        for index, kind in enumerate(self.kinds):
            drawn = [draw(kind, (self.seed, index, place, 0), self.data_dir) for place in range(self.lives)]
            self.lived[name_of(kind)] = [lived for lived, _ in drawn]
            fresh = [self._fresh(index, place, 0) for place in range(self.lives)]
            part = np.random.default_rng((self.seed, index)).uniform(0.2, 1, self.lives)
            left = np.array([max(1, int(share * rounds)) for share, (_, rounds) in zip(part, drawn, strict=True)])
            lives[name_of(kind)] = Lives(_stack(fresh), np.zeros(self.lives, int), left)
        return State(np.array(0), tau, self.optimizer.init(tau), lives)

    def go_on(self, state: State) -> State:
        """A state that was kept, once what its lives are lived on is drawn again."""
        lives = {}
        for index, kind in enumerate(self.kinds):
            taught, *counts = state.lives[name_of(kind)]
            number, left = map(np.array, counts)
            drawn = [draw(kind, (self.seed, index, *which), self.data_dir) for which in enumerate(map(int, number))]
            self.lived[name_of(kind)] = [lived for lived, _ in drawn]
            lives[name_of(kind)] = Lives(taught, number, left)
        return state._replace(windows=np.array(state.windows), lives=lives)

    def step(self, state: State) -> tuple[State, dict[str, Any]]:
        """A window of the next kind, and what is told of it."""
        window = int(state.windows)
        turn, at = divmod(window, len(self.kinds))
        index = int(np.random.default_rng((self.seed, turn)).permutation(len(self.kinds))[at])
        kind = self.kinds[index]
        name = name_of(kind)
        lives = self._renewed(index, state.lives[name])
        keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), window + 1), self.lives)
        _, run = self.programs[name]
        lived = _stack(self.lived[name])
        gradient, norms, taught, errors, accuracy = run(state.tau, lives.taught, lived, keys)
        update, adam = self.optimizer.update(gradient, state.adam, state.tau)
        sound = np.asarray(jnp.isfinite(errors).all(axis=1) & jnp.isfinite(norms))
        left = np.where(sound, lives.left - self.rounds, 0)  # one that is lost begins anew
        told = {
            "window": window,
            "kind": name,
            "error": float(np.mean(np.asarray(errors)[sound])) if sound.any() else None,
            "accuracy": [round(float(value), 4) for value in accuracy],
            "gradient_norm": [float(value) for value in norms],
        }
        every = {**state.lives, name: Lives(taught, lives.number, left)}
        return State(np.array(window + 1), optax.apply_updates(state.tau, update), adam, every), told

    def _renewed(self, index: int, lives: Lives) -> Lives:
        """The same lives, but for those that are over."""
        name = name_of(self.kinds[index])
        taught, number, left = lives
        for place in np.flatnonzero(left <= 0):
            number, left = number.copy(), left.copy()
            number[place] += 1
            which = (self.seed, index, int(place), int(number[place]))
            self.lived[name][place], left[place] = draw(self.kinds[index], which, self.data_dir)
            fresh = self._fresh(index, int(place), int(number[place]))
            taught = jax.tree.map(lambda all, one, place=place: all.at[place].set(one), taught, fresh)
        return Lives(taught, number, left)

    def _fresh(self, index: int, place: int, number: int) -> Taught:
        name = name_of(self.kinds[index])
        key = jax.random.key(int(np.random.default_rng((self.seed, index, place, number, 1)).integers(1 << 31)))
        found: Taught = self.programs[name][0](key, self.lived[name][place])
        return found

    def _begin(self, kind: Kind, key: Key, lived: Lived) -> Taught:
        k_student, k_loss = jax.random.split(key)
        phi = self.loss.init(k_loss)
        variables = student_of(kind).init(k_student, jnp.asarray(lived.inputs[:2]))
        return Taught(init_state(variables, optimizer_of(lived, self.settings)), phi, self.teacher.hidden(phi))

    def _window(self, kind: Kind) -> Callable[..., tuple[Any, ...]]:
        student, size = student_of(kind), self.settings

        def one(tau: PyTree, taught: Taught, lived: Lived, key: Key) -> tuple[Array, tuple[Taught, Array, Array]]:
            optimizer = optimizer_of(lived, size)
            errors_of = horizon(student, TASK, self.loss, self.teacher, optimizer, memory="mixed")
            k_train, k_clean = jax.random.split(key)
            shape = (self.rounds, size.unroll_length, size.batch_size)
            i = jax.random.randint(k_train, shape, 0, len(lived.labels))
            j = jax.random.randint(k_clean, (self.rounds, size.validation_batch_size), 0, lived.count)
            always = lambda x: jnp.broadcast_to(x, (self.rounds, *x.shape))  # noqa: E731
            train = TASK.gather((lived.inputs, lived.labels), i, None)
            seen = TASK.gather(lived.clean, j, None)
            errors, after = errors_of(tau, taught, Window(train, seen, Batch(*map(always, lived.judges))))
            outputs, _ = student.apply(after.student.variables, lived.judges[0], False)
            accuracy = jnp.mean(jnp.argmax(outputs, -1) == lived.judges[1])
            return jnp.mean(jnp.log(errors + FLOOR)), (after, errors, accuracy)

        def every(tau: PyTree, taught: Taught, lived: Lived, keys: Key) -> tuple[Any, ...]:
            derivative = jax.vmap(jax.value_and_grad(one, has_aux=True), (None, 0, 0, 0))
            (_, (after, errors, accuracy)), gradients = derivative(tau, taught, lived, keys)
            norms = jax.vmap(optax.tree.norm)(gradients)
            # Each life's is clipped for itself: a student that is thrown must not speak for all.
            scale = jnp.where(jnp.isfinite(norms), jnp.minimum(1, CLIP / jnp.maximum(norms, 1e-12)), 0)
            part = lambda g: jnp.tensordot(scale, jnp.where(jnp.isfinite(g), g, 0), 1) / self.lives  # noqa: E731
            return jax.tree.map(part, gradients), norms, after, errors, accuracy

        return every


def name_of(kind: Kind) -> str:
    """For records and pictures."""
    return f"{kind.source} {kind.classes}, {kind.student}{kind.width or ''}"


@cache
def student_of(kind: Kind) -> Student:
    """The student of a kind."""
    return STUDENTS[kind.student](num_classes=kind.classes, **({"width": kind.width} if kind.width else {}))


def optimizer_of(lived: Lived, settings: Preset) -> optax.GradientTransformation:
    """The student's: SGD whose rate falls from that of its life to 0 as a cosine, and a clip of its gradient."""

    def rate(count: Array) -> Array:
        done = jnp.minimum(count / (lived.rounds * settings.unroll_length), 1)
        return jnp.asarray(lived.rate * 0.5 * (1 + jnp.cos(jnp.pi * done)))

    return optax.chain(clip_by_global_norm(settings.student_clip), optax.sgd(rate))


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
