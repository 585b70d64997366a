"""The flags that experiments share. Defaults come from the preset's column."""

import dataclasses
import datetime
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from experiments import _settings
from l2t_jax.knobs import Knob, knobs_of
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods import TAUGHT, method_names
from l2t_jax.methods.parts import SCHEDULES
from l2t_jax.optimizers import STUDENT_OPTIMIZERS
from l2t_jax.presets import PRESETS, Preset
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.parallel import SHARDS, leave
from l2t_jax.students import STUDENTS
from l2t_jax.students.precision import COMPUTE_DTYPES
from l2t_jax.tasks import TASKS, TaskSpec, is_path, settings_for
from l2t_jax.teachers import TEACHERS, shipped

KINDS_OF_LABELS = ("clean", "noisy")  # which tables have


def _choices(names: Iterable[str]) -> str:
    return " | ".join(names)


def _by_preset(field: str) -> str:
    values = {name: getattr(preset, field) for name, preset in PRESETS.items()}
    if len(set(values.values())) == 1:
        return str(values["paper"])
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _by_task(flag: str) -> str:
    return ", ".join(f"{spec.defaults[flag]} for {name}" for name, spec in TASKS.items())


def _knobs(builders: Iterable[tuple[str, Callable[..., Any]]]) -> dict[str, dict[str, Knob]]:
    """What can be set of builders: knob -> builder -> what it is there."""
    found: dict[str, dict[str, Knob]] = {}
    for builder, build in builders:
        for name, knob in knobs_of(build).items():
            found.setdefault(name, {})[builder] = knob
    return found


STUDENT_KNOBS = _knobs(STUDENTS.items())
TASK_KNOBS = _knobs((name, build) for name, spec in TASKS.items() for build in spec.builders)


def _define_knob(what: str, name: str, of: dict[str, Knob]) -> None:
    """A flag for a knob of students or tasks; what is not given is left to the builder."""
    told: dict[tuple[Any, str], list[str]] = {}
    for student, knob in of.items():
        told.setdefault((knob.default, knob.text), []).append(student)
    text = "; ".join(f"{', '.join(students)}: {text} (default {default})" for (default, text), students in told.items())
    kind = type(next(iter(of.values())).default)
    define: dict[type, Callable[..., Any]]
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}
    define[kind](name, None, f"Of the {what}. {text}.")


flags.DEFINE_string("task", "classification", f"{_choices(TASKS)}. What is learned.")
flags.DEFINE_string(
    "dataset",
    None,
    "; ".join(f"{_choices(spec.datasets)} ({name}, default {spec.defaults['dataset']})" for name, spec in TASKS.items())
    + ". digits needs no download. Or the PATH of your own data: a folder of images in class folders (with or without "
    "train and test), an .npz, or a .csv (l2t_jax/tasks/own.py).",
)
flags.DEFINE_string(
    "labels",
    None,
    "FILE of labels that take the place of the training set's own, which are then the true ones: a .csv with a column "
    "label, an .npy, or an array of an .npz as FILE:NAME.",
)
flags.DEFINE_string(
    "class_weight",
    None,
    "balanced: the examples of each class count as much as those of any other; or a number for each class, comma "
    "separated. Default: all examples count alike.",
)
flags.DEFINE_float(
    "imbalance",
    1.0,
    "Makes classes rare: the first has so many training examples for each of the last, those between fall off "
    "exponentially (a long tail). The test set, what is held out and the clean examples stay as they are.",
    lower_bound=1.0,
)
flags.DEFINE_string(
    "clean",
    None,
    "FILE that names the training examples that are known to be right, which then measure the validation error: a .csv "
    "with a column index, an .npy, or an array of an .npz as FILE:NAME. Or how many to draw, as many of each class, "
    "where all true labels are known (beside --labels these are the set's own); they get their true labels.",
)
flags.DEFINE_bool(
    "train_on_clean",
    False,
    "Train on the clean examples of --meta or --clean as well, as one would who has no other use of them: the fair "
    "form of a baseline that reads no validation error.",
)
flags.DEFINE_string(
    "data_dir", None, "Folder of prepared TFDS data sets. Default: $TFDS_DATA_DIR or ~/tensorflow_datasets."
)
flags.DEFINE_bool("download", False, "Download and prepare the data set if it is not there (needs TensorFlow once).")
flags.DEFINE_float(
    "held_out",
    0.0,
    "Part of the training examples, as much of each class, that is kept away from training and tested on in place of "
    "the test set, which then stays unread: for choosing among settings.",
    lower_bound=0.0,
    upper_bound=0.9,
)
flags.DEFINE_string(
    "student", None, f"{_choices(STUDENTS)}. The network that is taught. Default: {_by_task('student')}."
)
for _name, _of in STUDENT_KNOBS.items():
    _define_knob("student", _name, _of)
