"""Run methods over seeds, keep everything in a run directory, and report: what every experiment shares.

Legend: G grid points of a surface's axis.
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments._flags import Config, Options
from l2t_jax import plots
from l2t_jax.checkpoints import Checkpoints
from l2t_jax.data import Dataset
from l2t_jax.losses.dln import Layer, pair_value
from l2t_jax.progress import RunProgress
from l2t_jax.records import (
    Metrics,
    RunDirectory,
    load_arrays,
    open_run,
    require_tensorboard,
    save_arrays,
    tensorboard_writer,
    write_json,
)
from l2t_jax.tasks.evaluation import evaluate
from l2t_jax.training import Outcome, Run, Schedule, compile_rounds, train
from l2t_jax.types import Array, Method, MethodState, Student, Task

FRESH, TRANSFER = 1, 2  # what the key of a seed is folded with to initialise a run; 0 is the order of random draws
SURFACE_POINTS = 41


class Entry(NamedTuple):
    """A row of the table: a method, and whose trained teacher it takes over, if any."""

    name: str
    method: Method
    teacher_of: str | None = None


class Setting(NamedTuple):
    """What all entries of one experiment share."""

    config: Config
    options: Options
    dataset: Dataset
    student: Student
    task: Task
    schedule: Schedule


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second run starts fast; JAX_COMPILATION_CACHE_DIR moves them."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2t_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def example_inputs(dataset: Dataset) -> Array:
    """Inputs [2, H, W, c] of the right shape, for a student's initialisation."""
    return jnp.zeros((2, *dataset.train_images.shape[1:]))


def run_entries(setting: Setting, entries: list[Entry]) -> int:
    """Train every entry for every seed, evaluate on the test set once, write the records, print the table.

    summary.json is a record that stands for itself: results, and what config.json holds.

    Returns:
      the exit code: 0, or 1 where any seed of any entry stopped early.
    """
    config, options = setting.config, setting.options
    if options.tensorboard:
        require_tensorboard()
    record = dataclasses.asdict(config) | {
        "rounds": setting.schedule.rounds,
        "dataset_sha256": setting.dataset.sha256,
    }
    directory = open_run(options.workdir, record, options.resume)
    pairs = [(entry.name, seed) for entry in entries for seed in config.seeds]
    outcomes: dict[tuple[str, int], Outcome | str] = {}
    with RunProgress(pairs, setting.schedule.rounds) as progress, _shown(progress.line):
        progress.line(f"{config.dataset}, {config.student}, preset {config.preset}; files go to {options.workdir}")
        for entry in entries:
            outcomes |= _train_entry(setting, entry, directory, progress, outcomes)
    summary = _summary(setting, entries, outcomes) | json.loads(directory.config_path.read_text())
    write_json(directory.path / "summary.json", summary)
    _plot(setting, directory)
    _print(summary, options.workdir)
    return int(any(method["failed"] for method in summary["methods"].values()))


@contextlib.contextmanager
def _shown(line: Callable[[str], None]) -> Iterator[None]:
    """Show what the library logs, each message once: the choice of a memory mode."""
    seen: set[str] = set()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message not in seen:
                seen.add(message)
                line(message)

    library, lines = logging.getLogger("l2t_jax"), Lines()
    before = library.level, library.propagate
    library.addHandler(lines)
    library.setLevel(logging.INFO)
    library.propagate = False  # the root logger's handlers would write into the progress bars
    try:
        yield
    finally:
        library.removeHandler(lines)
        library.setLevel(before[0])
        library.propagate = before[1]


def _train_entry(
    setting: Setting,
    entry: Entry,
    directory: RunDirectory,
    progress: RunProgress,
    earlier: dict[tuple[str, int], Outcome | str],
) -> dict[tuple[str, int], Outcome | str]:
    """Train one entry for every seed; an outcome is a string where the run could not even begin."""
    dataset = setting.dataset
    data = jax.device_put({"images": dataset.train_images, "labels": dataset.train_labels})
    execute = compile_rounds(entry.method, setting.task, dataset.augment)
    inputs = example_inputs(dataset)
    outcomes: dict[tuple[str, int], Outcome | str] = {}
    for seed in setting.config.seeds:
        stream = FRESH if entry.teacher_of is None else TRANSFER
        state = entry.method.init(jax.random.fold_in(jax.random.key(seed), stream), inputs)
        if entry.teacher_of is not None:
            taught = earlier[(entry.teacher_of, seed)]
            if isinstance(taught, str) or taught.failure is not None:
                outcomes[(entry.name, seed)] = f"there is no trained teacher, since {entry.teacher_of} stopped early"
                progress.end(entry.name, seed)
                continue
            state = state._replace(teacher=taught.state.teacher)
        checkpoints = Checkpoints(directory.checkpoints_dir(entry.name, seed))
        run = _run(setting, entry.name, seed, state, checkpoints, directory, progress)
        outcome = train(run, setting.schedule, execute, data)
        checkpoints.close()
        if outcome.failure is not None:
            progress.line(f"{entry.name}, seed {seed} stopped at {outcome.failure}; its last good checkpoint is kept")
            progress.end(entry.name, seed)
        outcomes[(entry.name, seed)] = outcome
    return outcomes


