r"""Teach one LSTM teacher on many short lives of students, drawn at random.

  python -m experiments.many_lives
  python -m experiments.many_lives --data_dir=DIR --windows=3000 --workdir=runs/teacher
  python -m experiments.noisy_labels --method=l2t_dln --preset=stable --set=units=8,dln_lr=0.03 \
    --teacher_from=runs/teacher/teacher.npz

A life has its own classes (2 to 20, of the digits, of mixtures of Gaussians, of MNIST with --data_dir), student, rate
and length, kind and share of wrong labels (none to 70 %), and number of clean examples. The teacher lives through
windows of --horizon rounds of --side_by_side lives at a time, which begin at any age. After every round it is judged by
examples with right labels that neither it nor the student sees, and it learns by the exact derivative through all
rounds of the window (l2t_jax.methods.horizon). No test set is read.

Writes teacher.npz and its card teacher.json, metrics.jsonl (a line a window), curves.png, response.png and state.npz to
--workdir (default runs/many_lives). The same command goes on where it stopped.
"""

import dataclasses
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import _flags, _settings
from experiments._command import reader, start
from l2t_jax.methods.parts import dln_arguments, teacher_arguments
from l2t_jax.presets import STABLE, Preset
from l2t_jax.runs import plots
from l2t_jax.runs.config import UsageError
from l2t_jax.runs.environment import environment
from l2t_jax.runs.lives import KINDS, RATES, Trainer, name_of
from l2t_jax.runs.records import Metrics, load_arrays, save_arrays, write_json
from l2t_jax.runs.setting import enable_compilation_cache
from l2t_jax.teachers import build_teacher
from l2t_jax.teachers.trained import fill
from l2t_jax.types import PyTree, Teacher

flags.DEFINE_integer("windows", 1000, "Windows in all, of one kind of life each.", lower_bound=1)
flags.DEFINE_integer("horizon", 5, "R, rounds of a window, through which the teacher is differentiated.", lower_bound=1)
# Not "lives", which is a row of the sheet.
flags.DEFINE_integer("side_by_side", 4, "Lives of a kind that go on side by side.", lower_bound=1)
flags.DEFINE_string("lstm", "8", "Units of its layers but the last: 8, 20-20, 64-64-64.")
flags.DEFINE_float("rate", 2e-3, "Learning rate of the teacher, which falls to 0 over all windows.")
flags.DEFINE_integer("seed", 0, "Of all draws.", lower_bound=0)
for name in ("dln_lr", "data_dir", "workdir"):
    flags.declare_key_flag(name)
FLAGS = flags.FLAGS

DLN_LR, EVERY = 0.03, 20


def train(root: Path) -> Iterator[str]:
    """Go through all windows that are not done, and write what there is.

    Raises:
      UsageError: a flag is out of range, or the directory is of other flags.
    """
    dln_lr = DLN_LR if FLAGS.dln_lr is None else FLAGS.dln_lr
    settings = _settings.checked(dataclasses.replace(STABLE, units=FLAGS.lstm, dln_lr=dln_lr))
    if not 0 < FLAGS.rate < float("inf"):
        raise UsageError(f"--rate={FLAGS.rate} must be a positive, finite number.")
    kinds = tuple(kind for kind in KINDS if kind.source != "mnist" or FLAGS.data_dir)
    if len(kinds) < len(KINDS):
        yield f"{len(KINDS) - len(kinds)} of {len(KINDS)} kinds of lives are of MNIST: left out without --data_dir."
    config = {name: FLAGS[name].value for name in ("horizon", "side_by_side", "rate", "seed", "windows")}
    config |= {"settings": dataclasses.asdict(settings), "kinds": [name_of(kind) for kind in kinds]}
    enable_compilation_cache()
    root.mkdir(parents=True, exist_ok=True)
    _same(root / "config.json", config)
    optimizer = optax.adam(optax.cosine_decay_schedule(FLAGS.rate, FLAGS.windows))
    trainer = Trainer(
        settings,
        optimizer,
        kinds=kinds,
        lives=FLAGS.side_by_side,
        rounds=FLAGS.horizon,
        seed=FLAGS.seed,
        data_dir=FLAGS.data_dir,
    )
    state, rows = trainer.begin(), Metrics(root / "metrics.jsonl")
    if (root / "state.npz").exists():
        try:
            state = trainer.go_on(fill(state, load_arrays(root / "state.npz")))
        except (OSError, ValueError, KeyError, BadZipFile) as damage:
            raise UsageError(f"{root / 'state.npz'} is damaged ({damage}): remove it to begin anew.") from damage
    rows.truncate(lambda row: row["window"] < int(state.windows))
    began, first = time.monotonic(), int(state.windows)
    try:
        while int(state.windows) < FLAGS.windows:
            start_of = time.monotonic()
            state, told = trainer.step(state)
            rows.append([told | {"seconds": round(time.monotonic() - start_of, 3)}])
            done = int(state.windows)
            if done % EVERY == 0 or done == FLAGS.windows:
                save_arrays(root / "state.npz", state)
                left = (FLAGS.windows - done) * (time.monotonic() - began) / (done - first)
                error = "" if told["error"] is None else f" error {told['error']:.3f}"
                yield f"window {done}/{FLAGS.windows}: {told['kind']}{error}, {left / 60:.0f} min left"
    except KeyboardInterrupt:
        _flags.fail(f"interrupted; the same command goes on from the last of every {EVERY} windows.", 130)
    write(root, settings, config, state.tau)
    yield f"Files: {root} (teacher.npz, teacher.json, metrics.jsonl, curves.png, response.png)"


