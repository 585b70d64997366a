"""L2T-DLF: its loss and measures, what is constant in its derivative, windows and whole lives."""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses.bilinear import bilinear
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2t_dlf import l2t_dlf, probability, smooth
from l2t_jax.students import from_linen
from l2t_jax.teachers import attention
from l2t_jax.teachers.attention import coefficients, init_attention, newborn, state_features
from l2t_jax.types import Batch, MethodState, RoundBatches
from l2t_jax.unroll import init_state

N, ETA, MU, C = 4, 0.5, 0.9, toy.CLASSES
MOMENTUM = optax.sgd(ETA, momentum=MU)
LOSS = bilinear(num_classes=C)
# A gradient step, with the gradient as its state so that a test can read it.
SGD = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(lambda g: -0.1 * g, grads), grads),
)


def batches_of(round, steps=N):
    return RoundBatches(toy.batch(10 * round, 1, steps, 6), toy.batch(10 * round + 1, 1, 8), jnp.array(False))


def build(teacher_optimizer=SGD, student=toy.student, **knobs):
    knobs = {"num_classes": C, "steps": N, "slots": 3, "width": 4, "memory": "save"} | knobs
    return l2t_dlf(student, toy.task, MOMENTUM, teacher_optimizer, **knobs)


def begin(method, seed=0, alive=True):
    """A state; `alive` makes the teacher's slots large, so that every one of its derivatives is."""
    state = method.init(jax.random.key(seed), jnp.zeros((2, 5)))
    return state._replace(teacher=state.teacher._replace(values=500 * state.teacher.values)) if alive else state


def log_p(z):
    return z - jax.scipy.special.logsumexp(z, axis=-1, keepdims=True)


def forward(theta, inputs):
    """The toy network written out; batch statistics in BatchNorm, so the running ones do not matter."""
    x = inputs @ theta["hidden"]["kernel"] + theta["hidden"]["bias"]
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * theta["norm"]["scale"] + theta["norm"]["bias"]
    return jnp.tanh(x) @ theta["output"]["kernel"] + theta["output"]["bias"]


def features_along(theta, tau, train):
    """The state s_t of every step, from a life written out with numbers only, and the weights at its end."""
    velocity, seen, features = jax.tree.map(jnp.zeros_like, theta), [], []
    predict = jax.jit(lambda theta, inputs: jnp.exp(log_p(forward(theta, inputs))))
    slope = jax.jit(jax.grad(written_loss))
    for t in range(N):
        y = train.targets[t]
        p = np.asarray(predict(theta, train.inputs[t]))
        right = p[np.arange(len(y)), y]
        wrong = np.array([np.delete(row, k).max() for row, k in zip(p, np.asarray(y), strict=True)])
        seen.append((-np.log(right).mean() / np.log(C), np.mean(p.argmax(-1) == np.asarray(y))))
        loss, accuracy = np.mean(seen, axis=0)  # N steps are too few for anything to be forgotten
        features.append(np.array([t / N, loss, accuracy, 0, 1 - seen[-1][1], 0, (right - wrong).mean()]))
        grads = slope(theta, tau, features[-1], train.inputs[t], y)
        velocity = jax.tree.map(lambda v, g: MU * v + g, velocity, grads)
        theta = jax.tree.map(lambda w, v: w - ETA * v, theta, velocity)
    return np.stack(features), theta


def written_loss(theta, tau, s, inputs, y):
    """The bilinear loss under the attention teacher, both written out."""
    alpha = jnp.exp(log_p(tau.keys @ (tau.query @ s) / np.sqrt(tau.query.shape[0])))
    phi = jnp.eye(C) + sum(a * v for a, v in zip(alpha, tau.values, strict=True))
    scores = (jnp.eye(C)[y] @ phi * log_p(forward(theta, inputs))).sum(-1) + tau.bias[y]
    return -jnp.mean(1 / (1 + jnp.exp(-scores)))