def _run(
    setting: Setting,
    name: str,
    seed: int,
    state: MethodState,
    checkpoints: Checkpoints,
    directory: RunDirectory,
    progress: RunProgress,
) -> Run:
    snapshots = directory.snapshots_dir / name / f"seed_{seed}"
    learned = bool(jax.tree.leaves(state.loss))

    def snapshot(done: int, state: MethodState) -> None:
        if learned:
            snapshots.mkdir(parents=True, exist_ok=True)
            save_arrays(snapshots / f"round_{done:06d}.npz", state.loss)

    def forget(done: int) -> None:
        directory.metrics.truncate(lambda row: (row["method"], row["seed"]) != (name, seed) or row["round"] < done)

    def show(done: int, row: dict[str, Any] | None) -> None:
        progress.update(name, seed, done, None if row is None else row["validation_error"])

    rounds = setting.schedule.rounds
    return Run(
        name=name,
        seed=seed,
        state=state,
        checkpoints=checkpoints,
        write=_writer(setting.options, directory, name, seed),
        forget=forget,
        snapshot=snapshot,
        snapshot_rounds=tuple(sorted({0, rounds // 5, rounds // 2, rounds})),  # as in Figure 3: start, 20 %, 50 %, end
        progress=show,
        report=progress.line,
        checkpoint_seconds=setting.options.checkpoint_seconds,
    )


def _writer(options: Options, directory: RunDirectory, name: str, seed: int) -> Callable[[list[dict[str, Any]]], None]:
    if not options.tensorboard:
        return directory.metrics.append
    boards: list[Any] = []

    def write(rows: list[dict[str, Any]]) -> None:
        directory.metrics.append(rows)
        if not boards:  # rows before the first one stand in the events of the interrupted run
            where = directory.path / "tensorboard" / name / f"seed_{seed}"
            boards.append(tensorboard_writer(where, purge_step=rows[0]["round"]))
        for row in rows:
            for key in set(row) - {"method", "seed", "round", "epoch", "finite"}:
                boards[0].add_scalar(key, row[key], row["round"])
        boards[0].flush()

    return write


def _summary(setting: Setting, entries: list[Entry], outcomes: dict[tuple[str, int], Outcome | str]) -> dict[str, Any]:
    config, schedule = setting.config, setting.schedule
    test = jax.device_put({"images": setting.dataset.test_images, "labels": setting.dataset.test_labels})
    methods = {}
    for entry in entries:
        results = [(seed, outcomes[(entry.name, seed)]) for seed in config.seeds]
        methods[entry.name] = {
            "test_accuracy": statistics([_test_accuracy(setting, outcome, test) for _, outcome in results]),
            "student_steps": schedule.rounds * schedule.unroll_length * entry.method.steps_per_round,
            "rounds": schedule.rounds,
            "wall_time_s": sum(outcome.wall_time_s for _, outcome in results if isinstance(outcome, Outcome)),
            "failed": [{"seed": seed, "reason": reason} for seed, outcome in results if (reason := _reason(outcome))],
        }
    return {
        "methods": methods,
        "dataset": config.dataset,
        "student": config.student,
        "student_parameters": _parameters(setting),
        "preset": config.preset,
        "teacher": config.teacher,
        "unroll_length": schedule.unroll_length,
        "seeds": list(config.seeds),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def statistics(per_seed: list[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds that finished; None where there are too few of them."""
    values = [value for value in per_seed if value is not None]
    return {
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "per_seed": per_seed,
    }


def _test_accuracy(setting: Setting, outcome: Outcome | str, test: dict[str, Any]) -> float | None:
    if _reason(outcome) or isinstance(outcome, str):
        return None
    return float(evaluate(setting.student, outcome.state.student.variables, test, setting.task)["accuracy"])


def _reason(outcome: Outcome | str) -> str | None:
    if isinstance(outcome, str):
        return outcome
    return None if outcome.failure is None else str(outcome.failure)


def _parameters(setting: Setting) -> int:
    variables = jax.eval_shape(setting.student.init, jax.random.key(0), example_inputs(setting.dataset))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def _plot(setting: Setting, directory: RunDirectory) -> None:
    directory.plots_dir.mkdir(exist_ok=True)
    rows = Metrics.read(directory.metrics.path)
    what = f"{setting.config.dataset}, {setting.config.student}, preset {setting.config.preset}"
    for name, label in (
        ("validation_error", "validation error"),
        ("validation_accuracy", "validation accuracy"),
    ):
        plots.learning_curves(
            directory.plots_dir / f"{name}.png",
            curves(rows, name),
            ylabel=label,
            title=f"{what}: {label} of the re-divided split",
            log_y=name == "validation_error",
        )
    norms = {
        f"{method}: {name.replace('_', ' ')}": curve
        for name in ("hypergradient_norm", "dln_update_norm", "teacher_gradient_norm")
        for method, curve in curves(rows, name).items()
        if np.nanmax(curve[1], initial=0) > 0
    }
    if norms:
        plots.norms(directory.plots_dir / "norms.png", norms, title=f"{what}: norms")
    for folder in sorted(directory.snapshots_dir.glob("*/seed_*")):
        _plot_surfaces(setting, directory, folder)


def curves(rows: list[dict[str, Any]], name: str) -> plots.Curves:
    """Gather one metric by method: student steps [R], values [seeds, R] with NaN where a seed stopped early."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for row in rows:
        if row.get(name) is not None:
            found.setdefault(row["method"], {}).setdefault(row["seed"], {})[row["student_steps"]] = row[name]
    gathered: plots.Curves = {}
    for method, by_seed in found.items():
        steps = sorted(set().union(*by_seed.values()))
        values = [[series.get(step, np.nan) for step in steps] for series in by_seed.values()]
        gathered[method] = (np.asarray(steps), np.asarray(values, dtype=float))
    return gathered


def _plot_surfaces(setting: Setting, directory: RunDirectory, folder: Path) -> None:
    right, wrong = jnp.meshgrid(*(jnp.linspace(0, 1, SURFACE_POINTS),) * 2, indexing="ij")  # [G, G]
    surfaces: list[tuple[str, Any]] = []
    for path in sorted(folder.glob("round_*.npz")):
        done = int(path.stem.removeprefix("round_"))
        percentage = f"{100 * done / setting.schedule.rounds:.0f} % (round {done})"
        share = {0: "start", setting.schedule.rounds: "end"}.get(done, percentage)
        arrays = load_arrays(path)
        depth = sum(name.endswith("/kernel") for name in arrays)
        layers = [
            Layer(jnp.asarray(arrays[f"{i}/kernel"]), jnp.asarray(arrays[f"{i}/bias"]) if f"{i}/bias" in arrays else ())
            for i in range(depth)
        ]
        surfaces.append((share, np.asarray(pair_value(layers, right, wrong))))
    added = " (added to cross entropy)" if setting.config.settings.residual else ""
    name = f"surfaces_{folder.parent.name}_{folder.name}.png"
    title = f"DLN{added}: {folder.parent.name}, {folder.name.replace('_', ' ')}"
    plots.loss_surfaces(directory.plots_dir / name, surfaces, title=title)


def _print(summary: dict[str, Any], workdir: str) -> None:
    seeds = ", ".join(map(str, summary["seeds"]))
    table = Table(title=f"{summary['dataset']}, {summary['student']}, preset {summary['preset']}, seeds {seeds}")
    for column in ("method", "test accuracy, %", "student steps", "wall time, s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, method in summary["methods"].items():
        table.add_row(
            name, percent(method["test_accuracy"]), str(method["student_steps"]), f"{method['wall_time_s']:.1f}"
        )
    console = Console()
    console.print(table)
    for name, method in summary["methods"].items():
        for failed in method["failed"]:
            console.print(
                f"{name}, seed {failed['seed']} did not finish: {failed['reason']}", highlight=False, soft_wrap=True
            )
    console.print(
        f"Files: {workdir} (summary.json, metrics.jsonl, config.json, plots/, checkpoints/)",
        highlight=False,
        soft_wrap=True,
    )


def percent(accuracy: dict[str, Any]) -> str:
    """Write statistics of fractions as percentages, `97.22 ± 0.23`."""
    if accuracy["mean"] is None:
        return "-"
    spread = "" if accuracy["std"] is None else f" ± {100 * accuracy['std']:.2f}"
    return f"{100 * accuracy['mean']:.2f}{spread}"
