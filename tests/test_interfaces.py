"""Students of other libraries: what docs/interfaces.md makes of them is what the libraries themselves compute."""

import sys
from pathlib import Path

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import nnx
from pages import run_page

from l2t_jax import from_arrays, train
from l2t_jax.hypergradient import hypergradient
from l2t_jax.runs import finals, reporting
from l2t_jax.students import from_equinox, from_haiku, from_nnx
from l2t_jax.students.layers import dropout
from l2t_jax.types import Batch, Student
from l2t_jax.unroll import init_state, inner_objective, outer_objective

PAGE = Path(__file__).parents[1] / "docs" / "interfaces.md"
KEY = jax.random.key(3)
SGD = optax.sgd(0.1, momentum=0.9)
FEW = {"rounds": 2, "seeds": 1, "unroll_length": 2, "memory": "save"}
RANDOM = np.random.default_rng(0)
X, Y = RANDOM.integers(0, 17, (400, 8, 8, 1)).astype(np.uint8), np.arange(400) % 10


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    short = 'rounds=2, unroll_length=2, memory="save",'
    return run_page(PAGE, tmp_path_factory.mktemp("page"), short, long="rounds=20,")


def images(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, 8, 8, 1)), float)


def own_nnx(names):
    """Two calls in training and one in evaluation, as the library's users write them: outputs, statistics."""
    module = names["OfNnx"](nnx.Rngs(KEY))
    module.train()
    outputs = [module(images(0, 6)), module(images(1, 6))]
    module.eval()
    return [*outputs, module(images(2, 6))], [module.norm.mean[...], module.norm.var[...]]


def own_equinox(names):
    model, state = eqx.nn.make_with_state(names["OfEquinox"])(KEY)
    outputs = []
    for place, used in enumerate((model, model, eqx.nn.inference_mode(model))):
        call = jax.vmap(used, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        one, state = call(images(place, 6), state)
        outputs.append(one)
    return outputs, jax.tree.leaves(state)


def own_haiku(names):
    pair = hk.without_apply_rng(hk.transform_with_state(names["network"]))
    params, state = pair.init(KEY, images(0, 6), True)
    outputs = []
    for place, training in enumerate((True, True, False)):
        one, state = pair.apply(params, state, images(place, 6), training)
        outputs.append(one)
    return outputs, jax.tree.leaves(state)


OWN = {"of_nnx": own_nnx, "of_equinox": own_equinox, "of_haiku": own_haiku}


def test_the_page_trains_all_four(page):
    for name in page["students"]:
        arrays = finals.load(page["folder"] / "runs" / name / "final", "meta_weight_net", 0)
        assert arrays["student"]["params"]["first" if name in ("plain", "nnx", "equinox") else "linear"] is not None
    assert page["result"].score is not None and list(page["students"]) == ["plain", "nnx", "equinox", "haiku"]
    assert finals.load(page["folder"] / "runs" / "nnx" / "final", "meta_weight_net", 0)["student"]["batch_stats"][
        "norm"
    ]


@pytest.mark.versions
@pytest.mark.parametrize("name", OWN)
def test_outputs_and_statistics_are_the_librarys(page, name):
    student = page[name]
    variables = student.init(KEY, images(0, 6))
    outputs = []
    for place, training in enumerate((True, True, False)):
        one, stats = student.apply(variables, images(place, 6), training)
        outputs.append(one)
        if not training:
            assert stats is variables["batch_stats"]  # evaluation moves nothing
        variables = {**variables, "batch_stats": stats}
    expected, statistics = OWN[name](page)
    for ours, theirs in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(variables["batch_stats"]), statistics, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "memory"), [("plain", "save"), ("of_nnx", "save"), *((x, "mixed") for x in OWN)])
