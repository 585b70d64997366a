"""Conclusion 1, the sharper bound, the escape from a strict saddle, Lanczos against whole Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax import analysis
from l2t_jax.types import Student
from l2t_jax.unroll import init_state

pytestmark = pytest.mark.usefixtures("x64")


def random_hessian(rng, size, coupling):
    """A symmetric matrix with mixed blocks of any strength."""
    h = rng.normal(size=(size, size)) * rng.choice([0.1, 1.0, 10.0])
    h = (h + h.T) / 2
    first = int(rng.integers(1, size))
    h[:first, first:] *= coupling
    h[first:, :first] *= coupling
    return jnp.asarray(h), first


def quadratic(h, first):
    """v'Hv / 2 of two blocks."""

    def objective(v1, v2):
        v = jnp.concatenate([v1, v2])
        return v @ h @ v / 2

    return objective


def saddle(v1, v2):
    """A product that should be one: its strict saddle is at the origin, where H = [[0, -1], [-1, 0]]."""
    return (v1["x"] * v2["y"] - 1) ** 2 / 2


def at(x, y):
    return {"x": jnp.asarray(x)}, {"y": jnp.asarray(y)}


def largest_root(h, first, eta):
    """The largest growth by the road of the proof: the largest root of d = -eta lowest(S(1 + d)), from above."""
    d = eta * 2 * np.linalg.norm(h) * (1 + eta * np.linalg.norm(h)) + 1
    for _ in range(20000):
        s = np.array(h)
        s[:first, first:] *= np.sqrt(1 + d)
        s[first:, :first] *= np.sqrt(1 + d)
        new = -eta * np.linalg.eigvalsh(s)[0]
        if abs(new - d) < 1e-13 * abs(d):
            break
        d = new
    return 1 + d


def test_the_hand_example():
    """H = [[1, 2], [2, 1]], blocks of one, eta = 0.1: every number by hand."""
    found = analysis.growth(jnp.array([[1.0, 2.0], [2.0, 1.0]]), 1, 0.1)
    m, g = analysis.sweep_matrices(jnp.array([[1.0, 2.0], [2.0, 1.0]]), 1, 0.1)
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(np.linalg.solve(m, g))), [0.729212, 1.110788], atol=1e-6)
    np.testing.assert_allclose(found.growth, 1.110788, atol=1e-6)
    expected = {"gamma": 1, "sharp": 1.1, "published": 1.04, "lipschitz": 3, "block_lipschitz": 2}
    np.testing.assert_allclose([getattr(found, name) for name in expected], list(expected.values()), rtol=1e-12)


def test_a_sweep_is_the_matrix_of_the_analysis():
    rng = np.random.default_rng(0)
    h, first = random_hessian(rng, 7, 1.0)
    v1, v2 = jnp.asarray(rng.normal(size=first)), jnp.asarray(rng.normal(size=7 - first))
    m, g = analysis.sweep_matrices(h, first, 0.05)
    points, values = analysis.alternating_descent(quadratic(h, first), v1, v2, 0.05, 3)
    expected = jnp.concatenate([v1, v2])
    for t in range(4):
        found = jnp.concatenate([points[0][t], points[1][t]])
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(values[t], expected @ h @ expected / 2, rtol=1e-11)
        expected = jnp.linalg.solve(m, g @ expected)


@pytest.mark.versions
def test_the_hessian_of_pytrees():
    """Of an objective that is not a quadratic, at a point where every entry is known by hand."""
    h, first = analysis.hessian(saddle, *at(2.0, 3.0))
    np.testing.assert_allclose(h, [[9.0, 11.0], [11.0, 4.0]], rtol=1e-14)
    assert first == 1


@pytest.mark.parametrize("step", [0.1, 1.0, 5.0])
def test_both_bounds_hold(step):
    """Over random Hessians, splits and step sizes eta = step / C_max; the growth found by a second road is the same."""
    rng = np.random.default_rng(int(10 * step))
    gains, compared, all_real = [], 0, True
    for _ in range(200):
        h, first = random_hessian(rng, int(rng.integers(2, 9)), rng.choice([0.0, 0.1, 1.0, 3.0]))
        eta = step / analysis.growth(h, first, 1.0).block_lipschitz
        found = analysis.growth(h, first, eta)
        if found.gamma <= 1e-3:
            continue
        compared += 1
        assert found.growth >= found.sharp - 1e-9 * found.growth
        assert 1 + eta * found.gamma / 3 - 1e-12 <= found.published <= 1 + eta * found.gamma / 2 + 1e-12
        np.testing.assert_allclose(found.growth, largest_root(np.asarray(h), first, eta), rtol=1e-6)
        gains.append((found.growth - 1) / (eta * found.gamma))
        eigenvalues = np.linalg.eigvals(np.linalg.solve(*analysis.sweep_matrices(h, first, eta)))
        all_real &= np.abs(eigenvalues.imag).max() <= 1e-9 * np.abs(eigenvalues).max()
    assert compared > 150
    assert all_real == (step <= 1)  # the paper has it without a condition on eta
    assert max(gains) > 1.05  # the bound is no identity: the blocks help each other out of the saddle