def _same(path: Path, config: dict[str, Any]) -> None:
    if not path.exists():
        write_json(path, config)
        return
    there = json.loads(path.read_text())
    if different := [name for name, value in config.items() if there.get(name) != json.loads(json.dumps(value))]:
        raise UsageError(f"{path} is of other flags ({', '.join(different)} differ): choose another --workdir.")


def write(root: Path, settings: Preset, config: dict[str, Any], tau: PyTree) -> None:
    """The teacher with its card, and the pictures."""
    save_arrays(root / "teacher.npz", tau)
    arguments, rows = teacher_arguments("lstm", settings), Metrics.read(root / "metrics.jsonl")
    card = {
        "teacher": arguments,
        "dln": dln_arguments(settings),
        "student": {"student_lr": RATES, "student_schedule": "cosine", "student_clip": settings.student_clip},
        "trained_on": config,
        "wall_time_s": sum(row["seconds"] for row in rows),
        "command": shlex.join(["python", "-m", "experiments.many_lives", *sys.argv[1:]]),
        "environment": environment(),
        "sha256": hashlib.sha256((root / "teacher.npz").read_bytes()).hexdigest(),
    }
    write_json(root / "teacher.json", card)
    draw_curves(root / "curves.png", rows)
    draw_response(root / "response.png", build_teacher(**arguments), tau, settings.dln_lr)


def draw_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """The error of the examples that judge, window by window."""
    curves: plots.Curves = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind and row["error"] is not None]
        if mine:
            curves[kind] = (np.array([row["window"] for row in mine]), np.array([[row["error"] for row in mine]]))
    plots.learning_curves(
        path, curves, xlabel="window", ylabel="error of the judges", title="One teacher, many lives", window=9
    )


def draw_response(path: Path, teacher: Teacher, tau: PyTree, gamma: float) -> None:
    """What the teacher writes where a hypergradient stays as it is, for some rounds, against its size."""
    sizes = jnp.logspace(-7, 1, 161)
    hidden, lines = teacher.hidden(sizes), plots.Curves()
    for round in range(1, 6):
        update, hidden = teacher.update(tau, hidden, sizes, jnp.zeros_like(sizes))
        lines[f"after {round} rounds" if round > 1 else "at once"] = (
            np.asarray(sizes),
            np.asarray(update)[None] / gamma,
        )
    plots.learning_curves(
        path,
        lines,
        xlabel="entry of the hypergradient",
        ylabel="update / gamma",
        title="What the teacher writes",
        log_y=False,
        log_x=True,
        window=1,
    )


main = reader(lambda: train(Path(FLAGS.workdir or "runs/many_lives")))

if __name__ == "__main__":
    start(main)
