"""A student that draws at random: exact in every memory mode, by example, from (seed, round) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import linen as nn

from l2t_jax.data.order import Plan
from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2rw import l2rw
from l2t_jax.methods.l2t_dlf import l2t_dlf
from l2t_jax.methods.mentornet import mentornet
from l2t_jax.runs import training
from l2t_jax.runs.parallel import keys_of
from l2t_jax.runs.setting import with_keys
from l2t_jax.runs.training import some_rounds
from l2t_jax.students import from_linen, mlp
from l2t_jax.students.layers import batch_norm, dropout
from l2t_jax.tasks import evaluate
from l2t_jax.types import Batch
from l2t_jax.unroll import init_state, inner_objective, outer_objective

N, B, V, CLASSES = 3, 6, 5, 3
SGD = optax.sgd(0.3, momentum=0.9)
STUDENT = mlp(num_classes=CLASSES, width=7, dropout=0.4)


class Normed(nn.Module):
    """With BatchNorm beside dropout, as real students have it."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train, keys=None):
        x = batch_norm(train, self.axis_name, "norm")(nn.Dense(5, name="hidden")(x))
        return nn.Dense(CLASSES, name="output")(dropout(nn.tanh(x), 0.4, keys, 0))


def batches(*shape, seed=0):
    draws = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), shape)
    inputs, targets = draws.normal(size=(*shape, 4)), draws.integers(0, CLASSES, shape)
    return Batch(jnp.asarray(inputs), jnp.asarray(targets, jnp.int32), key=keys)


def problem(student=STUDENT, axis_name=None):
    loss = LOSSES["dln"](squash="softmax")
    train, validation = batches(N, B), batches(V, seed=1)._replace(key=())
    state = init_state(toy.to_x64(student.init(jax.random.key(0), train.inputs[0])), SGD)
    objectives = (
        inner_objective(student, toy.task, loss, axis_name=axis_name),
        outer_objective(student, toy.task, axis_name=axis_name),
    )
    return objectives, toy.to_x64(loss.init(jax.random.key(1))), state, train, validation


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_the_hypergradient_is_that_of_the_draws(mode, x64):
    """Against central differences of a Python loop, under which every dropped unit stays dropped."""
    (inner, outer), phi, state, train, validation = problem()

    def error(phi):
        params, optimizer_state, stats = state.params, state.optimizer_state, state.batch_stats
        for i in range(N):
            batch = jax.tree.map(lambda x, i=i: x[i], train)
            grads, stats = jax.grad(inner, has_aux=True)(params, stats, phi, batch)
            update, optimizer_state = SGD.update(grads, optimizer_state, params)
            params = optax.apply_updates(params, update)
        return outer(params, stats, validation)[0]

    found = jax.jit(hypergradient(inner, outer, SGD, memory=mode))(phi, state, train, validation)
    leaves = jax.tree.leaves(phi)
    way = jax.tree.unflatten(
        jax.tree.structure(phi), [np.random.default_rng(i).normal(size=x.shape) for i, x in enumerate(leaves)]
    )
    moved = lambda h: jax.jit(error)(jax.tree.map(lambda p, d: p + h * d, phi, way))  # noqa: E731
    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    ours = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(found.gradient), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose(ours, slope, rtol=1e-6)
    np.testing.assert_allclose(found.error, error(phi), rtol=1e-12)
    other = train._replace(key=jax.random.split(jax.random.key(7), (N, B)))
    assert (
        abs(jax.jit(hypergradient(inner, outer, SGD, memory=mode))(phi, state, other, validation).error - found.error)
        > 1e-4
    )


def test_halves_of_a_batch_draw_what_the_whole_draws(x64):
    """With a key for each example; one key for a batch would draw the same for both halves."""
    (inner, outer), phi, state, train, validation = problem(from_linen(Normed(), draws=True))
    whole = jax.jit(hypergradient(inner, outer, SGD))(phi, state, train, validation)
    (inner, outer), *_ = problem(from_linen(Normed("d"), draws=True), "d")
    halves = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(N, 2, B // 2, *x.shape[2:]), 1, 0), train)
    parts = jax.tree.map(lambda x: jnp.stack([x, x]), validation)
    split = jax.vmap(hypergradient(inner, outer, SGD, axis_name="d"), (None, None, 0, 0), axis_name="d")
    ours = jax.jit(split)(phi, state, halves, parts)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-9, atol=1e-13)