def test_the_hypergradient_is_that_of_finite_differences(page, x64, name, memory):
    """Through two steps with BatchNorm; the validation error uses batch statistics and moves none."""
    student, loss = page[name], toy.small_loss()
    inner, outer = inner_objective(student, toy.task, loss), outer_objective(student, toy.task)
    batches = Batch(images(1, 2, 6), jnp.asarray(np.arange(12).reshape(2, 6) % 10))
    validation = Batch(images(2, 7), jnp.asarray(np.arange(7)))
    state = init_state(toy.to_x64(student.init(KEY, images(0, 6))), SGD)
    phi = toy.to_x64(loss.init(KEY))
    compute = jax.jit(hypergradient(inner, outer, SGD, memory=memory))
    result = compute(phi, state, batches, validation)
    assert {x.dtype for x in jax.tree.leaves(result.state.params)} == {jnp.dtype(jnp.float64)}
    for part in phi:
        moved = [compute({**phi, part: phi[part] + h}, state, batches, validation).error for h in (1e-5, -1e-5)]
        np.testing.assert_allclose(result.gradient[part], (moved[0] - moved[1]) / 2e-5, rtol=1e-6, atol=1e-9)
    other = compute(phi, state, batches, Batch(images(9, 7), validation.targets))
    assert other.error != result.error
    for mine, others, before in zip(*map(jax.tree.leaves, (result.state, other.state, state)), strict=True):
        np.testing.assert_array_equal(mine, others)  # statistics are those of training, whatever validated
        assert name == "plain" or mine.ndim == 0 or np.any(mine != before)


def test_running_statistics_are_those_of_the_training_batches(page, tmp_path, monkeypatch):
    """Two runs whose validation examples differ, and nothing else, leave the same student."""
    monkeypatch.setattr(reporting, "draw", lambda *_: None)
    left = []
    for place, seen in enumerate((X[300:], X[300:][::-1])):
        data = from_arrays(X[:200], Y[:200], test=(X[200:300], Y[200:300]), clean=(seen, Y[300:]), name="mine")
        run = train("cross_entropy", data, student=page["of_nnx"], workdir=tmp_path / str(place), **FEW)
        left.append((run.states[0].student, run.to_frame()["validation_error"].to_numpy()))
    (one, errors), (two, other_errors) = left
    assert np.any(errors != other_errors)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(one.batch_stats["norm/mean"] != 0) and np.all(one.batch_stats["norm/var"] != 1)


class Wide(eqx.Module):
    """Without state, with what is no array and with an array that is not trained."""

    layers: list
    order: jax.Array
    activation: object

    def __init__(self, key):
        self.layers = [eqx.nn.Linear(64, 10, key=key), eqx.nn.Dropout(0.5)]
        self.order = jax.random.permutation(key, 64)
        self.activation = lambda x: x * jax.nn.sigmoid(x)  # another one each time

    def __call__(self, x, key=None):
        return self.layers[0](self.layers[1](self.activation(x.ravel()[self.order]), key=key))


def test_an_equinox_module_draws_by_the_keys_of_its_examples():
    student = from_equinox(Wide, draws=True)
    x, keys = images(0, 6), jax.random.split(KEY, 6)
    variables = student.init(KEY, x)
    assert set(variables["params"]) == {"layers/0/weight", "layers/0/bias"}
    assert variables["batch_stats"]["module/order"].dtype == jnp.int32
    both, stats = student.apply(variables, x, True, keys)
    parts = [student.apply(variables, x[at], True, keys[at])[0] for at in (slice(2), slice(2, 6))]
    np.testing.assert_allclose(both, jnp.concatenate(parts), rtol=1e-5, atol=1e-6)  # however a batch is divided
    assert not np.allclose(both, student.apply(variables, x, True, keys[::-1])[0])
    still, _ = student.apply(variables, x, False)
    np.testing.assert_allclose(still, jax.vmap(eqx.nn.inference_mode(Wide(KEY)))(x), rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, keys):
        return self.last(dropout(x.reshape(len(x), -1), 0.5, keys, 0))


def dropped(x, train, keys):
    return hk.Linear(10)(dropout(x.reshape(len(x), -1), 0.5, keys, 0))


@pytest.mark.parametrize("student", [from_nnx(Dropped, draws=True), from_haiku(dropped, draws=True)], ids=["nnx", "hk"])
def test_others_draw_by_them_too(student, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "draw", lambda *_: None)
    x, keys = images(0, 6), jax.random.split(KEY, 6)
    variables = student.init(KEY, x)
    both = student.apply(variables, x, True, keys)[0]
    assert not np.allclose(both, student.apply(variables, x, True, keys[::-1])[0])
    np.testing.assert_array_equal(student.apply(variables, x, False)[0], student.apply(variables, x, True, None)[0])
    assert train("cross_entropy", "digits", student=student, workdir=tmp_path / "r", **FEW).score is not None


