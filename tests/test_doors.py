"""Whatever an unroll is given, every memory mode is right to 1e-10 or refuses it in one line.

A table: each row is an input that is unusual or wrong, and what must come of it. "Right" is the derivative of a plain
Python loop, without scan, memory mode or any line of ours, and central differences of its error; "refused" is a line
that names the fault, from every mode that cannot do it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import linen as nn
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES, make_loss
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2rw import l2rw
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.methods.slf import slf
from l2t_jax.optimizers import clip_by_global_norm
from l2t_jax.second_order import gradient_gap
from l2t_jax.students import from_linen, mlp
from l2t_jax.types import RoundBatches, StudentState
from l2t_jax.unroll import init_state, plain_gradient, student_step, unroll

SGD = optax.sgd(0.1)
FORWARD = ("mixed", "linearize", "nested")


def inner(params, stats, phi, batch):
    return jnp.mean((params["w"] * phi - batch) ** 2), stats


def outer(params, stats, validation):
    return jnp.mean((params["w"] - validation) ** 2), {}


class Case(NamedTuple):
    """What `hypergradient` is given; by default the problem of one number that the issue of each row bends."""

    inner: Any = inner
    outer: Any = outer
    params: Any = {"w": np.float64(1.0)}  # noqa: RUF012
    phi: Any = np.float64(0.7)
    batches: Any = np.ones(3)
    validation: Any = np.float64(2.0)
    stats: Any = {}  # noqa: RUF012
    optimizer: Any = SGD
    check_gradient: bool = False
    jit: bool = False  # whether values are traced
    modes: tuple[str, ...] = tuple(MEMORY_MODES)  # those that must be right; the others must refuse
    state: Any = None  # in place of params
    differences: bool = True  # whether the derivative is that of the error, and not what a custom one says it is


def run(case, mode):
    """The hypergradient in a memory mode."""
    state = case.state or init_state({"params": case.params, "batch_stats": case.stats}, case.optimizer)
    compute = hypergradient(case.inner, case.outer, case.optimizer, memory=mode, check_gradient=case.check_gradient)
    return (jax.jit(compute) if case.jit else compute)(case.phi, state, case.batches, case.validation)


def by_hand(case, phi):
    """The validation error after a Python loop over the batches."""
    params, stats, state = jax.tree.map(jnp.asarray, (case.params, case.stats, case.optimizer.init(case.params)))
    for n in range(jax.tree.leaves(case.batches)[0].shape[0]):
        batch = jax.tree.map(lambda x, n=n: x[n], case.batches)
        gradient, stats = jax.grad(case.inner, has_aux=True)(params, stats, phi, batch)
        updates, state = case.optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return case.outer(params, stats, case.validation)[0]


def number(params, stats, phi, batch):
    """As `inner`, for trees of anything: only what is a float counts."""
    return inner({"w": params["w"]}, stats, phi, batch)


# What is unusual, and right


def two(params, stats, phi, batch):
    return jnp.mean((params["w"] * phi["a"] - batch["x"] * phi["b"]) ** 2 * batch["weight"]), stats


def two_weights(params, stats, phi, batch):
    return (params["w"] * phi - batch) ** 2 + params["u"] ** 2, stats


def counted(params, stats, phi, batch):
    return inner(params, stats, phi, batch)[0] * (1 + 0.1 * stats["n"]), {"n": stats["n"] + 1, "even": ~stats["even"]}


def noisy(params, stats, phi, batch):
    draw = jax.random.normal(stats, (), batch.dtype)
    return inner(params, stats, phi, batch + 0.1 * draw)[0], jax.random.fold_in(stats, 1)


def averaged(params, stats, phi, batch):
    mean = 0.9 * stats + 0.1 * params["w"]
    return (params["w"] * phi - jnp.mean(batch)) ** 2 + mean**2, mean


def modulus(params, stats, phi, batch):
    return jnp.abs(params["w"] * phi - batch) ** 2 + jnp.abs(params["w"]) ** 3, stats


def indexed(params, stats, phi, batch):
    return jnp.mean((params["w"][batch] * phi - 1) ** 2), stats


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))


@jax.custom_vjp
def calls_itself(x):
    return x**3


calls_itself.defvjp(lambda x: (calls_itself(x), x), lambda x, u: (3 * x**2 * u,))


@jax.custom_jvp
def cube_forward(x):
    return x**3


cube_forward.defjvp(lambda primals, tangents: (primals[0] ** 3, 3 * primals[0] ** 2 * tangents[0]))


@jax.custom_vjp
def straight_through(x):
    return jnp.sin(3 * x)


straight_through.defvjp(lambda x: (jnp.sin(3 * x), None), lambda _, u: (u,))


@jax.custom_vjp
def gradient_halved(x):
    return x**2


gradient_halved.defvjp(lambda x: (x**2, x), lambda x, u: (x * u * jnp.cos(x),))


def with_activation(function):
    def loss(params, stats, phi, batch):
        return jnp.mean((function(params["w"]) * phi - batch) ** 2), stats

    return loss


def printing(params, stats, phi, batch):
    jax.debug.callback(lambda: None)
    return inner(params, stats, phi, batch)


def calling(ordered):
    def loss(params, stats, phi, batch):
        io_callback(lambda x: None, None, jax.lax.stop_gradient(batch), ordered=ordered)
        return inner(params, stats, phi, batch)

    return loss


def masked(params, stats, phi, batch):
    return jnp.sum(batch * phi * params["w"] ** 2), stats


TREE = {"phi": {"a": np.float64(0.5), "b": np.float64(1.5)}, "inner": two}
ONES = {"x": np.ones((3, 4)), "weight": np.linspace(0.1, 1, 12).reshape(3, 4)}
PLAIN = {  # right in every mode
    "as it is": Case(),
    "one step": Case(batches=np.ones(1)),
    "many steps": Case(batches=np.linspace(0, 1, 11)),
    "Python floats as parameters": Case(params={"w": 1.0}),
    "Python floats as phi": Case(phi=0.5),
    "Python float as validation": Case(validation=2.0),
    "a mean over examples": Case(batches=np.linspace(0, 1, 12).reshape(3, 4)),
    "examples of unequal weight, phi of two leaves": Case(**TREE, batches=ONES),
    "None among the leaves": Case(number, params={"w": np.float64(1.0), "bias": None}),
    "a parameter of no entries": Case(number, params={"w": np.float64(1.0), "none": np.zeros((0, 3))}),
    "a parameter that nothing reads": Case(number, params={"w": np.float64(1.0), "unused": np.ones(2)}),
    "integers as batches": Case(
        indexed,
        lambda p, s, v: (jnp.sum(p["w"] ** 2), {}),
        {"w": np.arange(1.0, 4.0)},
        batches=np.array([[0, 1], [2, 2]]),
    ),
    "bools as batches": Case(masked, batches=np.array([True, False, True])),
    "an integer and a bool among the statistics": Case(counted, stats={"n": np.int32(1), "even": np.array(True)}),
    "a random key among the statistics": Case(noisy, stats=jax.random.key(3)),
    "statistics that depend on the parameters": Case(
        averaged, lambda p, s, v: ((p["w"] - v) ** 2 + s, {}), stats=np.float64(0.3)
    ),
    "no validation batch": Case(outer=lambda p, s, v: ((p["w"] - 2) ** 2, {}), validation=None),
    "an error that reports a tree": Case(outer=lambda p, s, v: ((p["w"] - v) ** 2, {"w": p["w"], "n": 3})),
    "pairs as lists": Case(lambda *a: list(inner(*a)), lambda *a: list(outer(*a))),
    "complex parameters": Case(modulus, lambda p, s, v: (jnp.abs(p["w"] - v) ** 2, {}), {"w": np.complex128(1 + 0.3j)}),
    "a clipped gradient": Case(
        two_weights,
        lambda p, s, v: ((p["w"] - v) ** 2 + p["u"] ** 2, {}),
        {"w": 1.0, "u": 0.5},
        optimizer=optax.chain(clip_by_global_norm(0.2), SGD),
    ),
    "a gradient that is exactly zero, clipped": Case(
        masked, batches=np.array([1.0, 0.0]), optimizer=optax.chain(clip_by_global_norm(3.0), SGD)
    ),
    "a gradient that is exactly zero, Adam": Case(
        masked, batches=np.array([1.0, 0.0]), optimizer=optax.adam(0.1, eps_root=1e-2)
    ),
    "a schedule of the rate": Case(optimizer=optax.sgd(optax.cosine_decay_schedule(0.1, 5))),
    "a true custom_vjp": Case(with_activation(cube)),
    "a true custom_jvp": Case(with_activation(cube_forward)),
    "a true custom_vjp, checked": Case(with_activation(cube), check_gradient=True),
    "a true custom_jvp, checked under jit": Case(with_activation(cube_forward), check_gradient=True, jit=True),
    "a random key among the statistics, checked under jit": Case(
        noisy, stats=jax.random.key(3), check_gradient=True, jit=True
    ),
    "no custom derivative, checked": Case(check_gradient=True),
    "jax.debug inside": Case(printing),
    "a stop_gradient": Case(
        lambda p, s, f, b: (inner(p, s, f, b)[0] * jax.lax.stop_gradient(p["w"]), s), differences=False
    ),
    "a cond inside": Case(
        lambda p, s, f, b: (jax.lax.cond(b > 0.5, lambda w: w**2 * f, lambda w: w * f, p["w"]), s),
        batches=np.array([0.0, 1.0]),
    ),
    "a scan inside": Case(
        lambda p, s, f, b: (jax.lax.scan(lambda c, _: (jnp.sin(c * f), None), p["w"], None, 3)[0] ** 2, s)
    ),
    "a checkpoint inside": Case(lambda p, s, f, b: jax.checkpoint(inner)(p, s, f, b)),
    "a jit inside": Case(lambda p, s, f, b: jax.jit(inner)(p, s, f, b)),
}
SOME = {  # right in some modes, refused by the others
    "a custom_vjp that calls itself": (
        Case(with_activation(calls_itself), modes=("save", "remat", "auto")),
        'reverse mode only.*"save" or "remat"',
    ),
    "straight through, checked": (
        Case(
            with_activation(straight_through), differences=False, check_gradient=True, modes=("save", "remat", "auto")
        ),
        r"not its derivative \(off by [\d.e+]+ %\).*\"save\", \"remat\" or \"auto\"",
    ),
    "straight through, checked under jit": (
        Case(
            with_activation(straight_through),
            differences=False,
            check_gradient=True,
            jit=True,
            modes=("save", "remat", "auto"),
        ),
        "not its derivative",
    ),
    "a wrong derivative, checked": (
        Case(with_activation(gradient_halved), differences=False, check_gradient=True, modes=("save", "remat", "auto")),
        "not its derivative",
    ),
}


# The mode that asks most of jax's tracing stands for all of them in the part of `versions`.
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.versions if mode == "linearize" else ()) for mode in MEMORY_MODES]
)
@pytest.mark.parametrize("name", [*PLAIN, *SOME])
def test_right(name, mode, x64):
    case, _ = SOME[name] if name in SOME else (PLAIN[name], "")
    if mode not in case.modes:
        pytest.skip("refuses it: see test_refused")
    ours = run(case, mode)
    gradient, plain = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (ours.gradient, plain_of(name))
    )
    assert np.linalg.norm(gradient) > 1e-4  # zeros would agree too
    np.testing.assert_allclose(gradient, plain, rtol=1e-10, atol=1e-14)


@functools.cache
def plain_of(name):
    """The derivative of the Python loop, itself checked by central differences where the gradient is one."""
    case, _ = SOME[name] if name in SOME else (PLAIN[name], "")
    with jax.enable_x64(True):
        phi = jax.tree.map(jnp.asarray, case.phi)
        plain = jax.grad(lambda phi: by_hand(case, phi))(phi)
        for at, leaf in enumerate(jax.tree.leaves(plain) if case.differences else ()):
            moved = lambda h, at=at: jax.tree.unflatten(  # noqa: E731
                jax.tree.structure(phi), [x + h * (i == at) for i, x in enumerate(jax.tree.leaves(phi))]
            )
            difference = (by_hand(case, moved(1e-5)) - by_hand(case, moved(-1e-5))) / 2e-5
            np.testing.assert_allclose(leaf, difference, rtol=1e-6, atol=1e-10, err_msg=name)
    return plain


# What is refused


class Module(NamedTuple):
    """As a module of Equinox: its function is a leaf."""

    w: Any
    activation: Any


def loss_gives(change):
    return lambda *a: (change(inner(*a)[0]), a[1])


def error_gives(change):
    return lambda *a: (change(outer(*a)[0]), {})


def stats_become(change):
    return lambda p, s, f, b: (inner(p, s, f, b)[0], change(s))


def pair(n=3, m=3, *shape):
    return {"x": np.ones((n, *shape)), "y": np.ones((m, *shape))}


def of_pair(p, s, f, b):
    return jnp.mean((p["w"] * f - b["x"]) ** 2 + b["y"]), s


def growing():
    """An optimizer whose state changes its dtype."""
    return optax.GradientTransformation(
        lambda params: jnp.float32(0), lambda g, s, p=None: (jax.tree.map(lambda x: -0.1 * x, g), s + jnp.float64(1))
    )


W = np.float64(1.0)
REFUSED = {
    # params
    "an integer among the parameters": (
        Case(number, params={"n": np.int32(7), "w": W}),
        "params/n is int32: only floats",
    ),
    "a Python integer among them": (Case(number, params={"n": 7, "w": W}), "params/n is int(32|64): only floats"),
    "a bool among them": (Case(number, params={"n": np.array(True), "w": W}), "params/n is bool: only floats"),
    "a random key among them": (Case(number, params={"n": jax.random.key(0), "w": W}), r"params/n is key<\w+>: only"),
    "a name among them": (
        Case(number, params={"n": "relu", "w": W}),
        "params/n is a str: expected an array.*close over",
    ),
    "a function among them": (Case(params=Module(W, jnp.tanh)), "params/activation is a .*: expected an array"),
    "an object array": (Case(number, params={"w": np.array([None])}), "params/w is a NumPy array of object"),
    "a state made by hand": (
        Case(number, state=StudentState({"n": jnp.int32(7), "w": jnp.float64(1)}, {}, SGD.init({"w": 1.0}))),
        "params/n is int32: only floats",
    ),
    # phi
    "an integer as phi": (Case(phi={"a": np.int32(1), "b": W}, inner=two, batches=ONES), "phi/a is int32: only floats"),
    "a bool as phi": (Case(phi=np.array(True)), "phi is bool: only floats"),
    "a name in phi": (Case(phi={"a": "x"}), "phi/a is a str: expected an array"),
    # batches
    "batches of unequal N": (Case(of_pair, batches=pair(10, 9)), "differ in N.*batches/x has 10, batches/y has 9"),
    "batches of unequal N, examples": (Case(of_pair, batches=pair(4, 2, 5)), "batches/x has 4, batches/y has 2"),
    "no batches": (Case(batches={}), r"batches hold no array: expected leaves \[N, B"),
    "None as batches": (Case(batches=None), "batches hold no array"),
    "N = 0": (Case(batches=np.zeros(0)), r"batches is \[0\], which is empty"),
    "N = 0, examples": (Case(batches=np.zeros((0, 4))), r"batches is \[0, 4\], which is empty"),
    "empty batches": (Case(batches=np.zeros((3, 0))), r"batches is \[3, 0\], which is empty"),
    "examples of no size": (
        Case(of_pair, batches={"x": np.ones((3, 2)), "y": np.ones((3, 2, 0))}),
        "batches/y is .* empty",
    ),
    "a number as batches": (Case(batches=1.0), r"batches is a single number: expected \[N, B"),
    "numbers in a list": (Case(batches=[1.0, 1.0]), "batches/0 is a single number"),
    "words": (Case(batches=np.array(["a", "b"])), "batches is a NumPy array of <U1"),
    "without the leading N": (
        Case(of_pair, batches=pair(16, 16, 8), validation=pair(5, 5, 8)),
        r"as many axes as the validation batch.*x\[None\]",
    ),
    "without the leading N, labels beside": (
        Case(
            lambda p, s, f, b: (jnp.mean((b[0] @ p["w"] - b[1]) ** 2) * f, s),
            params={"w": np.ones(8)},
            batches=(np.ones((16, 8)), np.ones(16)),
            validation=(np.ones((5, 8)), np.ones(5)),
        ),
        "as many axes as the validation batch",
    ),
    "a name in the validation batch": (Case(validation={"x": "a"}), "validation/x is a str: expected an array"),
    "an empty validation batch": (Case(validation=np.zeros((0, 3))), r"validation is \[0, 3\], which is empty"),
    # what the inner loss returns
    "losses that are not reduced": (
        Case(lambda p, s, f, b: ((p["w"] * f - b) ** 2, s), batches=np.ones((3, 4))),
        r"the inner loss is float64\[4\]: expected one number; take its mean",
    ),
    "a loss [1]": (Case(loss_gives(lambda x: x[None])), r"the inner loss is float64\[1\]: expected one number"),
    "a loss of integers": (Case(loss_gives(lambda x: jnp.int32(x))), "the inner loss is of int32: expected a float"),
    "a loss that is a bool": (Case(loss_gives(lambda x: x > 1)), "the inner loss is of bool: expected a float"),
    "a complex loss": (Case(loss_gives(lambda x: x * 1j)), "the inner loss is of complex128: expected a float"),
    "a loss that depends on nothing": (Case(loss_gives(lambda x: 1.0)), "the inner loss is a float: expected a scalar"),
    "a loss that is None": (Case(loss_gives(lambda x: None)), "the inner loss is None"),
    "a loss alone": (Case(lambda *a: inner(*a)[0]), "the inner loss returns one array: expected two"),
    "three things": (Case(lambda *a: (*inner(*a), {})), "the inner loss returns 3 things: expected two"),
    "nothing": (Case(lambda *a: None), "the inner loss returns None: expected two"),
    "statistics that are dropped": (Case(stats_become(lambda s: {}), stats={"n": np.ones(2)}), "changes the structure"),
    "statistics that appear": (
        Case(stats_become(lambda s: {"n": jnp.ones(2)})),
        "changes the structure of batch_stats",
    ),
    "statistics of another dtype": (
        Case(stats_become(lambda s: {"n": s["n"].astype(jnp.float32)}), stats={"n": np.ones(2)}),
        r"changes batch_stats/n from float64\[2\] to float32\[2\]",
    ),
    "statistics of another shape": (
        Case(stats_become(lambda s: {"n": s["n"][:1]}), stats={"n": np.ones(2)}),
        r"from float64\[2\] to float64\[1\]",
    ),
    "a while loop in it": (
        Case(loss_gives(lambda x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1])),
        "Reverse-mode differentiation does not work for lax.while_loop",
    ),
    "a callback in it": (Case(calling(ordered=False)), r"has effects \(IOEffect\).*jax.debug.callback"),
    "an ordered callback in it": (Case(calling(ordered=True)), r"has effects \(OrderedIOEffect\).*jax.debug.callback"),
    "a pure callback in it": (
        Case(loss_gives(lambda x: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), x.dtype), x))),
        "do not support JVP",
    ),
    # what the outer error returns
    "an error alone": (Case(outer=lambda *a: outer(*a)[0]), "the outer error returns one array: expected two"),
    "three things of the error": (Case(outer=lambda *a: (*outer(*a), {})), "the outer error returns 3 things"),
    "no error": (Case(outer=lambda *a: None), "the outer error returns None: expected two"),
    "errors that are not reduced": (
        Case(validation=np.ones(4), outer=lambda p, s, v: ((p["w"] - v) ** 2, {})),
        r"the outer error is float64\[4\]: expected one number; take its mean",
    ),
    "an error of integers": (Case(outer=error_gives(lambda x: jnp.int32(x))), "the outer error is of int32"),
    "an error that depends on nothing": (Case(outer=error_gives(lambda x: 0.5)), "the outer error is a float"),
    # the optimizer
    "an optimizer whose state changes": (
        Case(optimizer=growing()),
        r"the student's optimizer changes its state from float32\[\] to float64\[\]",
    ),
    "optax's clip at a zero gradient": (
        Case(masked, batches=np.array([1.0, 0.0]), optimizer=optax.chain(optax.clip_by_global_norm(1.0), SGD)),
        "no derivative at a zero gradient.*l2t_jax.optimizers.clip_by_global_norm",
    ),
    "the same, checked under jit": (
        Case(optimizer=optax.chain(optax.clip_by_global_norm(1.0), SGD), check_gradient=True, jit=True),
        "no derivative at a zero gradient",
    ),
    "Adam at a zero gradient": (
        Case(
            lambda p, s, f, b: (f * (p["w"] ** 2 + p["dead"] ** 2), s),
            params={"w": W, "dead": np.float64(0)},
            outer=lambda p, s, v: (p["w"] ** 2 + p["dead"], {}),
            optimizer=optax.adam(0.1),
        ),
        "no derivative at a zero gradient.*eps_root > 0",
    ),
}


@pytest.mark.versions
@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("name", [*REFUSED, *SOME])
def test_refused(name, mode, x64):
    case, line = SOME[name] if name in SOME else REFUSED[name]
    if name in SOME and mode in case.modes:
        pytest.skip("does it: see test_right")
    with pytest.raises(ValueError, match=line) as error:
        run(case, mode)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# What an inner loss closes over


def closing_over(c, mode, *, index=False):
    """The hypergradient of a loss that reads c, and the integer it is cut to, and has neither as an argument."""
    row = jnp.asarray(c).astype(int) if index else 0
    table = jnp.array([1.0, 2.0, 3.0])

    def loss(p, s, f, b):
        return c * table[row] * inner(p, s, f, b)[0] + jnp.sin(c * p["w"]), s

    state = init_state({"params": {"w": jnp.array(1.0)}}, SGD)
    return hypergradient(loss, outer, SGD, memory=mode)(jnp.array(0.7), state, jnp.ones(3), jnp.array(2.0)).gradient


@pytest.mark.versions
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_traced_arrays_that_the_loss_closes_over(mode, x64):
    """jit, vmap and grad outside, where what is closed over has no value yet; grad differentiates by it as well."""
    value = closing_over(1.3, mode)
    np.testing.assert_allclose(value, closing_over(1.3, "save"), rtol=1e-10)
    np.testing.assert_allclose(jax.jit(lambda c: closing_over(c, mode))(1.3), value, rtol=1e-10)
    np.testing.assert_allclose(
        jax.jit(lambda c: closing_over(c, mode, index=True))(1.3), closing_over(1.3, mode, index=True)
    )
    several = jnp.array([0.2, 1.3])
    mapped = [closing_over(c, "save") for c in several]
    np.testing.assert_allclose(jax.vmap(lambda c: closing_over(c, mode))(several), mapped, rtol=1e-10)
    slope = jax.grad(lambda c: closing_over(c, mode))(1.3)
    difference = (closing_over(1.3 + 1e-5, "save") - closing_over(1.3 - 1e-5, "save")) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
    looped = jax.lax.scan(lambda _, c: (None, closing_over(c, mode)), None, several)[1]
    np.testing.assert_allclose(looped, mapped, rtol=1e-10)


@pytest.mark.versions
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_the_derivative_by_the_batches(mode, x64):
    state = init_state({"params": {"w": jnp.array(1.0)}}, SGD)
    run = MEMORY_MODES[mode](inner, SGD, None)
    error = lambda batches: outer(run(state, jnp.array(0.7), batches)[0].params, {}, 2.0)[0]  # noqa: E731
    slope, at = jax.grad(error)(jnp.ones(3)), jnp.ones(3)
    difference = [(error(at.at[n].add(1e-5)) - error(at.at[n].add(-1e-5))) / 2e-5 for n in range(3)]
    np.testing.assert_allclose(slope, difference, rtol=1e-6)


@pytest.mark.versions
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_how_often_effects_run(mode, x64):
    """Those of jax.debug: once a step, and again where a step is computed again on the way back."""
    count = []

    def loss(*a):
        jax.debug.callback(lambda _: count.append(1), a[-1])
        return inner(*a)

    run(Case(loss), mode)
    jax.effects_barrier()
    assert len(count) == 3 if mode in ("save", "linearize") else len(count) > 3


@pytest.mark.versions
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_shard_map_that_checks_what_varies(mode, x64):
    """Refused where jax would sum the derivatives of all devices up; right where phi and state are marked."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    compute = hypergradient(inner, outer, SGD, memory=mode, axis_name="d")
    state = init_state({"params": {"w": jnp.array(1.0)}}, SGD)

    def mapped(marked, check_vma):
        def local(phi, state, batches, validation):
            if marked:
                phi, state = jax.tree.map(lambda x: jax.lax.pcast(x, "d", to="varying"), (phi, state))
            return compute(phi, state, batches, validation).gradient

        whole, split = PartitionSpec(), PartitionSpec("d")
        specs = whole, whole, PartitionSpec(None, "d"), split
        function = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=check_vma)
        return jax.jit(function)(jnp.array(0.7), state, jnp.ones((3, 4)), 2 * jnp.ones(2))

    with pytest.raises(ValueError, match=r"split over the mapped axis d.*check_vma=False.*pmap.*pcast") as error:
        mapped(marked=False, check_vma=True)
    assert "\n" not in str(error.value)
    right = run(Case(), "save").gradient
    np.testing.assert_allclose(mapped(marked=False, check_vma=False), right, rtol=1e-10)
    np.testing.assert_allclose(mapped(marked=True, check_vma=True), right, rtol=1e-10)


