"""SLF: the straight-through derivative, the hypergradient of the decisions, draws, scales, schedules, resuming."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES, fixed
from l2t_jax.methods.common import merge_rounds
from l2t_jax.methods.slf import (
    POOL,
    draw,
    mix,
    mixture,
    probability,
    select,
    slf,
    temperature_at,
)
from l2t_jax.types import Batch, Loss, RoundBatches
from l2t_jax.unroll import inner_objective, outer_objective

SGD = optax.sgd(0.3, momentum=0.9)
HARMFUL = ("cross_entropy", fixed(lambda outputs, targets: -toy.task.error(outputs, targets))())
V = jnp.array([[0.2, -0.1], [0.0, 0.5], [0.3, 0.1]])  # decision logits of three losses
NOISE = jnp.array([[-0.5, 1.0], [0.1, 0.4], [0.9, -0.2]])  # switches the first two on
SCALE = jnp.array([2.0, 0.5, 1.5])


def batches_of(round, rounds=1):
    return RoundBatches(toy.batch(10 * round, rounds, 1, 6), toy.batch(10 * round + 1, rounds, 8), jnp.array(False))


def halves(batches):
    """Each batch cut in two, the parts along a new first axis."""
    cut = lambda axis: lambda x: np.stack(np.split(np.asarray(x), 2, axis))  # noqa: E731
    train, validation = jax.tree.map(cut(2), batches.train), jax.tree.map(cut(1), batches.validation)
    return RoundBatches(train, validation, batches.first_of_epoch)


def part(tree, i):
    """Entry i of all leaves."""
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def build(pool=("cross_entropy", "mae", "focal"), student=toy.student, **knobs):
    given = {"pool": pool, "num_classes": toy.CLASSES, "steps": 40, "memory": "save"} | knobs
    method = slf(student, toy.task, SGD, **given)
    return method, jax.jit(method.init)(jax.random.key(0), np.zeros((2, 5)))


def soft_by_hand(v, noise, temperature):
    """softmax((v + noise) / temperature) of the column that is on, in NumPy, and its derivative [K, K, 2] in v."""
    x = np.exp((np.asarray(v) + np.asarray(noise)) / temperature)
    y = x[:, 1] / x.sum(-1)
    derivative = np.zeros((len(y), len(y), 2))
    for k in range(len(y)):
        derivative[k, k] = y[k] * (1 - y[k]) / temperature * np.array([-1, 1])
    return y, derivative


def weights_by_hand(z, slope, scale):
    """w_j = z_j s_j / sum z and its derivative, given z and dz/dv."""
    total, scale = z.sum(), np.asarray(scale)
    by_z = np.diag(scale) / total - np.outer(z * scale, np.ones(len(z))) / total**2  # [j, k]
    return z * scale / total, np.einsum("jk,kla->jla", by_z, slope)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_straight_through_derivative_by_hand(temperature, x64):
    """Values of hard decisions, derivative of soft ones at these values."""
    v, noise, scale = toy.to_x64((V, NOISE, SCALE))
    ours = lambda v: mix(select(v, noise, jnp.array(temperature)), scale)  # noqa: E731
    weights, slope = weights_by_hand(np.array([1.0, 1.0, 0.0]), soft_by_hand(v, noise, temperature)[1], scale)
    np.testing.assert_allclose(ours(v), weights, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.jacobian(ours))(v), slope, rtol=1e-10)


def test_nothing_on_switches_the_most_probable_on():
    off = jnp.array([[9.0, 0.0]] * 3)
    np.testing.assert_array_equal(jax.jit(select)(V, off, 1.0), [0, 1, 0])
    v = jnp.array([[2.0, 0.0], [1.0, 0.0]])  # a set with nothing on has probability 0.64
    sets = jax.jit(jax.vmap(lambda k: draw(k, v)))(jax.random.split(jax.random.key(0), 400))
    none = np.mean(~np.any(np.argmax(v + sets, -1) == 1, -1))
    assert none < 0.1  # 0.64^8 = 0.03 where the first of 8 with any on is taken


def test_draws_have_the_probabilities_of_the_logits():
    """Of those sets that have any on: P(on_k) / P(any)."""
    sets = jax.jit(jax.vmap(lambda k: draw(k, V)))(jax.random.split(jax.random.key(1), 4000))
    on = np.mean(np.argmax(V + sets, -1) == 1, 0)
    p = np.asarray(probability(V))
    np.testing.assert_allclose(p, 1 / (1 + np.exp(V[:, 0] - V[:, 1])), rtol=1e-5)
    np.testing.assert_allclose(on, p / (1 - np.prod(1 - p)), atol=4 * 0.5 / np.sqrt(4000))


def test_temperature_falls_exponentially_between_its_ends():
    at = [float(temperature_at(jnp.array(x), (1.0, 0.1))) for x in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(at, [1.0, 10**-0.5, 0.1], rtol=1e-6)


def one_step(weights, state, params, train, validation):
    """Written out: theta after one step of SGD with momentum on sum_k w_k l_k, and e_val there."""
    names = ("cross_entropy", "mae", "focal")

    def objective(theta):
        variables = {"params": theta, "batch_stats": state.student.batch_stats}
        outputs, stats = toy.student.apply(variables, train.inputs, True)
        values = [LOSSES[name]().apply(p, outputs, train.targets) for name, p in zip(names, params, strict=True)]
        return sum(w * jnp.mean(value) for w, value in zip(weights, values, strict=True)), stats

    grads, stats = jax.grad(objective, has_aux=True)(state.student.params)
    updates, _ = SGD.update(grads, state.student.optimizer_state, state.student.params)
    theta = optax.apply_updates(state.student.params, updates)
    return theta, outer_objective(toy.student, toy.task)(theta, stats, validation)[0]


@pytest.fixture(scope="module")
def second_round():
    """A state after a first round, in float64, and what the next round makes of it."""
    with jax.enable_x64(True):
        method, start = build(lr=0.05)
        run = jax.jit(method.round)
        state, first = run(start, batches_of(0))
        after, metrics = run(state, batches_of(1))
        train, validation = part(batches_of(1).train, (0, 0)), part(batches_of(1).validation, 0)
        error = jax.jit(lambda weights, state: one_step(weights, state, ({}, {}, {}), train, validation))
        yield SimpleNamespace(**locals())


def test_round_is_adam_on_the_straight_through_hypergradient(second_round, x64):
    """Finite differences of e_val in the weights, the hand-written derivative of the weights, Adam, and a new start."""
    at, s = second_round, second_round.state
    count, v = 1, s.loss["logits"]
    key = jax.random.fold_in(jax.random.wrap_key_data(s.carried["key"]), count)
    noise, temperature = draw(key, v), 0.1 ** (1 / 40)
    z = np.asarray(select(v, noise, jnp.array(temperature))).round()
    scale = s.carried["scale"]
    weights, slope = weights_by_hand(z, soft_by_hand(v, noise, temperature)[1], scale)
    error, h = lambda w: float(at.error(jnp.asarray(w), s)[1]), 1e-5
    by_w = np.array([(error(weights + h * e) - error(weights - h * e)) / (2 * h) for e in np.eye(3)])
    gradient = np.einsum("j,jka->ka", by_w, slope)
    mu = lambda state: np.asarray(state.optimizer_state[0].mu)  # noqa: E731
    ours = (mu(at.after) - 0.9 * mu(s)) / 0.1
    assert np.abs(gradient).max() > 1e-4
    np.testing.assert_allclose(ours, gradient, rtol=1e-6, atol=1e-10)

    update, _ = optax.adam(0.05).update(jnp.asarray(ours), s.optimizer_state, v)
    np.testing.assert_allclose(at.after.loss["logits"], v + update, rtol=1e-9)
    z = np.asarray(select(v + update, noise, jnp.array(1.0))).round()  # the same noise under the new v
    theta, _ = at.error(jnp.asarray(z * scale / z.sum()), s)
    chex.assert_trees_all_close(at.after.student.params, theta, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(at.metrics["losses_on"], z.sum())
    np.testing.assert_allclose(at.metrics["validation_error_before"], error(weights), rtol=1e-10)


def test_hypergradient_of_a_soft_relaxation_against_finite_differences(second_round, x64):
    """Where decisions are soft all of it is one smooth function of v."""
    at, s = second_round, second_round.state
    loss, (noise, scale) = mixture([LOSSES[n]() for n in ("cross_entropy", "mae", "focal")]), toy.to_x64((NOISE, SCALE))
    outer = outer_objective(toy.student, toy.task)
    compute = hypergradient(inner_objective(toy.student, toy.task, loss), outer, SGD, memory="save")
    soft = lambda v: mix(probability((v + noise) / 0.5), scale)  # noqa: E731
    weights, chain = jax.vjp(soft, toy.to_x64(V))
    phi = {"weights": weights, "params": ({}, {}, {})}
    found = jax.jit(compute)(phi, s.student, jax.tree.map(lambda x: x[None], at.train), at.validation)
    error, h = jax.jit(lambda v: at.error(soft(v), s)[1]), 1e-5
    basis = np.eye(V.size).reshape(V.size, *V.shape)
    differences = [(error(toy.to_x64(V) + h * e) - error(toy.to_x64(V) - h * e)) / (2 * h) for e in basis]
    np.testing.assert_allclose(
        chain(found.gradient["weights"])[0].ravel(), np.array(differences), rtol=1e-6, atol=1e-10
    )
    assert np.abs(differences).max() > 1e-4


def test_scales_are_measured_once_on_the_first_batch(second_round, x64):
    """After scaling, the gradient of each loss in the first student's parameters has norm one."""
    at = second_round
    train = part(batches_of(0).train, (0, 0))
    for k, name in enumerate(("cross_entropy", "mae", "focal")):
        inner = inner_objective(toy.student, toy.task, LOSSES[name]())
        slope = jax.jit(jax.grad(lambda p: inner(p, at.start.student.batch_stats, {}, train)[0]))  # noqa: B023
        gradient = slope(at.start.student.params)
        np.testing.assert_allclose(at.state.carried["scale"][k] * optax.tree.norm(gradient), 1, rtol=1e-9)
    chex.assert_trees_all_equal(at.after.carried["scale"], at.state.carried["scale"])
    assert np.ptp(at.state.carried["scale"]) > 0.1
    assert {x.dtype for x in jax.tree.leaves(at.after) if x.dtype.kind == "f"} == {np.dtype("float64")}