for _name, _of in TASK_KNOBS.items():
    _define_knob("task", _name, _of)
flags.DEFINE_string(
    "method",
    None,
    f"One or more, comma separated: {_choices(method_names())}. {', '.join(TAUGHT)} are reported twice: online (the "
    "student that grew up with the teacher) and transfer (the trained, frozen teacher teaches a fresh student with a "
    "fresh loss). Default: l2t_dln and the fixed loss it is compared with, cross_entropy where there are classes.",
)
flags.DEFINE_string(
    "preset",
    "stable",
    f"{_choices(PRESETS)}. paper is Algorithm 1 to the letter, released what the authors' code does, residual what "
    "keeps that from drifting, stable what pays where labels are wrong, cheap the same in far fewer seconds. Sets the "
    "defaults of the flags below.",
)
flags.DEFINE_string(
    "set",
    "",
    "Any rows of the preset's sheet (l2t_jax/presets.py), NAME=VALUE, and any knobs of a loss, a method or "
    "the student's optimizer, "
    "NAME.KNOB=VALUE, comma separated: e.g. squash=log_softmax,odd=true,meta_weight_net.lr=0.01.",
)
flags.DEFINE_string("teacher", "lstm", f"{_choices(TEACHERS)}. All but lstm are optax transformations (Table 6).")
flags.DEFINE_integer(
    "unroll_length",
    None,
    f"N, student steps of one unroll. Default: {_by_preset('unroll_length')}.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "epochs", None, f"Passes over the validation part. Default: {_by_preset('epochs')}.", lower_bound=1
)
flags.DEFINE_integer(
    "rounds",
    None,
    "Rounds in all, instead of --epochs; each updates the teacher once. 0 scores the students as they begin. With "
    "--resume there may be more than the run had, where nothing is laid out over its length (constant schedules).",
    lower_bound=0,
)
flags.DEFINE_integer(
    "batch_size", None, f"Examples of a student step. Default: {_by_preset('batch_size')}.", lower_bound=1
)
flags.DEFINE_integer(
    "validation_batch_size",
    None,
    f"Examples of a validation error. Default: {_by_preset('validation_batch_size')}.",
    lower_bound=1,
)
flags.DEFINE_float(
    "validation_ratio",
    None,
    "Part of the training examples that validates, in (0, 1), re-divided every epoch. "
    f"Default: {_by_preset('validation_ratio')}.",
)
flags.DEFINE_string(
    "student_optimizer",
    None,
    f"{_choices(STUDENT_OPTIMIZERS)}. Of the student; its knobs by --set, e.g. sgd.momentum=0.9,adam.b2=0.99. "
    f"Default: {_by_preset('student_optimizer')}.",
)
flags.DEFINE_float("student_lr", None, f"eta, of the student's optimizer. Default: {_by_preset('student_lr')}.")
flags.DEFINE_string(
    "student_schedule",
    None,
    f"{_choices(SCHEDULES)}. eta over the run; cosine falls to 0. Default: {_by_preset('student_schedule')}.",
)
flags.DEFINE_float("dln_lr", None, f"gamma, of the DLN's update. Default: {_by_preset('dln_lr')}.")
flags.DEFINE_float("teacher_lr", None, f"Of the LSTM teacher's own Adam. Default: {_by_preset('teacher_lr')}.")
flags.DEFINE_string(
    "teacher_schedule",
    None,
    f"{_choices(SCHEDULES)}. That rate over all rounds; cosine falls to 0. Default: {_by_preset('teacher_schedule')}.",
)
flags.DEFINE_string(
    "memory",
    "auto",
    f"{_choices(MEMORY_MODES)}. How the exact hypergradient trades memory for time; auto predicts what each would keep "
    "and says which it takes.",
)
flags.DEFINE_string(
    "compute_dtype",
    "float32",
    f"{_choices(COMPUTE_DTYPES)}. In which the student computes. Parameters, losses, errors, the hypergradient and the "
    "teacher stay float32. bfloat16 is for accelerators: on a CPU it is slower and saves no memory.",
)
flags.DEFINE_integer(
    "micro_batches",
    1,
    "Parts of a batch that a device computes one after the other, for a step that does not fit into its memory; one "
    "more forward pass a gradient. All is exact, but BatchNorm sees a part at a time.",
    lower_bound=1,
)
flags.DEFINE_bool(
    "skip_broken",
    False,
    "Of images in files: read all once, and leave out those that cannot be read. Without it the first such image ends "
    "the run, with its name.",
)
flags.DEFINE_bool(
    "stream",
    False,
    "Keep examples on the host and bring those of some rounds to the device while it computes the ones before, for "
    "sets that are larger than its memory. The numbers stay the same. Images in files are read so anyway.",
)
flags.DEFINE_string("seeds", "3", "A count (3 means 0,1,2) or a comma-separated list (0,4,7; one seed: 4,).")
flags.DEFINE_integer(
    "seeds_at_once",
    None,
    "Seeds that a device computes at once (vmap). Default: 1 on a CPU, where that is faster, all on an accelerator.",
    lower_bound=1,
)
flags.DEFINE_integer("devices", 1, "Devices, of all processes together. On a CPU they are simulated.", lower_bound=1)
flags.DEFINE_string(
    "shard",
    "batch",
    f"{_choices(SHARDS)}. What is divided over the devices: every batch, with the same results up to rounding, or the "
    "seeds, with the same results.",
)
flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0 of a run of several processes, all with the same flags; auto asks the cluster (Slurm, Open "
    "MPI, Kubernetes, Cloud TPU).",
)
flags.DEFINE_integer(
    "num_processes", None, "How many processes --coordinator=HOST:PORT brings together.", lower_bound=1
)
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on; 0 writes the files.", lower_bound=0)
flags.DEFINE_string(
    "teacher_from",
    None,
    f"A --workdir whose trained, frozen teachers (of {', '.join(TAUGHT)}, for the same seeds) teach here, on another "
    "data set, student or noise; none is trained. Or shipped:NAME, one that comes with the package "
    f"({_choices(shipped()) or 'none yet'}), or FILE.npz, of experiments.many_lives.",
)
flags.DEFINE_string("workdir", None, "Where the files go. Default: runs/EXPERIMENT_DATASET_TIME.")
flags.DEFINE_bool(
    "resume",
    False,
    "Go on with the run that --workdir holds, bit for bit. --rounds, --seeds and --method may say more than before. "
    "What is done is kept, but a trained teacher that learns on teaches its fresh student (transfer) anew.",
)
flags.DEFINE_float(
    "checkpoint_seconds", 20.0, "Seconds between checkpoints; 0 saves after every dispatch.", lower_bound=0
)
flags.DEFINE_bool("tensorboard", False, "Write TensorBoard scalars too: pip install l2t_jax[tensorboard].")
flags.DEFINE_string(
    "on_row",
    None,
    "MODULE:FUNCTION that is told each row of metrics.jsonl, a dict, while the run goes on, for wandb, MLflow or "
    "anything else (docs/reading_results.md).",
)
flags.DEFINE_string("on_summary", None, "MODULE:FUNCTION that is told what summary.json holds, at the end.")

