"""What the entries of an experiment share: data, student, task, plan, layout."""

import contextlib
import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.data import DataError, Dataset, at, hold_out, require
from l2t_jax.data.files import in_a_line, read_clean, read_labels
from l2t_jax.data.imbalance import with_imbalance
from l2t_jax.data.noise import with_noise
from l2t_jax.data.order import Blocks, Plan, split_sizes
from l2t_jax.inputs import as_arrays, check_carried
from l2t_jax.knobs import knobs_for, knobs_of
from l2t_jax.methods import TAUGHT, UNWEIGHTED, build_method
from l2t_jax.methods.l2t_dln import STAGES
from l2t_jax.methods.parts import SCHEDULES, Parts
from l2t_jax.optimizers import STUDENT_OPTIMIZERS, clip_by_global_norm
from l2t_jax.presets import Preset
from l2t_jax.runs import parallel
from l2t_jax.runs.config import Config, Options, UsageError
from l2t_jax.runs.parallel import Layout
from l2t_jax.runs.progress import logged
from l2t_jax.students import STUDENTS
from l2t_jax.students.micro_batches import in_micro_batches
from l2t_jax.students.precision import in_bfloat16
from l2t_jax.tasks import TASKS, load
from l2t_jax.tasks.own import drawn_clean, with_class_weight, with_clean, with_labels
from l2t_jax.tasks.reading import behind, on_host
from l2t_jax.types import Array, Batch, How, Key, Loss, Method, MethodState, PyTree, Student, Task, Teacher
from l2t_jax.unroll import errors_of

FRESH, TRANSFER = 1, 2  # what the key of a seed is folded with to initialise a run; 0 is the order of random draws
META, FEW = 1000, 10_000  # clean examples of a meta set; a tenth as many where there are fewer examples than FEW


class Entry(NamedTuple):
    """A row of the table: a method, whose trained teacher it takes over, if any, and how many students it trains."""

    name: str
    method: Method
    teacher_of: str | None = None
    lives: int = 1  # of so many rounds as the run has for every student; the last one is judged


class Own(NamedTuple):
    """Objects of a caller's own in place of what a config names."""

    student: Student | None = None
    optimizer: optax.GradientTransformation | None = None
    loss: str | Loss | None = None  # what L2T-DLN teaches
    teacher: Teacher | None = None
    methods: Mapping[str, Callable[[Parts, bool], Method]] = MappingProxyType({})


class Setting(NamedTuple):
    """What all entries of one experiment share."""

    config: Config
    options: Options
    dataset: Dataset
    layout: Layout
    parts: Parts  # student, task, plan, ...: what methods are composed of
    inputs: PyTree  # [2, ...] of zeros: what a student is initialised with
    of_length: str = ""  # as in `Method`, of what all entries share

    def rounds_of(self, entry: Entry) -> int:
        """Rounds of a run of this entry, over all its students' lives."""
        return self.parts.plan.rounds * entry.lives


NOTHING = Own()