def written_measure(theta, validation):
    p = jnp.exp(log_p(forward(theta, validation.inputs)))
    return 1 - jnp.mean(p[jnp.arange(len(p)), validation.targets])


@jax.jit
def reverse_mode(theta, tau, features, train, validation):
    """Section by section what the method must give: a forward pass, then RMD for momentum by hand."""
    arguments = [(features[t], train.inputs[t], train.targets[t]) for t in range(N)]
    path, velocity = [theta], jax.tree.map(jnp.zeros_like, theta)
    for a in arguments:
        velocity = jax.tree.map(lambda v, g: MU * v + g, velocity, jax.grad(written_loss)(path[-1], tau, *a))
        path.append(jax.tree.map(lambda w, v: w - ETA * v, path[-1], velocity))
    measure, a_omega = jax.value_and_grad(written_measure)(path[-1], validation)
    a_v, d_tau = jax.tree.map(jnp.zeros_like, theta), jax.tree.map(jnp.zeros_like, tau)
    for t in reversed(range(N)):
        a_v = jax.tree.map(lambda v, w: v - ETA * w, a_v, a_omega)
        a_g = a_v  # of the gradient
        a_v = jax.tree.map(lambda v: MU * v, a_v)

        def along(theta, tau, a_g=a_g, a=arguments[t]):
            return optax.tree.vdot(jax.grad(written_loss)(theta, tau, *a), a_g)

        product, mixed = jax.grad(along, argnums=(0, 1))(path[t], tau)
        a_omega, d_tau = optax.tree.add(a_omega, product), optax.tree.add(d_tau, mixed)
    return measure, d_tau


class Life(NamedTuple):
    """One life in float64."""

    run: Any  # the compiled round
    state: MethodState
    batches: RoundBatches
    after: MethodState
    metrics: dict[str, Any]
    data: Any  # features written out [N, 7], training batches, validation batch
    theta: Any  # at the end, written out


@pytest.fixture(scope="module")
def life():
    with jax.enable_x64(True):
        method = build()
        run, state, batches = jax.jit(method.round), begin(method), batches_of(0)
        train, validation = jax.tree.map(lambda x: x[0], batches[:2])
        features, theta = features_along(state.student.params, state.teacher, train)
        return Life(run, state, batches, *run(state, batches), (features, train, validation), theta)


def test_loss_of_a_new_teacher_and_its_slope(x64):
    """Phi = I, b = 0: -p / (1 + p), and d/dz of it -p / (1 + p)^2 (e_y - softmax)."""
    tau = init_attention(jax.random.key(0), num_classes=C)
    params = coefficients(tau._replace(values=0 * tau.values), jnp.arange(7.0))
    z, y = 3 * jax.random.normal(jax.random.key(1), (5, C)), jnp.array([0, 1, 2, 0, 1])
    p = np.exp(log_p(z))
    right = p[np.arange(5), y]
    np.testing.assert_allclose(LOSS.apply(params, z, y), -right / (1 + right), rtol=1e-12)
    slope = jax.grad(lambda z: jnp.sum(LOSS.apply(params, z, y)))(z)
    np.testing.assert_allclose(slope, -(right / (1 + right) ** 2)[:, None] * (np.eye(C)[y] - p), rtol=1e-10)


def test_measures(x64):
    """2 sigmoid(50 d) - 1 at three distances; nothing, and no slope, where the right class is the largest."""
    d = np.array([0.01, 0.05, 0.1])
    z = jnp.log(jnp.stack([(0.8 - d) / 2, (0.8 + d) / 2, 0.2 + 0 * d], axis=-1))
    np.testing.assert_allclose(smooth(z, jnp.zeros(3, int)), [0.244919, 0.848284, 0.986614], atol=5e-7)
    value, slope = jax.value_and_grad(lambda z: jnp.sum(smooth(z, jnp.ones(3, int))))(z)
    np.testing.assert_allclose((value, jnp.abs(slope).max()), (0, 0), atol=1e-15)
    np.testing.assert_allclose(probability(z, jnp.zeros(3, int)), 1 - (0.8 - d) / 2, rtol=1e-12)


