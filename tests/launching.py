"""An experiment's command as a user gives it, run in this process."""

import dataclasses
import json

import pytest
from absl.testing import flagsaver

from experiments import _flags
from l2t_jax.runs.records import write_json
from l2t_jax.types import Metric

SMALL = ("--rounds=2", "--unroll_length=2", "--width=8", "--checkpoint_seconds=0")


def write_record(workdir, name, config, per_seed, rows):
    """What a cell of a table leaves, trained by nobody: the same accuracies for each of its rows."""
    accuracy = {"mean": sum(per_seed) / len(per_seed), "std": 0.07, "per_seed": per_seed}
    outcome = {"score": accuracy, "failed": [], "student_steps": 50, "wall_time_s": 4.0}
    record = {
        "methods": dict.fromkeys(rows, outcome),
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "metric": Metric("accuracy", "%")._asdict(),
        "seeds": list(config.seeds),
        **{"dataset": config.dataset, "student": config.student, "preset": config.preset, "unroll_length": 25},
    }
    write_json(workdir / "records" / f"{name}.json", record)


def launch(module, *arguments):
    """Run `python -m MODULE ARGUMENTS`; returns its exit code."""
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        _flags.parse_arguments([f"{module.__name__.rpartition('.')[2]}.py", *map(str, arguments)])
        module.main([])
    return stop.value.code