FLAGS = flags.FLAGS


def resolve(experiment: str, noise: Noise | None = None, task: str | None = None) -> tuple[Config, Options]:
    """Turn the parsed flags into a `Config` and `Options`.

    Raises:
      UsageError: a name is unknown, a value is out of range, or two flags exclude each other.
    """
    if task is not None and not FLAGS["task"].present:
        FLAGS["task"].value = task
    of_task = spec()
    if task not in (None, FLAGS.task):
        raise UsageError(f"--task={FLAGS.task} is not what experiments.{experiment} is for: use experiments.compare.")
    preset = settings_for(of_task, PRESETS[_settings.known("preset", FLAGS.preset, PRESETS)])
    methods = _methods(f"l2t_dln,{of_task.baseline}" if FLAGS.method is None else FLAGS.method)
    if FLAGS.rounds is not None and FLAGS.epochs is not None:
        raise UsageError("--rounds and --epochs both say how long to train: give one of them.")
    if FLAGS.teacher_from is not None and not set(TAUGHT) & set(methods):
        raise UsageError(f"--teacher_from is for {', '.join(TAUGHT)}: name one of them in --method.")
    if FLAGS.resume and FLAGS.workdir is None:
        raise UsageError("--resume goes on with the run in --workdir, which is not given: add --workdir=DIR.")
    if not 0 <= FLAGS.held_out <= 0.9:  # absl lets nan through
        raise UsageError(f"--held_out={FLAGS.held_out} must lie between 0 and 0.9.")
    if not FLAGS.checkpoint_seconds >= 0:
        raise UsageError(f"--checkpoint_seconds={FLAGS.checkpoint_seconds} must be at least 0.")
    if FLAGS.labels == "noisy" and noise is None:
        raise UsageError("--labels=noisy is of tables that have both: use experiments.noisy_labels, or give a FILE.")
    config = Config(
        task=FLAGS.task,
        dataset=_dataset(given("dataset"), of_task),
        labels=given_labels(),
        clean=FLAGS.clean,
        class_weight=FLAGS.class_weight,
        imbalance=FLAGS.imbalance,
        train_on_clean=FLAGS.train_on_clean,
        student=_settings.known("student", given("student"), STUDENTS),
        student_knobs=_student_knobs(of_task),
        task_knobs=_task_knobs(),
        methods=methods,
        preset=FLAGS.preset,
        teacher=_settings.known("teacher", FLAGS.teacher, TEACHERS),
        rounds=FLAGS.rounds,
        memory=_settings.known("memory", FLAGS.memory, MEMORY_MODES),
        compute_dtype=_settings.known("compute_dtype", FLAGS.compute_dtype, COMPUTE_DTYPES),
        skip_broken=FLAGS.skip_broken,
        micro_batches=FLAGS.micro_batches,
        seeds=parse_seeds(FLAGS.seeds),
        settings=preset,
        noise=noise,
        held_out=FLAGS.held_out,
    )
    config = _settings.with_settings(config, given_settings())
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    options = Options(
        data_dir=FLAGS.data_dir,
        download=FLAGS.download,
        workdir=FLAGS.workdir or f"runs/{experiment}_{Path(config.dataset).stem}_{time}",
        resume=FLAGS.resume,
        checkpoint_seconds=FLAGS.checkpoint_seconds,
        tensorboard=FLAGS.tensorboard,
        on_row=FLAGS.on_row,
        on_summary=FLAGS.on_summary,
        stream=FLAGS.stream,
        seeds_at_once=FLAGS.seeds_at_once,
        devices=FLAGS.devices,
        shard=_settings.known("shard", FLAGS.shard, SHARDS),
        coordinator=FLAGS.coordinator,
        num_processes=FLAGS.num_processes,
        process_id=FLAGS.process_id,
        teacher_from=FLAGS.teacher_from,
    )
    return config, options


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `3` as the seeds 0, 1, 2 and `0,4,7` (or `4,`) as a list."""
    try:
        numbers = [int(part) for part in text.rstrip(",").split(",")]
    except ValueError:
        numbers = [-1]
    seeds = tuple(numbers) if "," in text else tuple(range(numbers[0]))
    if not seeds or min(numbers) < 0 or max(numbers) >= 2**31 or len(set(seeds)) < len(seeds):
        raise UsageError(
            f"--seeds={text!r} is neither a count of at least 1 nor a comma-separated list of different seeds "
            "from 0 on: e.g. --seeds=3 or --seeds=0,4,7."
        )
    return seeds


def parse_arguments(argv: list[str]) -> list[str]:
    """Parse the command line for `app.run`: a bad flag is one line and exit code 2. An earlier one is gone."""
    for module, given in FLAGS.flags_by_module_dict().items():
        for flag in given if not module.startswith("absl") else ():  # whose verbosity `start` has set
            flag.unparse()
    try:
        rest = FLAGS(argv)
        if rest[1:]:
            raise UsageError(f"{rest[1]!r} is not a flag: flags look like --dataset=digits.")
    except (flags.Error, UsageError) as error:
        fail(f"{str(error).rstrip('. ')}. See python -m {_module(argv[0])} --help.")
    return rest


def fail(message: str, code: int = 2) -> NoReturn:
    """Say in one line what is wrong and exit."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    leave(code)


