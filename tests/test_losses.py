"""Laws every loss keeps, by name: a new entry of LOSSES is tested by existing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax.losses import LOSSES, fixed, fixed_losses

OUTPUTS = 2 * jax.random.normal(jax.random.key(0), (6, 4))
TARGETS = jnp.array([0, 1, 2, 3, 0, 1])


def build(name):
    loss = LOSSES[name]()
    return loss, loss.init(jax.random.key(1))


@pytest.mark.parametrize("name", LOSSES)
def test_unreduced_under_jit_and_vmap(name):
    loss, params = build(name)
    losses = loss.apply(params, OUTPUTS, TARGETS)
    chex.assert_shape(losses, (6,))
    chex.assert_trees_all_close(jax.jit(loss.apply)(params, OUTPUTS, TARGETS), losses, rtol=1e-5, atol=1e-6)
    one_by_one = jax.vmap(lambda z, y: loss.apply(params, z[None], y[None])[0])(OUTPUTS, TARGETS)
    chex.assert_trees_all_close(one_by_one, losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_dtype_follows_outputs(name):
    with jax.enable_x64(True):
        loss, params = build(name)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        assert loss.apply(params, OUTPUTS.astype(jnp.float64), TARGETS).dtype == jnp.float64
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        assert loss.apply(params, OUTPUTS.astype(jnp.float32), TARGETS).dtype == jnp.float32


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("name", LOSSES)
def test_first_and_second_derivatives_are_finite(name, scale):
    """At equal logits and at hopelessly wrong ones too: the student's second derivative is what teaches."""
    loss, params = build(name)
    total = lambda params, z: jnp.sum(loss.apply(params, z, TARGETS))  # noqa: E731
    first = jax.grad(total, argnums=(0, 1))(params, scale * OUTPUTS)
    norm = lambda params, z: jnp.sum(jax.grad(total, argnums=1)(params, z) ** 2)  # noqa: E731
    second = jax.grad(norm, argnums=(0, 1))(params, scale * OUTPUTS)
    chex.assert_tree_all_finite((first, second))


@pytest.mark.parametrize("name", LOSSES)
def test_sample_weight_and_mask(name):
    loss, params = build(name)
    plain = loss.apply(params, OUTPUTS, TARGETS)
    weights = jnp.arange(6.0)
    chex.assert_trees_all_close(loss.apply(params, OUTPUTS, TARGETS, sample_weight=weights), weights * plain)
    mask = jnp.array([True, False, True, True, True, False])
    spoiled = jnp.where(mask[:, None], OUTPUTS, jnp.nan)
    total = lambda z: jnp.sum(loss.apply(params, z, TARGETS, mask=mask))  # noqa: E731
    chex.assert_trees_all_close(loss.apply(params, spoiled, TARGETS, mask=mask), jnp.where(mask, plain, 0), rtol=1e-6)
    chex.assert_tree_all_finite(jax.grad(total)(spoiled))  # a NaN in a masked example must not leak


def test_values_of_the_fixed_losses():
    z, y = jnp.log(jnp.array([[0.7, 0.2, 0.1]])), jnp.array([0])
    value = lambda name, **knobs: float(LOSSES[name](**knobs).apply({}, z, y)[0])  # noqa: E731
    np.testing.assert_allclose(value("cross_entropy"), -np.log(0.7), rtol=1e-6)
    smooth = 0.9 * np.array([1, 0, 0]) + 0.1 / 3
    np.testing.assert_allclose(value("label_smoothing"), -smooth @ np.log([0.7, 0.2, 0.1]), rtol=1e-6)
    np.testing.assert_allclose(value("generalized_cross_entropy", q=1.0), 0.3, rtol=1e-6)
    np.testing.assert_allclose(value("generalized_cross_entropy", q=1e-3), -np.log(0.7), rtol=1e-3)


def test_own_loss_is_one_function():
    def margin(outputs, targets, *, m=1.0):
        right = jnp.take_along_axis(outputs, targets[:, None], 1)
        return jnp.sum(jax.nn.relu(m + outputs - right), -1) - m

    loss = fixed(margin)(m=2.0)
    chex.assert_trees_all_close(
        loss.apply(loss.init(jax.random.key(0)), OUTPUTS, TARGETS), margin(OUTPUTS, TARGETS, m=2.0)
    )
    assert fixed_losses()[0] == "cross_entropy" and "dln" not in fixed_losses()
