"""The ablations of L2T-DLN: one setting at a time, L2T-DLN and cross entropy at each of its values.

  python -m experiments.ablations --table=4     validation ratio (Table 4)
  python -m experiments.ablations --table=5     unroll length (Table 5), at equal rounds and at equal student steps
  python -m experiments.ablations --table=6     the optimizer of the DLN (Table 6)
  python -m experiments.ablations --table=lr    wrong learning rates of the student, which the paper announces
  python -m experiments.ablations --table=options    what each option of the preset stable is worth, one at a time
  python -m experiments.ablations --table=cost       what makes teaching cheaper, at equal student steps
  python -m experiments.ablations --table=5 --dataset=cifar10 --data_dir=DIR --student=resnet8 --rounds=2500

Table 5 of the paper keeps the number of rounds, so that a longer unroll is also a longer training; both are run here.
A cell that is done is kept: after an interruption give the same command again. Writes records/ (a JSON file a cell),
table.md and pictures to --workdir (default runs/ablation_TABLE). The test set is read once for each seed.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments import _flags, _labels, _noise, _settings, _table_flag
from experiments._command import command, refuse, start
from l2t_jax.presets import Preset
from l2t_jax.runs import plots, tables
from l2t_jax.runs.cells import Cell, cell_name, group_of, loader, run_cells
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.setting import build_plan
from l2t_jax.runs.tables import Column, Record, Row, Section, Table, baseline_of, words, written
from l2t_jax.runs.texts import headline, name_of, points

ONLINE, FROZEN = "l2t_dln", "l2t_dln_transfer"


class Ablation(NamedTuple):
    """One table."""

    setting: str  # a field of `Preset`, teacher, or option, whose values are NAME=VALUE
    values: tuple[Any, ...]
    published: dict[Any, float]  # %, of L2T-DLN with ResNet-8 on CIFAR-10
    equal: tuple[str, ...] = ("rounds",)  # what is the same at all values: rounds, (student) steps


AS_IT_IS = "as it is"
ABLATIONS = {
    "4": Ablation(
        "validation_ratio", (0.1, 0.25, 0.5, 0.75, 0.9), {0.1: 90.41, 0.25: 90.53, 0.5: 90.70, 0.75: 90.68, 0.9: 90.35}
    ),
    "5": Ablation(
        "unroll_length",
        (1, 5, 10, 15, 25, 50, 75),
        {1: 81.40, 5: 87.07, 10: 89.95, 15: 90.18, 25: 90.70, 50: 90.73, 75: 90.74},
        ("rounds", "steps"),
    ),
    # The table's image is lost: from the differences that the text gives.
    "6": Ablation(
        "teacher",
        ("lstm", "adam", "sgd", "rmsprop"),
        {"lstm": 90.70, "adam": 90.22, "sgd": 89.10, "rmsprop": 90.17},
    ),
    "lr": Ablation("student_lr", (0.001, 0.01, 0.03, 0.1, 0.3, 1.0), {}),
    "options": Ablation(  # of `stable`, one at a time otherwise; for others there is experiments.tune
        "option",
        (
            AS_IT_IS,
            "residual=false",
            "squash=sigmoid",
            "window=0",
            "odd=false",
            "silent=false",
            "student_clip=0",
            "student_schedule=constant",
            "dln_lr=0.001",
            "compress=0",
            "teacher_schedule=constant",
        ),
        {},
    ),
    "cost": Ablation(
        "option",
        (
            AS_IT_IS,
            "units=20-20",
            "units=8",
            "teach_every=2",
            "teach_every=5",
            "unroll_length=5",
            "unroll_length=5,teach_every=5",
            "unroll_length=5,teach_every=5,units=20-20",
            "unroll_length=5,teach_every=10,units=20-20",
            "unroll_length=5,teach_every=5,units=8",
        ),
        {},
        ("steps",),
    ),
}

Found = dict[Any, Record]  # value -> record

FLAGS = flags.FLAGS
for module in (_labels, _flags, _noise, _table_flag):
    flags.adopt_module_key_flags(module)


def _prepare() -> Noise | None:
    chosen = _table_flag.table(ABLATIONS)
    methods = (ONLINE, _flags.spec().baseline)
    refuse("method", f"{' and '.join(methods)} here, which are compared: leave it out.")
    _flags.set_table_defaults(method=",".join(methods), seeds="5", workdir=f"runs/ablation_{chosen}")
    return _labels.noise()


def fill(config: Config, options: Options) -> int:
    """Run every cell that is not done, then write the table and the pictures."""
    ablation, root, load = ABLATIONS[FLAGS.table], Path(options.workdir), loader(config, options)
    if ablation.setting == "validation_ratio" and load(config.dataset).meta:
        raise UsageError("a meta set kept apart validates, whatever the ratio: give --meta=0 to divide the noisy set.")
    config = dataclasses.replace(config, rounds=build_plan(config, load(config.dataset)).rounds)
    named = {equal: cells(config, ablation, equal) for equal in ablation.equal}
    records, code = run_cells([cell for found in named.values() for cell in found.values()], options, load)
    found = {equal: {value: records[cell.name] for value, cell in of.items()} for equal, of in named.items()}
    pictures = [f"equal_{equal}.png" for equal in ablation.equal]
    for equal, picture in zip(ablation.equal, pictures, strict=True):
        draw(root / picture, ablation, equal, found[equal])
    tables.write(root, table(ablation, found), *pictures, "records/")
    return code


def cells(config: Config, ablation: Ablation, equal: str) -> dict[Any, Cell]:
    """Of each value."""
    where = group_of(config)
    return {
        value: Cell(
            cell_name(where, ablation.setting, value, "equal", equal),
            f"{where}, {ablation.setting} {value}, equal {equal}",
            varied(config, ablation, equal, value),
        )
        for value in ablation.values
    }


def varied(config: Config, ablation: Ablation, equal: str, value: Any) -> Config:
    """A config, whose rounds are given, with one value of an ablation."""
    if ablation.setting == "teacher":
        return dataclasses.replace(config, teacher=value)
    assert config.rounds is not None
    given = {ablation.setting: value}
    if ablation.setting == "option":
        given = {} if value == AS_IT_IS else _settings.parse_settings("table", value)
    other = _settings.with_settings(config, given)
    steps = config.rounds * steps_of(config.settings)
    rounds = config.rounds if equal == "rounds" else max(1, round(steps / steps_of(other.settings)))
    return dataclasses.replace(other, rounds=rounds)


def steps_of(settings: Preset) -> int:
    """Student steps of a round, in stages of the same number."""
    return settings.unroll_length * settings.teach_every


def table(ablation: Ablation, found: dict[str, Found]) -> Table:
    """A section for what is held equal, a row for each value."""
    some = found[ablation.equal[0]][ablation.values[0]]
    source = " Published: L2T-DLN with a ResNet-8 on CIFAR-10." if published(ablation, some) else ""
    several = len(ablation.equal) > 1
    return Table(
        title=f"Ablation: {words(ablation.setting)}",
        intro=f"{tables.measured(some)}; {_what(ablation, some)}. Difference and p: L2T-DLN online\n"
        f"against {words(baseline_of(some))} over the same seeds, paired two-sided t test.{source}",
        sections=[
            Section(columns(ablation, some), rows(found[equal]), f"At equal {equal}" if several else "")
            for equal in ablation.equal
        ],
        rule=" --- ",
    )


def columns(ablation: Ablation, record: Record) -> list[Column]:
    """What is said of L2T-DLN online and of the others of its record."""
    values = {written(value): number for value, number in published(ablation, record).items()}
    return [
        Column(words(ablation.setting), lambda row: row.name),
        tables.scores("L2T-DLN, online"),
        tables.scores("transfer", FROZEN),
        tables.scores(words(baseline_of(record)), baseline_of(record)),
        *tables.differences(),
        tables.STEPS,
        Column("s a round", _seconds) if "rounds" in ablation.equal else tables.SECONDS,
        tables.published(lambda row: values.get(row.name), ".2f"),
    ]


def rows(found: Found) -> list[Row]:
    """L2T-DLN online at each value, compared with the baseline there."""
    return [
        Row(written(value), record, ONLINE, (record["methods"][baseline_of(record)]["score"],))
        for value, record in found.items()
    ]


def published(ablation: Ablation, record: Record) -> dict[Any, float]:
    """What the paper reports, where that is of the record's metric."""
    return ablation.published if record["metric"]["name"] == "accuracy" else {}


