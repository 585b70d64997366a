"""What a run says at its end is what its record says."""

import pytest

from l2t_jax.runs.texts import ending

ACCURACY = {"name": "accuracy", "unit": "%", "better": "higher"}


def record(metric=ACCURACY, **methods):
    """Of per-seed scores and seconds by method."""
    made = {
        name: {
            "score": {
                "mean": sum(found) / len(found) if (found := [s for s in scores if s is not None]) else None,
                "std": 0.01 if len(found) > 1 else None,
                "per_seed": list(scores),
            },
            "wall_time_s": seconds,
        }
        for name, (scores, seconds) in methods.items()
    }
    return {"methods": made, "metric": metric, "baseline": "cross_entropy", "config": {"wrong_labels": 0.394}}


def test_the_best_stands_beside_the_fixed_loss():
    """A frozen teacher costs its training too."""
    run = record(l2t_dln=((0.90, 0.94), 20.0), l2t_dln_transfer=((0.96, 0.97), 10.0), cross_entropy=((0.70, 0.72), 3.0))
    rows = [
        {"method": method, "seed": seed, "memorised": share}
        for method, shares in {"cross_entropy": (0.1, 0.3), "l2t_dln_transfer": (0.4, 0.02)}.items()
        for seed in (0, 1)
        for share in shares  # the last one counts
    ]
    assert ending(run, rows) == [
        "39 % of the training labels are wrong. Learned by heart of these: cross_entropy 30 %, l2t_dln_transfer 2 %.",
        "l2t_dln_transfer is 25.50 points better than cross_entropy (test accuracy in %: 96.50 ± 1.00 and 71.00 ± "
        "1.00), at 10.0 times its seconds.",
    ]


@pytest.mark.parametrize(
    "metric, ours, theirs, told",
    [
        (ACCURACY, (0.90, 0.94), (0.91, 0.93), "ours is level with cross_entropy"),
        (ACCURACY, (0.90, 0.91), (0.95, 0.96), "ours is 5.00 points worse than cross_entropy"),
        (ACCURACY, (0.90,), (0.85,), "ours is 5.00 points better, in one seed, than cross_entropy"),
        (ACCURACY, (0.90, None), (0.85, 0.99), "ours is 5.00 points better, in one seed, than cross_entropy"),
        (ACCURACY | {"better": "lower", "unit": ""}, (0.5, 0.6), (1.0, 1.1), "ours is 0.5000 better than"),
    ],
)
def test_a_difference_is_told_with_its_direction(metric, ours, theirs, told):
    """Only of seeds that both methods finished."""
    (line,) = ending(record(metric, ours=(ours, 2.0), cross_entropy=(theirs, 1.0)), [])
    assert line.startswith(told) and line.endswith("at 2.0 times its seconds.")


def test_of_two_the_better_one_is_told():
    lower = {"name": "error", "unit": "", "better": "lower"}
    (line,) = ending(record(lower, a=((2.0, 2.1), 1), b=((1.0, 1.1), 1), cross_entropy=((3.0, 3.1), 1)), [])
    assert line.startswith("b is")


def test_nothing_is_told_where_there_is_nothing_to_compare():
    assert ending(record(l2t_dln=((0.9,), 1)), []) == []
    assert ending(record(cross_entropy=((0.9,), 1)), []) == []
    assert ending(record(l2t_dln=((None,), 1), cross_entropy=((0.9,), 1)), []) == []
