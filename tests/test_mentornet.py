"""MentorNet: the percentile, the curriculum, dropout and the network by hand, and what the network learns from."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.flatten_util import ravel_pytree

from l2t_jax.methods.common import merge_rounds
from l2t_jax.methods.mentornet import init_network, kept_examples, mentornet, network_weight, predefined_weight
from l2t_jax.students import from_linen
from l2t_jax.types import Batch, RoundBatches

ETA, T, SHARE, ALL = 0.5, 1000, 0.6, ((0.0, 100),)  # the percentile 0.6 of 6 losses is the fourth smallest
BUILD = partial(mentornet, steps=T, percentile=SHARE, memory="save")
SGD = optax.sgd(ETA)


def rounds_of(rounds=1):
    return RoundBatches(toy.batch(1, rounds, 1, 6), toy.batch(2, rounds, 8), jnp.array(False))


def build(student=toy.student, **knobs):
    method = BUILD(student, toy.task, SGD, **knobs)
    state = toy.to_x64(jax.jit(method.init)(jax.random.key(0), jnp.zeros((2, 5))))
    if state.loss != {}:  # away from its start, where the output layer is zero
        state = state._replace(loss=toy.to_x64(optax.tree.random_like(jax.random.key(1), state.loss)))
    return method, state


def at(state, count, percentile=0.0):
    return state._replace(carried=state.carried | {"steps": jnp.int32(count), "percentile": jnp.float64(percentile)})


@jax.jit
def by_hand(student, batch, validation):
    """Losses [B] and their gradients [B, P] with respect to flat theta, and the new batch statistics."""
    flat, unravel = ravel_pytree(student.params)

    def losses(flat):
        variables = {"params": unravel(flat), "batch_stats": student.batch_stats}
        outputs, stats = toy.student.apply(variables, batch.inputs, True)
        return toy.task.error(outputs, batch.targets), stats

    gradients, stats = jax.jacrev(losses, has_aux=True)(flat)
    return losses(flat)[0], gradients, stats


def moved(student, weights, gradients):
    flat, unravel = ravel_pytree(student.params)
    return unravel(flat - ETA / 6 * weights @ gradients)


def network_by_hand(params, losses, difference, epoch):
    """One example at a time, in NumPy; both directions see the same single step."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    weights = []
    for pair in zip(losses, difference, strict=True):
        cells = []
        for direction in range(2):
            gate, candidate = np.asarray(pair) @ params.cell_kernel[:, direction] + params.cell_bias[direction]
            cells.append(sigmoid(gate) * np.tanh(candidate))
        features = np.array([*params.label, *params.epochs[epoch], *cells])
        hidden = np.tanh(params.hidden_kernel.T @ features + params.hidden_bias)
        weights.append(sigmoid(hidden @ params.output_kernel + params.output_bias))
    return np.array(weights)


def test_moving_percentile_and_the_three_phases(x64):
    method, state = build(dropout=ALL)
    run, b = jax.jit(method.round), rounds_of()
    batch, validation = jax.tree.map(lambda x: x[0, 0], b.train), jax.tree.map(lambda x: x[0], b.validation)
    losses, gradients, stats = by_hand(state.student, batch, validation)
    percentile = 0.5 * 1.5 + 0.5 * np.sort(losses)[3]
    d = losses - percentile
    hard, soft = np.where(d <= 0, 1.0, 0.0), np.clip(1 - d, 0, 1)
    assert 0 < hard.sum() < 6 and np.any((soft > 0) & (soft < 1))
    for count, weights in ((189, np.ones(6)), (190, hard), (899, hard), (900, soft), (999, soft)):
        after, metrics = run(at(state, count, 1.5), b)
        chex.assert_trees_all_close(after.student.params, moved(state.student, weights, gradients), atol=1e-12)
        chex.assert_trees_all_close(after.student.batch_stats, stats, rtol=1e-12)
        np.testing.assert_allclose(after.carried["percentile"], percentile, rtol=1e-12)
        np.testing.assert_allclose(metrics["mean_weight"], weights.mean(), rtol=1e-12)
        np.testing.assert_allclose(metrics["train_loss"], np.mean(weights * losses), rtol=1e-12)
        assert after.carried["steps"] == count + 1
    pull = jax.jit(method.pull)(at(state, 900, 1.5), batch, validation)
    plain = jax.jit(method.pull)(at(state, 0, 1.5), batch, validation)
    np.testing.assert_allclose(pull, soft * plain, rtol=1e-10)


