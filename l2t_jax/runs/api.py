"""Training from Python: one call, and what it returns.

from l2t_jax import from_arrays, train
data = from_arrays(x, y, test=(x_test, y_test), clean=(x_clean, y_clean))
result = train("l2t_dln", data, student="mlp", rounds=200, seeds=3)
result.score, result.predict(x), result.loss, result.examples, result.to_frame()
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.data import Dataset
from l2t_jax.data.images import objects
from l2t_jax.inputs import known
from l2t_jax.knobs import knobs_of
from l2t_jax.losses import LOSSES
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods import KNOBS, method_names
from l2t_jax.methods.parts import Parts
from l2t_jax.optimizers import STUDENT_OPTIMIZERS
from l2t_jax.presets import PRESETS, Preset
from l2t_jax.runs import examples, finals
from l2t_jax.runs.config import Config, Hook, Options, UsageError
from l2t_jax.runs.frames import read_run
from l2t_jax.runs.reporting import reason
from l2t_jax.runs.running import train_entries
from l2t_jax.runs.setting import Entry, Own, Setting, build_setting
from l2t_jax.runs.training import Outcome, StoppedError
from l2t_jax.students import STUDENTS
from l2t_jax.students.precision import COMPUTE_DTYPES
from l2t_jax.tasks import TASKS, load, settings_for
from l2t_jax.tasks.own import as_inputs
from l2t_jax.tasks.reading import batch_at
from l2t_jax.teachers import TEACHERS
from l2t_jax.types import Array, Loss, Method, MethodState, Student, Teacher

OBJECT = "own"  # the name in records of what is given as an object


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a run of a method has learned. Of a method with a teacher, the student that grew up with it."""

    score: float | None  # of the test set, in the task's metric: the mean over the seeds that finished; None: none did
    scores: list[float | None]  # of each seed
    summary: dict[str, Any]  # all that summary.json holds, rows of other entries too (L2T-DLN's transfer)
    directory: Path  # with all files of the run
    setting: Setting
    entry: Entry
    states: list[MethodState]  # of the seeds that finished

    def probabilities(self, x: Any) -> np.ndarray:
        """What the students say of inputs [n, ...], raw as those they were trained on: means over seeds [n, C].

        Where images were read from files, the inputs are files, bytes of files, or arrays uint8 [H, W, c] of any sizes.
        """
        self._require(of_classes=True)
        train = self.setting.dataset.train["inputs"]
        if train.dtype == object:
            return self._said(objects(x))
        inputs = as_inputs(x, "inputs")
        if inputs.dtype != train.dtype or inputs.shape[1:] != train.shape[1:]:
            raise ValueError(
                f"inputs are {inputs.dtype} {list(inputs.shape)}: expected {train.dtype} [n, "
                f"{', '.join(map(str, train.shape[1:]))}], raw as those that were trained on."
            )
        return self._said(inputs)

    def _said(self, inputs: np.ndarray) -> np.ndarray:
        parts = self.setting.parts
        data = {"inputs": inputs, "labels": np.zeros(len(inputs), np.int32)}
        batch = batch_at(parts.task, data, np.arange(len(inputs)))
        each = [jax.nn.softmax(parts.student.apply(s.student.variables, batch.inputs, False)[0]) for s in self.states]
        return np.mean([np.asarray(one) for one in each], axis=0)

    def predict(self, x: Any) -> np.ndarray:
        """The class of each input [n], by the name that labels have."""
        info = self.setting.dataset.info
        return np.asarray(info.names or np.arange(info.num_classes))[self.probabilities(x).argmax(1)]

    @property
    def loss(self) -> Callable[[Array, Array], Array]:
        """The loss of the first seed as it ended: (outputs [B, C], targets [B]) -> losses [B].

        Raises:
          ValueError: the method has no loss by itself: it weighs examples.
        """
        self._require()
        described = finals.loss_of(self.entry.name, self.setting.parts)
        own = self.setting.parts.loss
        if isinstance(own, Loss) and self.entry.name == "l2t_dln":
            loss: Loss = own
        elif described is None:
            raise ValueError(f"{self.entry.name} has no loss by itself: it weighs examples, see result.examples.pull.")
        else:
            loss = finals.build(described, self.setting.parts.classes)
        learned = loss.init(jax.random.key(0)) if loss.learned == "no" else self.states[0].loss
        params = loss.at(learned, jnp.float32(1))
        return lambda outputs, targets: loss.apply(params, outputs, targets)

    @property
    def examples(self) -> examples.Examples:
        """A row for each training example: its label, what the students say of it, how strongly it pulls."""
        self._require(of_classes=True)
        return examples.describe(self.setting, self.entry, self.states)

    def to_frame(self) -> Any:
        """The rows of the run as a pandas DataFrame, see `ReadRun.to_frame`."""
        return read_run(self.directory).to_frame()

    def _require(self, of_classes: bool = False) -> None:
        if of_classes and (task := self.setting.config.task) != "classification":
            raise ValueError(f"this is of classification, and the run is of {task}: use result.states and its task.")
        if not self.states:
            raise ValueError(f"no seed finished: {self.summary['methods'][self.entry.name]['failed'][0]['reason']}.")


