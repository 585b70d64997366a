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
from experiments._command import command, refuse, start
from l2t_jax.runs import tables
from l2t_jax.runs.cells import Cell, cell_name, group_of, loader, run_cells
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.tables import Column, Record, Row, Section, Table, words
from l2t_jax.runs.texts import name_of

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


def _prepare() -> None:
    for name in ("method", "teacher"):
        refuse(name, "what the table goes over: leave it out.")
    if FLAGS.held_out:
        raise UsageError("--held_out is for choosing: use experiments.tune.")
    known = {f"--dataset={dataset} --student={student}": None for dataset, student, _ in TUNED}
    dataset, student = _flags.given("dataset"), _flags.given("student")
    if (asked := f"--dataset={dataset} --student={student}") not in known:
        raise UsageError(f"{asked}: nothing was tuned for it; choose one of {', '.join(known)}.")
    _flags.set_table_defaults(seeds="5", workdir=f"runs/replication_{dataset}")


def fill(config: Config, options: Options) -> int:
    """Run every cell that is not done, then write the table."""
    records: dict[str, Record] = {}
    code = 0
    for group, labels in groups(config):
        found, failed = run_cells(cells(group, labels), options, loader(group, options))
        records, code = records | found, code | failed
    tables.write(Path(options.workdir), table(config, records), "records/")
    return code


def groups(config: Config) -> list[tuple[Config, str]]:
    """A config for every kind of labels, and the name of the kind."""
    kinds = [labels for dataset, student, labels in TUNED if (dataset, student) == (config.dataset, config.student)]
    return [(dataclasses.replace(config, noise=LABELS[labels]), labels) for labels in kinds]


def cells(group: Config, labels: str) -> list[Cell]:
    """All runs of a kind of labels."""
    where = group_of(group)
    found = []
    for teacher in ("lstm", "adam"):
        taught = dataclasses.replace(group, methods=(DLN,), teacher=teacher)
        found.append(Cell(cell_name(where, teacher, DLN), where, taught))
    for method, values in TUNED[group.dataset, group.student, labels].items():
        tuned: dict[str, Any] = dict(zip(("student_lr", "student_schedule", "student_clip"), values, strict=True))
        settings = dataclasses.replace(group.settings, **tuned)
        config = dataclasses.replace(group, methods=(method,), settings=settings)
        found.append(Cell(cell_name(where, method), where, config))
    return found


def table(config: Config, records: dict[str, Record]) -> Table:
    """A section for each kind of labels: the rows, then what was promised."""
    some = next(iter(records.values()))
    return Table(
        title="L2T-DLN against tuned baselines",
        intro=f"{tables.measured(some)}, read once after the last step; {some['config']['rounds']} rounds of N = "
        f"{some['unroll_length']}, preset {some['preset']}. p: paired two-sided t test against L2T-DLN with the LSTM, "
        "online.",
        sections=[section(labels, rows(cells(group, labels), records)) for group, labels in groups(config)],
    )


def section(labels: str, found: dict[str, Row]) -> Section:
    """The rows of a kind of labels, compared with L2T-DLN with the LSTM, online."""
    ours = found[LSTM]
    columns = [
        Column("method", lambda row: row.name),
        tables.scores(ours.record["metric"]["name"]),
        tables.differences()[1],
        tables.STEPS,
        tables.SECONDS,
    ]
    compared = [row._replace(compared=(ours.score,)) for row in found.values()]
    after = [f"- {'held' if held else '**missed**'}: {what}" for what, held in promises(labels, found)]
    return Section(columns, compared, name_of(ours.record), after="\n".join(after))


def rows(group: list[Cell], records: dict[str, Record]) -> dict[str, Row]:
    """By name, in the order of the cells; L2T-DLN has one for each protocol."""
    found = {}
    for cell in group:
        record, teacher = records[cell.name], {"lstm": "LSTM", "adam": "Adam"}[cell.config.teacher]
        for method in record["methods"]:
            protocol = {DLN: "online", f"{DLN}_transfer": "frozen"}.get(method)
            name = f"L2T-DLN, {teacher}, {protocol}" if protocol else method
            found[name] = Row(name, record, method)
    return found


def promises(labels: str, rows: dict[str, Row]) -> list[tuple[str, bool]]:
    """What the recipe promised for a kind of labels, with the measured points, and whether it held."""
    scale = tables.worth(rows[LSTM].record)
    mean = {name: scale * (row.score["mean"] or 0.0) for name, row in rows.items()}
    failed = rows[LSTM].outcome["failed"] or rows[FROZEN].outcome["failed"]
    found = [("no seed of L2T-DLN with the LSTM stops early", not failed)]

    def beside(what: str, ours: str, others: list[str], least: float) -> None:
        best = max(others, key=lambda name: mean[name])
        apart = round(mean[ours] - mean[best], 4)  # accuracies are float32: equal ones may differ in the mean
        found.append((f"{ours}: {what} ({apart:+.2f} from {best})", apart >= least))

    adam = [name for name in rows if name.startswith("L2T-DLN, Adam")]
    for ours in (LSTM, FROZEN):
        if labels == "clean":
            pairs = zip(rows[ours].score["per_seed"], rows[CE].score["per_seed"], strict=True)
            least = min(scale * ((a or 0.0) - (b or 0.0)) for a, b in pairs)
            found.append((f"{ours}: no seed is more than 0.3 points below {words(CE)} ({least:+.2f})", least >= -0.3))
            beside(f"above {words(CE)} in the mean", ours, [CE], 1e-4)
        elif labels == "flips":
            beside(f"10 points above {words(CE)}", ours, [CE], 10.0)
            beside("not below generalized cross entropy", ours, [GCE], 0.0)
            beside("not below Meta-Weight-Net", ours, [MWN], 0.0)
        else:
            beside("at most 0.5 points below the best of the others", ours, [CE, GCE, MWN], -0.5)
    beside("not below the best optax teacher", FROZEN, adam, 0.0)
    return found


main = command("replication", fill, _prepare, task="classification")

if __name__ == "__main__":
    start(main)
