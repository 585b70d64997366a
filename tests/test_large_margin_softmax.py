"""Large-margin softmax: its angle function, its schedule, and derivatives where there is no angle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.losses.large_margin_softmax import large_margin_softmax, margin_product, psi
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.types import Head, RoundBatches

THETA = np.array([0, 0.5, 1, 1.5, 2, 2.5, 3, np.pi])
PSI = {
    2: (1, 0.540302, -0.416147, -0.989992, -1.346356, -2.283662, -2.96017, -3),
    3: (1, 0.070737, -0.989992, -1.789204, -2.96017, -3.653365, -4.91113, -5),
    4: (1, -0.416147, -1.346356, -2.96017, -4.1455, -5.160928, -6.843854, -7),
}
LAMBDA = {  # (gamma, power) -> after 1, 1000, 5000, 10 000, 20 000 iterations
    (2.5e-5, 35): (999.1, 421.4, 16.21, 0.4056, 6.868e-4),
    (2e-5, 45): (999.1, 410.2, 13.72, 0.2734, 2.656e-4),
    (1e-5, 45): (999.6, 639.1, 111.3, 13.72, 0.2734),
}
RNG = np.random.default_rng(0)
HEAD = Head(RNG.normal(size=(7, 4)), RNG.normal(size=(4, 3)), RNG.normal(size=3))
TARGETS = np.array([0, 1, 2, 0, 1, 2, 0])


def by_definition(m, lam, head=HEAD):
    """The losses from angles, in NumPy."""
    z = head.features @ head.kernel + head.bias
    for b, y in enumerate(TARGETS):
        x, w = head.features[b], head.kernel[:, y]
        length = np.linalg.norm(x) * np.linalg.norm(w)
        theta = np.arccos(x @ w / length)
        k = min(int(theta * m / np.pi), m - 1)
        margin = length * ((-1) ** k * np.cos(m * theta) - 2 * k)
        z[b, y] = (lam * x @ w + margin) / (1 + lam) + head.bias[y]
    return np.log(np.exp(z).sum(1)) - z[np.arange(7), TARGETS]


def on_device(head=HEAD):
    return jax.tree.map(jnp.asarray, head), jnp.asarray(TARGETS)


@pytest.mark.parametrize("m", PSI)
def test_psi_anchors(m, x64):
    np.testing.assert_allclose(psi(jnp.cos(THETA), m), PSI[m], atol=5.1e-7)


@pytest.mark.parametrize("m", PSI)
def test_psi_falls_and_has_no_step_in_its_slope(m, x64):
    theta = jnp.linspace(1e-3, np.pi - 1e-3, 2001)
    slope = jax.jit(jax.vmap(jax.grad(lambda t: psi(jnp.cos(t), m))))(theta)
    assert jnp.all(slope <= 1e-12)
    assert jnp.max(jnp.abs(jnp.diff(slope))) < m**2 * 2e-3  # |psi''| <= m^2, and theta moves by pi / 2000


@pytest.mark.parametrize("rates", LAMBDA)
def test_lambda_anchors(rates, x64):
    gamma, power = rates
    loss = large_margin_softmax(gamma=gamma, power=power, iterations=40_000)
    params = loss.init(jax.random.key(0))
    lam = [loss.at(params, jnp.array(it / 40_000))["lambda"] for it in (1, 1000, 5000, 10_000, 20_000)]
    np.testing.assert_allclose(lam, LAMBDA[rates], rtol=5.1e-4)
    floor = large_margin_softmax(gamma=gamma, power=power, iterations=40_000, lambda_min=5.0)
    assert floor.at(params, jnp.array(0.5))["lambda"] == 5.0


@pytest.mark.parametrize("m, lam", [(2, 0.0), (2, 1.5), (3, 0.2), (4, 0.0), (4, 3.0)])
def test_losses_are_those_of_the_angles(m, lam, x64):
    loss = large_margin_softmax(m=m)
    values = jax.jit(loss.apply)({"lambda": jnp.array(lam)}, *on_device())
    np.testing.assert_allclose(values, by_definition(m, lam), rtol=1e-12)


@pytest.mark.parametrize("m, lam", [(1, 0.0), (1, 2.0), (3, np.inf)])
def test_without_a_margin_it_is_cross_entropy(m, lam, x64):
    head, targets = on_device()
    values = jax.jit(large_margin_softmax(m=m).apply)({"lambda": jnp.array(lam)}, head, targets)
    expected = jax.jit(cross_entropy)(HEAD.features @ HEAD.kernel + HEAD.bias, targets)
    np.testing.assert_allclose(values, expected, rtol=1e-12)


@pytest.mark.parametrize("m", PSI)
def test_derivatives_against_finite_differences_of_the_definition(m, x64):
    loss = large_margin_softmax(m=m)
    head, targets = on_device()
    total = lambda head: loss.apply({"lambda": jnp.array(0.3)}, head, targets).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total))(head)
    for name in Head._fields:
        value, difference = getattr(HEAD, name), np.zeros_like(getattr(HEAD, name))
        for i in np.ndindex(value.shape):
            for sign in (1, -1):
                moved = value.copy()
                moved[i] += sign * 1e-6
                difference[i] += sign * by_definition(m, 0.3, HEAD._replace(**{name: moved})).sum() / 2e-6
        np.testing.assert_allclose(getattr(gradient, name), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("m", PSI)
def test_second_derivative_where_features_lie_on_the_column(m, x64):
    """|x| psi at x = 2 e_1 + t e_2, w = +-e_1: psi is 1 - m^2 t^2 / 2|x|^2, or the same rising from 1 - 2m."""

    @jax.jit
    @jax.vmap
    def first_and_second(sign):
        w = sign * jnp.array([[1.0, 0.0]])
        f = lambda t: margin_product(jnp.array([[2.0, 0.0]]) + t * jnp.array([[0.0, 1.0]]), w, m)[0]  # noqa: E731
        return jax.grad(f)(0.0), jax.grad(jax.grad(f))(0.0)

    first, second = first_and_second(jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(first, [0, 0], atol=1e-12)
    np.testing.assert_allclose(second, [(1 - m**2) / 2, (1 - 2 * m + m**2) / 2], atol=1e-12)


def test_derivatives_are_finite_where_nothing_has_an_angle():
    loss, (head, targets) = large_margin_softmax(m=4), on_device(jax.tree.map(np.float32, HEAD))

    def norm(head):
        total = lambda head: loss.apply({"lambda": jnp.array(0.0)}, head, targets).sum()  # noqa: E731
        first = jax.grad(total)(head)
        return optax.tree.norm(first, squared=True), first

    compute = jax.jit(jax.value_and_grad(norm, has_aux=True))
    for size in (0.0, 1e-30, 1e-10, 2e-9, 1e-6):
        for features, kernel in ((size, 1.0), (1.0, size), (size, size)):
            small = head._replace(features=features * head.features, kernel=kernel * head.kernel)
            chex.assert_tree_all_finite(compute(small))
    dead = head._replace(features=head.features.at[0].set(0), kernel=head.kernel.at[:, 1].set(0))
    chex.assert_tree_all_finite(compute(dead))


def test_it_trains_a_student_by_its_head():
    """From cross entropy to a margin of 4 within 40 steps on one batch."""
    loss, optimizer = large_margin_softmax(m=4, base=10.0), optax.sgd(0.1)
    method = fixed_loss(toy.student, toy.task, loss, optimizer, steps=40)
    state = method.init(jax.random.key(0), jnp.zeros((2, 5)))
    one = toy.batch(0, 1, 1, 6)
    batches = RoundBatches(jax.tree.map(lambda x: x.repeat(10, 1), one), toy.batch(1, 1, 7), jnp.array(False))
    run, losses = jax.jit(method.round), []
    for _ in range(4):
        state, metrics = run(state, batches)
        losses.append(metrics["train_loss"])
    assert losses[-1] < 0.7 * losses[0]
    assert all(jax.tree.leaves(metrics["finite"]))
    with pytest.raises(ValueError, match="give steps"):
        fixed_loss(toy.student, toy.task, loss, optimizer)


@pytest.mark.parametrize(
    "knobs, said",
    [({"m": 5}, "m=5"), ({"m": 0}, "m=0"), ({"gamma": -1.0}, "gamma=-1.0"), ({"iterations": 0}, "iterations=0")],
)
def test_bad_knobs_are_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        large_margin_softmax(**knobs)