def build_setting(
    config: Config, options: Options, dataset: Dataset, own: Own = NOTHING
) -> tuple[Setting, list[Entry]]:
    """All that a config describes, checked as far as it can be before anything is computed.

    Args:
      config, options: of the run.
      dataset: of `prepare`.
      own: objects that take the place of what the config names.

    Raises:
      UsageError, ParallelError: something does not fit; one line says what.
    """
    layout = parallel.layout_of(len(config.seeds), options.devices, options.shard, options.seeds_at_once)
    sizes = {name: getattr(config.settings, name) for name in ("batch_size", "validation_batch_size")}
    parallel.check(layout, **sizes)
    spec = TASKS[config.task]
    if "weight" in dataset.train and (lost := [name for name in config.methods if name in UNWEIGHTED]):
        raise UsageError(
            f"--method={lost[0]} takes no weights of examples: leave it out, or --class_weight and other weights."
        )
    dataset = encoded(config, dataset)
    task = build_task(config, dataset)
    example = example_batch(task, dataset)
    inputs = _zeros(example.inputs)
    student = build_student(config, task, example, layout.axis_name, own.student)
    task = build_task(config, dataset, layout.axis_name)  # now that it was tried on one device
    if options.stream and task.lengths:
        raise UsageError(f"--stream: the examples of --task={config.task} are cut to their lengths on the device.")
    task = on_host(task) if options.stream else task
    student = divided(config, student, layout.devices if layout.axis_name else 1)
    task, inputs = behind(task, student), seen_by(student, inputs)
    if student.draws:
        task = with_keys(task)
    plan = build_plan(config, dataset, task)
    steps = max(1, plan.rounds * plan.stages * plan.unroll_length)
    knobs = knobs_for(config.knobs, config.settings.student_optimizer)
    optimizer = own.optimizer or build_optimizer(config.settings, steps, **knobs)
    parts = Parts(
        settings=config.settings,
        teacher=own.teacher or config.teacher,
        student=student,
        task=task,
        loss=own.loss or task.loss or spec.loss,
        baseline=spec.baseline,
        knobs=config.knobs,
        optimizer=optimizer,
        plan=plan,
        axis_name=layout.axis_name,
        how=How(memory=config.memory, at_once=layout.seeds, check_gradient=True),
    )
    schedule = config.settings.student_schedule
    of_length = f"student_schedule={schedule}" if own.optimizer is None and schedule != "constant" else ""
    setting = Setting(config, options, dataset, layout, parts, inputs, of_length)
    return setting, build_entries(config.methods, parts, options.teacher_from is not None, own.methods)


def encoded(config: Config, dataset: Dataset) -> Dataset:
    """The data set as its task reads it: text, say, in the ids of a vocabulary.

    Raises:
      UsageError: a knob has a value that it cannot have.
    """
    encode = TASKS[config.task].encode
    if encode is None:
        return dataset
    with _knobs_told(config):
        return encode(dataset, **_own_knobs(encode, config))


def build_task(config: Config, dataset: Dataset, axis_name: str | None = None) -> Task:
    """The task that the flags describe.

    Args:
      config: of the run.
      dataset: of `prepare`, and `encoded`.
      axis_name: mapped axis over which batches are divided, for a task that reads a batch as a whole.
    Raises:
      UsageError: a knob has a value that it cannot have.
    """
    build = TASKS[config.task].build
    axis = {"axis_name": axis_name} if "axis_name" in inspect.signature(build).parameters else {}
    with _knobs_told(config):
        return build(dataset, **_own_knobs(build, config), **axis)


def _own_knobs(build: Callable[..., Any], config: Config) -> dict[str, Any]:
    """The task's knobs that are of this function: of what encodes its data, or of what builds it."""
    own = knobs_of(build)
    return {name: value for name, value in config.task_knobs.items() if name in own}


@contextlib.contextmanager
def _knobs_told(config: Config) -> Iterator[None]:
    """Say it as of a flag where a knob of the task has a value that it cannot have."""
    try:
        yield
    except DataError:
        raise
    except ValueError as error:  # which begins with the knob
        raise UsageError(f"--{error}" if config.task_knobs else str(error)) from error


def build_entries(
    methods: Sequence[str],
    parts: Parts,
    elsewhere: bool = False,
    builders: Mapping[str, Callable[[Parts, bool], Method]] = NOTHING.methods,
) -> list[Entry]:
    """The rows of the table, in the order of the methods' names.

    A method with a teacher gives two, one for each protocol; only the transfer, where its teacher is from elsewhere.

    Raises:
      UsageError: the parts do not do for a method.
    """
    entries = []
    for name in methods:
        try:
            if name in builders:
                entries.append(Entry(name, builders[name](parts, True)))
                continue
            if name not in TAUGHT or not elsewhere:
                lives = parts.settings.lives if name == "l2t_dln" else 1
                entries.append(Entry(name, build_method(name, parts), lives=lives))
            if name in TAUGHT:
                entries.append(Entry(f"{name}_transfer", build_method(name, parts, learn=False), name))
        except ValueError as error:
            raise UsageError(f"--method={name}: {error}") from error
    return entries