@pytest.mark.versions
@pytest.mark.parametrize("name", ["a custom_vjp that calls itself", "straight through, checked"])
def test_auto_says_in_one_line_what_it_avoids(name, x64, caplog):
    with caplog.at_level("INFO", "l2t_jax.memory"):
        run(SOME[name][0], "auto")
    (line,) = caplog.messages
    assert "takes save" in line and "; not linearize, mixed, nested: " in line and "\n" not in line


@pytest.mark.versions
@pytest.mark.parametrize(
    ("loss", "wrong"), [(cube, 0), (cube_forward, 0), (jnp.sin, 0), (straight_through, 0.3), (gradient_halved, 0.1)]
)
@pytest.mark.parametrize("traced", [False, True])
def test_the_gap_of_a_gradient(loss, wrong, traced):
    """In float32: rounding where the derivative is true, and a large part of it where it is not."""
    found = []

    def measure(w):
        found.append(gradient_gap(with_activation(loss), {"w": w}, {}, jnp.float32(0.7), jnp.float32(1)))
        return w

    (jax.jit(measure) if traced else measure)(jnp.array([1.0, 0.4]))
    assert found[0] < 1e-5 if not wrong else found[0] > wrong


# The doors of methods and students


def a_round(stages):
    train, validation = toy.batch(1, stages, 2, 6), toy.batch(2, stages, 7)
    return RoundBatches(train, validation, jnp.array(True))


