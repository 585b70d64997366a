"""What a run says at its end: the summary, the plots, the table. The test set is read here, once.

Legend: R rows.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from l2t_jax.losses.dln import Layer, surface
from l2t_jax.runs import examples, finals, pictures, plots
from l2t_jax.runs.records import Metrics, RunDirectory, load_arrays, write_json
from l2t_jax.runs.setting import Entry, Setting, first_state
from l2t_jax.runs.texts import ending, headline, name_of, shown
from l2t_jax.runs.training import Outcome
from l2t_jax.tasks import TASKS
from l2t_jax.tasks.evaluation import evaluate
from l2t_jax.types import PyTree

SURFACE_POINTS = 41
MOST_READ = 100_000  # examples that are not in memory, of more of which no row is written: all are read again for it
SUSPECTS = 0.1  # share of the examples of which it is said how many labels are wrong among the least trusted
OBSERVED = {  # see `l2t_jax.runs.observing`
    "memorised": "wrong labels learned, share",
    "recovered": "wrong labels seen through, share",
    "fitted": "right labels learned, share",
    "wrong_pull": "share of the gradient from wrong labels",  # as on the poster of L2T-DLN
}
Outcomes = dict[tuple[str, int], Outcome | str]  # a string where a run could not even begin


def report(
    setting: Setting,
    entries: list[Entry],
    outcomes: Outcomes,
    directory: RunDirectory,
    *,
    alone: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write summary.json, a record that stands for itself: results and what config.json holds; returns what it holds.

    The test set is read here, and what was learned is left in files. Where the run stands alone, and is no cell of a
    table, it is plotted too, and printed unless it is to be quiet.
    """
    summary = _summary(setting, entries, outcomes) | json.loads(directory.config_path.read_text())
    _leave(setting, entries, outcomes, directory.path, summary)
    write_json(directory.path / "summary.json", summary)
    if alone:
        draw(summary, directory.path, directory.plots_dir)
        lines = _illustrate(setting, entries, outcomes, directory)
        if not quiet:
            _print(summary, setting.options.workdir, lines, Metrics.read(directory.path / "observations.jsonl"))
    return summary


def _leave(setting: Setting, entries: list[Entry], outcomes: Outcomes, path: Path, summary: dict[str, Any]) -> None:
    """What was learned leaves with the run: final students, losses and teachers, a row for each training example."""
    finished = {
        key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Outcome) and not reason(outcome)
    }
    states = {key: outcome.state for key, outcome in finished.items()}
    finals.write(path, setting, states)
    labels = setting.dataset.train.get("labels")
    if not TASKS[setting.config.task].classes or np.ndim(labels) != 1:
        return
    if setting.parts.task.read and len(labels) > MOST_READ:
        return
    found = {}
    for entry in entries:
        if mine := [state for (name, _), state in states.items() if name == entry.name]:
            found[entry.name] = examples.describe(setting, entry, mine)
    examples.write(path / "examples.csv", setting.dataset, found)
    if "true" in setting.dataset.train:
        for name, rows in found.items():
            precision = examples.precision_among(rows, SUSPECTS)
            summary["methods"][name]["suspects"] = {"share": SUSPECTS, "precision": precision}


def _illustrate(setting: Setting, entries: list[Entry], outcomes: Outcomes, directory: RunDirectory) -> list[str]:
    """What students make of some test examples, of the first seed that finished: a picture, or lines to be shown."""
    for seed in setting.config.seeds:
        of_seed = {entry.name: outcomes[(entry.name, seed)] for entry in entries}
        ended = {
            name: outcome.state
            for name, outcome in of_seed.items()
            if isinstance(outcome, Outcome) and not reason(outcome)
        }
        if ended:
            begun = first_state(entries[0].method, seed, setting.inputs)
            pictures.draw(directory.plots_dir / "seen.png", setting, entries, begun, ended)
            return pictures.in_words(directory.path / "seen.txt", setting, begun, ended)
    return []


def reason(outcome: Outcome | str) -> str | None:
    """Why a run stopped early, if it did."""
    if isinstance(outcome, str):
        return outcome
    return None if outcome.failure is None else str(outcome.failure)


