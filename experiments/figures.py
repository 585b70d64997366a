"""Draw the figures of finished runs from what they saved; nothing is trained.

  python -m experiments.figures --runs=runs/mine
  python -m experiments.figures --runs=runs/lstm,runs/adam --workdir=figures
  python -m experiments.figures --studies=experiments/results/study/residual,experiments/results/study/stable

For every run: the surfaces of the DLN through its training (Figure 3), learning curves, norms, and, where labels were
wrong, what the student made of them and how much of its gradient came from them (the poster). Several runs are also
drawn together, a curve for each run and method. --studies draws runs of experiments.study together. Pictures go to
--workdir (default figures), in a folder for each run. Records of what a hypergradient costs are drawn by
benchmarks.hypergradient_cost --replot.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments._command import reader, start
from l2t_jax.runs.config import UsageError
from l2t_jax.runs.records import Metrics, read_record
from l2t_jax.runs.reporting import draw, plot_curves
from l2t_jax.runs.study_pictures import draw as draw_study

flags.DEFINE_list("runs", [], "Run directories, comma separated; names of their last folders must differ.")
flags.DEFINE_list("studies", [], "Run directories of experiments.study, comma separated: drawn together.")
FLAGS = flags.FLAGS
flags.declare_key_flag("workdir")


def figures(runs: list[str], studies: list[str], folder: Path) -> list[Path]:
    """Draw all that is asked for; returns the pictures, in order.

    Raises:
      UsageError: nothing is asked for, or what is there is no finished run or no record.
    """
    if not runs and not studies:
        raise UsageError("there is nothing to draw: give --runs=DIR or --studies=DIR.")
    names = [Path(run).name for run in runs]
    for flag, found in (("runs", names), ("studies", [Path(study).name for study in studies])):
        if len(set(found)) < len(found):
            raise UsageError(f"--{flag} has two runs of one name ({', '.join(found)}): rename a directory.")
    summaries = [_read(Path(run) / "summary.json", "methods", "a finished run") for run in runs]
    for run, name, summary in zip(runs, names, summaries, strict=True):
        draw(summary, Path(run), folder / name)
    if len(runs) > 1:
        rows, observations = (
            [
                row | {"method": f"{name}: {row['method']}"}
                for run, name in zip(runs, names, strict=True)
                for row in Metrics.read(Path(run) / file)
            ]
            for file in ("metrics.jsonl", "observations.jsonl")
        )
        share = max(summary["config"]["wrong_labels"] for summary in summaries)
        plot_curves(folder, rows, observations, f"{len(runs)} runs", wrong_labels=share)  # named beside the curves
    if studies:
        about = [_read(Path(study) / "summary.json", "methods", "a finished run") for study in studies]
        rows_of = {Path(study).name: Metrics.read(Path(study) / "observations.jsonl") for study in studies}
        for name, rows in rows_of.items():
            if not rows or "agreement" not in rows[0]:
                raise UsageError(f"--studies: {name} is no run of experiments.study.")
        seen = [row | {"method": name} for name, rows in rows_of.items() for row in rows]
        folder.mkdir(parents=True, exist_ok=True)
        draw_study(folder, seen, f"{about[0]['dataset']}, {about[0]['student']}")
    return sorted(folder.rglob("*.png"))


def _read(path: Path, field: str, what: str) -> dict[str, Any]:
    try:
        record = read_record(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not there or not readable ({type(error).__name__}): name {what}.") from None
    if not isinstance(record, dict) or field not in record:
        raise UsageError(f"{path} is something else: name {what}.")
    return record


main = reader(lambda: figures(FLAGS.runs, FLAGS.studies, Path(FLAGS.workdir or "figures")))

if __name__ == "__main__":
    start(main)