def build(loss, **options):
    return l2t_dln(toy.student, toy.task, loss, toy.teacher, SGD, SGD, **options)


def without(phi):
    return make_loss(lambda params, outputs, targets: toy.task.error(outputs, targets))


METHODS_REFUSE = {
    "a loss with a schedule": (lambda: build(LOSSES["smooth_zero_one"]()), "has a schedule.*use fixed_loss"),
    "a loss without parameters": (lambda: build(without({})), "has no parameters for a teacher to rewrite"),
    "a loss that nothing learns": (lambda: build(LOSSES["cross_entropy"]()), 'learned by "no".*use fixed_loss'),
    "a loss that the student learns": (lambda: build(LOSSES["adaptive_robust"](num_classes=3)), 'learned by "student"'),
    "a taught loss in a pool": (
        lambda: slf(toy.student, toy.task, SGD, pool=["mae", toy.small_loss()], num_classes=3, steps=9),
        "parameters that are learned",
    ),
    "a schedule without the steps of the run": (
        lambda: fixed_loss(toy.student, toy.task, LOSSES["large_margin_softmax"](), SGD),
        "has a schedule: give steps",
    ),
}
ROUNDS_REFUSE = {
    "one stage for two": (lambda: build(toy.small_loss()), 1, r"reads 2 stages.*\[2, N, B"),
    "two stages for one": (lambda: build(toy.small_loss(), second_stage="restart"), 2, r"reads 1 stages.*\[1, N, B"),
    "two stages for a fixed loss of one": (
        lambda: fixed_loss(toy.student, toy.task, LOSSES["mae"](), SGD),
        2,
        "reads 1",
    ),
    "two batches for one": (lambda: l2rw(toy.student, toy.task, SGD), 1, "one student step a round, not 2"),
}


