"""Make a trained LSTM teacher of L2T-DLN part of the package, with its card.

  python -m experiments.noisy_labels --preset=stable --method=l2t_dln --held_out=0.2 --seeds=3 --workdir=runs/mine
  python -m experiments.ship --run=runs/mine --name=mine

Of the run's seeds it takes the teacher whose frozen copy taught a fresh student best, by the accuracy on training
examples that were held out: a run that was tested on the test set is refused. Writes NAME.npz and NAME.json to
l2t_jax/assets; --teacher_from=shipped:NAME and `l2t_jax.teachers.load("NAME")` then know it.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

from absl import flags

import l2t_jax
from experiments._command import reader, start
from l2t_jax.methods.parts import dln_arguments, teacher_arguments
from l2t_jax.presets import Preset
from l2t_jax.runs import trained_teachers
from l2t_jax.runs.config import Config, Noise, UsageError
from l2t_jax.runs.records import read_record, write_json

flags.DEFINE_string("run", None, "Directory of a finished run of l2t_dln with --held_out.")
flags.DEFINE_string("name", None, "Letters, digits and _: what the teacher will be called.")
FLAGS = flags.FLAGS
ASSETS = Path(l2t_jax.__file__).parent / "assets"
STUDENT = ("student", "dataset", "rounds", "held_out", "meta", "wrong_labels", "noise", "dataset_sha256")
OPTIMIZER = ("student_lr", "student_schedule", "student_clip", "batch_size", "validation_batch_size", "unroll_length")


def ship(run: str | None, name: str | None, folder: Path) -> str:
    """Copy the best teacher of a run into a folder and write its card; returns what it did, in one line.

    Raises:
      UsageError: no run or name is given, the run is none of a taught DLN or not finished, or it read the test set.
    """
    if not run or not name or not name.isidentifier():
        raise UsageError("--run=DIR and --name=NAME are both needed; a name has letters, digits and _ only.")
    try:
        record = read_record(Path(run) / "summary.json")
        accuracy = record["methods"]["l2t_dln_transfer"]["score"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--run={run} is no finished run of l2t_dln ({type(error).__name__}: {error}).") from None
    if not record["config"]["held_out"]:
        raise UsageError(f"--run={run} was tested on the test set, which must not choose: run it with --held_out=0.2.")
    scored = [pair for pair in zip(accuracy["per_seed"], record["seeds"], strict=True) if pair[0] is not None]
    if not scored:
        raise UsageError(f"--run={run} has no seed that finished.")
    score, seed = max(scored)
    source = trained_teachers.path_of(Path(run), "l2t_dln", seed)
    if not source.exists():
        raise UsageError(f"{source} is not there: an optax teacher has nothing that could be shipped.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / f"{name}.npz")
    write_json(
        folder / f"{name}.json", card(record, seed) | {"sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    )
    return f"{name}: seed {seed}, whose frozen copy taught a fresh student {100 * score:.2f} % on held-out examples"


def card(record: dict[str, Any], seed: int) -> dict[str, Any]:
    """What there is to know of a run's teacher."""
    given = record["config"]
    known = {field.name: given[field.name] for field in dataclasses.fields(Config) if field.name in given}
    noise = Noise(**given["noise"]) if given["noise"] else None
    config = Config(**known | {"settings": Preset(**given["settings"]), "noise": noise})
    return {
        "teacher": teacher_arguments(config.teacher, config.settings),
        "dln": dln_arguments(config.settings),
        "student": {name: given["settings"][name] for name in OPTIMIZER},
        "trained_on": {name: given[name] for name in STUDENT},
        "seed": seed,
        "scores": {f"{name}, held-out accuracy": method["score"] for name, method in record["methods"].items()},
        "command": record["command"],
        "commit": (record["environment"].get("git") or {}).get("commit"),
    }


main = reader(lambda: [ship(FLAGS.run, FLAGS.name, ASSETS)])

if __name__ == "__main__":
    start(main)
