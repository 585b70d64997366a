r"""What is teaching worth on these data? Methods with rates of their own, at equal steps and at equal seconds.

  python -m experiments.worth --noise=flip2 --noise_ratio=0.4
  python -m experiments.worth --dataset=mine.npz --student=mlp --rounds=144
  python -m experiments.worth --dataset=cifar10 --data_dir=DIR --labels=cifar10n.npz:worse_label --clean=1000 \
    --student=lenet --rounds=800 --method=cross_entropy,generalized_cross_entropy,l2t_dln --workdir=runs/worth_cifar10n

For data with wrong labels and some clean examples. Methods that read no validation error are trained on the clean
examples as well ("+ clean"), cross entropy in both ways. L2T-DLN has three rows: the LSTM, Adam, and "cheap", an LSTM
8-1 that looks 5 steps ahead, once in 25, which is left out where --set makes all of them so. First every row is trained
with each of --rates as the student's learning rate, on one seed, and judged on --held_out (0.2) of the training
examples, which have right labels where these are known. Then it is trained with the best of them on all training
examples, for all --seeds, for --rounds and for each of --shorter; the test set is read once for each. A cell that is
done is kept: give the same command again after an interruption, or with more methods. Writes records/ (a JSON file a
cell), table.md and seconds.png to --workdir (default runs/worth_DATASET). Where it is known which labels are wrong,
curves.png shows what became of them in the longest runs.
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments import _flags, _noise
from experiments._command import command, start
from l2t_jax.presets import Preset
from l2t_jax.runs import plots, tables
from l2t_jax.runs.cells import Cell, cell_name, group_of, loader, record_path, run_cells
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.records import Metrics, read_record
from l2t_jax.runs.reporting import OBSERVED, curves
from l2t_jax.runs.setting import build_plan
from l2t_jax.runs.tables import Column, Record, Row, Section, Table, written
from l2t_jax.runs.texts import headline, name_of, points, shown

FLAGS = flags.FLAGS
for module in (_flags, _noise):
    flags.adopt_module_key_flags(module)
flags.DEFINE_list("rates", ["0.03", "0.1", "0.3"], "Learning rates of the student to choose from, comma separated.")
flags.DEFINE_list("shorter", [], "Rounds of shorter runs, for the table of equal seconds. Default: 1/8, 1/4, 1/2.")

HELD_OUT, SHARES = 0.2, (8, 4, 2)


class Way(NamedTuple):
    """A row before anything is trained."""

    name: str
    method: str
    teacher: str = "lstm"
    train_on_clean: bool = False
    cheap: bool = False


BASELINE = Way("cross entropy + clean", "cross_entropy", train_on_clean=True)
WAYS = (
    Way("cross entropy", "cross_entropy"),
    BASELINE,
    Way("label smoothing + clean", "label_smoothing", train_on_clean=True),
    Way("generalized cross entropy + clean", "generalized_cross_entropy", train_on_clean=True),
    Way("sce + clean", "sce", train_on_clean=True),
    Way("early stopped", "early_stopped"),
    Way("meta only", "meta_only"),
    Way("Meta-Weight-Net", "meta_weight_net"),
    Way("MentorNet, data-driven", "mentornet_data_driven"),
    Way("L2T-DLN, LSTM", "l2t_dln"),
    Way("L2T-DLN, Adam", "l2t_dln", teacher="adam"),
    Way("L2T-DLN, cheap", "l2t_dln", cheap=True),
)
PROTOCOLS = {"l2t_dln": ", online", "l2t_dln_transfer": ", frozen"}


def _prepare() -> Noise | None:
    if FLAGS["teacher"].present:
        raise UsageError("--teacher is what the table goes over: leave it out.")
    if "student_lr" in _flags.given_settings():
        raise UsageError("--student_lr is chosen for each row: give --rates.")
    if FLAGS["train_on_clean"].present:
        raise UsageError("--train_on_clean is what rows differ in: leave it out.")
    if FLAGS.held_out:
        raise UsageError(f"--held_out is {HELD_OUT} where rates are chosen, and 0 where they are judged: leave it out.")
    parse_numbers("rates", FLAGS.rates)
    parse_numbers("shorter", FLAGS.shorter)
    methods = ",".join(dict.fromkeys(way.method for way in WAYS))
    _flags.set_table_defaults(method=methods, seeds="3", workdir=f"runs/worth_{Path(_flags.given('dataset')).stem}")
    return _noise.from_flags()


def fill(config: Config, options: Options) -> int:
    """Choose the rates, run every cell that is not done, then write the tables and the picture."""
    rates, ways = parse_numbers("rates", FLAGS.rates), ways_of(config)
    tuning = dataclasses.replace(config, held_out=HELD_OUT, seeds=config.seeds[:1])
    load = loader(tuning, options)
    if not load(config.dataset).meta:
        raise UsageError("no examples are known to be clean, and this table is of what they are good for: give some.")
    whole = build_plan(tuning, load(config.dataset)).rounds
    shorter = [int(n) for n in parse_numbers("shorter", FLAGS.shorter)] or [max(1, whole // n) for n in SHARES]
    if max(shorter) > whole:
        raise UsageError(f"--shorter={','.join(FLAGS.shorter)}: these are rounds of runs shorter than {whole}.")
    lengths = sorted({*shorter, whole})
    records, code = run_cells([tried_cell(tuning, way, rate) for way in ways for rate in rates], options, load)
    best = {way.name: best_rate(tuning, way, rates, records) for way in ways}
    found, failed = run_cells(
        [final_cell(config, way, best[way.name], n) for n in reversed(lengths) for way in ways],
        options,
        loader(config, options),
    )
    root = Path(options.workdir)
    every = reached(config, ways, best, lengths, found)
    draw(root / "seconds.png", every)
    pictures = ["seconds.png"]
    if draw_curves(root, {way.name: final_cell(config, way, best[way.name], whole) for way in ways}):
        pictures.append("curves.png")
    tables.write(root, table_of(every), *pictures, "records/")
    return code | failed


def parse_numbers(flag: str, texts: list[str]) -> list[float]:
    """Positive numbers, each once.

    Raises:
      UsageError: one is none.
    """
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = [-1.0]
    if any(not 0 < number < float("inf") for number in numbers) or len(set(numbers)) < len(numbers):
        raise UsageError(f"--{flag}={','.join(texts)}: give positive numbers, each once, e.g. --rates=0.03,0.1,0.3.")
    return numbers


def ways_of(config: Config) -> list[Way]:
    """The rows of the methods that are asked for.

    Raises:
      UsageError: one is in no row.
    """
    for method in config.methods:
        if method not in {way.method for way in WAYS}:
            raise UsageError(f"--method={method} is in no row here: use experiments.compare.")
    as_it_is = cheaper(config.settings) == config.settings  # then "cheap" is the LSTM's row
    return [way for way in WAYS if way.method in config.methods and not (way.cheap and as_it_is)]


def _as(config: Config, way: Way, rate: float) -> Config:
    settings = dataclasses.replace(config.settings, student_lr=rate)
    settings = cheaper(settings) if way.cheap else settings
    train_on_clean, methods = way.train_on_clean, (way.method,)
    return dataclasses.replace(
        config, methods=methods, teacher=way.teacher, train_on_clean=train_on_clean, settings=settings
    )


def cheaper(settings: Preset) -> Preset:
    """A small LSTM, and for a round of N steps an unroll of about their root: as many steps, fewer hypergradients."""
    steps = settings.unroll_length * settings.teach_every
    length = max(n for n in range(1, math.isqrt(steps) + 1) if steps % n == 0)
    return dataclasses.replace(settings, units="8", unroll_length=length, teach_every=steps // length)


def _parts(way: Way) -> list[str]:
    return [way.method, *([way.teacher] if way.method in PROTOCOLS else []), *(["cheap"] if way.cheap else [])]


def tried_cell(config: Config, way: Way, rate: float) -> Cell:
    """A row on held-out examples."""
    cell = _as(config, way, rate)
    where = group_of(cell)
    return Cell(cell_name("held_out", where, *_parts(way), written(rate)), f"{way.name}, rate {rate:g}", cell)


def final_cell(config: Config, way: Way, rate: float, rounds: int) -> Cell:
    """A row on the test set, for so many rounds."""
    cell = dataclasses.replace(_as(config, way, rate), rounds=rounds)
    where = group_of(cell)
    return Cell(cell_name("final", where, *_parts(way), f"{rounds}"), f"{way.name}, {rounds} rounds", cell)


def best_rate(config: Config, way: Way, rates: list[float], records: dict[str, Record]) -> float:
    """The rate that was best on held-out examples, of L2T-DLN online."""

    def key(rate: float) -> tuple[bool, float]:
        record = records[tried_cell(config, way, rate).name]
        return tables.rank(Row(way.name, record, way.method))

    return min(rates, key=key)


class Reached(NamedTuple):
    """What a row has reached after runs of all lengths."""

    name: str
    rate: float
    rows: list[Row]  # the shortest first
    seconds: list[float]  # of a seed; of a frozen teacher with those of its training


def reached(
    config: Config, ways: list[Way], best: dict[str, float], lengths: list[int], records: dict[str, Record]
) -> list[Reached]:
    """All rows, each protocol of L2T-DLN apart, the best after the longest run first."""
    found = []
    for way in ways:
        cells = [records[final_cell(config, way, best[way.name], n).name] for n in lengths]
        for method in cells[0]["methods"]:
            name = way.name + PROTOCOLS.get(method, "")
            paid = dict.fromkeys((way.method, method))
            seconds = [sum(r["methods"][m]["wall_time_s"] for m in paid) / len(r["seeds"]) for r in cells]
            found.append(Reached(name, best[way.name], [Row(name, record, method) for record in cells], seconds))
    return sorted(found, key=lambda one: tables.rank(one.rows[-1]))


def table_of(every: list[Reached]) -> Table:
    """Equal steps, then equal seconds."""
    of = {one.name: one for one in every}
    base, record = of[BASELINE.name].rows[-1].score if BASELINE.name in of else None, every[0].rows[-1].record
    steps = [
        Column("method", lambda row: row.name),
        tables.scores(record["metric"]["name"]),
        *tables.differences(),
        Column("rate", lambda row: f"{of[row.name].rate:g}"),
        Column("s a seed", lambda row: f"{of[row.name].seconds[-1]:.0f}"),
    ]
    within = [Column("method", lambda row: row.name), *(_within(of, budget) for budget in budgets_of(every))]
    rows = [one.rows[-1]._replace(compared=(base,)) for one in every]
    config = record["config"]
    return Table(
        f"What teaching is worth: {_data(record)}",
        [
            Section(steps, rows, f"Equal steps: {every[0].rows[-1].outcome['student_steps']}"),
            Section(within, rows, "Equal seconds: the longest run of a seed that takes no more"),
        ],
        f"{tables.measured(record)}, read once after the last step. Difference and p: from {BASELINE.name} over the "
        f"same seeds, paired two-sided t test, not corrected for the number of rows. {100 * config['wrong_labels']:.1f}"
        f" % of the labels are wrong, {config['meta']} examples are known to be clean; + clean: trained on these as "
        "well. Rate: of the student, chosen for each row on held-out examples. Seconds of a frozen teacher: of its "
        "training and of its use.",
    )


def draw(path: Path, every: list[Reached]) -> None:
    """Draw scores against seconds."""
    record = every[0].rows[-1].record
    scale = points(record["metric"])
    lines = {
        one.name: [
            (second, scale * row.score["mean"], scale * row.score["std"])
            for second, row in zip(one.seconds, one.rows, strict=True)
            if row.score["mean"] is not None
        ]
        for one in every
    }
    plots.reached(path, lines, xlabel="seconds a seed", ylabel=headline(record), title=_data(record))


def draw_curves(root: Path, cells: dict[str, Cell]) -> bool:
    """Draw what became of the wrong labels in the longest runs; False where that is not known or no longer there."""
    panels: dict[str, plots.Curves] = {OBSERVED[name]: {} for name in ("memorised", "recovered")}
    for way, cell in cells.items():
        rows = Metrics.read(root / "cells" / cell.name / "observations.jsonl")
        for name in ("memorised", "recovered"):
            for method, curve in curves(rows, name).items():
                panels[OBSERVED[name]][way + PROTOCOLS.get(method, "")] = curve
    if not all(panels.values()):
        return False
    (record, *_) = (read_record(record_path(root, cell.name)) for cell in cells.values())
    plots.overview(root / "curves.png", panels, (), title=_data(record))
    return True


def _data(record: Record) -> str:
    """What all rows were measured on, however a row was trained."""
    return name_of({**record, "config": {**record["config"], "train_on_clean": False}})


def budgets_of(every: list[Reached]) -> list[float]:
    """Seconds to compare at: those of the whole run of the fastest row, doubled until the slowest is through."""
    ends = sorted(one.seconds[-1] for one in every)
    found = [ends[0]]
    while found[-1] < ends[-1]:
        found.append(2 * found[-1])
    return found


def _within(every: dict[str, Reached], budget: float) -> Column:
    def text(row: Row) -> str:
        one = every[row.name]
        through = [run for run, seconds in zip(one.rows, one.seconds, strict=True) if seconds <= budget * (1 + 1e-9)]
        return shown(through[-1].score, row.record["metric"]) if through else ""

    return Column(f"{budget:.0f} s" if budget >= 10 else f"{budget:.1f} s", text)


main = command("worth", fill, _prepare, task="classification")

if __name__ == "__main__":
    start(main)