def _summary(setting: Setting, entries: list[Entry], outcomes: Outcomes) -> dict[str, Any]:
    config, plan, metric = setting.config, setting.parts.plan, setting.parts.task.metric
    # Examples that are read on the host stay there.
    test = setting.dataset.test if setting.parts.task.read else jax.device_put(setting.dataset.test)
    methods = {}
    for entry in entries:
        results = [(seed, outcomes[(entry.name, seed)]) for seed in config.seeds]
        scores = [_scores(setting, outcome, test) for _, outcome in results]
        methods[entry.name] = {
            "score": statistics([None if found is None else found[metric.name] for found in scores]),
            "scores": {
                name: statistics([None if found is None else found[name] for found in scores])
                for name in sorted(set().union(*(found for found in scores if found)))
            },
            "student_steps": plan.rounds * plan.of(entry.method.stages).unroll_length * entry.method.steps_per_round,
            "learned_parameters": _learned(setting, entry),
            "rounds": setting.rounds_of(entry),
            "wall_time_s": sum(outcome.wall_time_s for _, outcome in results if isinstance(outcome, Outcome)),
            "failed": [{"seed": seed, "reason": why} for seed, outcome in results if (why := reason(outcome))],
        }
    return {
        "methods": methods,
        "metric": metric._asdict(),
        "baseline": setting.parts.baseline,
        "dataset": config.dataset,
        "student": config.student,
        "student_parameters": _parameters(setting),
        "preset": config.preset,
        "teacher": config.teacher,
        "unroll_length": plan.unroll_length,
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


def _scores(setting: Setting, outcome: Outcome | str, test: PyTree) -> dict[str, float] | None:
    if reason(outcome) or isinstance(outcome, str):
        return None
    return evaluate(setting.parts.student, outcome.state.student.variables, test, setting.parts.task)


def _learned(setting: Setting, entry: Entry) -> dict[str, int]:
    """How many numbers the loss and the teacher of a method have."""
    state = jax.eval_shape(entry.method.init, jax.random.key(0), setting.inputs)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    return {"loss": count(state.loss), "teacher": count(state.teacher)}


def _parameters(setting: Setting) -> int:
    variables = jax.eval_shape(setting.parts.student.init, jax.random.key(0), setting.inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def draw(record: dict[str, Any], run: Path, folder: Path) -> None:
    """Draw all pictures of a finished run from what it saved.

    Args:
      record: its summary.json.
      run: its directory.
      folder: where the pictures go.
    """
    rows, observations = Metrics.read(run / "metrics.jsonl"), Metrics.read(run / "observations.jsonl")
    what = f"{record['dataset']}, {record['student']}, preset {record['preset']}"
    plot_curves(folder, rows, observations, what, wrong_labels=record["config"]["wrong_labels"])
    norms = {
        f"{method}: {name.replace('_', ' ')}": curve
        for name in ("hypergradient_norm", "dln_update_norm", "teacher_gradient_norm")
        for method, curve in curves(rows, name).items()
        if np.nanmax(curve[1], initial=0) > 0
    }
    if norms:
        plots.norms(folder / "norms.png", norms, title=f"{what}: norms")
    ends: list[tuple[str, Any]] = []
    config = record["config"]
    added = " (added to cross entropy)" if config["settings"]["residual"] else ""
    for snapshots in sorted((run / "snapshots").glob("l2t_dln*/seed_*")):  # other losses are not of two predictions
        method, seed = snapshots.parent.name, snapshots.name
        if surfaces := surfaces_of(config, snapshots):
            title = f"DLN{added}: {method}, {seed.replace('_', ' ')}"
            plots.loss_surfaces(folder / f"surfaces_{method}_{seed}.png", surfaces, title=title)
            ends = ends or [(f"what the DLN {'adds to cross entropy' if added else 'is'}", surfaces[-1][1])]
    _draw_overview(folder, name_of(record), rows, observations, ends)


def plot_curves(
    folder: Path,
    rows: list[dict[str, Any]],
    observations: list[dict[str, Any]],
    what: str,
    *,
    prefix: str = "",
    wrong_labels: float = 0.0,
) -> None:
    """Draw the validation curves of the methods and, where labels are wrong, what the students did with them."""
    names = {name for row in rows for name in row if name.startswith("validation_")}
    entries = {
        f"{method}: {name.removeprefix('loss_')}": curve
        for name in sorted({name for row in rows for name in row if name.startswith("loss_")})
        for method, curve in curves(rows, name).items()
        if np.nanmax(np.abs(curve[1] - curve[1][:, :1])) > 0  # nothing moves a constant that is added
    }
    if entries:
        title = f"{what}: parameters of the taught loss"
        plots.learning_curves(folder / f"{prefix}loss.png", entries, ylabel="value", title=title, log_y=False)
    for name in sorted(names - {"validation_error_stage_one"}):
        label = name.replace("_", " ")
        title, log_y = f"{what}: {label} while training", name == "validation_error"
        plots.learning_curves(
            folder / f"{prefix}{name}.png", curves(rows, name), ylabel=label, title=title, log_y=log_y
        )
    for name, label in OBSERVED.items():
        found = curves(observations, name)
        if found and name == "wrong_pull":
            ends = np.asarray([0, max(x[-1] for x, _ in found.values())])
            found["their share of the labels"] = ends, np.full((1, 2), wrong_labels)
        if found:
            plots.learning_curves(
                folder / f"{prefix}{name}.png", found, ylabel=label, title=f"{what}: {label}", log_y=False
            )


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


def surfaces_of(config: dict[str, Any], snapshots: Path) -> list[tuple[str, Any]]:
    """The DLN at the moments of a run that were kept: when, and its values [G, G]; none if the loss is another."""
    surfaces: list[tuple[str, Any]] = []
    paths = {int(path.stem.removeprefix("round_")): path for path in sorted(snapshots.glob("round_*.npz"))}
    rounds = max(1, config["rounds"])
    before = max(paths, default=0) // rounds - 1  # lives that ended before the one that is shown
    for moment, path in paths.items():
        done = moment - max(before, 0) * rounds if moment else 0
        percentage = f"{100 * done / rounds:.0f} % (round {done})"
        share = {0: "start", rounds: "end"}.get(done, percentage)
        arrays = load_arrays(path)
        if "0/kernel" not in arrays:  # what another task teaches in the DLN's place
            return []
        depth = sum(name.endswith("/kernel") for name in arrays)
        layers = [
            Layer(jnp.asarray(arrays[f"{i}/kernel"]), jnp.asarray(arrays[f"{i}/bias"]) if f"{i}/bias" in arrays else ())
            for i in range(depth)
        ]
        compress = config["settings"].get("compress", 0.0)  # older records lack it
        surfaces.append((share, np.asarray(surface(layers, config["settings"]["squash"], SURFACE_POINTS, compress))))
    return surfaces


def _draw_overview(
    folder: Path, what: str, rows: list[dict[str, Any]], observations: list[dict[str, Any]], surfaces: list[Any]
) -> None:
    """One picture of what came out, for a slide."""
    panels = {"validation accuracy": curves(rows, "validation_accuracy")} if rows else {}
    if not any(panels.values()):
        panels = {"validation error": curves(rows, "validation_error")}
    panels[OBSERVED["memorised"]] = curves(observations, "memorised")
    panels = {label: found for label, found in panels.items() if found}
    if len(panels) + len(surfaces) > 1:
        plots.overview(folder / "overview.png", panels, surfaces, title=what)


def _print(summary: dict[str, Any], workdir: str, lines: list[str], observations: list[dict[str, Any]]) -> None:
    seeds = ", ".join(map(str, summary["seeds"]))
    table = Table(title=f"{name_of(summary)}, preset {summary['preset']}, seeds {seeds}")
    for column in ("method", headline(summary), "student steps", "wall time, s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, method in summary["methods"].items():
        table.add_row(
            name,
            shown(method["score"], summary["metric"]),
            str(method["student_steps"]),
            f"{method['wall_time_s']:.1f}",
        )
    console = Console()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for name, method in summary["methods"].items():
        for failed in method["failed"]:
            console.print(
                f"{name}, seed {failed['seed']} did not finish: {failed['reason']}", highlight=False, soft_wrap=True
            )
    for line in ending(summary, observations):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Files: {workdir} (plots/overview.png first; summary.json, metrics.jsonl, config.json, final/, checkpoints/)",
        highlight=False,
        soft_wrap=True,
    )
