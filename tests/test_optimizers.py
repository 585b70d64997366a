"""Any optax optimizer in an unroll: right against a plain Python loop, or refused in a line; and at zero gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import build_loss
from l2t_jax.losses.checking import as_read
from l2t_jax.optimizers import STUDENT_OPTIMIZERS, check_at_first, check_at_zero
from l2t_jax.presets import Preset
from l2t_jax.runs.setting import build_optimizer
from l2t_jax.unroll import init_state, plain_gradient, student_step

RATE, STEPS = 0.01, 3
RIGHT = {  # optax's, and those of its contrib that need no more than a gradient
    **{
        name: functools.partial(getattr(optax, name), RATE)
        for name in (
            *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad"),
            *("fromage", "lamb", "lars", "nadam", "nadamw", "novograd", "optimistic_adam_v2"),
            *("optimistic_gradient_descent", "rmsprop", "sgd", "sm3", "yogi"),
        )
    },
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=0),
    "sgd with momentum": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "adam with eps_root": lambda: optax.adam(RATE, eps_root=1e-8),
    "muon": lambda: optax.contrib.muon(RATE),
    "prodigy": lambda: optax.contrib.prodigy(RATE),
    "schedule_free_sgd": lambda: optax.contrib.schedule_free_sgd(RATE),
}
PIECEWISE = {name: functools.partial(getattr(optax, name), RATE) for name in ("lion", "rprop", "sign_sgd")}
STEP = "the student's optimizer cannot take a step"
REFUSED = {
    "lbfgs": (lambda: optax.lbfgs(RATE), rf"{STEP} \(TypeError: .*'value', 'grad', and 'value_fn'"),
    "polyak_sgd": (lambda: optax.polyak_sgd(), rf"{STEP} \(TypeError: .*'value'.*e.g. optax.sgd"),
    "momo": (lambda: optax.contrib.momo(RATE), rf"{STEP} \(TypeError: .*'value'"),
    "sophia": (lambda: optax.contrib.sophia(RATE), rf"{STEP} \(ValueError: obj_fn must be provided"),
    "radam": (lambda: optax.radam(RATE), "no finite derivative in its first steps, whatever the gradient"),
    "radam, at three steps": (lambda: optax.radam(RATE, eps_root=1e-8), "no finite derivative in its first steps"),
    "a builder": (lambda: optax.sgd, r"the student's optimizer is a function: .*optax.sgd\(0.1\) and not optax.sgd"),
    "nothing": (lambda: None, "the student's optimizer is a NoneType: expected an optax transformation"),
}


def inner(params, stats, phi, batch):
    hidden = jnp.tanh(batch["x"] @ params["a"] + params["c"])
    decay = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
    return jnp.mean(phi["scale"] * (hidden @ params["b"] - batch["y"]) ** 2) + phi["decay"] * decay, stats


def outer(params, stats, batch):
    return inner(params, stats, {"scale": 1.0, "decay": 0.0}, batch)[0], {}


def problem():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape))  # noqa: E731
    params = {"a": draw(3, 4), "c": draw(4), "b": draw(4, 2)}
    batches, validation = {"x": draw(STEPS, 5, 3), "y": draw(STEPS, 5, 2)}, {"x": draw(6, 3), "y": draw(6, 2)}
    return params, {"scale": jnp.asarray(0.7), "decay": jnp.asarray(0.01)}, batches, validation


def compare(optimizer):
    """The hypergradient by a Python loop, and by two modes: one as plain autodiff, one that does not store."""
    params, phi, batches, validation = problem()
    state = init_state({"params": params}, optimizer)

    def by_hand(phi):
        theta, kept = params, optimizer.init(params)
        for n in range(STEPS):
            gradient = jax.grad(lambda p, n=n: inner(p, {}, phi, jax.tree.map(lambda x: x[n], batches))[0])(theta)
            updates, kept = optimizer.update(gradient, kept, theta)
            theta = optax.apply_updates(theta, updates)
        return outer(theta, {}, validation)[0]

    @jax.jit
    def compute(phi):
        modes = [hypergradient(inner, outer, optimizer, memory=mode) for mode in ("save", "mixed")]
        return jax.grad(by_hand)(phi), *(mode(phi, state, batches, validation).gradient for mode in modes)

    return [np.array(jax.tree.leaves(x)) for x in compute(phi)]


@pytest.mark.parametrize("name", RIGHT)
def test_right(name, x64):
    plain, *ours = compare(RIGHT[name]())
    assert np.linalg.norm(plain) > 1e-12
    for one in ours:
        np.testing.assert_allclose(one, plain, rtol=1e-9, atol=1e-12 * np.linalg.norm(plain))


@pytest.mark.parametrize("name", PIECEWISE)
def test_those_of_a_sign_have_no_slope(name, x64):
    for found in compare(PIECEWISE[name]()):
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("mode", ["save", "mixed"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, mode, x64):
    params, phi, batches, validation = problem()
    build, line = REFUSED[name]
    with pytest.raises(ValueError) as error:
        optimizer = build()
        compute = hypergradient(inner, outer, optimizer, memory=mode, check_gradient=True)
        compute(phi, init_state({"params": params}, optimizer), batches, validation)
    said = str(error.value)
    assert re.search(line, said) and "\n" not in said and len(said) < 500, said


def test_one_that_wants_an_axis_is_refused_for_a_number(x64):
    """sm3: right for arrays, see above."""
    theta, step = (
        {"w": jnp.asarray(1.0)},
        student_step(plain_gradient(lambda p, s, f, b: (p["w"] ** 2, s)), optax.sm3(0.1)),
    )
    with pytest.raises(ValueError, match=rf"{STEP} \(IndexError: .*sm3 wants an axis in each"):
        step(init_state({"params": theta}, optax.sm3(0.1)), 1.0, 1.0)


def test_the_state_of_another_is_refused(x64):
    state = init_state({"params": {"w": jnp.ones(2)}}, optax.sgd(0.1))
    step = student_step(plain_gradient(lambda p, s, f, b: (jnp.sum(p["w"] ** 2), s)), optax.adam(0.1))
    with pytest.raises(ValueError, match=rf"{STEP} .*the state of its own init"):
        step(state, 1.0, 1.0)


# Gradients that are exactly zero: of a batch of which every example is masked

OFFERED = {  # the students' optimizers of the experiments
    f"{schedule}, clip {clip:g}": Preset(student_schedule=schedule, student_clip=clip)
    for schedule in ("constant", "cosine")
    for clip in (0.0, 0.5)
}
CLASSES = 3


def masked_round(loss, optimizer):
    """Slope of the error of two steps, the first of a wholly masked batch, by loss parameters and examples' weight."""
    random = np.random.default_rng(1)
    x, v = (jnp.asarray(random.normal(size=(5, 4))) for _ in range(2))
    y = jnp.asarray(random.integers(0, CLASSES, 5))
    params = {"w": jnp.asarray(random.normal(size=(4, CLASSES))), "unused": jnp.zeros(2)}
    batches = {"x": jnp.stack([jnp.zeros_like(x), x]), "mask": jnp.array([[False] * 5, [True] * 5])}

    def inner(theta, stats, phi, batch):
        read, weight = as_read(loss, batch["x"] @ theta["w"]), jnp.where(jnp.arange(5) < 2, phi["factor"], 1)
        return jnp.mean(loss.apply(phi["loss"], read, y, mask=batch["mask"], sample_weight=weight)), stats

    def outer(theta, stats, v):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(v @ theta["w"], y)), {}

    phi = {"factor": jnp.asarray(1.3), "loss": loss.init(jax.random.key(2))}
    way = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), phi)
    state = init_state({"params": params}, optimizer)
    compute = hypergradient(inner, outer, optimizer, memory="save")

    @jax.jit
    def at(h):
        found = compute(jax.tree.map(lambda p, d: p + h * d, phi, way), state, batches, v)
        slopes = jax.tree.map(lambda g, d: jnp.vdot(g, d), found.gradient, way)
        return found.error, sum(jax.tree.leaves(slopes)), found.losses

    (up, _, _), (down, _, _), (error, slope, losses) = at(1e-5), at(-1e-5), at(0.0)
    assert losses[0] == 0 and jnp.all(jnp.isfinite(losses)) and jnp.isfinite(error)
    return slope, (up - down) / 2e-5


