"""What is wrong is told in one line that names it."""

import os
import re
from pathlib import Path

import pytest

from l2t_jax.data import DataError


def said_in_a_line(call, line, named=""):
    with pytest.raises(DataError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and 15 < len(said) < 600 and re.search(line, said) and str(named) in said, said


def prepared(name):
    """Where prepared TFDS data lie on this machine, the set of this name among them."""
    beside = Path(__file__).parents[1] / "../shared/data/tfds"
    folder = Path(os.environ.get("TFDS_DATA_DIR") or beside.resolve())
    if not (folder / name).is_dir():
        pytest.skip(f"needs prepared {name} in {folder}: set TFDS_DATA_DIR")
    return folder