def test_gamma_is_the_width_of_the_last_phase():
    d = jnp.array([-1.0, 0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(predefined_weight(d, jnp.int32(90), 2.0), [1, 1, 0.5, 0, 0])
    np.testing.assert_allclose(predefined_weight(d, jnp.int32(89), 2.0), [1, 1, 0, 0, 0])


def test_dropout_keeps_exactly_its_share_at_random():
    schedule = ((0.5, 17), (0.05, 78), (0.9, 5))
    draw = jax.jit(jax.vmap(lambda key, epoch: kept_examples(key, epoch, 10, schedule), (0, None)))
    keys = jax.random.split(jax.random.key(0), 2000)
    for epoch, kept in ((0, 5), (16, 5), (17, 9), (94, 9), (95, 1), (99, 1)):
        keep = draw(keys, epoch)
        np.testing.assert_array_equal(keep.sum(1), kept)
        np.testing.assert_allclose(keep.mean(0), kept / 10, atol=0.05)  # each example as often as any other
    whole = kept_examples(keys[0], jnp.int32(0), 10, schedule)
    part = jax.vmap(lambda d: kept_examples(keys[0], jnp.int32(0), 5, schedule, "d"), axis_name="d")(jnp.arange(2))
    np.testing.assert_array_equal(part.reshape(-1), whole)


def test_dropout_of_a_round_differs_from_step_to_step(x64):
    method, state = build(dropout=((0.5, 100),))
    run, b, seen = jax.jit(method.round), rounds_of(), set()
    for count in range(4):
        after, metrics = run(at(state, count), b)
        again, _ = run(at(state, count), b)
        chex.assert_trees_all_equal(after, again)
        assert metrics["mean_weight"] == 0.5
        seen.add(float(metrics["train_loss"]))
    assert len(seen) > 1


def test_network_against_numpy(x64):
    params = toy.to_x64(optax.tree.random_like(jax.random.key(2), init_network(jax.random.key(0))))
    losses, epoch = jnp.array([0.1, 2.0, 5.0]), 37
    weights = network_weight(params, losses, losses - 1.3, jnp.int32(epoch))
    np.testing.assert_allclose(weights, network_by_hand(params, losses, losses - 1.3, epoch), rtol=1e-12)
    fresh = network_weight(init_network(jax.random.key(0)), losses, losses - 1.3, jnp.int32(epoch))
    np.testing.assert_array_equal(fresh, 0.5)


def test_network_learns_from_the_virtual_step(x64):
    """The hypergradient against differences through the step by hand; then Adam, and the step with the new network."""
    dropout = ((0.5, 100),)
    method, state = build(curriculum="data_driven", dropout=dropout)
    run, b, count = jax.jit(method.round), rounds_of(), 300
    batch, validation = jax.tree.map(lambda x: x[0, 0], b.train), jax.tree.map(lambda x: x[0], b.validation)
    losses, gradients, _ = by_hand(state.student, batch, validation)
    difference = losses - (0.5 * 0.8 + 0.5 * np.sort(losses)[3])
    key = jax.random.fold_in(jax.random.wrap_key_data(state.carried["key"]), count)
    keep = np.asarray(kept_examples(key, jnp.int32(30), 6, dropout))

    @jax.jit
    def error(params):
        variables = {"params": params, "batch_stats": state.student.batch_stats}
        return jnp.mean(toy.task.error(toy.student.apply(variables, validation.inputs, True)[0], validation.targets))

    def step(phi):
        return moved(state.student, keep * network_by_hand(phi, losses, difference, 30), gradients)

    after, metrics = run(at(state, count, 0.8), b)
    d = jax.tree.map(lambda m: m / 0.1, optax.tree.get(after.optimizer_state, "mu"))  # Adam's first moment
    direction = toy.to_x64(optax.tree.random_like(jax.random.key(3), state.loss))
    direction = direction._replace(epochs=jnp.zeros_like(direction.epochs))  # never trained
    shifted = lambda h: error(step(jax.tree.map(np.asarray, optax.tree.add_scale(state.loss, h, direction))))  # noqa: E731
    expected = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    assert abs(expected) > 1e-4
    np.testing.assert_allclose(optax.tree.vdot(d, direction), expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["hypergradient_norm"], optax.tree.norm(d), rtol=1e-10)
    phi = jax.tree.map(lambda p, g: p - 1e-3 * g / (jnp.abs(g) + 1e-8), state.loss, d)
    chex.assert_trees_all_close(after.loss, phi, rtol=1e-8)
    chex.assert_trees_all_equal(after.loss.epochs, state.loss.epochs)
    chex.assert_trees_all_close(after.student.params, step(jax.tree.map(np.asarray, phi)), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(metrics["validation_error"], error(after.student.params), rtol=1e-12)

    early, metrics = run(at(state, 0, 0.8), b)  # burn-in: the network learns, and is not used
    assert metrics["mean_weight"] == 0.5 and metrics["hypergradient_norm"] > 1e-4
    assert optax.tree.norm(optax.tree.sub(early.loss, state.loss)) > 1e-3


def test_a_batch_in_two_parts_is_the_whole(x64):
    b = rounds_of()
    whole, state = build(curriculum="data_driven")
    parted = BUILD(from_linen(toy.Network("devices")), toy.task, SGD, curriculum="data_driven", axis_name="devices")
    half = RoundBatches(
        jax.tree.map(lambda x: jnp.moveaxis(x.reshape(1, 1, 2, 3, *x.shape[3:]), 2, 0), b.train),
        jax.tree.map(lambda x: jnp.moveaxis(x.reshape(1, 2, 4, *x.shape[2:]), 1, 0), b.validation),
        b.first_of_epoch,
    )
    parts = jax.jit(jax.vmap(parted.round, (None, RoundBatches(0, 0, None)), axis_name="devices"))
    together = jax.jit(whole.round)
    for count in (100, 950):  # with half of the examples dropped, in burn-in, and in the last phase
        found, expected = parts(at(state, count, 0.8), half), together(at(state, count, 0.8), b)
        for d in range(2):
            chex.assert_trees_all_close(jax.tree.map(lambda x, d=d: x[d], found), expected, rtol=1e-10, atol=1e-10)


def test_several_rounds_are_rounds_of_their_own():
    """Each step of a scan draws, counts and remembers as if it came alone."""
    method, b = BUILD(toy.student, toy.task, SGD), rounds_of(2)
    start = jax.jit(method.init)(jax.random.key(0), jnp.zeros((2, 5)))
    after, metrics = jax.jit(merge_rounds(method, 2).round)(start, b)
    assert all(jax.tree.leaves(metrics["finite"])) and after.carried["steps"] == 2
    one, run = start, jax.jit(method.round)
    for r in range(2):
        train, validation = jax.tree.map(lambda x, r=r: x[r : r + 1], (b.train, b.validation))
        one, _ = run(one, RoundBatches(train, validation, b.first_of_epoch))
    chex.assert_trees_all_close(after, one, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("curriculum", ["predefined", "data_driven"])
@pytest.mark.parametrize("double", [False, True])
def test_nothing_changes_its_dtype(curriculum, double):
    with jax.enable_x64(double):
        method = BUILD(toy.student, toy.task, SGD, curriculum=curriculum)
        state, b = jax.eval_shape(method.init, jax.random.key(0), jnp.zeros((2, 5), jnp.float32)), rounds_of()
        cast = lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        state = jax.eval_shape(lambda tree: jax.tree.map(cast, tree), state)
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(method.round, state, b)[0], state)


@pytest.mark.parametrize(
    ("knob", "line"),
    [
        ({"curriculum": "none"}, "curriculum 'none' is unknown; choose one of predefined, data_driven"),
        ({"steps": 0}, "steps=0 and gamma=1.0 must both be positive"),
        ({"percentile": 70}, "percentile=70 is not a share"),
        ({"burn_in": 18}, "burn_in=18 is not a share"),
        ({"dropout": ((0.5, 17),)}, "for 100 epochs in all"),
        ({"dropout": ((1.5, 100),)}, "for 100 epochs in all"),
    ],
)
def test_bad_arguments(knob, line):
    with pytest.raises(ValueError, match=line):
        BUILD(toy.student, toy.task, SGD, **knob)


def test_one_step_a_round():
    method = BUILD(toy.student, toy.task, SGD)
    state = jax.eval_shape(method.init, jax.random.key(0), jnp.zeros((2, 5)))
    b = rounds_of()
    two = Batch(*(jax.tree.map(lambda x: jnp.concatenate([x, x], 1), x) for x in b.train[:2]))
    with pytest.raises(ValueError, match="one student step a round, not 2: use merge_rounds"):
        jax.eval_shape(method.round, state, b._replace(train=two))
