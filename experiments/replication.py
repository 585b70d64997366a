"""Does learning to teach pay? L2T-DLN against tuned losses and weights.

  python -m experiments.replication --dataset=digits --rounds=140
  python -m experiments.replication --dataset=mnist --data_dir=DIR --rounds=200

Three kinds of labels: right ones, 40 % flips to two classes, 60 % drawn anew; with wrong ones a clean, class-balanced
meta set is kept apart. L2T-DLN is as the preset (default: stable) is, on all data alike, with the LSTM and with Adam as
teachers, in both protocols. Cross entropy, generalized cross entropy and Meta-Weight-Net have the student's learning
rate, schedule and clipping that were best for each of them, on each data set and kind of labels, on held-out training
examples (TUNED below; experiments.tune). Same student, batches, number of student steps and seeds. A cell that is done
is kept. Writes records/ (a JSON file a cell) and table.md, with what was promised and whether it held, to --workdir
(default runs/replication_DATASET). The test set is read once for each seed.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from experiments import _flags
from experiments._command import command, start
from l2t_jax.runs.cells import cell_name, group_of, loader, run_cell
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.records import read_record
from l2t_jax.runs.reporting import result, tested_on
from l2t_jax.runs.tables import name_of, paired, probability, setup_of

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(_flags)
LABELS = {  # name: noise
    "clean": None,
    "flips": Noise("flip2", 0.4, None, 1),
    "uniform": Noise("uniform", 0.6, None, 1),
}
CE, GCE, MWN, DLN = "cross_entropy", "generalized_cross_entropy", "meta_weight_net", "l2t_dln"
Tuned = tuple[float, str, float]  # student_lr, student_schedule, student_clip
# (data set, student, labels) -> baseline -> the best by held-out accuracy
TUNED: dict[tuple[str, str, str], dict[str, Tuned]] = {
    ("digits", "mlp", "clean"): {CE: (0.3, "cosine", 0.3)},
    ("digits", "mlp", "flips"): {
        CE: (0.03, "cosine", 0.3),
        GCE: (0.03, "cosine", 0.3),
        MWN: (0.1, "constant", 0.0),
    },
    ("digits", "mlp", "uniform"): {
        CE: (0.03, "cosine", 0.3),
        GCE: (0.03, "cosine", 0.3),
        MWN: (0.3, "constant", 0.3),
    },
    ("mnist", "mlp", "clean"): {CE: (0.3, "cosine", 1.0)},
    ("mnist", "mlp", "flips"): {
        CE: (0.1, "cosine", 0.0),
        GCE: (0.3, "cosine", 0.0),
        MWN: (0.3, "constant", 0.0),
    },
    ("mnist", "mlp", "uniform"): {
        CE: (0.1, "cosine", 0.0),
        GCE: (0.3, "cosine", 0.0),
        MWN: (0.3, "constant", 0.0),
    },
}
LSTM, FROZEN = "L2T-DLN, LSTM, online", "L2T-DLN, LSTM, frozen"

Rows = dict[str, dict[str, Any]]  # name -> the method's part of a record
Found = dict[str, tuple[str, Rows, dict[str, Any]]]  # title -> kind of labels, rows, a record


def main(argv: list[str]) -> None:
    """Fill the table; bad input is one line and exit code 2, a seed that stopped early exit code 1."""
    command("replication", replicate, _prepare)


def _prepare() -> None:
    for name in ("method", "teacher"):
        if FLAGS[name].present:
            raise UsageError(f"--{name} is what the table goes over: leave it out.")
    if FLAGS.held_out:
        raise UsageError("--held_out is for choosing: use experiments.tune.")
    known = {f"--dataset={dataset} --student={student}": None for dataset, student, _ in TUNED}
    if (asked := f"--dataset={FLAGS.dataset} --student={FLAGS.student}") not in known:
        raise UsageError(f"{asked}: nothing was tuned for it; choose one of {', '.join(known)}.")
    _flags.set_defaults(seeds="5", workdir=f"runs/replication_{FLAGS.dataset}")


def replicate(config: Config, options: Options) -> int:
    """Run every cell that is not done, then write the table."""
    root, code = Path(options.workdir), 0
    for group, labels in groups(config):
        load = loader(group, options)
        for method, cell in cells(group, labels):
            code |= run_cell(_name(method, cell), group_of(cell), cell, options, load)
    (root / "table.md").write_text(markdown(recorded(root, config)))
    print(f"Files: {root} (table.md, records/)")
    return code


def recorded(root: Path, config: Config) -> Found:
    """What the records of a finished table say."""
    found: Found = {}
    for group, labels in groups(config):
        rows: Rows = {}
        for method, cell in cells(group, labels):
            record: dict[str, Any] = read_record(root / "records" / f"{_name(method, cell)}.json")
            teacher = {"lstm": "LSTM", "adam": "Adam"}[cell.teacher]
            taught = [f"L2T-DLN, {teacher}, {protocol}" for protocol in ("online", "frozen")]
            rows |= dict(zip(taught if method == DLN else [method], record["methods"].values(), strict=True))
        found[name_of(setup_of(record))] = labels, rows, record
    return found


def groups(config: Config) -> list[tuple[Config, str]]:
    """A config for every kind of labels, and the name of the kind."""
    kinds = [labels for dataset, student, labels in TUNED if (dataset, student) == (config.dataset, config.student)]
    return [(dataclasses.replace(config, noise=LABELS[labels]), labels) for labels in kinds]


def _name(method: str, cell: Config) -> str:
    """Of a cell's record."""
    return cell_name(group_of(cell), cell.teacher if method == DLN else "", method)


