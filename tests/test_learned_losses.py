"""The losses a teacher learns, each against its formula written in NumPy, and that learning them can do something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax.losses import LOSSES

RNG = np.random.default_rng(0)
Z = 2 * RNG.normal(size=(6, 4))
Y = np.array([0, 1, 2, 3, 1, 2])
P = np.exp(Z) / np.exp(Z).sum(1, keepdims=True)
ONE_HOT = np.eye(4)[Y]
PLAIN = -np.log(P[np.arange(6), Y])


def build(name, **knobs):
    loss = LOSSES[name](**knobs)
    return loss, loss.init(jax.random.key(1))


def test_ml3_by_hand(x64):
    loss, params = build("ml3")
    first, second, third = (np.asarray(layer.kernel) for layer in params)
    assert [layer.bias for layer in params] == [(), (), ()]
    assert first.size + second.size + third.size == 2650
    expected = np.zeros(6)
    for b in range(6):
        for j in range(4):
            hidden = np.maximum(np.array([P[b, j], ONE_HOT[b, j]]) @ first, 0)
            value = (np.maximum(hidden @ second, 0) @ third).item()
            expected[b] += np.log1p(np.exp(value))
    np.testing.assert_allclose(jax.jit(loss.apply)(params, Z, Y), expected, rtol=1e-12)


def test_taylor_glo_by_hand(x64):
    loss, start = build("taylor_glo")
    t0, t1, t2, t3, t4, t5, t6, t7 = theta = RNG.normal(size=8)
    x, y = ONE_HOT, P  # the paper's names
    terms = t2 * (y - t1) + t3 / 2 * (y - t1) ** 2 + t4 / 6 * (y - t1) ** 3 + t5 * (x - t0) * (y - t1)
    terms = terms + t6 / 2 * (x - t0) * (y - t1) ** 2 + t7 / 2 * (x - t0) ** 2 * (y - t1)
    apply = jax.jit(loss.apply)
    values = apply(jnp.asarray(theta), Z, Y)
    np.testing.assert_allclose(values, -terms.mean(1), rtol=1e-12)
    begins = apply(start, Z, Y)
    right = P[np.arange(6), Y]
    np.testing.assert_allclose(begins, ((1 - right) + (1 - right) ** 2 / 2) / 4, rtol=1e-12)


@pytest.mark.parametrize("units", [100, 7])
def test_weight_net_by_hand(units, x64):
    loss, params = build("weight_net", units=units)
    (w1, b1), (w2, b2) = (map(np.asarray, layer) for layer in params)
    assert (w1.shape, b1.shape, w2.shape, b2.shape) == ((1, units), (units,), (units, 1), (1,))
    weights = 1 / (1 + np.exp(-(np.maximum(PLAIN[:, None] @ w1 + b1, 0) @ w2 + b2)[:, 0]))
    apply = jax.jit(lambda z: loss.apply(params, z, Y))
    np.testing.assert_allclose(apply(Z), weights * PLAIN, rtol=1e-12)
    # To the student the weight is a constant: nothing of V's slope is in its gradient.
    gradient = jax.grad(lambda z: apply(z).sum())(jnp.asarray(Z))
    np.testing.assert_allclose(gradient, weights[:, None] * (P - ONE_HOT), rtol=1e-12)


LAWS = {"ml3": lambda i, o: np.sqrt(6 / (i + o)), "weight_net": lambda i, o: 1 / np.sqrt(i)}


@pytest.mark.parametrize("name", LAWS)
def test_initial_values_fill_their_range(name):
    for layer in build(name)[1]:
        bound = LAWS[name](*layer.kernel.shape)
        for leaf in (x for x in layer if not isinstance(x, tuple)):
            assert jnp.max(jnp.abs(leaf)) <= bound
            if leaf.size >= 50:
                assert jnp.max(jnp.abs(leaf)) > 0.9 * bound and abs(leaf.mean()) < 0.25 * bound
    other = LOSSES[name]().init(jax.random.key(2))
    assert jnp.all(other[0].kernel != build(name)[1][0].kernel)


@pytest.mark.parametrize("name", ["ml3", "taylor_glo", "weight_net"])
def test_parameters_reach_the_students_gradient(name, x64):
    """The mixed derivative a teacher lives by, against finite differences of the student's gradient."""
    loss, params = build(name)
    v = jnp.asarray(RNG.normal(size=Z.shape))

    @jax.jit
    def along(params):  # of the student's gradient
        return jnp.vdot(jax.grad(lambda z: loss.apply(params, z, jnp.asarray(Y)).sum())(jnp.asarray(Z)), v)

    gradient = jax.jit(jax.grad(along))(params)
    for leaf, value in zip(jax.tree.leaves(gradient), jax.tree.leaves(params), strict=True):
        assert leaf.shape == value.shape and jnp.any(leaf != 0)
    way = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape)), params)
    ahead, back = (along(jax.tree.map(lambda p, d, h=h: p + h * d, params, way)) for h in (1e-6, -1e-6))
    inner = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, way)), strict=True))
    np.testing.assert_allclose(inner, (ahead - back) / 2e-6, rtol=1e-6)
