"""Laws every loss keeps, by name: a new entry of LOSSES is tested by existing."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from l2t_jax.losses import build_loss, check_loss, fixed, fixed_losses
from l2t_jax.losses.checking import as_read
from l2t_jax.types import Head

CLASSES = 4
OUTPUTS = 2 * jax.random.normal(jax.random.key(0), (6, CLASSES))
TARGETS = jnp.array([0, 1, 2, 3, 0, 1])


WEIGHTS = jnp.arange(6.0)
MASK = jnp.array([True, False, True, True, True, False])
SPOILED = jnp.where(MASK[:, None], OUTPUTS, jnp.nan)


@cache
def computed(name):
    """All that the laws are about, of one loss, by one program."""
    loss = build_loss(name, CLASSES)

    def apply(params, outputs, targets, **weights):
        return loss.apply(params, as_read(loss, outputs), targets, **weights)

    def derivatives(params, scale):
        total = lambda params, z: jnp.sum(apply(params, z, TARGETS))  # noqa: E731
        norm = lambda params, z: jnp.sum(jax.grad(total, argnums=1)(params, z) ** 2)  # noqa: E731
        return [jax.grad(f, argnums=(0, 1))(params, scale * OUTPUTS) for f in (total, norm)]

    @jax.jit
    def compute(params):
        return {
            "plain": apply(params, OUTPUTS, TARGETS),
            "one by one": jax.vmap(lambda z, y: apply(params, z[None], y[None])[0])(OUTPUTS, TARGETS),
            "weighted": apply(params, OUTPUTS, TARGETS, sample_weight=WEIGHTS),
            "masked": apply(params, SPOILED, TARGETS, mask=MASK),
            "masked slope": jax.grad(lambda z: jnp.sum(apply(params, z, TARGETS, mask=MASK)))(SPOILED),
            "derivatives": jax.vmap(lambda scale: derivatives(params, scale))(jnp.array([0.0, 1.0, 30.0])),
        }

    return compute(loss.init(jax.random.key(1)))


@pytest.mark.parametrize("name", toy.OF_CLASSES)
def test_unreduced_and_each_example_by_itself(name):
    found = computed(name)
    chex.assert_shape(found["plain"], (6,))
    chex.assert_trees_all_close(found["one by one"], found["plain"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", toy.OF_CLASSES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_dtype_follows_outputs(name, dtype, x64):
    """In a float64 program too, a float32 loss stays one, and its schedule keeps the dtype of its parameters."""
    loss = build_loss(name, CLASSES)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), jax.eval_shape(loss.init, jax.random.key(1)))
    scheduled = jax.eval_shape(loss.at, params, jax.ShapeDtypeStruct((), jnp.float64))
    assert {leaf.dtype for leaf in jax.tree.leaves(scheduled)} <= {jnp.dtype(dtype)}
    read = as_read(loss, OUTPUTS.astype(dtype))
    assert jax.eval_shape(loss.apply, scheduled, read, TARGETS).dtype == dtype


@pytest.mark.parametrize("name", toy.OF_CLASSES)
def test_first_and_second_derivatives_are_finite(name):
    """At equal logits and at hopelessly wrong ones too: the student's second derivative is what teaches."""
    chex.assert_tree_all_finite(computed(name)["derivatives"])


@pytest.mark.parametrize(
    "name", [name for name in toy.OF_CLASSES if name != "weight_net"]
)  # its derivative is cut by design
def test_derivatives_against_finite_differences(name, x64):
    loss = build_loss(name, CLASSES)
    read = as_read(loss, OUTPUTS.astype(float))
    at = (loss.init(jax.random.key(1)), read)
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(at)))
    draws = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, jax.tree.leaves(at), strict=True)]
    way = jax.tree.unflatten(jax.tree.structure(at), draws)

    @jax.jit
    def both(at, way):
        move = lambda h: jax.tree.map(lambda a, b: a + h * b, at, way)  # noqa: E731
        f = lambda h: loss.apply(*move(h), TARGETS)  # noqa: E731
        return jax.jacfwd(f)(0.0), (f(1e-6) - f(-1e-6)) / 2e-6

    exact, difference = both(at, way)
    assert jnp.all(jnp.abs(exact) > 1e-7)
    np.testing.assert_allclose(exact, difference, rtol=1e-6, atol=1e-8)
    if name not in ("smooth_zero_one", "large_margin_softmax"):  # which have a kink where all logits are equal
        equal = read._replace(features=0 * read.features) if isinstance(read, Head) else 0 * read
        np.testing.assert_allclose(*both((at[0], equal), way), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", toy.OF_CLASSES)
def test_sample_weight_and_mask(name):
    found = computed(name)
    chex.assert_trees_all_close(found["weighted"], WEIGHTS * found["plain"], rtol=1e-6)
    chex.assert_trees_all_close(found["masked"], jnp.where(MASK, found["plain"], 0), rtol=1e-6)
    chex.assert_tree_all_finite(found["masked slope"])  # a NaN in a masked example must not leak


@pytest.mark.parametrize("name", toy.OF_CLASSES)
@pytest.mark.parametrize("classes", [2, 3])  # ten are in test_bad_input.py
def test_every_loss_passes_the_check_of_a_users_loss(name, classes):
    check_loss(build_loss(name, classes), classes, name)


@pytest.mark.parametrize("name", toy.OF_CLASSES)
def test_only_losses_with_something_to_learn_say_so(name):
    loss = build_loss(name, CLASSES)
    if loss.learned == "no":
        assert all(leaf.ndim == 0 for leaf in jax.tree.leaves(loss.init(jax.random.key(0))))  # a schedule's, if any
    else:
        assert jax.tree.leaves(loss.init(jax.random.key(0)))
    assert (name in fixed_losses()) == (loss.learned != "teacher")


def test_classes_and_knobs_reach_the_builder():
    key, z, y = jax.random.key(0), jnp.zeros((1, 3)), jnp.array([0])
    assert build_loss("adaptive_robust", 7).init(key)["alpha"].shape == (7,)
    focal = build_loss("focal", 3, gamma=0.0)
    chex.assert_trees_all_close(focal.apply({}, z, y), jnp.log(jnp.array([3.0])), rtol=1e-6)
    with pytest.raises(ValueError, match="'hinge' is unknown; choose one of cross_entropy"):
        build_loss("hinge", 3)


def test_own_loss_is_one_function():
    def margin(outputs, targets, *, m=1.0):
        right = jnp.take_along_axis(outputs, targets[:, None], 1)
        return jnp.sum(jax.nn.relu(m + outputs - right), -1) - m

    loss = fixed(margin)(m=2.0)
    chex.assert_trees_all_close(
        loss.apply(loss.init(jax.random.key(0)), OUTPUTS, TARGETS), margin(OUTPUTS, TARGETS, m=2.0)
    )
    assert fixed_losses()[0] == "cross_entropy" and "dln" not in fixed_losses()
