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
from l2t_jax.optimizers import clip_by_global_norm
from l2t_jax.unroll import init_state, inner_objective, outer_objective, plain_gradient, student_step

ETA, MU, DECAY = 0.1, 0.9, 1e-2
OURS = ("mixed", "linearize", "nested")  # with a derivative of our own; the others are what jax makes of a scan
CASES = [(memory, length) for memory in OURS for length in (1, 3, 7)] + [("save", 3), ("remat", 3), ("auto", 3)]
SGD = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(ETA, momentum=MU))
OPTIMIZERS = {
    "momentum_decay": SGD,
    "nesterov": optax.sgd(ETA, momentum=MU, nesterov=True),
    "adam": optax.adam(0.01, eps_root=1e-8),
    "clipped": optax.chain(clip_by_global_norm(0.5), optax.sgd(ETA)),
}


def problem(length, optimizer=SGD):
    loss = LOSSES["dln"](form="paper", squash="softmax")
    inner, outer = inner_objective(toy.student, toy.task, loss), outer_objective(toy.student, toy.task)
    phi = toy.to_x64(loss.init(jax.random.key(1)))
    batches, validation = toy.batch(2, length, 6), toy.batch(3, 7)
    state = init_state(toy.student.init(jax.random.key(0), batches.inputs[0]), optimizer)
    return inner, outer, phi, state, batches, validation


def plain_autodiff(inner, outer, optimizer, phi, state, batches, validation):
    """`jax.grad` of a Python loop: no scan, no memory mode, no helper of ours but the step."""
    step, outer = jax.jit(student_step(plain_gradient(inner), optimizer)), jax.jit(outer)  # compiled once, not N times

    def error(phi):
        s = state
        for one in steps_of(batches):
            s, _ = step(s, phi, one)
        return outer(s.params, s.batch_stats, validation)[0]

    return jax.grad(error)(phi)


def steps_of(batches):
    """The batches one by one, as NumPy arrays, since a slice of another place would compile anew."""
    batches = jax.device_get(batches)
    return [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(len(batches.targets))]


def hand_recursion(inner, outer, phi, state, batches, validation):
    """Eqs. 4-6 for theta <- theta - eta v, v <- mu v + dL/dtheta + decay theta, with adjoints of theta and v."""

    @jax.jit
    def forward(theta, stats, velocity, one):
        grads, stats = jax.grad(inner, has_aux=True)(theta, stats, phi, one)
        velocity = jax.tree.map(lambda v, g, t: MU * v + g + DECAY * t, velocity, grads, theta)
        return jax.tree.map(lambda t, v: t - ETA * v, theta, velocity), stats, velocity

    @jax.jit
    def backward(a_theta, a_velocity, gradient, theta, stats, one):
        a_velocity = jax.tree.map(lambda av, at: av - ETA * at, a_velocity, a_theta)

        def product(theta, phi):
            grads, _ = jax.grad(inner, has_aux=True)(theta, stats, phi, one)
            return sum(jnp.vdot(g, a) for g, a in zip(jax.tree.leaves(grads), jax.tree.leaves(a_velocity), strict=True))

        h_theta, h_phi = jax.grad(product, argnums=(0, 1))(theta, phi)
        gradient = jax.tree.map(jnp.add, gradient, h_phi)  # (6)
        a_theta = jax.tree.map(lambda at, h, av: at + h + DECAY * av, a_theta, h_theta, a_velocity)  # (5)
        return a_theta, jax.tree.map(lambda av: MU * av, a_velocity), gradient

    theta, stats = state.params, state.batch_stats
    velocity, path = jax.tree.map(jnp.zeros_like, theta), []
    for one in steps_of(batches):
        path.append((theta, stats, one))
        theta, stats, velocity = forward(theta, stats, velocity, one)
    a_theta = jax.jit(jax.grad(lambda t: outer(t, stats, validation)[0]))(theta)  # (4)
    a_velocity, gradient = jax.tree.map(jnp.zeros_like, (theta, phi))
    for point in reversed(path):
        a_theta, a_velocity, gradient = backward(a_theta, a_velocity, gradient, *point)
    return gradient


@functools.cache
def references(length):
    """The two other routes; they know no memory mode, so each is computed once."""
    with jax.enable_x64(True):
        inner, outer, *arguments = problem(length)
        return hand_recursion(inner, outer, *arguments), plain_autodiff(inner, outer, SGD, *arguments)


