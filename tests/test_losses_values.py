"""The losses without anything to learn, each against its formula written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax.losses import LOSSES

RNG = np.random.default_rng(0)
Z = 3 * RNG.normal(size=(8, 5))
Y = RNG.integers(0, 5, 8)
P = np.exp(Z) / np.exp(Z).sum(1, keepdims=True)
ONE_HOT = np.eye(5)[Y]
RIGHT = P[np.arange(8), Y]
BEST_WRONG = np.where(ONE_HOT == 1, -1, P).max(1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FORMULAS = [
    ("cross_entropy", {}, -np.log(RIGHT)),
    ("label_smoothing", {}, -((0.9 * ONE_HOT + 0.1 / 5) * np.log(P)).sum(1)),
    ("generalized_cross_entropy", {}, (1 - RIGHT**0.7) / 0.7),
    ("generalized_cross_entropy", {"q": 1.0}, 1 - RIGHT),
    ("focal", {}, -((1 - RIGHT) ** 2) * np.log(RIGHT)),
    ("focal", {"gamma": 0.5}, -np.sqrt(1 - RIGHT) * np.log(RIGHT)),
    ("mae", {}, np.abs(ONE_HOT - P).sum(1)),
    ("sce", {}, -0.1 * np.log(RIGHT) - (P * np.where(ONE_HOT == 1, 0, -4.0)).sum(1)),
    ("sce", {"alpha": 6.0, "beta": 0.1, "log_zero": -3.0}, -6 * np.log(RIGHT) + 0.3 * (1 - RIGHT)),
    ("poly", {}, -np.log(RIGHT) + 2 * (1 - RIGHT)),
    ("poly", {"epsilon": -1.0}, -np.log(RIGHT) - (1 - RIGHT)),
    ("taylor_ce", {}, (1 - RIGHT) + (1 - RIGHT) ** 2 / 2),
    ("taylor_ce", {"order": 4}, sum((1 - RIGHT) ** k / k for k in range(1, 5))),
    ("smooth_zero_one", {}, sigmoid(2 * (BEST_WRONG - RIGHT))),  # K as the run begins
    ("smooth_zero_one", {"k": 30.0}, sigmoid(30 * (BEST_WRONG - RIGHT))),
    ("smooth_zero_one", {"k": 9, "form": "wrong_only"}, 2 * sigmoid(9 * (P.max(1) - RIGHT)) - 1),
]


@pytest.mark.parametrize("name, knobs, expected", FORMULAS)
def test_values(name, knobs, expected, x64):
    loss = LOSSES[name](**knobs)
    values = jax.jit(loss.apply)(loss.init(jax.random.key(0)), Z, Y)
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_taylor_ce_becomes_cross_entropy(x64):
    values = jax.jit(LOSSES["taylor_ce"](order=100).apply)({}, Z, Y)[RIGHT > 0.25]
    np.testing.assert_allclose(values, -np.log(RIGHT[RIGHT > 0.25]), rtol=1e-10)


def test_demo_values_of_the_smooth_zero_one_loss(x64):
    """2 sigmoid(50 d) - 1 where the right class is d behind the largest."""
    loss = LOSSES["smooth_zero_one"](k=50.0, form="wrong_only")
    d = np.array([0.01, 0.05, 0.1])
    z = np.log(np.stack([0.5 + d / 2, 0.5 - d / 2], axis=1))
    values = jax.jit(loss.apply)({"k": jnp.array(50.0)}, z, np.ones(3, int))
    np.testing.assert_allclose(values, [0.244919, 0.848284, 0.986614], atol=5e-7)


def test_forms_of_the_smooth_zero_one_loss_differ_where_the_class_is_right(x64):
    right = P.argmax(1) == Y
    assert 0 < right.sum() < len(Y)
    for form, alive in (("both_sides", np.ones(8, bool)), ("wrong_only", ~right)):
        loss = LOSSES["smooth_zero_one"](k=2.0, form=form)
        total = lambda z, loss=loss: loss.apply({"k": jnp.array(2.0)}, z, Y).sum()  # noqa: E731
        slopes = np.abs(jax.jit(jax.grad(total))(Z)).max(1)
        np.testing.assert_array_equal(slopes > 0, alive)


def test_smooth_zero_one_counts_mistakes_in_the_end(x64):
    loss = LOSSES["smooth_zero_one"]()
    params = loss.at(loss.init(jax.random.key(0)), jnp.array(0.99))
    assert np.abs(BEST_WRONG - RIGHT).min() > 0.05
    np.testing.assert_allclose(jax.jit(loss.apply)(params, Z, Y), P.argmax(1) != Y, atol=1e-4)


@pytest.mark.parametrize("steps", [3, 9, 300, 39_000])
def test_steepness_takes_a_third_of_the_run_each(steps):
    loss = LOSSES["smooth_zero_one"]()
    params = loss.init(jax.random.key(0))
    k = jax.vmap(lambda count: loss.at(params, count / steps)["k"])(jnp.arange(steps))
    np.testing.assert_allclose(k, np.repeat([2, 20, 200], steps // 3), rtol=1e-6)


def test_a_given_steepness_stays():
    loss = LOSSES["smooth_zero_one"](k=7.0)
    assert loss.at({"k": jnp.array(7.0)}, jnp.array(0.9)) == {"k": 7.0}


@pytest.mark.parametrize(
    "name, knobs, said",
    [
        ("smooth_zero_one", {"form": "left"}, "choose one of both_sides, wrong_only"),
        ("smooth_zero_one", {"k": 0.0}, "k=0.0 is not positive"),
        ("weight_net", {"units": 0}, "units=0 is not a positive integer"),
        ("adaptive_robust", {"num_classes": 1}, "num_classes=1"),
    ],
)
def test_bad_knobs_are_refused(name, knobs, said):
    with pytest.raises(ValueError, match=said):
        LOSSES[name](**knobs)


def test_no_order_is_refused_when_applied():
    with pytest.raises(ValueError, match="order=0 is not a positive integer"):
        LOSSES["taylor_ce"](order=0).apply({}, jnp.asarray(Z), jnp.asarray(Y))
