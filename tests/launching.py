"""An experiment's command as a user gives it, run in this process."""

import pytest
from absl.testing import flagsaver

from experiments import _flags

SMALL = ("--rounds=2", "--unroll_length=2", "--width=8", "--checkpoint_seconds=0")


def launch(module, *arguments):
    """Run `python -m MODULE ARGUMENTS`; returns its exit code."""
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        _flags.parse_arguments([f"{module.__name__.rpartition('.')[2]}.py", *map(str, arguments)])
        module.main([])
    return stop.value.code
