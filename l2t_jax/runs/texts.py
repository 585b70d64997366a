"""How records are told: names, numbers, and what came out in sentences."""

import math
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


def ending(record: Record, observations: list[dict[str, Any]]) -> list[str]:
    """What came out of a run, for somebody who sees it for the first time.

    Args:
      record: its summary.json.
      observations: rows of observations.jsonl, which there are where labels are known to be wrong.
    Returns:
      how many labels were wrong and who learned them by heart; how the best of the other methods stands to the fixed
      loss. "Level" is a difference of less than two standard errors over the seeds. None where there are not both.
    """
    methods, metric, base = record["methods"], record["metric"], record["baseline"]
    done = [name for name, method in methods.items() if method["score"]["mean"] is not None]
    if base not in done or len(done) < 2:
        return []
    sign = 1 if metric["better"] == "higher" else -1
    best = max((name for name in done if name != base), key=lambda name: sign * methods[name]["score"]["mean"])
    return [*_by_heart(record, observations, base, best), _compared(record, base, best, sign)]


def _by_heart(record: Record, observations: list[dict[str, Any]], base: str, best: str) -> list[str]:
    last: dict[str, dict[int, float]] = {}
    for row in observations:
        if row.get("memorised") is not None:
            last.setdefault(row["method"], {})[row["seed"]] = row["memorised"]
    if base not in last or best not in last:
        return []
    shares = [f"{name} {100 * float(np.mean(list(last[name].values()))):.0f} %" for name in (base, best)]
    wrong = 100 * record["config"]["wrong_labels"]
    return [f"{wrong:.0f} % of the training labels are wrong. Learned by heart of these: {', '.join(shares)}."]


def _compared(record: Record, base: str, best: str, sign: int) -> str:
    methods, metric = record["methods"], record["metric"]
    scores = [methods[name]["score"] for name in (best, base)]
    pairs = [(a, b) for a, b in zip(*(s["per_seed"] for s in scores), strict=True) if None not in (a, b)]
    gains = [sign * (a - b) for a, b in pairs]
    gain, seeds = float(np.mean(gains)) if gains else math.nan, len(gains)
    error = float(np.std(gains, ddof=1)) / math.sqrt(seeds) if seeds > 1 else math.inf
    of = {name: method["wall_time_s"] for name, method in methods.items()}
    # A frozen teacher has cost its training too.
    seconds = sum(of[name] for name in {best, best.removesuffix("_transfer")} if name in of)
    times = seconds / of[base] if of[base] else math.nan
    told = " and ".join(shown(score, metric) for score in scores)
    size = f"{points(metric) * abs(gain):.{decimals(metric)}f}" + (" points" if metric["unit"] == "%" else "")
    if not abs(gain) > 2 * error:
        how = "level with" if seeds > 1 else f"{size} {'better' if gain > 0 else 'worse'}, in one seed, than"
    else:
        how = f"{size} {'better' if gain > 0 else 'worse'} than"
    return f"{best} is {how} {base} ({headline(record, ' in ')}: {told}), at {times:.1f} times its seconds."


def name_of(record: dict[str, Any]) -> str:
    """What a record was measured on, `digits, mlp, flip2 40 %, long tail of 100`."""
    config = record["config"]
    noise, tail = noise_of(config), config.get("imbalance", 1.0)  # older records lack what was no choice then
    told = [Path(record["dataset"]).name, record["student"], f"{noise} %" if noise else ""]
    told.append(f"long tail of {tail:g}" if tail != 1 else "")
    told.append("trained on the clean ones too" if config.get("train_on_clean") else "")
    return ", ".join(filter(None, told))


def noise_of(config: dict[str, Any]) -> str:
    """Which labels are wrong, `flip2 40`, or "" where none is."""
    noise = config["noise"]
    return f"{noise['kind']} {100 * noise['ratio']:g}" if noise and noise["ratio"] else ""


def headline(record: dict[str, Any], unit: str = ", ") -> str:
    """What the score of a record is, `test accuracy, %`.

    Args:
      record: of a run.
      unit: what stands before the metric's unit, if it has one.
    """
    metric, tested_on = record["metric"], "held-out" if record["config"].get("held_out") else "test"
    return f"{tested_on} {metric['name']}" + (f"{unit}{metric['unit']}" if metric["unit"] else "")


def points(metric: dict[str, Any]) -> float:
    """By how much a score is multiplied to be shown in the metric's unit: percentages are of fractions."""
    return 100.0 if metric["unit"] == "%" else 1.0


def decimals(metric: dict[str, Any]) -> int:
    """How many decimals of a score are shown."""
    return 2 if metric["unit"] == "%" else 4


def result(score: dict[str, Any], failed: int, metric: dict[str, Any]) -> str:
    """`shown`, and how many seeds stopped early, if any did."""
    return shown(score, metric) + (f" ({failed} stopped early)" if failed else "")


def shown(score: dict[str, Any], metric: dict[str, Any]) -> str:
    """Write statistics of a score in the metric's unit, `97.22 ± 0.23`."""
    if score["mean"] is None:
        return "-"
    scale, places = points(metric), decimals(metric)
    spread = "" if score["std"] is None else f" ± {scale * score['std']:.{places}f}"
    return f"{scale * score['mean']:.{places}f}{spread}"