def build_student(
    config: Config, task: Task, example: Batch, axis_name: str | None = None, own: Student | None = None
) -> Student:
    """The student that the flags describe, or one's own, once it is sure to fit the task and the data set.

    Args:
      config: of the run.
      task: gives how many outputs there are, and the error, which is tried on what the student puts out.
      example: shapes of a batch of the data set, see `example_batch`.
      axis_name: mapped axis over which BatchNorm averages.
      own: in place of what the flags describe; nobody has tried it yet, so a training step of it is looked at too.

    Raises:
      UsageError: a knob is not the student's, or it does not fit.
    """
    usual = TASKS[config.task].defaults["student"]
    hint = "" if usual == config.student else f" Students of --task={config.task} are like {usual}."
    called = f"--student={config.student}"
    if own is not None:
        called, hint = "the student that was given", " A module becomes one by from_linen, _nnx, _equinox or _haiku."
    else:
        _require_knobs(config)
    try:
        student = own or _named_student(config, task, axis_name)
        inputs = seen_by(student, _zeros(example.inputs))
        outputs = _tried(student, inputs, training=own is not None)
        shape = getattr(outputs, "shape", None)  # a tree has none
        if own is not None and TASKS[config.task].classes and shape and shape[-1] != task.outputs:
            raise ValueError(f"it puts out {list(shape)}, expected {task.outputs} numbers, one for each class.")
    except Exception as error:  # what is for one kind of inputs may fail in any way for another
        told = _told(error, "it cannot read its inputs")
        raise UsageError(f"{called} does not fit --dataset={config.dataset}: {told}{hint}") from error
    try:
        jax.eval_shape(lambda outputs, batch: errors_of(task, outputs, batch), outputs, example)
    except Exception as error:  # what is for one kind of outputs may fail in any way for another
        told = _told(error, "what it puts out cannot be read")
        raise UsageError(f"{called} does not fit --task={config.task}: {told}{hint}") from error
    return in_bfloat16(student) if config.compute_dtype == "bfloat16" else student