def test_equality_without_mixed_blocks():
    h = jnp.diag(jnp.array([2.0, -0.5, 1.0, -3.0]))
    found = analysis.growth(h, 2, 0.2)
    np.testing.assert_allclose(found.growth, found.sharp, rtol=1e-12)
    np.testing.assert_allclose(found.growth, 1.6, rtol=1e-12)


def test_escape_from_a_strict_saddle():
    """Near the saddle the distance grows by the eigenvalue of M^-1 G a sweep; in the end the minimum is reached."""
    eta = 0.1
    h, first = analysis.hessian(saddle, *at(0.0, 0.0))
    found = analysis.growth(h, first, eta)
    assert found.gamma == pytest.approx(1) and found.growth > found.sharp > found.published > 1
    points, values = analysis.alternating_descent(saddle, *at(1e-8, 0.0), eta, 600)
    distance = np.hypot(points[0]["x"], points[1]["y"])
    np.testing.assert_allclose(distance[100:120] / distance[99:119], found.growth, rtol=1e-4)
    assert (np.diff(values) <= 1e-15).all() and values[0] == pytest.approx(0.5) and values[-1] < 1e-12


@pytest.mark.versions
def test_lanczos_finds_what_the_whole_hessian_has():
    """On the validation error of a taught student: second derivatives through its steps."""

    def apply(variables, inputs, train):
        return jnp.tanh(inputs) @ variables["params"], {}

    student = Student(lambda key, inputs: {"params": jax.random.normal(key, (5, toy.CLASSES))}, apply)
    loss, optimizer = toy.small_loss(), optax.sgd(3.0)
    state = init_state(student.init(jax.random.key(0), jnp.zeros((2, 5))), optimizer)
    data = toy.batch(1, 3, 6), toy.batch(2, 7)
    objective = analysis.taught_error(student, toy.task, loss, optimizer, state, *data)
    point = state.params, toy.to_x64(loss.init(jax.random.key(1)))
    h, first = analysis.hessian(objective, *point)
    np.testing.assert_allclose(h, h.T, atol=1e-10)
    values, vectors = np.linalg.eigh(h)
    assert values[0] < -1e-2  # or the test would say nothing about negative curvature
    found = analysis.lowest_curvature(objective, *point, jax.random.key(2), tolerance=1e-10)
    np.testing.assert_allclose(found.value, values[0], rtol=1e-8)
    np.testing.assert_allclose(found.first_share, np.sum(vectors[:first, 0] ** 2), rtol=1e-6)
    assert found.residual < 1e-7 and found.products >= 17
    theta, phi = found.direction
    flat = jnp.concatenate([theta.ravel(), *(x.ravel() for x in jax.tree.leaves(phi))])
    assert abs(flat @ vectors[:, 0]) == pytest.approx(1, abs=1e-8)


def test_the_objective_of_a_run_is_its_validation_error():
    """Two student steps written out by hand, then the error on the validation batch."""
    loss, eta = toy.small_loss(), 0.3
    optimizer = optax.sgd(eta)
    state = init_state(toy.to_x64(toy.student.init(jax.random.key(0), jnp.zeros((2, 5)))), optimizer)
    batches, validation, phi = toy.batch(1, 2, 6), toy.batch(2, 7), toy.to_x64(loss.init(jax.random.key(1)))
    theta, stats = state.params, state.batch_stats

    def training(theta, batch, stats):
        outputs, _ = toy.student.apply({"params": theta, "batch_stats": stats}, batch.inputs, True)
        return jnp.mean(loss.apply(phi, outputs, batch.targets))

    for i in range(2):
        gradient = jax.grad(training)(theta, jax.tree.map(lambda x, i=i: x[i], batches), stats)
        theta = jax.tree.map(lambda p, g: p - eta * g, theta, gradient)
    outputs, _ = toy.student.apply({"params": theta, "batch_stats": stats}, validation.inputs, True)
    expected = jnp.mean(toy.task.error(outputs, validation.targets))
    elsewhere = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))  # theta is an argument
    objective = analysis.taught_error(toy.student, toy.task, loss, optimizer, elsewhere, batches, validation)
    np.testing.assert_allclose(objective(state.params, phi), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.growth(jnp.ones((2, 3)), 1, 0.1), r"H \[2, 3\] cannot be divided"),
        (lambda: analysis.growth(jnp.eye(2), 2, 0.1), "0 < D1 < D"),
        (lambda: analysis.growth(jnp.array([[1.0, 2.0], [0.0, 1.0]]), 1, 0.1), "not symmetric"),
        (
            lambda: analysis.lowest_curvature(saddle, *at(1.0, 1.0), jax.random.key(0)),
            "use `hessian`",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_curvature_where_there_is_none():
    """Too few products, and an objective without a second derivative, are said and not answered."""
    h = jnp.diag(jnp.linspace(-1, 1, 400))
    objective, blocks = quadratic(h, 200), (jnp.ones(200), jnp.ones(200))
    with pytest.raises(analysis.CurvatureError, match="raise products or tolerance"):
        analysis.lowest_curvature(objective, *blocks, jax.random.key(0), tolerance=1e-12, products=20)
    with pytest.raises(analysis.CurvatureError, match="not finite"):
        analysis.lowest_curvature(
            lambda a, b: jnp.sum(jnp.abs(a) ** 1.5) + jnp.sum(b), jnp.zeros(4), jnp.zeros(3), jax.random.key(0)
        )
