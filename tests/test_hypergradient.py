"""The hypergradient against a hand-written recursion (Eqs. 4-6), plain autodiff and finite differences, in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.unroll import (
    init_state,
    inner_objective,
    outer_objective,
    plain_gradient,
    student_step,
)

ETA, MU, DECAY = 0.1, 0.9, 1e-2
LENGTHS = (1, 3, 7)
SGD = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(ETA, momentum=MU))
OPTIMIZERS = {
    "sgd": optax.sgd(ETA),
    "momentum_decay": SGD,
    "nesterov": optax.sgd(ETA, momentum=MU, nesterov=True),
    "adam": optax.adam(0.01, eps_root=1e-8),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(ETA)),
}


def problem(length, optimizer=SGD, **knobs):
    loss = LOSSES["dln"](**({"form": "paper", "squash": "softmax"} | knobs))
    inner, outer = inner_objective(toy.student, loss), outer_objective(toy.student, toy.task)
    phi = toy.to_x64(loss.init(jax.random.key(1)))
    batches, validation = toy.batch(2, length, 6), toy.batch(3, 7)
    state = init_state(toy.student.init(jax.random.key(0), batches.inputs[0]), optimizer)
    return inner, outer, phi, state, batches, validation


def plain_autodiff(inner, outer, optimizer, phi, state, batches, validation):
    """`jax.grad` of a Python loop: no scan, no memory mode, no helper of ours but the step."""
    step = student_step(plain_gradient(inner), optimizer)

    def error(phi):
        s = state
        for i in range(batches.targets.shape[0]):
            s, _ = step(s, phi, jax.tree.map(lambda x, i=i: x[i], batches))
        return outer(s.params, s.batch_stats, validation)[0]

    return jax.grad(error)(phi)


def hand_recursion(inner, outer, phi, state, batches, validation):
    """Eqs. 4-6 for theta <- theta - eta v, v <- mu v + dL/dtheta + decay theta, with adjoints of theta and v."""
    length = batches.targets.shape[0]
    theta, stats = state.params, state.batch_stats
    velocity = jax.tree.map(jnp.zeros_like, theta)
    path = []
    for i in range(length):
        one = jax.tree.map(lambda x, i=i: x[i], batches)
        path.append((theta, stats, one))
        grads, new_stats = jax.grad(inner, has_aux=True)(theta, stats, phi, one)
        velocity = jax.tree.map(lambda v, g, t: MU * v + g + DECAY * t, velocity, grads, theta)
        theta = jax.tree.map(lambda t, v: t - ETA * v, theta, velocity)
        stats = new_stats
    a_theta = jax.grad(lambda t: outer(t, stats, validation)[0])(theta)  # (4)
    a_velocity = jax.tree.map(jnp.zeros_like, theta)
    gradient = jax.tree.map(jnp.zeros_like, phi)
    for theta, stats, one in reversed(path):
        a_velocity = jax.tree.map(lambda av, at: av - ETA * at, a_velocity, a_theta)

        def product(theta, phi, stats=stats, one=one, a=a_velocity):
            grads, _ = jax.grad(inner, has_aux=True)(theta, stats, phi, one)
            return sum(jnp.vdot(g, v) for g, v in zip(jax.tree.leaves(grads), jax.tree.leaves(a), strict=True))

        h_theta, h_phi = jax.grad(product, argnums=(0, 1))(theta, phi)
        gradient = jax.tree.map(jnp.add, gradient, h_phi)  # (6)
        a_theta = jax.tree.map(lambda at, h, av: at + h + DECAY * av, a_theta, h_theta, a_velocity)  # (5)
        a_velocity = jax.tree.map(lambda av: MU * av, a_velocity)
    return gradient


@functools.cache
def references(length):
    """The two other routes; they know no memory mode, so each is computed once."""
    with jax.enable_x64(True):
        inner, outer, *arguments = problem(length)
        by_hand = jax.jit(lambda *a: hand_recursion(inner, outer, *a))(*arguments)
        return by_hand, jax.jit(lambda *a: plain_autodiff(inner, outer, SGD, *a))(*arguments)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_matches_recursion_and_plain_autodiff(memory, length, x64):
    inner, outer, *arguments = problem(length)
    ours = jax.jit(hypergradient(inner, outer, SGD, memory=memory))(*arguments).gradient
    by_hand, plain = references(length)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(ours))
    assert optax.tree.norm(ours) > 1e-4  # zeros would agree too
    chex.assert_trees_all_close(ours, by_hand, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_matches_finite_differences(memory, length, x64):
    inner, outer, phi, *rest = problem(length)
    compute = jax.jit(hypergradient(inner, outer, SGD, memory=memory))
    gradient = compute(phi, *rest).gradient
    for seed in range(3):
        direction = toy.to_x64(optax.tree.random_like(jax.random.key(seed), phi))
        direction = optax.tree.scale(1 / optax.tree.norm(direction), direction)
        along = lambda h, d=direction: compute(optax.tree.add_scale(phi, h, d), *rest).error  # noqa: E731
        difference = (along(1e-5) - along(-1e-5)) / 2e-5
        np.testing.assert_allclose(optax.tree.vdot(gradient, direction), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_any_optimizer(memory, name, x64):
    optimizer = OPTIMIZERS[name]
    inner, outer, *arguments = problem(3, optimizer)
    ours = jax.jit(hypergradient(inner, outer, optimizer, memory=memory))(*arguments).gradient
    plain = jax.jit(lambda *a: plain_autodiff(inner, outer, optimizer, *a))(*arguments)
    chex.assert_trees_all_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_flows_through_auxiliary_state(memory, x64):
    """A validation error that reads running statistics, an inner loss that reads them, and an integer in them."""
    inner, _, phi, state, batches, validation = problem(3)

    def counted(params, stats, phi, batch):
        loss, new = inner(params, stats["norm"], phi, batch)
        mean = new["norm"]["mean"]
        return loss * (1 + jnp.sum(mean**2)), {"norm": new, "steps": stats["steps"] + 1}

    def outer(params, stats, batch):
        variables = {"params": params, "batch_stats": stats["norm"]}
        outputs, _ = toy.student.apply(variables, batch.inputs, False)
        return jnp.mean(toy.task.error(outputs, batch.targets)), stats["steps"]

    state = state._replace(batch_stats={"norm": state.batch_stats, "steps": jnp.array(0)})
    arguments = (phi, state, batches, validation)
    ours = jax.jit(hypergradient(counted, outer, SGD, memory=memory))(*arguments)
    plain = jax.jit(lambda *a: plain_autodiff(counted, outer, SGD, *a))(*arguments)
    chex.assert_trees_all_close(ours.gradient, plain, rtol=1e-10, atol=1e-12)
    assert ours.metrics == 3


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_derivative_of_the_inner_losses(memory, x64):
    """The losses an unroll returns are differentiable as well, in every mode."""
    inner, _, phi, state, batches, _ = problem(3)
    run = MEMORY_MODES[memory](inner, SGD, None)
    reference = MEMORY_MODES["save"](inner, SGD, None)
    last = lambda run: jax.jit(jax.grad(lambda phi: run(state, phi, batches)[1][-1]))(phi)  # noqa: E731
    chex.assert_trees_all_close(last(run), last(reference), rtol=1e-10, atol=1e-12)


def test_constants_inside_the_loss_stay_constant(x64):
    """A stop_gradient in the loss means the same in every mode."""
    inner, outer, *arguments = problem(3)

    def weighted(params, stats, phi, batch):
        loss, new = inner(params, stats, phi, batch)
        return loss * jax.nn.sigmoid(jax.lax.stop_gradient(loss)), new

    results = [jax.jit(hypergradient(weighted, outer, SGD, memory=m))(*arguments).gradient for m in MEMORY_MODES]
    for other in results[1:]:
        chex.assert_trees_all_close(results[0], other, rtol=1e-10, atol=1e-12)


def test_adam_at_a_zero_gradient_is_finite():
    """A dead parameter has a zero gradient; eps_root keeps its derivative finite, and without it there is a NaN."""

    def inner(params, stats, phi, batch):
        return phi * (jnp.sum(params["live"] ** 2) + jnp.sum(params["dead"] ** 2)), stats

    def outer(params, stats, batch):
        return jnp.sum(params["live"] ** 2) + jnp.sum(params["dead"]), {}

    def gradient(eps_root):
        optimizer = optax.adam(0.1, eps_root=eps_root)
        state = init_state({"params": {"live": jnp.ones(2), "dead": jnp.zeros(2)}}, optimizer)
        return hypergradient(inner, outer, optimizer)(jnp.array(1.0), state, jnp.zeros(3), None).gradient

    assert jnp.isfinite(gradient(1e-8))
    assert not jnp.isfinite(gradient(0.0))


def test_a_custom_derivative_inside_the_loss(x64):
    """A jax.custom_vjp that tells the truth is differentiated in every mode."""

    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))
    state = init_state({"params": jnp.arange(1.0, 3.0)}, SGD)

    def gradient(memory, cube):
        loss = lambda params, stats, phi, batch: (jnp.sum(phi * cube(params)), stats)  # noqa: E731
        outer = lambda params, stats, batch: (jnp.sum(params**2), {})  # noqa: E731
        return hypergradient(loss, outer, SGD, memory=memory)(jnp.array(0.1), state, jnp.zeros(3), None).gradient

    for memory in MEMORY_MODES:
        np.testing.assert_allclose(gradient(memory, cube), gradient("save", lambda x: x**3), rtol=1e-12)


def test_mixed_refuses_what_it_cannot_do(x64):
    inner, outer, phi, state, batches, _ = problem(2)
    run = MEMORY_MODES["mixed"](inner, SGD, None)
    with pytest.raises(ValueError, match="holds the batch constant"):
        jax.grad(lambda x: run(state, phi, batches._replace(inputs=x))[1].sum())(batches.inputs)

    with pytest.raises(ValueError, match=r"'mixd' is unknown; choose one of save, remat, mixed"):
        hypergradient(inner, outer, SGD, memory="mixd")


def test_mixed_stores_one_set_of_parameters_a_step():
    """The compiler's own numbers: memory grows by about one theta a step, while plain autodiff keeps many more."""
    width, parameters = 256, 256 * 256

    def inner(params, stats, phi, batch):
        hidden = batch
        for _ in range(4):
            hidden = jnp.tanh(hidden @ params)
        return jnp.mean(phi * hidden**2), stats

    def outer(params, stats, batch):
        return jnp.mean((batch @ params) ** 2), {}

    def growth(memory):
        optimizer = optax.sgd(0.1)
        state = init_state({"params": jnp.eye(width)}, optimizer)
        compute = jax.jit(hypergradient(inner, outer, optimizer, memory=memory))

        def temporary(length):
            compiled = compute.lower(1.0, state, jnp.ones((length, 512, width)), jnp.ones((8, width))).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        return (temporary(24) - temporary(8)) / 16

    assert growth("mixed") < 1.2 * 4 * parameters
    assert growth("save") > 4 * growth("mixed")


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_split_over_an_axis_is_the_whole_batch(memory, x64):
    """Four shards with one mean of each student gradient and one of the hypergradient: the 1-device numbers."""
    loss = LOSSES["dln"](form="paper", squash="softmax")
    plain = optax.sgd(ETA, momentum=MU)

    def network(params, inputs):
        return jnp.tanh(inputs @ params["a"]) @ params["b"]

    def inner(params, stats, phi, batch):
        return jnp.mean(loss.apply(phi, network(params, batch.inputs), batch.targets)), stats

    def outer(params, stats, batch):
        return jnp.mean(toy.task.error(network(params, batch.inputs), batch.targets)), {}

    keys = jax.random.split(jax.random.key(5))
    params = {"a": jax.random.normal(keys[0], (5, 4)), "b": jax.random.normal(keys[1], (4, 3))}
    phi, state = toy.to_x64(loss.init(jax.random.key(1))), init_state({"params": params}, plain)
    batches, validation = toy.batch(2, 3, 8), toy.batch(3, 12)
    whole = jax.jit(hypergradient(inner, outer, plain, memory=memory))(phi, state, batches, validation)

    shards = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(3, 4, 2, *x.shape[2:]), 1, 0), batches)
    parts = jax.tree.map(lambda x: x.reshape(4, 3, *x.shape[1:]), validation)

    def split(axis_name):
        compute = hypergradient(inner, outer, plain, memory=memory, axis_name=axis_name)
        return jax.jit(jax.vmap(compute, in_axes=(None, None, 0, 0), axis_name="d"))(phi, state, shards, parts)

    for d in range(4):
        one = jax.tree.map(lambda x, d=d: x[d], split("d"))
        chex.assert_trees_all_close((one.gradient, one.error), (whole.gradient, whole.error), rtol=1e-12, atol=1e-13)
    unsynchronised = jax.tree.map(lambda x: jnp.mean(x, 0), split(None).gradient)  # the canary
    assert optax.tree.norm(optax.tree.sub(unsynchronised, whole.gradient)) > 1e-3 * optax.tree.norm(whole.gradient)