def test_demo_teacher_starts_at_a_saddle_and_ours_does_not(life, x64):
    """Phi = W + W2 gate: with W2 = 0 and gate = 0 the dynamic part has no derivative at all."""
    state, batches = life.state, life.batches
    train, validation = jax.tree.map(lambda x: x[0], batches[:2])

    def demo(theta, t, tau, batch):
        z, _ = toy.student.apply({"params": theta, "batch_stats": state.student.batch_stats}, batch.inputs, True)
        error = jax.lax.stop_gradient(jnp.mean(z.argmax(-1) != batch.targets))
        gate = 2 * jax.nn.sigmoid(tau["th"] @ jnp.stack([t / N, 10 * error]) + tau["b2"]) - 1
        params = {"phi": tau["W"] + tau["W2"] * gate, "bias": tau["b"]}
        return jnp.mean(LOSS.apply(params, z, batch.targets)), t + 1

    def outer(theta, t, batch):
        z, _ = toy.student.apply({"params": theta, "batch_stats": state.student.batch_stats}, batch.inputs, True)
        return jnp.mean(probability(z, batch.targets)), {}

    shapes = {"W2": (C, C), "th": (2,), "b2": (), "b": (C,)}
    tau = {"W": jnp.eye(C)} | {name: jnp.zeros(shape) for name, shape in shapes.items()}
    compute = jax.jit(hypergradient(demo, outer, MOMENTUM, memory="save"))
    start = state.student._replace(batch_stats=jnp.array(0.0))
    norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), compute(tau, start, train, validation).gradient)
    assert (norms["W2"], norms["th"], norms["b2"]) == (0, 0, 0) and norms["W"] > 1e-3
    broken = compute(tau | {"b2": jnp.array(0.1)}, start, train, validation).gradient
    assert jnp.linalg.norm(broken["W2"]) > 1e-5

    fresh = begin(build(), alive=False)
    ours = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), life.run(fresh, batches)[0].optimizer_state)
    assert min(ours) > 1e-7, f"a leaf of the attention has no derivative at the start: {ours}"
    flat = fresh._replace(teacher=fresh.teacher._replace(values=0 * fresh.teacher.values))
    at_zero = life.run(flat, batches)[0].optimizer_state
    assert jnp.linalg.norm(at_zero.values) > 1e-3 and jnp.linalg.norm(at_zero.query) == 0


