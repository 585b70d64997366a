"""The dynamic loss network against numbers computed with the authors' class and by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.losses.dln import Layer, dln, init_network, pair_value, surface

SHAPES = ((4, 40), (40, 40), (40, 40), (40, 40), (40, 1))
Z, Y = [[1.0, 0.0, -1.0], [0.5, 2.0, -0.3]], jnp.array([0, 2])


def anchor_params():
    """W_l[i, j] = 0.3 sin(1 + i + 2 j)."""
    return tuple(Layer(0.3 * jnp.sin(1 + jnp.arange(r)[:, None] + 2.0 * jnp.arange(c)[None, :]), ()) for r, c in SHAPES)


def test_anchor_of_the_released_code(x64):
    loss = dln()
    params, z = anchor_params(), jnp.array(Z)
    value, gradient = jax.value_and_grad(lambda z: jnp.mean(loss.apply(params, z, Y)))(z)
    np.testing.assert_allclose(value, 0.00145449, atol=5e-9)
    expected = [[1.299e-4, 7.71e-5, 6.06e-5], [6.90e-5, 3.16e-5, 1.542e-4]]
    np.testing.assert_allclose(gradient, expected, atol=6e-8)
    s = jax.nn.sigmoid(z)
    pairs = [
        [pair_value(params, s[0, 0], s[0, j]) for j in (1, 2)],
        [pair_value(params, s[1, 2], s[1, j]) for j in (0, 1)],
    ]
    np.testing.assert_allclose(pairs, [[0.00239098, 0.00196353], [0.00195374, 0.00241871]], atol=6e-9)


@pytest.mark.parametrize(("form", "count"), [("released", 5000), ("paper", 5081)])
def test_parameter_count_and_scale(form, count):
    params = dln(form=form).init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    draws = [init_network(jax.random.key(k), form) for k in range(20)]
    for depth, fan_out in enumerate((40, 40, 40, 40, 1)):
        std = np.std([d[depth].kernel for d in draws])
        np.testing.assert_allclose(std, np.sqrt(2 / (1 + 1e-4) / fan_out), rtol=0.1)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("classes", [2, 5, 100])
def test_is_the_sum_over_wrong_classes(form, classes):
    """Against a loop over pairs, for any number of classes, and whatever the order of the wrong ones."""
    loss = dln(form=form, squash="softmax", reduction="sum")
    params = loss.init(jax.random.key(0))
    z, y = jax.random.normal(jax.random.key(1), (3, classes)), jnp.array([0, 1, classes - 1])
    p = jax.nn.softmax(z)
    by_hand = [sum(pair_value(params, p[b, y[b]], p[b, j]) for j in range(classes) if j != y[b]) for b in range(3)]
    chex.assert_trees_all_close(loss.apply(params, z, y), jnp.stack(by_hand), rtol=2e-4, atol=2e-4)
    order = jnp.array([0, *range(classes - 1, 0, -1)])
    chex.assert_trees_all_close(
        loss.apply(params, z[:1, order], y[:1]), loss.apply(params, z[:1], y[:1]), rtol=1e-4, atol=1e-5
    )


def test_reductions_and_squashes():
    params = dln().init(jax.random.key(0))
    z = jnp.array(Z)
    value = lambda **knobs: dln(**knobs).apply(params, z, Y)  # noqa: E731
    chex.assert_trees_all_close(3 * value(), value(reduction="sum"), rtol=1e-5)
    chex.assert_trees_all_close(2 * value(reduction="mean_pairs"), value(reduction="sum"), rtol=1e-5)
    values = [value(squash=squash) for squash in ("sigmoid", "softmax", "identity")]
    assert all(jnp.abs(a - b).max() > 1e-4 for i, a in enumerate(values) for b in values[:i])


def test_fourth_input_has_no_gradient():
    loss = dln()
    gradient = jax.grad(lambda p: jnp.sum(loss.apply(p, jnp.array(Z), Y)))(loss.init(jax.random.key(0)))
    assert jnp.all(gradient[0].kernel[3] == 0) and jnp.all(jnp.any(gradient[0].kernel[:3] != 0, axis=1))


def test_residual_starts_as_cross_entropy_and_can_learn():
    loss = dln(residual=True, squash="softmax")
    params, z = loss.init(jax.random.key(0)), jnp.array(Z)
    chex.assert_trees_all_close(loss.apply(params, z, Y), cross_entropy(z, Y))
    gradient = jax.grad(lambda p: jnp.sum(loss.apply(p, z, Y)))(params)
    assert jnp.any(gradient[-1].kernel != 0)


def test_log_softmax_can_take_cross_entropy_back(x64):
    """-log s_y through the network, with the sign and scale that undo cross entropy: no derivative is left anywhere."""
    loss = dln(residual=True, squash="log_softmax", reduction="mean_pairs")
    params = toy.to_x64(jax.tree.map(jnp.zeros_like, loss.init(jax.random.key(0))))
    one = [layer._replace(kernel=layer.kernel.at[0, 0].set(1.0)) for layer in params]
    one[0] = one[0]._replace(kernel=-one[0].kernel)  # -log s_y is positive, so that every LeakyReLU lets it pass
    one[-1] = one[-1]._replace(kernel=-one[-1].kernel)
    outputs = jnp.array([[9.0, -9.0, 0.0], [1.0, 2.0, 3.0]])  # the first one is certain, and wrong
    targets = jnp.array([1, 2])
    total = lambda z, params: jnp.sum(loss.apply(params, z, targets))  # noqa: E731
    assert jnp.abs(jax.grad(total)(outputs, tuple(params))).max() > 0.5
    np.testing.assert_allclose(jax.grad(total)(outputs, tuple(one)), 0, atol=1e-12)
    np.testing.assert_allclose(loss.apply(tuple(one), outputs, targets), 0, atol=1e-12)


def test_compressed_pairs(x64):
    """c asinh(v / c) of every pair: v where it is small, its logarithm where it is large, and the surface is it."""
    plain, compressed = dln(squash="softmax"), dln(squash="softmax", compress=2.0)
    params, z = toy.to_x64(plain.init(jax.random.key(0))), jnp.array(Z)
    p, pairs = jax.nn.softmax(z), [[(0, 1), (0, 2)], [(2, 0), (2, 1)]]
    for scale in (1, 10):
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, params)
        values = jnp.array([[pair_value(scaled, p[b, i], p[b, j]) for i, j in row] for b, row in enumerate(pairs)])
        by_hand = jnp.sign(values) * 2 * jnp.log(jnp.abs(values) / 2 + jnp.sqrt(values**2 / 4 + 1))
        chex.assert_trees_all_close(compressed.apply(scaled, z, Y), jnp.sum(by_hand, axis=1) / 3)
    assert jnp.abs(values).max() > 1e3 and jnp.abs(by_hand).max() < 30
    drawn = surface(params, "softmax", 5, 2.0)
    chex.assert_trees_all_close(drawn, 2 * jnp.arcsinh(surface(params, "softmax", 5) / 2))
    near = (*params[:-1], jax.tree.map(lambda x: 1e-6 * x, params[-1]))
    gradient = lambda loss: jax.grad(lambda q: jnp.sum(loss.apply(q, z, Y)))(near)  # noqa: E731
    chex.assert_trees_all_close(gradient(compressed), gradient(plain), rtol=1e-6)


@pytest.mark.parametrize("compress", [-1.0, float("inf"), float("nan")])
def test_what_cannot_compress_is_refused(compress):
    with pytest.raises(ValueError, match="must be a positive, finite number, or 0 for none"):
        dln(compress=compress)


@pytest.mark.parametrize("knob", ["form", "squash", "reduction"])
def test_unknown_knob_names_the_known_ones(knob):
    with pytest.raises(ValueError, match=f"DLN {knob} 'no' is unknown; choose one of"):
        dln(**{knob: "no"})
