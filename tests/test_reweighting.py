"""Meta-Weight-Net, deep interactions and L2RW: weights from a clean batch, against the same round written by hand."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.flatten_util import ravel_pytree

from l2t_jax.losses.deep_weight import deep_weight, weight_of
from l2t_jax.losses.weight_net import weight_net
from l2t_jax.methods.common import merge_rounds
from l2t_jax.methods.deep_interactions import deep_interactions
from l2t_jax.methods.l2rw import l2rw
from l2t_jax.methods.meta_weight_net import meta_weight_net
from l2t_jax.students import from_linen
from l2t_jax.types import Batch, Head, RoundBatches, Student

ETA, UNITS, DECAY = 0.5, 5, 0.01
SGD = optax.sgd(ETA)
METHODS = {
    "l2rw": partial(l2rw, memory="save"),
    "meta_weight_net": partial(meta_weight_net, units=UNITS, weight_decay=DECAY, memory="save"),
    "deep_interactions": partial(deep_interactions, num_classes=toy.CLASSES, units=UNITS, memory="save"),
}


def weights_by_loss(phi, losses, features, targets):
    """V(l) of Meta-Weight-Net."""
    return (
        weight_net(units=UNITS).apply(phi, jnp.stack([0 * losses, jnp.log(jnp.expm1(losses))], 1), 0 * targets) / losses
    )


def weights_by_features(phi, losses, features, targets):
    """w(f, y) of deep interactions."""
    seen = features / jnp.sqrt(jnp.mean(features**2, 1, keepdims=True))
    hidden = jnp.maximum(seen @ phi["hidden"].kernel + phi["hidden"].bias + phi["label"][targets], 0)
    return 2 / (1 + jnp.exp(-(hidden @ phi["output"].kernel + phi["output"].bias)[:, 0]))


# How examples are weighed, and the decay of what weighs them.
WEIGHED = {"meta_weight_net": (weights_by_loss, DECAY), "deep_interactions": (weights_by_features, 0)}


def rounds_of(rounds=1, examples=6):
    return RoundBatches(toy.batch(1, rounds, 1, examples), toy.batch(2, rounds, 8), jnp.array(False))


def build(name, **knobs):
    method = METHODS[name](toy.student, toy.task, SGD, **knobs)
    return method, toy.to_x64(method.init(jax.random.key(0), jnp.zeros((2, 5))))


def by_hand(state, batches):
    """Of the first round: theta, its form, batch, losses [B], logits, statistics, dl/dtheta [B, P], e_val(theta)."""
    batch, validation = jax.tree.map(lambda x: x[0, 0], batches.train), jax.tree.map(lambda x: x[0], batches.validation)
    flat, unravel = ravel_pytree(state.student.params)

    def outputs(flat, batch):
        variables = {"params": unravel(flat), "batch_stats": state.student.batch_stats}
        return toy.student.apply(variables, batch.inputs, True)

    losses = lambda flat: toy.task.error(outputs(flat, batch)[0], batch.targets)  # noqa: E731
    error = lambda flat: jnp.mean(toy.task.error(outputs(flat, validation)[0], validation.targets))  # noqa: E731
    values = jax.jit(lambda flat: (losses(flat), *outputs(flat, batch), jax.jacrev(losses)(flat)))(flat)
    return flat, unravel, batch, *values, jax.jit(error)


def test_l2rw_weights_are_the_agreement_of_gradients(x64):
    method, state = build("l2rw")
    b = rounds_of()
    after, metrics = jax.jit(method.round)(state, b)
    flat, unravel, batch, losses, logits, stats, gradients, error = by_hand(state, b)
    agreement = gradients @ jax.grad(error)(flat)
    useful = np.maximum(agreement, 0)
    weights = useful / useful.sum()
    assert 0 < np.sum(weights > 0) < 6  # some examples help and some do not
    moved = unravel(flat - ETA * weights @ gradients)
    chex.assert_trees_all_close(after.student.params, moved, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(after.student.batch_stats, stats, rtol=1e-12)  # moved once, not twice
    np.testing.assert_allclose(metrics["train_loss"], weights @ losses, rtol=1e-10)
    np.testing.assert_allclose(metrics["largest_weight"], weights.max(), rtol=1e-10)
    np.testing.assert_allclose(metrics["examples_used"], np.mean(weights > 0))
    np.testing.assert_allclose(metrics["hypergradient_norm"], np.linalg.norm(agreement), rtol=1e-10)
    pull = jax.jit(method.pull)(state, batch, jax.tree.map(lambda x: x[0], b.validation))
    slope = jax.nn.softmax(logits) - jax.nn.one_hot(batch.targets, toy.CLASSES)
    np.testing.assert_allclose(pull, 6 * weights * np.linalg.norm(slope, axis=-1), rtol=1e-9, atol=1e-12)


def linear_problem(labels):
    """Four examples, each of its own row of a linear student at zero; the validation batch has them as 0, 1, 0, 1."""
    student = Student(
        init=lambda key, inputs: {"params": jnp.zeros((4, 2)), "batch_stats": {}},
        apply=lambda variables, inputs, train: (inputs @ variables["params"], {}),
    )
    method = l2rw(student, toy.task, SGD, memory="save")
    train = Batch(jnp.eye(4)[None, None], jnp.array(labels)[None, None])
    validation = Batch(jnp.eye(4)[None], jnp.array([[0, 1, 0, 1]]))
    state = method.init(jax.random.key(0), jnp.zeros((1, 4)))
    return state, *jax.jit(method.round)(state, RoundBatches(train, validation, jnp.array(False)))


def test_l2rw_leaves_a_mislabelled_example_out():
    _, after, metrics = linear_problem([0, 1, 1, 1])
    step = ETA / 3 * np.array([[0.5, -0.5], [-0.5, 0.5], [0, 0], [-0.5, 0.5]])
    np.testing.assert_allclose(after.student.params, step, rtol=1e-6)
    np.testing.assert_allclose([metrics["examples_used"], metrics["largest_weight"]], [3 / 4, 1 / 3], rtol=1e-6)


def test_l2rw_stands_still_where_no_example_helps():
    state, after, metrics = linear_problem([1, 0, 1, 0])
    chex.assert_trees_all_equal(after.student, state.student)  # the virtual step leaves no trace either
    assert metrics["train_loss"] == 0 and metrics["examples_used"] == 0
    assert all(jax.tree.leaves(metrics["finite"]))


@pytest.mark.parametrize("name", WEIGHED)
def test_a_round_of_learned_weights_by_hand(name, x64):
    weigh, decay = WEIGHED[name]
    method, state = build(name)
    b = rounds_of()
    after, metrics = jax.jit(method.round)(state, b)
    flat, unravel, batch, losses, _, stats, gradients, error = by_hand(state, b)
    features = toy.student.head(state.student.variables, batch.inputs, True)[0].features

    def step(phi):
        weights = weigh(phi, losses, features, batch.targets)  # numbers to the student
        return flat - ETA * jnp.mean(weights[:, None] * gradients, axis=0)

    decayed = jax.tree.map(lambda m: m / 0.1, optax.tree.get(after.carried, "mu"))  # Adam's first moment, b1 = 0.9
    d = jax.tree.map(lambda g, p: g - decay * p, decayed, state.loss)
    direction = toy.to_x64(optax.tree.random_like(jax.random.key(3), state.loss))
    virtual = lambda h: error(step(optax.tree.add_scale(state.loss, h, direction)))  # noqa: E731
    difference = (virtual(1e-5) - virtual(-1e-5)) / 2e-5
    assert abs(difference) > 1e-4
    np.testing.assert_allclose(optax.tree.vdot(d, direction), difference, rtol=1e-6)
    np.testing.assert_allclose(metrics["hypergradient_norm"], optax.tree.norm(d), rtol=1e-10)

    phi = jax.tree.map(lambda p, g: p - 1e-3 * g / (jnp.abs(g) + 1e-8), state.loss, decayed)  # Adam's first step
    chex.assert_trees_all_close(after.loss, phi, rtol=1e-9)
    chex.assert_trees_all_close(after.student.params, unravel(step(phi)), rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(after.student.batch_stats, stats, rtol=1e-12)
    np.testing.assert_allclose(metrics["validation_error"], error(step(phi)), rtol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_in_two_parts_is_the_whole(name, x64):
    b = rounds_of()
    whole, state = build(name)
    parted = METHODS[name](from_linen(toy.Network("devices")), toy.task, SGD, axis_name="devices")
    half = RoundBatches(
        jax.tree.map(lambda x: jnp.moveaxis(x.reshape(1, 1, 2, 3, *x.shape[3:]), 2, 0), b.train),
        jax.tree.map(lambda x: jnp.moveaxis(x.reshape(1, 2, 4, *x.shape[2:]), 1, 0), b.validation),
        b.first_of_epoch,
    )
    axes = (None, RoundBatches(0, 0, None))
    parts = jax.jit(jax.vmap(parted.round, axes, axis_name="devices"))(state, half)
    together = jax.jit(whole.round)(state, b)
    for d in range(2):
        chex.assert_trees_all_close(jax.tree.map(lambda x, d=d: x[d], parts), together, rtol=1e-10, atol=1e-10)


def test_several_rounds_for_several_seeds():
    """Two steps in a scan, for two seeds at once, are the steps one by one."""
    method, b = METHODS["l2rw"](toy.student, toy.task, SGD), rounds_of(2)
    init = jax.jit(method.init)
    each = [init(key, jnp.zeros((2, 5))) for key in jax.random.split(jax.random.key(1))]
    states = jax.tree.map(lambda *x: jnp.stack(x), *each)
    after, metrics = jax.jit(jax.vmap(merge_rounds(method, 2).round, (0, None)))(states, b)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, states)
    assert all(np.all(flag) for flag in jax.tree.leaves(metrics["finite"]))
    one, run = each[1], jax.jit(method.round)
    for r in range(2):
        train, validation = jax.tree.map(lambda x, r=r: x[r : r + 1], (b.train, b.validation))
        one, _ = run(one, RoundBatches(train, validation, b.first_of_epoch))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], after), one, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("double", [False, True])
def test_nothing_changes_its_dtype(name, double):
    with jax.enable_x64(double):
        method = METHODS[name](toy.student, toy.task, SGD)
        state, b = jax.eval_shape(method.init, jax.random.key(0), jnp.zeros((2, 5), jnp.float32)), rounds_of()
        cast = lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        state = jax.eval_shape(lambda tree: jax.tree.map(cast, tree), state)
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(method.round, state, b)[0], state)


def test_weights_of_features_have_no_scale_and_no_nan():
    """Features as large as they like weigh the same, and a student without an active feature has a derivative."""
    loss = deep_weight(num_classes=3, features=4, units=UNITS)
    phi, features, targets = (
        loss.init(jax.random.key(0)),
        jax.random.normal(jax.random.key(1), (6, 4)),
        jnp.arange(6) % 3,
    )
    weights = weight_of(phi, features, targets)
    assert jnp.all((weights > 0) & (weights < 2)) and jnp.ptp(weights) > 0.01
    np.testing.assert_allclose(weight_of(phi, 1e3 * features, targets), weights, rtol=1e-5)
    assert jnp.max(jnp.abs(weight_of(phi, features, (targets + 1) % 3) - weights)) > 0.01
    dead = Head(jnp.zeros((6, 4)), jnp.ones((4, 3)), jnp.zeros(3))
    slopes = jax.grad(lambda phi, dead: jnp.sum(loss.apply(phi, dead, targets)), argnums=(0, 1))(phi, dead)
    chex.assert_tree_all_finite(slopes)


def test_deep_interactions_reads_a_head():
    blind = toy.student._replace(head=None)
    with pytest.raises(ValueError, match="the student has no `head`"):
        deep_interactions(blind, toy.task, SGD, num_classes=3)
    with pytest.raises(ValueError, match="deep_interactions units=0 is not a positive integer"):
        deep_interactions(toy.student, toy.task, SGD, num_classes=3, units=0)


def test_l2rw_takes_one_step_a_round():
    method = METHODS["l2rw"](toy.student, toy.task, SGD)
    state = method.init(jax.random.key(0), jnp.zeros((2, 5)))
    two = jax.tree.map(lambda x: jnp.concatenate([x, x], 1), rounds_of().train)
    with pytest.raises(ValueError, match="one student step a round, not 2: use merge_rounds"):
        method.round(state, rounds_of()._replace(train=two))