def test_hypergradient_is_the_hand_written_recursion(life, x64):
    """RMD for momentum, features constant, in two memory modes; the student's own life step by step."""
    state, after = life.state, life.after
    measure, gradient = reverse_mode(state.student.params, state.teacher, *life.data)
    chex.assert_trees_all_close(after.student.params, life.theta, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(life.metrics["dlf_measure"], measure, rtol=1e-12)
    assert min(float(jnp.linalg.norm(leaf)) for leaf in gradient) > 1e-5
    chex.assert_trees_all_close(after.optimizer_state, gradient, rtol=1e-8, atol=1e-13)
    other, _ = jax.jit(build(memory="mixed").round)(state, life.batches)
    chex.assert_trees_all_close(other.optimizer_state, gradient, rtol=1e-8, atol=1e-13)


def test_hypergradient_against_finite_differences(life, x64):
    """With the features of the life as it was; were they to move with the teacher, the derivative would be another."""
    state = life.state
    direction = toy.to_x64(optax.tree.random_like(jax.random.key(3), state.teacher))
    ours = optax.tree.vdot(life.after.optimizer_state, direction)
    moved = lambda h: optax.tree.add_scale(state.teacher, h, direction)  # noqa: E731
    measure = lambda h: reverse_mode(state.student.params, moved(h), *life.data)[0]  # noqa: E731
    np.testing.assert_allclose(ours, (measure(1e-5) - measure(-1e-5)) / 2e-5, rtol=1e-6)
    total = lambda h: life.run(state._replace(teacher=moved(h)), life.batches)[1]["dlf_measure"]  # noqa: E731
    assert abs((total(1e-5) - total(-1e-5)) / 2e-5 - ours) > 1e-4 * abs(ours)


def test_features_are_those_of_the_life(life, x64):
    """At the end of a life: of the last batch what is of a batch, the averages, the dev accuracy of the round."""
    state, after, metrics, (features, _, validation) = life.state, life.after, life.metrics, life.data
    running = after.carried["running"]
    ours = state_features(running, num_classes=C, steps=N)
    right = float(metrics["validation_accuracy"])
    assert right == np.mean(forward(life.theta, validation.inputs).argmax(-1) == validation.targets) and 0 < right < 1
    expected = features[-1] + np.array([1 / N, 0, 0, right, 0, right, 0])
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(after.loss, coefficients(after.teacher, ours), rtol=1e-12)
    assert set(after.student.batch_stats) == set(state.student.batch_stats) == {"norm"}  # the student's own, only
    assert metrics["phi_movement"] > 1e-3 and metrics["phi_distance"] > 1e-2


def test_averages_forget_and_the_best_is_kept(x64):
    means = [{"loss": jnp.array(float(k)), "accuracy": jnp.array(0.5), "margin": jnp.array(0.1)} for k in range(30)]
    running, expected = newborn(), 0.0
    for k, measured in enumerate(means):
        running = attention.saw_batch(running, measured)
        running = running._replace(steps=running.steps + 1)
        expected = np.mean(range(10)) if k == 9 else 0.9 * expected + 0.1 * k
        if k >= 9:
            np.testing.assert_allclose(running.train_loss, expected, rtol=1e-12)
    running = attention.saw_validation(attention.saw_validation(running, jnp.array(0.7)), jnp.array(0.4))
    assert (running.dev_accuracy, running.best_dev_accuracy) == (0.4, 0.7)


def test_whole_life_is_a_window_of_the_same_fresh_student(life, x64):
    """In the first round that of init, then new ones: everything of a student begins anew, the teacher goes on."""
    whole = build(life="whole")
    run, state, other = jax.jit(whole.round), begin(whole), life.state
    key = jax.random.wrap_key_data(state.carried["key"])
    for k in range(3):
        if k:
            drawn = toy.student.init(jax.random.fold_in(key, k), jnp.zeros((2, 5)))
            other = other._replace(student=init_state(drawn, MOMENTUM), carried={"running": newborn()})
        state, metrics = run(state, batches_of(k))
        other, expected = life.run(other, batches_of(k))
        chex.assert_trees_all_close(
            (state.student, state.teacher, state.loss), (other.student, other.teacher, other.loss)
        )
        chex.assert_trees_all_close(state.optimizer_state, other.optimizer_state)
        chex.assert_trees_all_close(metrics, expected, rtol=1e-9)
        chex.assert_trees_all_close(state.carried["running"], other.carried["running"])
    assert state.carried["lives"] == 3
    with pytest.raises(ValueError, match="a round has 3 steps, a whole life 4"):
        whole.round(state, batches_of(0, steps=3))


def test_same_key_same_student():
    key, inputs = jax.random.key(4), jnp.zeros((2, 5))
    other = fixed_loss(toy.student, toy.task, toy.small_loss(), MOMENTUM).init(key, inputs)
    chex.assert_trees_all_equal(build().init(key, inputs).student, other.student)


def test_split_over_an_axis_is_the_whole_batch(life, x64):
    """Gradients, features and the dev accuracy of two halves are those of the whole."""
    batches = life.batches
    halves = RoundBatches(
        jax.tree.map(lambda x: jnp.moveaxis(x.reshape(1, N, 2, 3, *x.shape[3:]), 2, 0), batches.train),
        jax.tree.map(lambda x: jnp.moveaxis(x.reshape(1, 2, 4, *x.shape[2:]), 1, 0), batches.validation),
        batches.first_of_epoch,
    )
    split = build(student=from_linen(toy.Network("devices")), axis_name="devices", memory="mixed")
    axes = (None, RoundBatches(Batch(0, 0), Batch(0, 0), None))
    parts = jax.jit(jax.vmap(split.round, axis_name="devices", in_axes=axes))(life.state, halves)
    for d in range(2):
        part = jax.tree.map(lambda x, d=d: x[d], parts)
        chex.assert_trees_all_close(part, (life.after, life.metrics), rtol=1e-10, atol=1e-12)


def test_frozen_teacher_teaches_the_same_and_stays(life, x64):
    stayed, metrics = jax.jit(build(learn=False).round)(life.state, life.batches)
    before = (life.state.teacher, life.state.optimizer_state)
    chex.assert_trees_all_equal((stayed.teacher, stayed.optimizer_state), before)
    assert optax.tree.norm(optax.tree.sub(life.after.teacher, life.state.teacher)) > 1e-4
    found, expected = (stayed.student, stayed.carried), (life.after.student, life.after.carried)
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-14)  # a bias before BatchNorm is rounding alone
    np.testing.assert_allclose(metrics["dlf_measure"], life.metrics["dlf_measure"], rtol=1e-9)
    assert metrics["hypergradient_norm"] == 0