def _seconds(row: Row) -> str:
    return f"{row.outcome['wall_time_s'] / row.outcome['rounds'] / len(row.record['seeds']):.2f}"


def _what(ablation: Ablation, record: Record) -> str:
    """What all cells share."""
    teacher = "" if ablation.setting == "teacher" else f", teacher {record['config']['teacher']}"
    return f"{name_of(record)}, preset {record['preset']}{teacher}"


def _short(value: Any) -> Any:
    """Several settings as they stand under a picture: by the paper's letter."""
    return value.replace("unroll_length", "N").replace("teach_every=", "every ") if isinstance(value, str) else value


def draw(path: Path, ablation: Ablation, equal: str, found: Found) -> None:
    """The scores against the values, and the published ones."""
    some, curves = found[ablation.values[0]], {}
    scale = points(some["metric"])
    for name in (ONLINE, FROZEN, baseline_of(some)):
        scores = {value: record["methods"][name]["score"] for value, record in found.items()}
        curves[name] = [
            (_short(value), scale * score["mean"], scale * (score["std"] or 0))
            for value, score in scores.items()
            if score["mean"] is not None
        ]
    curves["published: ResNet-8, CIFAR-10"] = [(value, y, 0.0) for value, y in published(ablation, some).items()]
    plots.ablation(
        path,
        {name: line for name, line in curves.items() if line},
        xlabel=words(ablation.setting),
        ylabel=headline(some),
        title=f"{_what(ablation, some)}, equal {equal}",
    )


main = command("ablations", fill, _prepare)

if __name__ == "__main__":
    start(main)
