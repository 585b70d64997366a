"""L2T-DLN against fixed losses on image classification, under the same student, batches, steps and seeds.

With no flags: the embedded UCI digits, 3 seeds, about two minutes on two cores.

  python -m experiments.classification
  python -m experiments.classification --dataset=mnist --data_dir=DIR --student=lenet --seeds=5
  python -m experiments.classification --preset=released --rounds=100 --workdir=runs/mine
  python -m experiments.classification --preset=released --rounds=100 --workdir=runs/mine --resume

Writes config.json, metrics.jsonl (a line a round), summary.json, plots/ and checkpoints/ to --workdir.
"""

import dataclasses
import shlex
import sys
from typing import Any

import jax
import optax
from absl import app, flags, logging

from experiments import _flags
from experiments._flags import Config, UsageError, fail
from experiments._run import run_entries
from experiments._setting import Entry, Setting, enable_compilation_cache, example_inputs
from l2t_jax import data, parallel
from l2t_jax.checkpoints import CheckpointError
from l2t_jax.losses import LOSSES, LossError, check_loss
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2t_dln import STAGES, l2t_dln
from l2t_jax.records import WorkdirError
from l2t_jax.students import STUDENTS
from l2t_jax.tasks.image_classification import image_classification
from l2t_jax.teachers import TEACHERS
from l2t_jax.training import Schedule, StoppedError
from l2t_jax.types import Loss, Student, Task, Teacher

flags.adopt_module_key_flags(_flags)


def main(argv: list[str]) -> None:
    """Run the experiment; bad input is one line and exit code 2, a seed that stopped early exit code 1."""
    try:
        config, options = _flags.resolve("classification")
        parallel.start(options.devices, options.coordinator, options.num_processes, options.process_id)
        layout = parallel.layout_of(len(config.seeds), options.devices, options.shard, options.seeds_at_once)
        sizes = {name: getattr(config.settings, name) for name in ("batch_size", "validation_batch_size")}
        parallel.check(layout, **sizes)
        dataset = data.load(config.dataset, options.data_dir, options.download)
        task, student = image_classification(dataset), build_student(config, dataset, layout.axis_name)
        schedule = build_schedule(config, len(dataset.train_labels))
        entries = build_entries(config, student, task, dataset.num_classes, layout)
        enable_compilation_cache()
        code = run_entries(Setting(config, options, dataset, student, task, schedule, layout), entries)
    except (UsageError, parallel.ParallelError, data.DataError, WorkdirError, ImportError) as error:
        fail(str(error))
    except parallel.LostError as error:
        fail(f"{error}. What was saved is intact; {_go_on(options)}", 1)
    except (CheckpointError, OSError) as error:
        fail(f"{error}. What was saved is intact; make room, then {_go_on(options)}", 1)
    except (StoppedError, KeyboardInterrupt):
        fail(f"interrupted; {_go_on(options)}", 130)
    sys.exit(code)


def _go_on(options: _flags.Options) -> str:
    # Of a flag given twice the last counts.
    again = shlex.join([*sys.argv[1:], f"--workdir={options.workdir}", "--resume"])
    return f"go on with: python -m experiments.classification {again}"


def build_student(config: Config, dataset: data.Dataset, axis_name: str | None = None) -> Student:
    """The student that the flags describe, once it is sure to fit the data set's images."""
    knobs: dict[str, Any] = {} if config.width is None else {"width": config.width}
    if config.student.startswith("resnet"):
        knobs |= {"shortcut": config.shortcut, "head_grid": config.head_grid, "axis_name": axis_name}
    elif (config.shortcut, config.head_grid) != ("a", 1):
        raise UsageError(f"--shortcut and --head_grid are of the ResNets; --student={config.student} has neither.")
    try:
        student = STUDENTS[config.student](num_classes=dataset.num_classes, **knobs)
        jax.eval_shape(student.init, jax.random.key(0), example_inputs(dataset))
    except ValueError as error:
        raise UsageError(f"--student={config.student} does not fit --dataset={config.dataset}: {error}") from error
    return student


def build_schedule(config: Config, examples: int) -> Schedule:
    """How long the run is and what a round reads."""
    settings = config.settings
    try:
        schedule = Schedule(
            rounds=config.rounds or 1,
            unroll_length=settings.unroll_length,
            batch_size=settings.batch_size,
            validation_batch_size=settings.validation_batch_size,
            validation_ratio=settings.validation_ratio,
            examples=examples,
            stages=STAGES[settings.second_stage],
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return dataclasses.replace(schedule, rounds=config.rounds or settings.epochs * schedule.rounds_per_epoch)


def build_teacher(config: Config) -> Teacher:
    """The teacher that the flags describe."""
    settings = config.settings
    if config.teacher != "lstm":
        return TEACHERS[config.teacher](settings.dln_lr)
    knobs = {"update_sign": settings.update_sign, "preprocess": settings.preprocess, "odd": settings.odd}
    return TEACHERS["lstm"](settings.dln_lr, **knobs)


def build_entries(
    config: Config, student: Student, task: Task, classes: int, layout: parallel.Layout = parallel.ONE
) -> list[Entry]:
    """The rows of the table, in the order of --method; l2t_dln gives two, one for each protocol."""
    settings = config.settings
    optimizer = optax.sgd(settings.student_lr)
    entries = []
    for name in config.methods:
        if name != "l2t_dln":
            stages = STAGES[settings.second_stage]
            fixed = _checked(LOSSES[name](), name, classes)
            method = fixed_loss(student, task, fixed, optimizer, stages=stages, axis_name=layout.axis_name)
            entries.append(Entry(name, method))
            continue
        loss = LOSSES["dln"](
            form=settings.dln_form, squash=settings.squash, reduction=settings.reduction, residual=settings.residual
        )
        loss = _checked(loss, name, classes)
        for protocol, learn, teacher_of in (("l2t_dln", True, None), ("l2t_dln_transfer", False, "l2t_dln")):
            method = l2t_dln(
                student,
                task,
                loss,
                build_teacher(config),
                optimizer,
                optax.adam(settings.teacher_lr),
                second_stage=settings.second_stage,
                reset_memory=settings.reset_memory,
                learn=learn,
                memory=config.memory,
                axis_name=layout.axis_name,
                at_once=layout.seeds,
            )
            entries.append(Entry(protocol, method, teacher_of))
    return entries


def _checked(loss: Loss, name: str, classes: int) -> Loss:
    try:
        check_loss(loss, classes, name)
    except LossError as error:
        raise UsageError(f"--method: {error}") from error
    return loss


def cli() -> None:
    """Entry point: quiet libraries, then absl."""
    logging.set_verbosity(logging.ERROR)  # tensorflow-datasets and orbax tell much; --verbosity=0 brings it back
    app.run(main, flags_parser=_flags.parse_arguments)


if __name__ == "__main__":
    cli()