def divided(config: Config, student: Student, devices: int) -> Student:
    """The student that sees each device's part of a batch in so many micro-batches.

    Args:
      config: of the run.
      student: of `build_student`.
      devices: over which every batch is divided.

    Raises:
      UsageError: they do not divide the batch, or have not the size of parts of the validation batch.
    """
    count = config.micro_batches
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"micro_batches={count!r} is not a positive integer: give at least 1.")
    if count == 1:
        return student
    batch, validation = (x // devices for x in (config.settings.batch_size, config.settings.validation_batch_size))
    size, rest = divmod(batch, count)
    on_each = f" on each of {devices} devices" if devices > 1 else ""
    if rest:
        raise UsageError(
            f"--micro_batches={count} does not divide the {batch} examples of a batch{on_each}: give "
            "a divisor of that, or another --batch_size."
        )
    if validation > size and validation % size:
        raise UsageError(
            f"--micro_batches={count} has parts of {size}, which do not divide the {validation} examples "
            f"of a validation batch{on_each}: give --validation_batch_size as a multiple of {size * devices}."
        )
    return in_micro_batches(student, size)


def _told(error: Exception, failed: str) -> str:
    """What a ValueError says, as it is meant for the user; of another error that something failed by it."""
    return " ".join(str(error).split()) if isinstance(error, ValueError) else f"{failed} ({in_a_line(error)})."


def _require_knobs(config: Config) -> None:
    """Say so where a knob was given that the student has not."""
    has = knobs_of(STUDENTS[config.student])
    for name, value in config.student_knobs.items():
        if name not in has:
            told = ", ".join(f"--{other}" for other in has) or "none of these knobs"
            raise UsageError(
                f"--{name}={value} is no knob of --student={config.student}, which has {told}: leave it out."
            )


def _named_student(config: Config, task: Task, axis_name: str | None) -> Student:
    build = STUDENTS[config.student]
    axis = {"axis_name": axis_name} if "axis_name" in inspect.signature(build).parameters else {}
    return build(num_classes=task.outputs, **config.student_knobs, **axis)


def _tried(student: Student, inputs: PyTree, training: bool) -> PyTree:
    """What a student puts out for these inputs, as shapes.

    Raises:
      ValueError: its variables are not two trees of arrays; in training, a step changes the form of its batch_stats.
    """

    def try_it(key: Key, inputs: PyTree) -> PyTree:
        variables = as_arrays(student.init(key, inputs), "variables")
        if not isinstance(variables, dict) or set(variables) != {"params", "batch_stats"}:
            raise ValueError('its init gives no {"params": ..., "batch_stats": ...}, batch_stats {} without BatchNorm.')
        if training:
            keys = (jax.random.split(key, len(jax.tree.leaves(inputs)[0])),) if student.draws else ()
            _, stats = student.apply(variables, inputs, True, *keys)
            check_carried(variables["batch_stats"], stats, "its apply", "batch_stats")
        return student.apply(variables, inputs, False)[0]

    return jax.eval_shape(try_it, jax.random.key(0), inputs)


def first_state(method: Method, seed: int, inputs: PyTree, stream: int = FRESH) -> MethodState:
    """The state of a run at round 0."""
    return method.init(jax.random.fold_in(jax.random.key(seed), stream), inputs)


def build_optimizer(settings: Preset, steps: int, **knobs: Any) -> optax.GradientTransformation:
    """The student's optimizer, for a run of so many student steps."""
    rate = SCHEDULES[settings.student_schedule](settings.student_lr, steps)
    optimizer = STUDENT_OPTIMIZERS[settings.student_optimizer](rate, **knobs)
    return optax.chain(clip_by_global_norm(settings.student_clip), optimizer) if settings.student_clip else optimizer


def build_plan(config: Config, dataset: Dataset, task: Task | None = None) -> Plan:
    """How long the run is and what a round reads; a meta set takes the place of the division into two parts.

    Args:
      config: of the run.
      dataset: of `prepare`.
      task: says whether examples of one kind stand together, or rounds share examples out by length.
    Raises:
      UsageError: sizes do not fit.
    """
    lengths = task.lengths if task else None
    settings, examples = config.settings, dataset.examples
    if config.train_on_clean and not dataset.meta:
        raise UsageError("--train_on_clean: no examples are known to be clean: give --meta or --clean, or no flag.")
    strata, blocks = TASKS[config.task].strata, None
    if task is not None and task.together > 1 and strata is not None:
        blocks = Blocks(strata(dataset), task.together, task.apart)
    stages, apart = STAGES[settings.second_stage], dataset.meta > 0 or (blocks is not None and blocks.apart)
    validation_ratio = dataset.meta / examples if dataset.meta else settings.validation_ratio
    try:
        # With teach_every a round may have more validation batches than the part has; they are read again then.
        again = (
            stages * settings.teach_every * settings.validation_batch_size > split_sizes(examples, validation_ratio)[1]
        )
        plan = Plan(
            rounds=1,
            unroll_length=settings.unroll_length,
            batch_size=settings.batch_size,
            validation_batch_size=settings.validation_batch_size,
            validation_ratio=validation_ratio,
            examples=examples,
            stages=stages * settings.teach_every,
            epoch_stages=stages if apart or again else None,  # a meta set is read again and again
            meta_trains=config.train_on_clean,
            fixed_split=apart,
            blocks=blocks,
            lengths=lengths.of(dataset.train) if lengths else None,
            buckets=lengths.buckets if lengths else 1,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    rounds = settings.epochs * plan.rounds_per_epoch if config.rounds is None else config.rounds
    return dataclasses.replace(plan, rounds=rounds)


def prepare(config: Config, options: Options) -> Dataset:
    """Load a config's data set, put other labels and a clean part in place, hold a part out, make labels wrong.

    First, where that is asked for, images that cannot be read are left out.

    Then classes are made rare, of what is trained on: what is held out and what is clean keep their shares.

    Raises:
      DataError: it is not there, or cannot be divided or corrupted as asked.
    """
    spec = TASKS[config.task]
    how = {"skip_broken": True} if config.skip_broken else {}
    with logged(lambda line: print(line, file=sys.stderr)):
        dataset = load(config.dataset, options.data_dir, options.download, task=config.task, **how)
    # Each example is classified, not its pixels.
    labelled = spec.classes and isinstance(dataset.train, dict) and "labels" in dataset.train
    for flag, given, put in (("labels", config.labels, _relabelled), ("clean", config.clean, _with_clean)):
        try:
            require(given is None or labelled, f"it is of classes of examples, and {dataset.name} has none.")
            dataset = dataset if given is None else put(dataset, given)
        except DataError as error:
            raise DataError(f"--{flag}={given}: {error}") from error
    dataset = hold_out(dataset, config.held_out, strata=spec.strata and spec.strata(dataset))
    noise = config.noise
    if noise is not None:
        default = META if dataset.examples >= FEW else META // 10
        meta = default if noise.meta is None else noise.meta
        dataset = with_noise(dataset, noise.kind, noise.ratio, meta, noise.seed)
    if config.imbalance != 1:
        try:
            dataset = with_imbalance(dataset, config.imbalance, 0 if noise is None else noise.seed)
        except DataError as error:
            raise DataError(f"--imbalance={config.imbalance:g}: {error}") from error
    if config.class_weight is not None:
        require(labelled, f"{dataset.name}: class weights are of classes of examples, and this data set has none.")
        dataset = with_class_weight(dataset, config.class_weight)
    return dataset


def _relabelled(dataset: Dataset, file: str) -> Dataset:
    return with_labels(dataset, read_labels(file))


def _with_clean(dataset: Dataset, given: str) -> Dataset:
    which = drawn_clean(dataset, int(given)) if given.isdecimal() else read_clean(given)
    return with_clean(dataset, which)


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second run starts fast; JAX_COMPILATION_CACHE_DIR moves them."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2t_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def example_batch(task: Task, dataset: Dataset) -> Batch:
    """Shapes and dtypes of a batch of two examples, for a student's initialisation and for trials."""
    first = at(dataset.train, slice(2))
    if task.read:
        first = task.read(first, np.arange(2) % dataset.examples, [(0,), (1,)])
    batch: Batch = jax.eval_shape(lambda examples: task.gather(examples, jnp.arange(2), None), first)
    return batch


def seen_by(student: Student, inputs: PyTree) -> PyTree:
    """What init and apply of a student take for these inputs [2, ...], all zero: features, where it has a backbone."""
    if student.backbone is None:
        return inputs
    return _zeros(jax.eval_shape(student.backbone.apply, student.backbone.variables, inputs))


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def with_keys(task: Task) -> Task:
    """A task whose batches carry the keys of what a student draws, beside those that its own gather draws by."""

    def gather(data: PyTree, indices: Array, keys: Key | None) -> Batch:
        batch = task.gather(data, indices, keys if task.draws else None)
        # Another stream than that of gather, which may use the keys as they are.
        return batch if keys is None else batch._replace(key=jax.vmap(fold)(keys.ravel()).reshape(keys.shape))

    def fold(key: Key) -> Key:
        return jax.random.fold_in(key, 1)

    return task._replace(gather=gather, draws=True)