def test_teacher_steps_reduce_the_measure():
    """The same student taught again and again, as a scan over rounds; and two seeds side by side."""
    method = build(optax.adam(0.05), measure="smooth", life="whole", memory="mixed")

    def again(state, _):
        new, metrics = method.round(state, batches_of(2))
        carried = new.carried | {"lives": state.carried["lives"]}
        return new._replace(student=state.student, carried=carried), metrics["dlf_measure"]

    states = jax.vmap(lambda seed: begin(method, seed, alive=False))(jnp.arange(2))
    _, measures = jax.jit(jax.vmap(partial(jax.lax.scan, again, length=15)))(states)
    assert measures.shape == (2, 15)
    assert (measures[:, -1] < measures[:, 0] - 0.02).all(), measures


@pytest.mark.parametrize("life", ["windows", "whole"])
@pytest.mark.parametrize("bits", [32, 64])
def test_dtypes_of_the_state_stay(life, bits):
    with jax.enable_x64(bits == 64):
        method = build(optax.adam(0.1), life=life)
        state = jax.eval_shape(lambda: begin(method))
        after, _ = jax.eval_shape(method.round, state, jax.eval_shape(lambda: batches_of(0)))
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        floats = [x.dtype for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert set(floats) == {jnp.dtype(f"float{bits}")}


def test_pull_is_the_slope_of_the_loss_the_teacher_would_give(life, x64):
    state, batch = life.state, toy.batch(7, 6)
    ours = jax.jit(build().pull)(state, batch, None)
    z = forward(state.student.params, batch.inputs)
    features, _ = features_along(state.student.params, state.teacher, Batch(*(jnp.stack([x] * N) for x in batch[:2])))
    params = coefficients(state.teacher, features[0])
    scores = (params["phi"][batch.targets] * log_p(z)).sum(-1) + params["bias"][batch.targets]
    slope = jax.vmap(jax.jacrev(lambda z, row: row @ log_p(z)))(z, params["phi"][batch.targets])
    sigma = 1 / (1 + np.exp(-scores))
    np.testing.assert_allclose(ours, sigma * (1 - sigma) * np.linalg.norm(slope, axis=-1), rtol=1e-9)


def test_bad_arguments_are_told():
    for knobs, line in (
        ({"life": "half"}, "life 'half' is unknown; choose one of windows, whole"),
        ({"measure": "none"}, "measure 'none' is unknown; choose one of probability, smooth"),
        ({"memory": "none"}, "memory mode 'none' is unknown"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"num_classes": 1}, "num_classes is 1, expected at least 2"),
    ):
        with pytest.raises(ValueError, match=line):
            build(**knobs)
    method = build(num_classes=4)
    with pytest.raises(ValueError, match="the student has 3 outputs and num_classes is 4"):
        jax.eval_shape(method.round, begin(method), batches_of(0))