def _module(path: str) -> str:
    return "experiments." + path.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".py")


def _methods(text: str) -> tuple[str, ...]:
    choices = method_names()
    names = tuple(_settings.known("method", name.strip(), choices) for name in text.split(",") if name.strip())
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--method={text!r} must name each method once, at least one: {_choices(choices)}.")
    return names


def spec() -> TaskSpec:
    """Of the task that is asked for.

    Raises:
      UsageError: there is none of that name.
    """
    return TASKS[_settings.known("task", FLAGS.task, TASKS)]


def given(flag: str) -> str:
    """The value of --dataset or --student, by default that of the task."""
    value: str | None = FLAGS[flag].value
    default: str = spec().defaults[flag]
    return default if value is None else value


def _dataset(name: str, of_task: TaskSpec) -> str:
    if of_task.open is not None and is_path(name, of_task):
        return name
    return _settings.known("dataset", name, of_task.datasets)


def given_labels() -> str | None:
    """The file of --labels; where that says only of which kind labels are, there is none."""
    return None if FLAGS.labels in KINDS_OF_LABELS else FLAGS.labels


def _student_knobs(of_task: TaskSpec) -> dict[str, Any]:
    """The student's knobs that flags give; the task's default student on its default data has some of its own."""
    default = FLAGS.student is None and FLAGS.dataset is None
    return (of_task.student_knobs if default else {}) | _given_knobs(STUDENT_KNOBS)


