"""The adaptive robust loss: rho in all its limits, the partition function against quadrature, learning alpha and c."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from scipy import integrate

from l2t_jax.losses import LossError, check_loss
from l2t_jax.losses.adaptive_robust import (
    adaptive_robust,
    general_robust,
    log_partition,
    negative_log_likelihood,
    shape_and_scale,
)
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.types import RoundBatches

X = np.array([0.5, 1, 2, 4])
RHO = {
    -2: (0.117647, 0.4, 1, 1.6),
    0: (0.117783, 0.405465, 1.098612, 2.197225),
    0.5: (0.11787, 0.408658, 1.151348, 2.544443),
    1: (0.118034, 0.414214, 1.236068, 3.123106),
    1.5: (0.118468, 0.426502, 1.398717, 4.256154),
    2: (0.125, 0.5, 2, 8),
    -np.inf: (0.117503, 0.393469, 0.864665, 0.999665),
    np.inf: tuple(np.expm1(X**2 / 2)),
}
Z = {
    0: 4.4428829,
    0.25: 3.9124486,
    0.5: 3.6389931,
    1: 3.272307,
    1.25: 3.1190445,
    1.5: 2.9659249,
    1.75: 2.794052,
    2: 2.5066283,
}


rho = jax.jit(general_robust)


def rho_by_definition(x, alpha, c=1.0):
    b, s = abs(alpha - 2), (x / c) ** 2
    return b / alpha * ((s / b + 1) ** (alpha / 2) - 1)


def log_z_by_quadrature(alpha):
    """Over x = exp(y) beyond 1, so that the heavy tails of small alpha are reached."""
    near = integrate.quad(lambda x: np.exp(-rho_by_definition(x, alpha)), 0, 1, epsabs=1e-13)[0]
    far = integrate.quad(
        lambda y: np.exp(y - rho_by_definition(np.exp(y), alpha)), 0, 60, epsabs=1e-13, epsrel=1e-12, limit=400
    )[0]
    return np.log(2 * (near + far))


@pytest.mark.parametrize("alpha", RHO)
def test_rho_anchors(alpha, x64):
    np.testing.assert_allclose(rho(X, alpha, 1.0), RHO[alpha], atol=5.1e-7)
    np.testing.assert_allclose(rho(3 * X, alpha, 3.0), RHO[alpha], atol=5.1e-7)


def test_rho_is_its_definition_elsewhere(x64):
    rng = np.random.default_rng(0)
    alpha = np.concatenate([rng.uniform(-8, 5, 60), [1e-3, -1e-3, 1.999, 2.001]])
    x, c = rng.normal(size=64) * 2, rng.uniform(0.3, 3, 64)
    np.testing.assert_allclose(rho(x, alpha, c), rho_by_definition(x, alpha, c), rtol=1e-11)
    # near its limits too, where the formula itself has no digits left
    for near, limit in ((1e-9, 0), (2 - 1e-9, 2), (-1e9, -np.inf)):
        np.testing.assert_allclose(rho(X, near, 1.0), rho(X, limit, 1.0), rtol=1e-6)


def test_derivatives_of_rho(x64):
    """Through alpha = 0 there is no seam."""
    rng = np.random.default_rng(1)
    alpha = jnp.asarray(np.concatenate([rng.uniform(-3, 1.9, 20), [0.0, 1e-7, 1e-3, -1e-3]]))
    x, c = jnp.asarray(rng.normal(size=24) * 3), jnp.asarray(rng.uniform(0.3, 3, 24))
    first = jax.jit(jax.vmap(jax.grad(general_robust, argnums=(0, 1, 2))))
    second = jax.jit(jax.vmap(jax.grad(jax.grad(general_robust, argnums=1), argnums=1)))
    differences = [
        (rho(*up) - rho(*down)) / 2e-5
        for up, down in (
            ((x + 1e-5, alpha, c), (x - 1e-5, alpha, c)),
            ((x, alpha + 1e-5, c), (x, alpha - 1e-5, c)),
            ((x, alpha, c + 1e-5), (x, alpha, c - 1e-5)),
        )
    ]
    np.testing.assert_allclose(first(x, alpha, c), differences, rtol=1e-6, atol=1e-8)
    slope = lambda alpha: first(x, alpha, c)[1]  # noqa: E731
    np.testing.assert_allclose(
        second(x, alpha, c), (slope(alpha + 1e-5) - slope(alpha - 1e-5)) / 2e-5, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("wide", [True, False])
def test_derivatives_are_finite_at_the_limits(wide):
    with jax.enable_x64(wide):
        both = lambda *a: (jax.grad(general_robust, (0, 1, 2))(*a), jax.hessian(general_robust, (0, 1, 2))(*a))  # noqa: E731
        compute = jax.jit(jax.vmap(both))
        x, alpha = jnp.meshgrid(
            jnp.array([0.0, 1e-20, 0.3, 1e4]), jnp.array([-jnp.inf, -1e6, -2, 0, 1e-8, 1, 2, 3, jnp.inf])
        )
        chex.assert_tree_all_finite(compute(x.ravel(), alpha.ravel(), jnp.ones(x.size)))
        partition = jax.vmap(lambda a: (log_partition(a), jax.grad(log_partition)(a), jax.hessian(log_partition)(a)))
        chex.assert_tree_all_finite(jax.jit(partition)(jnp.array([0.0, 1e-6, 1.0, 1.999, 2.0])))


def test_partition_anchors(x64):
    np.testing.assert_allclose(jnp.exp(log_partition(jnp.array(list(Z), float))), list(Z.values()), atol=5e-7)
    exact = np.log([np.pi * np.sqrt(2), np.sqrt(2 * np.pi)])
    np.testing.assert_allclose(log_partition(jnp.array([0.0, 2.0])), exact, atol=1e-6)


@pytest.mark.versions
def test_partition_against_quadrature(x64):
    alpha = np.concatenate([np.random.default_rng(0).uniform(0, 2, 46), [1e-3, 1e-2, 1.99, 1.999]])
    expected = [log_z_by_quadrature(a) for a in alpha]
    np.testing.assert_allclose(log_partition(jnp.asarray(alpha)), expected, atol=2e-7)
    with jax.enable_x64(False):
        single = log_partition(jnp.asarray(alpha, jnp.float32))
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, expected, atol=2e-6)


def test_derivative_of_the_partition_against_quadrature(x64):
    alpha = np.array([0.01, 0.2, 0.7, 1.0, 1.4, 1.8, 1.97])
    slope = [(log_z_by_quadrature(a + 1e-4) - log_z_by_quadrature(a - 1e-4)) / 2e-4 for a in alpha]
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(log_partition)))(alpha), slope, atol=1e-5)


def test_the_likelihood_integrates_to_one(x64):
    y = np.linspace(-60, 60, 60_001)[:, None]  # x = sinh(y) / 10
    alpha, c = np.array([[0.4, 1.0, 1.9], [0.7, 2.5, 0.1]])
    density = np.exp(-jax.jit(negative_log_likelihood)(np.sinh(y) / 10, alpha, c))
    np.testing.assert_allclose(np.sum(density * np.cosh(y) / 10, 0) * (y[1] - y[0]), [1, 1, 1], rtol=1e-6)


def test_shape_and_scale_start_in_the_middle_and_stay_in_bounds(x64):
    alpha, c = shape_and_scale(adaptive_robust(num_classes=3).init(jax.random.key(0)), 0.1)
    np.testing.assert_allclose(alpha, [1, 1, 1], rtol=1e-15)
    np.testing.assert_allclose(c, [1, 1, 1], rtol=1e-15)
    far = jnp.array([-50.0, 50.0])
    alpha, c = shape_and_scale({"alpha": far, "c": far}, 1e-5)
    np.testing.assert_allclose(alpha, [0.001, 1.999], rtol=1e-12)
    np.testing.assert_allclose(c[0], 1e-5, rtol=1e-12)
    np.testing.assert_allclose(c[1], (1 - 1e-5) * (50 + np.log(np.e - 1)) + 1e-5, rtol=1e-12)


@pytest.mark.parametrize("low", [0, 1.0, -1])
def test_bad_least_scale(low):
    with pytest.raises(ValueError, match="must lie between 0 and 1, both excluded"):
        adaptive_robust(scale_low=low)


def test_every_class_has_its_own_shape_and_scale(x64):
    rng = np.random.default_rng(3)
    z, y, latent = rng.normal(size=(4, 3)), np.array([0, 1, 2, 1]), rng.normal(size=(2, 3))
    alpha = 0.001 + 1.998 / (1 + np.exp(-latent[0]))
    c = (1 - 0.03) * np.log1p(np.exp(latent[1] + np.log(np.e - 1))) + 0.03
    residual = np.eye(3)[y] - np.exp(z) / np.exp(z).sum(1, keepdims=True)
    log_z = np.array([log_z_by_quadrature(a) for a in alpha])
    expected = (rho_by_definition(residual, alpha, c) + np.log(c) + log_z).sum(1)
    params = {"alpha": jnp.asarray(latent[0]), "c": jnp.asarray(latent[1])}
    values = jax.jit(adaptive_robust(num_classes=3, scale_low=0.03).apply)(params, z, y)
    np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.versions
def test_a_student_trains_alpha_and_c_by_its_own_optimizer(x64):
    loss = adaptive_robust(num_classes=toy.CLASSES)
    method = fixed_loss(toy.student, toy.task, loss, optax.sgd(0.1))
    state = method.init(jax.random.key(0), jnp.zeros((2, 5)))
    train = toy.batch(0, 1, 1, 6)
    run = jax.jit(method.round)
    after, first = run(state, RoundBatches(train, toy.batch(1, 1, 7), jnp.array(False)))

    @jax.jit
    def by_hand(phi):
        inputs, targets, *_ = jax.tree.map(lambda x: x[0, 0], train)
        outputs, _ = toy.student.apply(state.student.variables, inputs, True)
        residual = jax.nn.one_hot(targets, 3) - jax.nn.softmax(outputs)
        mean = lambda phi: negative_log_likelihood(residual, *shape_and_scale(phi, 0.1)).sum(1).mean()  # noqa: E731
        return jax.tree.map(lambda p, g: p - 0.1 * g, phi, jax.grad(mean)(phi))

    chex.assert_trees_all_close(after.loss, by_hand(state.loss), rtol=1e-12)
    assert min(jnp.abs(leaf).min() for leaf in jax.tree.leaves(after.loss)) > 1e-4
    for _ in range(20):
        after, last = run(after, RoundBatches(train, toy.batch(1, 1, 7), jnp.array(False)))
    assert last["train_loss"] < first["train_loss"] - 0.5  # the scale of the residuals is found
    assert jnp.all(shape_and_scale(after.loss, 0.1)[1] < 0.9)


def test_another_number_of_classes_is_refused():
    loss = adaptive_robust(num_classes=4)
    with pytest.raises(ValueError, match="built for 4 classes and is given outputs of 3: build it with num_classes=3"):
        loss.apply(loss.init(jax.random.key(0)), jnp.zeros((2, 3)), jnp.zeros(2, int))
    with pytest.raises(LossError, match="apply failed"):
        check_loss(loss, 3, "adaptive_robust")