@pytest.mark.parametrize("name", OFFERED)
def test_offered_optimizers_at_a_zero_gradient(name, x64):
    optimizer = build_optimizer(OFFERED[name], 9)
    check_at_zero(optimizer, {"w": np.ones(3)})
    slope, difference = masked_round(build_loss("cross_entropy", CLASSES), optimizer)
    assert abs(slope) > 1e-6
    np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", toy.OF_CLASSES)
def test_losses_of_a_batch_that_is_wholly_masked(name, x64):
    slope, difference = masked_round(build_loss(name, CLASSES), build_optimizer(OFFERED["cosine, clip 0.5"], 9))
    assert jnp.isfinite(slope)
    np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-8)


def test_optax_clipping_is_told_apart():
    """The law is one that can fail."""
    with pytest.raises(ValueError, match="no derivative at a zero gradient"):
        check_at_zero(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), {"w": np.ones(3)})


@pytest.mark.parametrize("name", STUDENT_OPTIMIZERS)
def test_a_student_optimizer_by_name_teaches(name):
    """Each can be differentiated at a zero gradient, and steps as optax's own with the knobs that are given."""
    for knobs in ({}, {"weight_decay": 0.1} if name != "rmsprop" else {"decay": 0.5}):
        settings = Preset(student_optimizer=name, student_lr=0.1)
        optimizer = build_optimizer(settings, 9, **knobs)
        check_at_zero(optimizer, {"a": jnp.ones(3)})
        check_at_first(optimizer, {"a": jnp.ones(3)})
    gradient, params = jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0])
    heavy = build_optimizer(Preset(student_lr=0.1), 9, momentum=0.9, weight_decay=0.5)
    moved, _ = heavy.update(gradient, heavy.init(params), params)
    np.testing.assert_allclose(moved, -0.1 * (gradient + 0.5 * params), rtol=1e-6)
