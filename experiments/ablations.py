"""The ablations of L2T-DLN: one setting at a time, L2T-DLN and cross entropy at each of its values.

  python -m experiments.ablations --table=4     validation ratio (Table 4)
  python -m experiments.ablations --table=5     unroll length (Table 5), at equal rounds and at equal student steps
  python -m experiments.ablations --table=6     the optimizer of the DLN (Table 6)
  python -m experiments.ablations --table=lr    wrong learning rates of the student, which the paper announces
  python -m experiments.ablations --table=options    what each option of the preset stable is worth, one at a time
  python -m experiments.ablations --table=5 --dataset=cifar10 --data_dir=DIR --student=resnet8 --rounds=2500

Table 5 of the paper keeps the number of rounds, so that a longer unroll is also a longer training; both are run here.
A cell that is done is kept: after an interruption give the same command again. Writes records/ (a JSON file a cell),
table.md and pictures to --workdir (default runs/ablation_TABLE). The test set is read once for each seed.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments import _flags, _labels, _noise, _table_flag
from experiments._command import command, start
from experiments._table_flag import table
from l2t_jax.runs import cells, plots
from l2t_jax.runs.cells import cell_name, group_of, run_cell
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.records import read_record
from l2t_jax.runs.reporting import result, tested_on
from l2t_jax.runs.setting import build_plan
from l2t_jax.runs.tables import name_of, paired, probability, setup_of

METHODS = ("l2t_dln", "cross_entropy")
ROWS = ("l2t_dln", "l2t_dln_transfer", "cross_entropy")


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
}

Records = dict[tuple[str, Any], dict[str, Any]]  # (what is equal, value) -> record

FLAGS = flags.FLAGS
for module in (_labels, _flags, _noise, _table_flag):
    flags.adopt_module_key_flags(module)


def main(argv: list[str]) -> None:
    """Run the ablation; bad input is one line and exit code 2, a seed that stopped early exit code 1."""
    command("ablations", run_ablation, _prepare)


def _prepare() -> Noise | None:
    chosen = table(ABLATIONS)
    if FLAGS["method"].present:
        raise UsageError(f"--method is {' and '.join(METHODS)} here, which are compared: leave it out.")
    _flags.set_defaults(method=",".join(METHODS), seeds="5", workdir=f"runs/ablation_{chosen}")
    return _labels.noise()


def run_ablation(config: Config, options: Options) -> int:
    """Run every cell that is not done, then write the table and the picture."""
    ablation, root, code = ABLATIONS[FLAGS.table], Path(options.workdir), 0
    load = cells.loader(config, options)
    if ablation.setting == "validation_ratio" and load(config.dataset).meta:
        raise UsageError("a meta set kept apart validates, whatever the ratio: give --meta=0 to divide the noisy set.")
    config = dataclasses.replace(config, rounds=build_plan(config, load(config.dataset)).rounds)
    found: Records = {}
    for equal in ablation.equal:
        for value in ablation.values:
            cell = varied(config, ablation, equal, value)
            name = cell_name(group_of(cell), ablation.setting, value, "equal", equal)
            code |= run_cell(name, f"{group_of(cell)}, {ablation.setting} {value}, equal {equal}", cell, options, load)
            found[equal, value] = read_record(root / "records" / f"{name}.json")
    (root / "table.md").write_text(markdown(FLAGS.table, found))
    for equal in ablation.equal:
        draw(root / f"equal_{equal}.png", ablation, equal, found)
    print(f"Files: {root} (table.md, {', '.join(f'equal_{equal}.png' for equal in ablation.equal)}, records/)")
    return code


def varied(config: Config, ablation: Ablation, equal: str, value: Any) -> Config:
    """A config, whose rounds are given, with one value of an ablation."""
    if ablation.setting == "teacher":
        return dataclasses.replace(config, teacher=value)
    assert config.rounds is not None
    given = {ablation.setting: value}
    if ablation.setting == "option":
        given = {} if value == AS_IT_IS else _flags.parse_settings("table", value)
    settings = _flags.checked(dataclasses.replace(config.settings, **given))
    steps = config.rounds * config.settings.unroll_length
    rounds = config.rounds if equal == "rounds" else max(1, round(steps / settings.unroll_length))
    return dataclasses.replace(config, settings=settings, rounds=rounds)


def markdown(name: str, found: Records) -> str:
    """The table as text: a section for what is held equal, a row for each value."""
    ablation, some = ABLATIONS[name], next(iter(found.values()))
    setting = ablation.setting.replace("_", " ")
    lines = [
        f"# Ablation: {setting}",
        "",
        f"{tested_on(some['config']).capitalize()} accuracy in %, mean ± sample standard deviation over "
        f"{len(some['seeds'])} seeds; {_what(ablation, some)}. Difference and p: L2T-DLN online",
        "against cross entropy over the same seeds, paired two-sided t test."
        + (" Published: L2T-DLN with a ResNet-8 on CIFAR-10." if ablation.published else ""),
        "",
    ]
    head = [setting, "L2T-DLN, online", "transfer", "cross entropy", "difference", "p", "student steps"]
    head += ["s a round", "published"]
    for equal in ablation.equal:
        lines += [f"## At equal {equal}", ""] if len(ablation.equal) > 1 else []
        rows = [_cells_of(ablation, value, found[equal, value]) for value in ablation.values]
        lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]
    return "\n".join(lines)


def _what(ablation: Ablation, record: dict[str, Any]) -> str:
    """What all cells share."""
    teacher = "" if ablation.setting == "teacher" else f", teacher {record['config']['teacher']}"
    return f"{name_of(setup_of(record))}, preset {record['preset']}{teacher}"


def _cells_of(ablation: Ablation, value: Any, record: dict[str, Any]) -> list[str]:
    methods = record["methods"]
    accuracies = {name: methods[name]["score"] for name in ROWS}
    ours, base = accuracies["l2t_dln"], accuracies["cross_entropy"]
    p = paired(ours["per_seed"], base["per_seed"])
    apart = None if None in (ours["mean"], base["mean"]) else 100 * (ours["mean"] - base["mean"])
    online = methods["l2t_dln"]
    return [
        f"{value:g}" if isinstance(value, float) else str(value),
        *(result(accuracies[name], len(methods[name]["failed"]), record["metric"]) for name in ROWS),
        "" if apart is None else f"{apart:+.2f}",
        probability(p),
        str(online["student_steps"]),
        f"{online['wall_time_s'] / online['rounds'] / len(record['seeds']):.2f}",
        f"{ablation.published[value]:.2f}" if value in ablation.published else "",
    ]


def draw(path: Path, ablation: Ablation, equal: str, found: Records) -> None:
    """The accuracies against the values, and the published ones."""
    points: dict[str, list[tuple[Any, float, float]]] = {}
    for value in ablation.values:
        for name in ROWS:
            accuracy = found[equal, value]["methods"][name]["score"]
            if accuracy["mean"] is not None:
                points.setdefault(name, []).append((value, 100 * accuracy["mean"], 100 * (accuracy["std"] or 0)))
    if ablation.published:
        points["published: ResNet-8, CIFAR-10"] = [(value, y, 0.0) for value, y in ablation.published.items()]
    some = next(iter(found.values()))
    plots.ablation(
        path,
        points,
        xlabel=ablation.setting.replace("_", " "),
        ylabel=f"{tested_on(some['config'])} accuracy, %",
        title=f"{_what(ablation, some)}, equal {equal}",
    )


def cli() -> None:
    """Entry point."""
    start(main)


if __name__ == "__main__":
    cli()