def _given_knobs(known_ones: Iterable[str]) -> dict[str, Any]:
    """The knobs that flags give."""
    return {name: FLAGS[name].value for name in known_ones if FLAGS[name].value is not None}


def _task_knobs() -> dict[str, Any]:
    """The task's knobs that flags give.

    Raises:
      UsageError: one is of another task.
    """
    found = _given_knobs(TASK_KNOBS)
    for name, value in found.items():
        if FLAGS.task not in TASK_KNOBS[name]:
            raise UsageError(f"--{name}={value} is of {_choices(TASK_KNOBS[name])}, not of --task={FLAGS.task}.")
    return found


def given_settings() -> dict[str, Any]:
    """The settings that flags give, whatever the preset, and the knobs of losses and methods: see `with_settings`.

    Raises:
      UsageError: see `parse_settings`, or a setting is given twice.
    """
    names = [field.name for field in dataclasses.fields(Preset)]
    by_flag = {name: FLAGS[name].value for name in names if name in FLAGS and FLAGS[name].value is not None}
    by_name = _settings.parse_settings("set", FLAGS.set)
    for name in by_flag.keys() & by_name.keys():
        raise UsageError(f"--{name} and --set={name}=... say the same thing: give one of them.")
    return by_flag | by_name


def set_defaults(**defaults: Any) -> None:
    """Give shared flags the values that a module has for them where the user gave none."""
    for name, value in defaults.items():
        if not FLAGS[name].present:
            setattr(FLAGS, name, value)


def set_table_defaults(**defaults: Any) -> None:
    """`set_defaults` of a module that fills a table.

    Raises:
      UsageError: a flag was given that is for single runs.
    """
    if FLAGS.teacher_from is not None:
        raise UsageError("--teacher_from is for single runs: give it to experiments.classification or noisy_labels.")
    if FLAGS.rounds == 0:
        raise UsageError("--rounds=0 scores students as they begin, in single runs: give at least 1 for a table.")
    if FLAGS.coordinator is not None:
        raise UsageError("a table is filled by one process: leave --coordinator out, or run its cells one by one.")
    set_defaults(**defaults)
