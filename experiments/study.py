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

from absl import flags

from experiments import _flags, _labels, _noise, _settings
from experiments._command import command, refuse, start
from l2t_jax.presets import PRESETS
from l2t_jax.runs import cells
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.instruments import Instruments
from l2t_jax.runs.records import Metrics
from l2t_jax.runs.running import run_entries
from l2t_jax.runs.setting import Entry, Setting, build_setting
from l2t_jax.runs.study_pictures import PICTURES, draw
from l2t_jax.tasks import TASKS, settings_for

flags.DEFINE_string(
    "presets", "released,residual", f"One or more of {', '.join(PRESETS)}; takes the place of --preset."
)
flags.DEFINE_bool("curvature", True, "Find the most negative curvature of the validation error at 5 moments.")
FLAGS = flags.FLAGS
for module in (_labels, _flags, _noise):
    flags.adopt_module_key_flags(module)


def _prepare() -> Noise | None:
    refuse("preset", "one of several here: give --presets.")
    refuse("method", "l2t_dln here, whose parts are looked at: leave it out.")
    _flags.set_table_defaults(method="l2t_dln", held_out=0.2, workdir=f"runs/study_{_labels.kind()}")
    if not FLAGS.held_out:
        raise UsageError("--held_out=0 leaves no examples that no run has seen: hold out a part of training.")
    return _labels.noise()


def study(config: Config, options: Options) -> int:
    """Train with every preset, measured, then draw what was seen."""
    names = [_settings.known("presets", name.strip(), PRESETS) for name in FLAGS.presets.split(",") if name.strip()]
    dataset = cells.loader(config, options)(config.dataset)
    root, code, rows = Path(options.workdir), 0, []
    for name in names:
        place = dataclasses.replace(options, workdir=str(root / name))
        setting, entries = build_setting(_with_preset(config, name), place, dataset)
        online = [entry for entry in entries if entry.teacher_of is None]
        code |= run_entries(setting, online, instruments=_instruments)
        rows += [row | {"method": name} for row in Metrics.read(root / name / "observations.jsonl")]
    draw(root, rows, f"{config.dataset}, {config.student}, {_labels.kind()} labels")
    print(f"Files: {root} ({', '.join(f'{name}.png' for name in PICTURES)}, position.png, a run for each preset)")
    return code


def _with_preset(config: Config, name: str) -> Config:
    """The config with another preset, and what flags say beyond it."""
    column = settings_for(TASKS[config.task], PRESETS[name])
    return _settings.with_settings(dataclasses.replace(config, preset=name, settings=column), _flags.given_settings())


def _instruments(setting: Setting, entry: Entry) -> Instruments:
    rounds = setting.rounds_of(entry)
    moments = {0, rounds // 10, rounds // 4, rounds // 2, rounds} if FLAGS.curvature else set()
    return Instruments(setting, entry.method, frozenset(moments))


main = command("study", study, _prepare, task="classification")

if __name__ == "__main__":
    start(main)