def train(
    method: str | Callable[[Parts, bool], Method],
    data: Dataset | str,
    *,
    student: str | Student = "mlp",
    loss: str | Loss | None = None,
    optimizer: optax.GradientTransformation | None = None,
    teacher: str | Teacher = "lstm",
    preset: str = "stable",
    rounds: int | None = None,
    seeds: int | Sequence[int] = 3,
    memory: str = "auto",
    compute_dtype: str = "float32",
    micro_batches: int = 1,
    stream: bool = False,
    task: str = "classification",
    student_knobs: dict[str, Any] | None = None,
    task_knobs: dict[str, Any] | None = None,
    knobs: dict[str, Any] | None = None,
    workdir: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_row: Hook | None = None,
    on_summary: Hook | None = None,
    **settings: Any,
) -> Result:
    """Train a method on a data set, for some seeds, and score it on the test set once.

    Args:
      method: a name of `methods.method_names`, or (parts, whether the teacher learns) -> `Method`, as in METHODS.
      data: a data set, a name, or a path (`tasks.load`).
      student: a name of STUDENTS, or a `Student`.
      loss: what L2T-DLN teaches in place of its DLN: a name of LOSSES or a `Loss`.
      optimizer: the student's, any optax transformation; by default what the settings say.
      teacher: a name of TEACHERS or a `Teacher`, of L2T-DLN.
      preset: a column of the sheet in `l2t_jax.presets`.
      rounds: by default as many as the preset's epochs have.
      seeds: how many, or which.
      memory: mode of the hypergradient.
      compute_dtype: float32 or bfloat16, in which the student computes (`students.precision.in_bfloat16`).
      micro_batches: parts of a batch that are computed one after the other (`students.micro_batches`).
      stream: keep examples on the host, and bring those of each round to the device (`tasks.reading.on_host`).
      task: a name of TASKS.
      student_knobs: keywords of the student's builder, e.g. {"width": 64}.
      task_knobs: keywords of the task's builder, e.g. {"crop": 193}.
      knobs: of a method, a loss or the student's optimizer, e.g. {"meta_weight_net.lr": 0.01, "sgd.momentum": 0.9}.
      workdir: where the files go; by default runs/train_METHOD_DATA_TIME.
      resume: go on with the run that is there, which may be of fewer rounds and seeds; objects must be those it had.
      quiet: show no progress.
      on_row: is told each row of metrics.jsonl, a dict, as the run goes on; one that raises is told no more.
      on_summary: is told what summary.json holds, at the end.
      **settings: rows of the sheet, e.g. student_lr=0.1, unroll_length=10, and validation_ratio.
    Returns:
      a `Result`.
    Raises:
      ValueError: a name is unknown, a value is out of range, or something does not fit; one line says what.
      KeyboardInterrupt: SIGINT (a notebook's interrupt) or SIGTERM was received. The first one finishes the rounds
        under way and saves them, a second one stops at once; the line says how to go on.
    """
    spec = TASKS[known(f"task {task!r}", task, TASKS, UsageError)]
    column = settings_for(spec, PRESETS[known(f"preset {preset!r}", preset, PRESETS, UsageError)])
    rows = [field.name for field in dataclasses.fields(Preset)]
    for row in settings:
        known(f"setting {row!r}", row, rows, UsageError)
    dataset = load(data, task=task) if isinstance(data, str) else data
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers:
        raise UsageError(f"seeds={seeds!r} are none: give a count of at least 1, or a list.")
    name = known(f"method {method!r}", method, method_names(), UsageError) if isinstance(method, str) else OBJECT
    if isinstance(loss, str):
        known(f"loss {loss!r}", loss, LOSSES, UsageError)
    config = Config(
        dataset=dataset.name,
        student=_named("student", student, STUDENTS, Student),
        methods=(name,),
        preset=preset,
        teacher=_named("teacher", teacher, TEACHERS, Teacher),
        rounds=rounds,
        memory=known(f"memory mode {memory!r}", memory, MEMORY_MODES, UsageError),
        compute_dtype=known(f"compute_dtype {compute_dtype!r}", compute_dtype, COMPUTE_DTYPES, UsageError),
        micro_batches=micro_batches,
        seeds=numbers,
        settings=dataclasses.replace(column, **settings),
        task=task,
        student_knobs=dict(student_knobs or {}),
        task_knobs=dict(task_knobs or {}),
        knobs=_checked(knobs or {}, name, settings.get("student_optimizer", column.student_optimizer)),
    )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    options = Options(
        workdir=str(workdir or f"runs/train_{name}_{Path(dataset.name).stem}_{stamp}"),
        stream=stream,
        resume=resume,
        on_row=_told("on_row", on_row),
        on_summary=_told("on_summary", on_summary),
        command=f"l2t_jax.train({name!r}, {dataset.name!r}, preset={preset!r}, seeds={numbers}, rounds={rounds}, ...)",
    )
    own = Own(
        student=student if isinstance(student, Student) else None,
        optimizer=optimizer,
        loss=loss,
        teacher=teacher if isinstance(teacher, Teacher) else None,
        methods={} if isinstance(method, str) else {OBJECT: method},
    )
    setting, entries = build_setting(config, options, dataset, own)
    try:
        outcomes, summary = train_entries(setting, entries, alone=True, quiet=quiet, table=False)
    except (StoppedError, KeyboardInterrupt):
        # No Exception: a loop that goes on after errors must not go on after this.
        raise KeyboardInterrupt(
            f"train was stopped; go on by the same call with workdir={options.workdir!r}, resume=True."
        ) from None
    entry = entries[0]
    finished = [outcomes[(entry.name, seed)] for seed in numbers]
    states = [outcome.state for outcome in finished if isinstance(outcome, Outcome) and not reason(outcome)]
    score = summary["methods"][entry.name]["score"]
    return Result(score["mean"], score["per_seed"], summary, Path(options.workdir), setting, entry, states)