class Stream(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(x)


class Sows(nnx.Module):
    def __init__(self, rngs):
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        self.seen = nnx.Intermediate(x)
        return self.last(x.reshape(len(x), -1))


class Keyword(nnx.Module):
    def __init__(self, *, rngs):
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: from_nnx(Stream), r"Stream holds random numbers of its own \(drop/rngs/count\).*layers.dropout"),
        (
            lambda: from_nnx(Dropped(nnx.Rngs(0))),
            "given an object of type Dropped: give what makes the module, rngs ->",
        ),
        (lambda: from_nnx(Keyword), "no module was made .*takes 1 positional argument.*rngs -> module"),
        (lambda: from_nnx(lambda rngs: jnp.ones(3)), "which is no module that can be called"),
        (lambda: from_nnx(Wide), "from_nnx: no module was made"),
        (lambda: from_nnx("Net"), "given an object of type str"),
        (lambda: from_equinox(Wide(KEY)), "given an object of type Wide: give what makes the module, key ->"),
        (lambda: from_equinox(lambda key: 3), "type int was made, which is no module"),
        (lambda: from_equinox(lambda: 3), "no module was made .*takes 0 positional arguments"),
        (
            lambda: from_haiku(hk.transform(dropped)),
            "type Transformed is no function of .*before hk.transform_with_state",
        ),
    ],
)
def test_what_is_no_module_gets_a_line(make, line):
    with pytest.raises(ValueError, match=line) as error:
        make()
    assert "\n" not in str(error.value)


def closed_over():
    """By hand, around a module that changes itself: the trap of nnx."""
    module = nnx.BatchNorm(64, rngs=nnx.Rngs(0))
    return Student(
        lambda key, x: {"params": {"w": jnp.ones((64, 10))}, "batch_stats": {}},
        lambda variables, x, train: (module(x.reshape(len(x), -1)) @ variables["params"]["w"], {}),
    )


def constant(params, stats=None, outputs=10, after=None):
    given = {"params": params, "batch_stats": stats or {}}
    return Student(
        lambda key, x: given, lambda variables, x, train: (jnp.zeros((len(x), outputs)), after or stats or {})
    )


@pytest.mark.parametrize(
    ("student", "line"),
    [
        (
            lambda: Dropped(nnx.Rngs(0)),
            "student is an object of type Dropped: give a name or a `Student`; from_linen, from",
        ),
        (lambda: Wide(KEY), "student is an object of type Wide"),
        (lambda: dropped, "student is an object of type function"),
        (closed_over, "cannot read its inputs .*BatchStat.*becomes one by from_linen, _nnx, _equinox or _haiku"),
        (lambda: constant(Wide(KEY)), "variables/params/layers/1/p is|variables/params/activation is a function"),
        (
            lambda: constant({"w": jnp.ones(3)}, {"n": jnp.ones(2)}, after={"n": jnp.ones(3)}),
            "its apply changes batch_st",
        ),
        (
            lambda: constant({"w": jnp.ones(3)}, {"n": jnp.ones(2)}, after={"m": jnp.ones(2)}),
            "changes the structure of",
        ),
        (
            lambda: constant({"w": jnp.ones(3)}, outputs=3),
            r"it puts out \[2, 3\], expected 10 numbers, one for each cl",
        ),
        (lambda: Student(lambda key, x: jnp.ones(3), None), 'its init gives no {"params"'),
        (lambda: from_nnx(Sows), r"the call of Sows makes variables \(seen"),
        (
            lambda: from_haiku(lambda x, train: hk.dropout(hk.next_rng_key(), 0.5, x)),
            "pass a non-None PRNGKey",
        ),
    ],
)
def test_a_student_that_does_not_fit_gets_a_line(student, line, tmp_path):
    with pytest.raises(ValueError, match=line) as error:
        train("cross_entropy", "digits", student=student(), workdir=tmp_path / "r", **FEW)
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


@pytest.mark.parametrize(("door", "library"), [(from_equinox, "equinox"), (from_haiku, "haiku")])
def test_a_library_that_is_absent_is_named(door, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match="pip install"):
        door(lambda *_: None)