def cells(group: Config, labels: str) -> list[tuple[str, Config]]:
    """All runs of a kind of labels: (method, config)."""
    found = [(DLN, dataclasses.replace(group, methods=(DLN,), teacher=teacher)) for teacher in ("lstm", "adam")]
    for method, values in TUNED[group.dataset, group.student, labels].items():
        tuned: dict[str, Any] = dict(zip(("student_lr", "student_schedule", "student_clip"), values, strict=True))
        settings = dataclasses.replace(group.settings, **tuned)
        found.append((method, dataclasses.replace(group, methods=(method,), settings=settings)))
    return found


def markdown(found: Found) -> str:
    """The tables as text: a section for each kind of labels, the rows, then what was promised."""
    some = next(iter(found.values()))[2]
    lines = [
        "# L2T-DLN against tuned baselines",
        "",
        f"{tested_on(some['config']).capitalize()} accuracy in %, mean ± sample standard deviation over "
        f"{len(some['seeds'])} seeds, read once after the last step; {some['config']['rounds']} rounds of N = "
        f"{some['unroll_length']}, preset {some['preset']}. p: paired two-sided t test against L2T-DLN with the LSTM, "
        "online.",
        "",
    ]
    for title, (labels, rows, _) in found.items():
        ours = rows[LSTM]["score"]
        lines += [f"## {title}", "", "| method | accuracy | p | student steps | s a seed |", "|---|---|---|---|---|"]
        for name, row in rows.items():
            accuracy = row["score"]
            p = probability(paired(ours["per_seed"], accuracy["per_seed"]))
            seconds = f"{row['wall_time_s'] / len(accuracy['per_seed']):.0f}"
            lines.append(
                f"| {name} | {result(accuracy, len(row['failed']), some['metric'])} | {p} | {row['student_steps']} "
                f"| {seconds} |"
            )
        lines += ["", *(f"- {'held' if held else '**missed**'}: {what}" for what, held in promises(labels, rows)), ""]
    return "\n".join(lines)


def promises(labels: str, rows: Rows) -> list[tuple[str, bool]]:
    """What the recipe promised for a kind of labels, with the measured points, and whether it held."""
    mean = {name: 100 * (row["score"]["mean"] or 0.0) for name, row in rows.items()}
    found = [("no seed of L2T-DLN with the LSTM stops early", not (rows[LSTM]["failed"] or rows[FROZEN]["failed"]))]

    def beside(what: str, ours: str, others: list[str], least: float) -> None:
        best = max(others, key=lambda name: mean[name])
        apart = round(mean[ours] - mean[best], 4)  # accuracies are float32: equal ones may differ in the mean
        found.append((f"{ours}: {what} ({apart:+.2f} from {best})", apart >= least))

    adam = [name for name in rows if name.startswith("L2T-DLN, Adam")]
    for ours in (LSTM, FROZEN):
        if labels == "clean":
            pairs = zip(rows[ours]["score"]["per_seed"], rows[CE]["score"]["per_seed"], strict=True)
            least = min(100 * ((a or 0.0) - (b or 0.0)) for a, b in pairs)
            found.append((f"{ours}: no seed is more than 0.3 points below cross entropy ({least:+.2f})", least >= -0.3))
            beside("above cross entropy in the mean", ours, [CE], 1e-4)
        elif labels == "flips":
            beside("10 points above cross entropy", ours, [CE], 10.0)
            beside("not below generalized cross entropy", ours, [GCE], 0.0)
            beside("not below Meta-Weight-Net", ours, [MWN], 0.0)
        else:
            beside("at most 0.5 points below the best of the others", ours, [CE, GCE, MWN], -0.5)
    beside("not below the best optax teacher", FROZEN, adam, 0.0)
    return found


def cli() -> None:
    """Entry point."""
    start(main)


if __name__ == "__main__":
    cli()