def test_a_harmful_loss_becomes_improbable():
    """Negated cross entropy in the pool, several rounds as one: it is switched off more and more, the other is not."""
    method, state = build(HARMFUL, lr=0.1)
    run = jax.jit(merge_rounds(method, 20).round)
    inputs = toy.batch(0, 20, 1, 12).inputs
    learnable = Batch(inputs, jnp.argmax(inputs[..., :3], -1))
    batches = RoundBatches(learnable, jax.tree.map(lambda x: x[:, 0], learnable), jnp.array(False))
    after, metrics = run(state, batches)
    good, bad = probability(after.loss["logits"])
    assert bad < 0.3 and good > 0.5
    assert set(metrics) >= {"probability_cross_entropy", "probability_loss_1", "train_loss", "validation_accuracy"}
    assert all(np.all(flag) for flag in jax.tree.leaves(metrics["finite"]))


def test_default_pool_of_registered_losses():
    _, state = build(POOL)
    assert state.loss["logits"].shape == (len(POOL), 2)


def test_schedules_and_losses_on_the_last_layer_are_honoured():
    """A loss that is twice cross entropy from half of the run on, beside cross entropy on the last layer."""
    late = Loss(
        lambda key: {"factor": jnp.array(1.0)},
        lambda params, outputs, targets: params["factor"] * toy.task.error(outputs, targets),
        lambda params, progress: {"factor": jnp.where(progress >= 0.5, 2.0, 1.0)},
        learned="no",
    )
    on_head = Loss(
        lambda key: {},
        lambda params, head, targets: toy.task.error(head.features @ head.kernel + head.bias, targets),
        reads="head",
        learned="no",
    )
    method, state = build((late, on_head), steps=4)
    at = lambda n: state._replace(carried=state.carried | {"steps": jnp.int32(n)})  # noqa: E731
    batch, run = toy.batch(3, 6), jax.jit(method.round)
    pull = jax.jit(method.pull)
    pulls = [pull(at(n), batch, batch) for n in (1, 2)]
    np.testing.assert_allclose(pulls[1] / pulls[0], 1.5, rtol=1e-5)  # probabilities and scales are equal here
    scale = run(state, batches_of(0))[0].carried["scale"]
    np.testing.assert_allclose(scale[0], scale[1], rtol=1e-5)  # at first they are one function
    only_late = {**state.loss, "logits": jnp.array([[-50.0, 50.0], [50.0, -50.0]])}
    losses = [run(at(n)._replace(loss=only_late), batches_of(0))[1]["train_loss"] for n in (1, 2)]
    np.testing.assert_allclose(losses[1] / losses[0], 2, rtol=1e-5)


