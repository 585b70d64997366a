"""The pictures of a study, from the rows that its instruments wrote."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2t_jax.runs import plots
from l2t_jax.runs.instruments import HORIZONS
from l2t_jax.runs.reporting import curves

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
