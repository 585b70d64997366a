"""What the rows of the cost benchmark say: tables, fitted growth, and the plot beside the paper's Table 5."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.worker import PROGRAMS
from l2t_jax.runs.plots import costs

TOLERANCE = 1e-2  # relative; float32 through many steps differs by less, another derivative by more
# L2T-DLN (NeurIPS 2023), Table 5: N -> seconds of one ROUND (two unrolls and the teacher), wide ResNet-8, its GPU.
PAPER_TABLE_5 = {1: 1.0, 5: 3.0, 10: 5.8, 15: 7.9, 25: 13.4, 50: 32.0, 75: 76.7}
PAPER_LABEL = "paper, Table 5: a whole ROUND\n(two unrolls) of its wide\nResNet-8 on its GPU"


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fit seconds ~ N^exponent and MiB ~ N * mib_a_step by least squares, where there are three lengths or more.

    The memory is the compiler's figure where there is one, else that of the resident set.
    """
    fitted = []
    for workload, program in dict.fromkeys((row["workload"], row["program"]) for row in rows):
        mine = [row for row in rows if (row["workload"], row["program"]) == (workload, program)]
        lengths = [row["unroll_length"] for row in mine]
        if len(set(lengths)) < 3:
            continue
        column = "temporary_mib" if mine[0]["temporary_mib"] is not None else "resident_mib"
        memory = [row[column] for row in mine]
        fitted.append(
            {
                "workload": workload,
                "program": program,
                "unroll_lengths": lengths,
                "exponent": _slope(np.log(lengths), np.log([row["seconds"] for row in mine])),
                "mib_a_step": None if None in memory else _slope(lengths, memory),
                "memory": column,
            }
        )
    return fitted


def _slope(x: Any, y: Any) -> float:
    return float(np.polyfit(x, y, 1)[0])


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows for the eye."""
    table = Table(title="Cost of a hypergradient", caption="* the mode that auto takes")
    for column in ("workload", "N", "program"):
        table.add_column(column, justify="right" if column == "N" else "left")
    for column in ("seconds", "x plain", "x torch", "temp MiB", "RSS MiB", "compile s", "differs"):
        table.add_column(column, justify="right")
    for row in rows:
        agreement = row["agreement"]
        differs = "" if agreement is None else f"{agreement:.0e}"
        table.add_row(
            row["workload"],
            str(row["unroll_length"]),
            row["program"] + ("*" if row["program"] == row["auto_mode"] else ""),
            f"{row['seconds']:.3f}",
            f"{row['ratio_to_plain']:.2f}",
            _cell(row["ratio_to_torch"], 2),
            _cell(row["temporary_mib"], 1),
            _cell(row["resident_mib"], 1),
            _cell(row["compile_seconds"], 1),
            # `not <=`, so that it is said of NaN too
            f"[bold red]disagrees: {differs}[/]" if agreement is not None and not agreement <= TOLERANCE else differs,
        )
    return table


def table_of_exponents(fitted: list[dict[str, Any]]) -> Table:
    """The fits for the eye."""
    table = Table(title="Growth with N")
    for column in ("workload", "program", "seconds ~ N^", "MiB a step"):
        table.add_column(column, justify="left" if column in ("workload", "program") else "right")
    for fit in fitted:
        table.add_row(fit["workload"], fit["program"], f"{fit['exponent']:.2f}", _cell(fit["mib_a_step"], 2))
    return table


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw seconds against N, ours solid, the peers dashed, beside the paper's times for a round."""
    panels: dict[str, dict[str, Any]] = {}
    for row in rows:
        panel = panels.setdefault(f"{row['workload']}: {row['student']}", {})
        panel.setdefault(row["program"], []).append((row["unroll_length"], row["seconds"]))
    paper = (PAPER_LABEL, list(PAPER_TABLE_5), list(PAPER_TABLE_5.values()))
    title = "Cost of a hypergradient"
    costs(path, panels, dashed=list(PROGRAMS), marks=paper, xlabel="N, steps", ylabel="seconds", title=title)
    return path