@pytest.mark.parametrize(
    ("memory", "length"), [pytest.param(*case, marks=pytest.mark.versions if case[1] == 3 else ()) for case in CASES]
)
def test_matches_recursion_plain_autodiff_and_finite_differences(memory, length, x64):
    inner, outer, phi, *rest = problem(length)
    compute = jax.jit(hypergradient(inner, outer, SGD, memory=memory))
    ours = compute(phi, *rest).gradient
    by_hand, plain = references(length)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(ours))
    assert optax.tree.norm(ours) > 1e-4  # zeros would agree too
    chex.assert_trees_all_close(ours, by_hand, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(ours, plain, rtol=1e-10, atol=1e-12)
    for seed in range(3):
        direction = toy.to_x64(optax.tree.random_like(jax.random.key(seed), phi))
        direction = optax.tree.scale(1 / optax.tree.norm(direction), direction)
        along = lambda h, d=direction: compute(optax.tree.add_scale(phi, h, d), *rest).error  # noqa: E731
        difference = (along(1e-5) - along(-1e-5)) / 2e-5
        np.testing.assert_allclose(optax.tree.vdot(ours, direction), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name, x64):
    """Nested takes the steps of mixed, remat those of save: with the optimizer that keeps most they are tried too."""
    optimizer = OPTIMIZERS[name]
    inner, outer, *arguments = problem(3, optimizer)
    plain = plain_autodiff(inner, outer, optimizer, *arguments)
    for memory in (*OURS, "remat") if name == "adam" else ("mixed", "linearize"):
        ours = jax.jit(hypergradient(inner, outer, optimizer, memory=memory))(*arguments).gradient
        chex.assert_trees_all_close(ours, plain, rtol=1e-10, atol=1e-12, custom_message=memory)


def test_flows_through_auxiliary_state(x64):
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
    plain = plain_autodiff(counted, outer, SGD, *arguments)
    for memory in (*OURS, "remat"):
        ours = jax.jit(hypergradient(counted, outer, SGD, memory=memory))(*arguments)
        chex.assert_trees_all_close(ours.gradient, plain, rtol=1e-10, atol=1e-12, custom_message=memory)
        assert ours.metrics == 3


def test_derivative_of_the_inner_losses(x64):
    """The losses an unroll returns are differentiable as well, in every mode."""
    inner, _, phi, state, batches, _ = problem(3)

    def last(memory):
        run = MEMORY_MODES[memory](inner, SGD, None)
        return jax.jit(jax.grad(lambda phi: run(state, phi, batches)[1][-1]))(phi)

    reference = last("save")
    for memory in OURS:
        chex.assert_trees_all_close(last(memory), reference, rtol=1e-10, atol=1e-12, custom_message=memory)


def test_constants_inside_the_loss_stay_constant(x64):
    """A stop_gradient in the loss means the same in every mode."""
    inner, outer, *arguments = problem(3)

    def weighted(params, stats, phi, batch):
        loss, new = inner(params, stats, phi, batch)
        return loss * jax.nn.sigmoid(jax.lax.stop_gradient(loss)), new

    gradient = lambda m: jax.jit(hypergradient(weighted, outer, SGD, memory=m))(*arguments).gradient  # noqa: E731
    reference = gradient("save")
    for memory in OURS:
        chex.assert_trees_all_close(gradient(memory), reference, rtol=1e-10, atol=1e-12, custom_message=memory)


@pytest.mark.versions
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
        compute = jax.jit(hypergradient(loss, outer, SGD, memory=memory))
        return compute(jnp.array(0.1), state, jnp.zeros(3), None).gradient

    expected = gradient("save", lambda x: x**3)
    for memory in set(MEMORY_MODES) - {"auto"}:
        np.testing.assert_allclose(gradient(memory, cube), expected, rtol=1e-12, err_msg=memory)


@pytest.mark.versions
def test_an_unknown_mode():
    inner, outer = inner_objective(toy.student, toy.task, toy.small_loss()), outer_objective(toy.student, toy.task)
    with pytest.raises(ValueError, match=r"'mixd' is unknown; choose one of save, remat, mixed"):
        hypergradient(inner, outer, SGD, memory="mixd")


@pytest.mark.versions
def test_split_over_an_axis_is_the_whole_batch(x64):
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
    whole = jax.jit(hypergradient(inner, outer, plain, memory="save"))(phi, state, batches, validation)

    shards = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(3, 4, 2, *x.shape[2:]), 1, 0), batches)
    parts = jax.tree.map(lambda x: x.reshape(4, 3, *x.shape[1:]), validation)

    def split(memory, axis_name):
        compute = hypergradient(inner, outer, plain, memory=memory, axis_name=axis_name)
        return jax.jit(jax.vmap(compute, in_axes=(None, None, 0, 0), axis_name="d"))(phi, state, shards, parts)

    for memory in (*OURS, "save"):
        results = split(memory, "d")
        for d in range(4):
            ours = jax.tree.map(lambda x, d=d: x[d], (results.gradient, results.error))
            chex.assert_trees_all_close(ours, (whole.gradient, whole.error), rtol=1e-12, atol=1e-13)
    unsynchronised = jax.tree.map(lambda x: jnp.mean(x, 0), split("mixed", None).gradient)  # the canary
    assert optax.tree.norm(optax.tree.sub(unsynchronised, whole.gradient)) > 1e-3 * optax.tree.norm(whole.gradient)


@pytest.mark.versions
def test_our_clip_is_that_of_optax(x64):
    """The same bits for gradients that are clipped, that are not, and that are at the bound."""
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])}  # of norm 13
    for bound in (0.5, 13.0, 13.1):
        ours, theirs = (
            jax.jit(clip(bound).update)(gradient, optax.EmptyState())[0]
            for clip in (clip_by_global_norm, optax.clip_by_global_norm)
        )
        chex.assert_trees_all_equal(ours, theirs)