def test_keys_are_of_the_example_however_a_batch_is_divided():
    indices, key = jnp.arange(8).reshape(2, 4), jax.random.key(3)
    whole = keys_of(key, indices, None)
    parts = jnp.moveaxis(indices.reshape(2, 2, 2), 1, 0)
    divided = jax.vmap(lambda x: jax.random.key_data(keys_of(key, x, "d")), axis_name="d")(parts)
    np.testing.assert_array_equal(jnp.moveaxis(divided, 0, 1).reshape(2, 4, -1), jax.random.key_data(whole))


def test_rounds_draw_anew_and_always_alike():
    """The draws of a round depend on the seed and the round, not on how rounds are divided into dispatches."""
    task, seen = with_keys(toy.task), []

    def gather(data, indices, keys):
        batch = task.gather(data, indices, keys)
        jax.debug.callback(lambda key: seen.append(np.asarray(key)), jax.random.key_data(batch.key))
        return batch

    method = fixed_loss(mlp(num_classes=5, width=4, dropout=0.5), task, LOSSES["cross_entropy"](), optax.sgd(0.1))
    rounds = jax.jit(some_rounds(method, task._replace(gather=gather)))
    data = toy.batch(0, 40)
    state = method.init(jax.random.key(0), data.inputs[:2])
    plan = Plan(9, 2, 4, 5, 0.5, 40, 1)
    two, _, _ = rounds(state, data, training._dispatch(0, 0, 2, plan))
    one, _, _ = rounds(state, data, training._dispatch(0, 0, 1, plan))
    one, _, _ = rounds(one, data, training._dispatch(0, 1, 1, plan))
    jax.effects_barrier()
    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({key.tobytes() for key in seen}) == 4  # training and validation batches of two rounds, twice each


def test_nothing_is_dropped_in_evaluation_or_validation(x64):
    (_, outer), _, state, _, validation = problem()
    plain = mlp(num_classes=CLASSES, width=7)
    expected = outer_objective(plain, toy.task)(state.params, {}, validation)[0]
    assert outer(state.params, {}, batches(V, seed=1))[0] == expected
    assert evaluate(STUDENT, state.variables, validation, toy.task) == evaluate(
        plain, state.variables, validation, toy.task
    )


@pytest.mark.parametrize("build", [l2rw, mentornet, l2t_dlf])
def test_methods_with_objectives_of_their_own_drop_too(build):
    """One round with and one without dropout give other students; a batch without keys is refused."""
    knobs = {"l2rw": {}, "mentornet": {"steps": 9}, "l2t_dlf": {"steps": 9, "num_classes": 5}}[build.__name__]
    optimizers = (optax.sgd(0.1),) * (2 if build is l2t_dlf else 1)
    data = toy.batch(0, 6)
    data = data._replace(key=jax.random.split(jax.random.key(0), 6))
    given = jax.tree.map(lambda x: x[None, None], data), jax.tree.map(lambda x: x[None], data._replace(key=()))
    states = []
    for rate in (0.0, 0.5):
        method = build(mlp(num_classes=5, width=4, dropout=rate), toy.task, *optimizers, **knobs)
        state = method.init(jax.random.key(1), data.inputs)
        states.append(method.round(state, training.RoundBatches(*given, True))[0].student.params)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, states), strict=True))
    assert method.pull(state, data._replace(key=()), data).shape == (6,)  # of a record, which has no keys
    with pytest.raises(ValueError, match=r"draws at random \(dropout\), and the training batch has no keys"):
        method.round(state, training.RoundBatches(given[0]._replace(key=()), given[1], True))


def test_units_are_dropped_with_their_probability_and_the_rest_scaled():
    keys = jax.random.split(jax.random.key(0), 500)
    x = dropout(jnp.ones((500, 40)), 0.3, keys, 0)
    assert set(np.unique(x)) == {0, np.float32(1 / 0.7)} and abs(np.mean(x == 0) - 0.3) < 0.02
    assert np.any(x != dropout(jnp.ones((500, 40)), 0.3, keys, 1)) and np.any(x[0] != x[1])
    assert dropout(jnp.ones(3), 0.3, None, 0).tolist() == [1, 1, 1]
