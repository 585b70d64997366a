"""The benchmark runs, and its rows say what they are."""

import numpy as np
import pytest
from absl.testing import flagsaver

from benchmarks import hypergradient_cost


def test_rows_of_a_measurement():
    rows = hypergradient_cost.measure("w3", 2, ["save", "mixed"], repeats=3)
    assert [row["program"] for row in rows] == ["plain steps", "save", "mixed"]
    for row in rows:
        assert (row["parameters"], row["unroll_length"], len(row["seconds_all"])) == (397_510, 2, 3)
        np.testing.assert_allclose(row["seconds"], np.median(row["seconds_all"]))
        np.testing.assert_allclose(row["ratio_to_plain"], row["seconds"] / rows[0]["seconds"])
    assert rows[2]["temporary_mib"] > 2 * 4 * 397_510 / 2**20  # at least theta for each of the two steps


def test_bad_unroll_lengths_are_one_line(capsys):
    for bad in ("0", "x", ""):
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
            hypergradient_cost.FLAGS(["hypergradient_cost", f"--unroll_lengths={bad}"])
            hypergradient_cost.main([])
        assert stop.value.code == 2 and "at least 1" in capsys.readouterr().err
