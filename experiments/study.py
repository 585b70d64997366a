"""An instrumented study of L2T-DLN: what drifts, what the DLN learns, how far the teacher's advice carries.

  python -m experiments.study
  python -m experiments.study --presets=released,residual --labels=noisy --seeds=3
  python -m experiments.study --dataset=mnist --data_dir=DIR --rounds=400

Trains L2T-DLN with each preset and looks, at 41 moments, at the range of the DLN, the effective student step, the
hypergradient by position in the unroll, the teacher's update of the DLN, and what the DLN and that update are worth
after N, 4 N and 16 N steps on examples that no run has seen: --held_out (here 0.2) of the training examples, in place
of the test set, which is not read. At 5 moments the most negative curvature of the validation error is found by Lanczos
(--nocurvature leaves it out). Writes a run directory a preset and pictures to --workdir (default runs/study_LABELS).
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import _cells, _flags, _labels, _noise
from experiments._command import command, start
from experiments._config import Config, Noise, Options, UsageError
from experiments._instruments import HORIZONS, Instruments
from experiments._methods import Entry
from experiments._report import curves
from experiments._run import run_entries
from experiments._setting import Setting, build_setting
from experiments.presets import PRESETS
from l2t_jax import plots
from l2t_jax.records import Metrics

flags.DEFINE_string(
    "presets", "released,residual", f"One or more of {', '.join(PRESETS)}; takes the place of --preset."
)
flags.DEFINE_bool("curvature", True, "Find the most negative curvature of the validation error at 5 moments.")
FLAGS = flags.FLAGS
for module in (_labels, _flags, _noise):
    flags.adopt_module_key_flags(module)

Rows = list[dict[str, Any]]


class Picture(NamedTuple):
    """What one picture shows."""

    label: str
    rows: dict[str, str]  # name in observations.jsonl -> what it is, in the legend
    log_y: bool = True
    linear_within: float | None = None  # see `plots.learning_curves`


PICTURES = {  # by file
    "range": Picture("value of the DLN", {"dln_low": "lowest", "dln_high": "highest"}, linear_within=0.1),
    "push": Picture(
        "mean derivative of the loss by logits",
        {"push_right": "right class", "push_wrong": "wrong ones"},
        linear_within=0.01,
    ),
    "step_ratio": Picture("student step, in those of cross entropy", {"step_ratio": ""}),
    "step_cosine": Picture("cosine of the student step with cross entropy's", {"step_cosine": ""}, log_y=False),
    "hypergradient": Picture("norm of the hypergradient", {"hypergradient": ""}),
    "update": Picture("root mean square of the teacher's update / gamma", {"update_norm": ""}),
    "offset": Picture("|mean| / root mean square of the update", {"update_offset": ""}, log_y=False),
    "agreement": Picture("share of the update that descends", {"agreement": ""}, log_y=False),
    "gain": Picture(
        "held-out error under cross entropy less under the DLN",
        {f"gain_{k}": f"{k} N steps" for k in HORIZONS},
        linear_within=0.1,
    ),
    "advice": Picture(
        "held-out error before the update less after it",
        {f"advice_{k}": f"{k} N steps" for k in HORIZONS},
        linear_within=0.001,
    ),
    "leak": Picture("held-out error less that on the validation part", {"leak": ""}, linear_within=0.1),
    "curvature": Picture("lowest eigenvalue of the Hessian", {"curvature": ""}, linear_within=0.1),
}


def main(argv: list[str]) -> None:
    """Run the study; bad input is one line and exit code 2, a seed that stopped early exit code 1."""
    command("study", study, _prepare)


def _prepare() -> Noise | None:
    if FLAGS["preset"].present:
        raise UsageError("--preset is one of several here: give --presets.")
    if FLAGS["method"].present:
        raise UsageError("--method is l2t_dln here, whose parts are looked at: leave it out.")
    _cells.set_defaults(method="l2t_dln", held_out=0.2, workdir=f"runs/study_{FLAGS.labels}")
    if not FLAGS.held_out:
        raise UsageError("--held_out=0 leaves no examples that no run has seen: hold out a part of training.")
    return _labels.noise()


def study(config: Config, options: Options) -> int:
    """Train with every preset, measured, then draw what was seen."""
    names = [_flags.known("presets", name.strip(), PRESETS) for name in FLAGS.presets.split(",") if name.strip()]
    dataset = _cells.loader(config, options)(config.dataset)
    root, code, rows = Path(options.workdir), 0, []
    for name in names:
        place = dataclasses.replace(options, workdir=str(root / name))
        setting, entries = build_setting(_with_preset(config, name), place, dataset)
        online = [entry for entry in entries if entry.teacher_of is None]
        code |= run_entries(setting, online, instruments=_instruments)
        rows += [row | {"method": name} for row in Metrics.read(root / name / "observations.jsonl")]
    draw(root, rows, f"{config.dataset}, {config.student}, {FLAGS.labels} labels")
    print(f"Files: {root} ({', '.join(f'{name}.png' for name in PICTURES)}, position.png, a run for each preset)")
    return code


def _with_preset(config: Config, name: str) -> Config:
    """The config with another preset, and what flags say beyond it."""
    settings = _flags.checked(dataclasses.replace(PRESETS[name], **_flags.given_settings()))
    return dataclasses.replace(config, preset=name, settings=settings)


def _instruments(setting: Setting, entry: Entry) -> Instruments:
    rounds = setting.rounds_of(entry)
    moments = {0, rounds // 10, rounds // 4, rounds // 2, rounds} if FLAGS.curvature else set()
    return Instruments(setting, entry.method, frozenset(moments))


def draw(root: Path, rows: Rows, what: str) -> None:
    """Write the pictures: curves over student steps, and the hypergradient by position at several moments."""
    for file, (label, names, log_y, linear_within) in PICTURES.items():
        found = {
            f"{preset}, {meaning}".rstrip(", "): curve
            for name, meaning in names.items()
            for preset, curve in curves(rows, name).items()
        }
        if found:
            title = f"{what}: {label}"
            plots.learning_curves(
                root / f"{file}.png", found, ylabel=label, title=title, log_y=log_y, linear_within=linear_within
            )
    plots.learning_curves(
        root / "position.png",
        positions(rows),
        ylabel="norm of the part through the step",
        xlabel="step of the unroll",
        title=f"{what}: the hypergradient by position",
    )


def positions(rows: Rows) -> plots.Curves:
    """The norms of the parts of the hypergradient at a run's start, half and end: name -> (step [N], [seeds, N])."""
    found: plots.Curves = {}
    for preset in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == preset]
        moments = sorted({row["round"] for row in mine})
        for share, moment in (("start", 0), ("half", len(moments) // 2), ("end", -1)):
            there = [row for row in mine if row["round"] == moments[moment]]
            length = sum(name.startswith("position_") for name in there[0])
            values = [[row[f"position_{i}"] for i in range(1, length + 1)] for row in there]
            found[f"{preset}, {share}"] = np.arange(1, length + 1), np.asarray(values)
    return found


def cli() -> None:
    """Entry point."""
    start(main)


if __name__ == "__main__":
    cli()