@pytest.mark.parametrize("name", METHODS_REFUSE)
def test_methods_refuse_what_they_cannot_use(name):
    make, line = METHODS_REFUSE[name]
    with pytest.raises(ValueError, match=line) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ROUNDS_REFUSE)
def test_rounds_refuse_data_of_another_shape(name):
    make, stages, line = ROUNDS_REFUSE[name]
    method = make()
    with pytest.raises(ValueError, match=line) as error:
        jax.eval_shape(method.round, jax.eval_shape(method.init, jax.random.key(0), jnp.zeros((2, 5))), a_round(stages))
    assert "\n" not in str(error.value)


def test_students_of_ids_take_them_and_pixels_are_normalised(x64):
    """Ids have no dtype to hand on: parameters are of Python's floats then; pixels are told what to become."""

    class Words(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2, name="output")(nn.Embed(7, 3)(x).mean(1))

    student, ids = from_linen(Words()), jnp.array([[1, 6], [0, 2]], jnp.int32)
    variables = student.init(jax.random.key(0), ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float64")}
    assert student.apply(variables, ids, True)[0].shape == (2, 2)
    for dtype in ("uint8", "bool"):
        with pytest.raises(ValueError, match=rf"inputs are {dtype}: expected floats, or int32 ids.*\(x - mean\) / std"):
            mlp(num_classes=2).init(jax.random.key(0), jnp.ones((2, 5), dtype))


STEPS_REFUSE = {
    "unequal N": (lambda step, state: unroll(step, state, 1.0, pair(3, 2)), "differ in N"),
    "an integer parameter": (lambda step, state: step(state._replace(params={"w": 1}), 1.0, 1.0), "params/w is int"),
    "an integer made a state": (lambda step, state: init_state({"params": {"w": 1}}, SGD), "params/w is int"),
    "a name made a state": (lambda step, state: init_state({"params": {"w": "a"}}, SGD), "params/w is a str"),
    "a name among statistics": (
        lambda step, state: init_state({"params": {}, "batch_stats": {"n": "a"}}, SGD),
        "batch_stats/n is a str",
    ),
    "a clip of nothing": (lambda step, state: clip_by_global_norm(0.0), "max_norm=0.0 is not a positive"),
    "a clip of no number": (lambda step, state: clip_by_global_norm(float("nan")), "max_norm=nan is not a positive"),
}


@pytest.mark.parametrize("name", STEPS_REFUSE)
def test_steps_refuse_it_too(name):
    make, line = STEPS_REFUSE[name]
    step = student_step(plain_gradient(inner), SGD)
    with pytest.raises(ValueError, match=line) as error:
        make(step, init_state({"params": {"w": 1.0}}, SGD))
    assert "\n" not in str(error.value)


def test_the_table_is_long_enough():
    """And its rows are different ones."""
    tables = PLAIN, SOME, REFUSED, METHODS_REFUSE, ROUNDS_REFUSE, STEPS_REFUSE
    assert sum(map(len, tables)) >= 100