def test_split_over_an_axis_and_seeds_side_by_side(x64):
    """Batches in two parts, against the whole ones for the first of two seeds."""
    names = ("cross_entropy", "mae")
    split, state = build(names, toy.from_linen(toy.Network(axis_name="devices")), lr=0.05, axis_name="devices")
    whole, _ = build(names, lr=0.05)
    states = jax.tree.map(lambda *x: np.stack(x), state, jax.jit(whole.init)(jax.random.key(1), np.zeros((2, 5))))
    axes = RoundBatches(Batch(0, 0), Batch(0, 0), None)
    run = jax.jit(jax.vmap(split.round, in_axes=(None, axes), axis_name="devices"))
    plain = jax.jit(jax.vmap(whole.round, in_axes=(0, None)))
    for r in range(3):
        parts = run(state, halves(batches_of(r)))
        results = plain(states, batches_of(r))
        chex.assert_trees_all_close(part(parts, 0), part(results, 0), rtol=1e-10, atol=1e-11)
        (state, _), (states, _) = part(parts, 0), results
    assert results[1]["hypergradient_norm"][0] > 1e-4
    scale = states.carried["scale"]
    assert np.all(scale != 1) and np.any(scale[0] != scale[1])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="the pool has 1 losses, expected at least 2"):
        build(("mae",))
    with pytest.raises(ValueError, match="dln has parameters that are learned"):
        build(("mae", "dln"))
    with pytest.raises(ValueError, match="expected at least 1, and two above 0"):
        build(temperature=(1.0, 0.0))