def _checked(knobs: dict[str, Any], method: str, optimizer: str) -> dict[str, Any]:
    """Knobs of the method and of the student's optimizer, which exist."""
    builders = {name: build for name, build in {**KNOBS, **STUDENT_OPTIMIZERS}.items() if name in (method, optimizer)}
    names = [f"{name}.{knob}" for name, build in builders.items() for knob in knobs_of(build)]
    for knob in knobs:
        known(f"knob {knob!r}", knob, names, UsageError)
    return knobs


def _named(what: str, given: Any, names: dict[str, Any], kind: type) -> str:
    """The name of what is given: one of the known, or that of all objects.

    Raises:
      UsageError: it is an unknown name, or neither a name nor an object of this kind.
    """
    if isinstance(given, str):
        known(f"{what} {given!r}", given, names, UsageError)
        return given
    if not isinstance(given, kind):
        of_module = "; from_linen, from_nnx, from_equinox and from_haiku make one of a module" * (kind is Student)
        raise UsageError(
            f"{what} is an object of type {type(given).__name__}: give a name or a `{kind.__name__}`{of_module}."
        )
    return OBJECT


def _told(name: str, hook: Any) -> Hook | None:
    if hook is not None and not callable(hook):
        raise UsageError(f"{name} is an object of type {type(hook).__name__}: give a function of a dict.")
    return hook
