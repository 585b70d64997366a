"""Metric learning: losses by loops and by an oracle, hypergradients, batches in blocks, devices, recall@k, runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import linen as nn
from launching import SMALL, failing_disk, launch
from PIL import Image

from experiments import metric_learning
from l2t_jax.data import DataError, Dataset
from l2t_jax.data.augment import resized_crop
from l2t_jax.data.images import objects
from l2t_jax.data.order import Blocks, Plan
from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.losses import embeddings as losses
from l2t_jax.losses.embeddings import SIGNALS, distance_weights, draw_negatives, on_sphere, pairs_of
from l2t_jax.methods import method_names
from l2t_jax.methods.ala import ala, elements
from l2t_jax.presets import PRESETS
from l2t_jax.runs import finals
from l2t_jax.runs.config import Config, Options, UsageError
from l2t_jax.runs.setting import build_setting
from l2t_jax.students import from_linen
from l2t_jax.tasks import TASKS, evaluate, load, settings_for
from l2t_jax.tasks import metric_learning as task_module
from l2t_jax.tasks.metric_learning import Embedded, recalls
from l2t_jax.types import Batch, RoundBatches
from l2t_jax.unroll import init_state, inner_objective, outer_objective

SGD = optax.sgd(0.5)
D, B = 4, 11
LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 0])  # the example of class 3 forms no triplet
FIXED, TAUGHT = ("triplet", "margin", "nca"), tuple(SIGNALS)


def made(n=40, classes=8, features=5, seed=0):
    """Features of classes around a point each: the first half trains."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % classes
    inputs = (rng.normal(size=(classes, features))[labels] + rng.normal(size=(n, features))).astype(np.float32)
    first = labels < classes // 2
    parts = [{"inputs": inputs[part], "labels": labels[part]} for part in (first, ~first)]
    return Dataset("made", *parts, Embedded((0.0,) * features, (1.0,) * features))


TASK = task_module.metric_learning(made(), embedding=D)
CONFIG = Config(
    dataset="made",
    student="mlp",
    methods=("triplet",),
    preset="stable",
    teacher="adam",
    rounds=1,
    memory="save",
    seeds=(0,),
    settings=settings_for(TASKS["metric_learning"], PRESETS["stable"]),
    task="metric_learning",
    student_knobs={"width": 4},
)


def points(seed=0, count=B):
    """Embeddings on the sphere."""
    return on_sphere(jnp.asarray(np.random.default_rng(seed).normal(size=(count, D))))


# Losses


def chances(d, y, dimension=D):
    """The sampler of Wu et al. by loops: the probability of each negative of each anchor."""
    q = np.zeros_like(d)
    for a, n in np.ndindex(*d.shape):
        if y[a] != y[n] and d[a, n] < 1.4:
            near = max(d[a, n], 0.5)
            q[a, n] = 1 / (near ** (dimension - 2) * (1 - near**2 / 4) ** ((dimension - 3) / 2))
    return q / np.maximum(q.sum(1, keepdims=True), 1e-300)


def by_loops(name, x, y, phi, negatives):
    """The mean loss of a batch."""
    d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    count, q = len(y), chances(d, y)
    same = [[p for p in range(count) if y[p] == y[a] and p != a] for a in range(count)]
    other = [[n for n in range(count) if y[n] != y[a]] for a in range(count)]
    anchors = [a for a in range(count) if same[a] and other[a]]
    if name == "nca":
        near = np.exp(-9 * d**2)
        return np.mean([-np.log(near[a, same[a]].sum() / near[a, same[a] + other[a]].sum()) for a in anchors])
    if name == "focal_triplet":
        sharp = np.array([2, 20]) * np.exp(phi["phi"])
        parts = ((1, sharp[0], same), (-1, sharp[1], other))
        return np.mean(
            [sum(np.log(1 + np.exp(s * k * (d[a, j[a]] - 1)).sum()) / k for s, k, j in parts) for a in anchors]
        )
    f = d
    if name.endswith("mixture"):
        known = (d, d**2 / 2, 2 * np.log(1 + d), np.exp(d - 1), 2 * np.sqrt(d))
        f = sum(w * t for w, t in zip(phi["phi"], known, strict=True))
    beta = phi.get("beta", 1.2)
    terms = []  # weight, value
    for a in range(count):
        drawn = {"distance": q[a], "all": np.isin(np.arange(count), other[a]) / max(1, len(other[a]))}
        for p in same[a]:
            if name.startswith("margin"):
                terms.append((1, max(0, 0.2 + f[a, p] - beta)))
            for n in other[a]:
                if name.startswith("margin"):
                    terms.append((drawn[negatives][n], max(0, 0.2 - f[a, n] + beta)))
                    continue
                near = d[a, p] < d[a, n] < d[a, p] + 0.2
                weight = {"semihard": near, "all": 1, "distance": q[a, n]}[negatives]
                terms.append((weight, max(0, f[a, p] - f[a, n] + 0.2)))
    return sum(w * v for w, v in terms) / sum(w for w, v in terms if v > 0)


def parameters(name):
    """Near where they begin, and nowhere on a kink."""
    given = {"focal_triplet": {"phi": [0.3, -0.2]}, "margin": {"beta": 1.15}}
    mixture = {"phi": [0.8, 0.1, 0.05, -0.07, 0.15]}
    given |= {"triplet_mixture": mixture, "margin_mixture": mixture}
    return jax.tree.map(jnp.asarray, given.get(name, {}), is_leaf=lambda x: isinstance(x, list))


KINDS = [
    *((name, kind) for name in ("triplet", "triplet_mixture") for kind in ("semihard", "all", "distance")),
    *((name, kind) for name in ("margin", "margin_mixture") for kind in ("all", "distance")),
    *((name, None) for name in ("nca", "focal_triplet")),
]


def built(name, negatives):
    return LOSSES[name](**({} if negatives is None else {"negatives": negatives}))


def mean_loss(name, negatives, x, y, phi):
    """Of a student whose outputs are its inputs."""
    student = from_linen(Given())
    inner = inner_objective(student, TASK, built(name, negatives))
    return inner({"scale": jnp.ones(())}, {}, phi, Batch(x, jnp.asarray(y)))[0]


class Given(nn.Module):
    """Outputs that are the inputs times a parameter: on the sphere it does not count."""

    @nn.compact
    def __call__(self, x, train):
        return x * self.param("scale", nn.initializers.ones, ())


@pytest.mark.parametrize(("name", "negatives"), KINDS)
def test_losses_are_those_of_loops(name, negatives, x64):
    phi = parameters(name)
    found = mean_loss(name, negatives, 3 * points(), LABELS, phi)
    expected = by_loops(name, np.asarray(points()), LABELS, jax.tree.map(np.asarray, phi), negatives)
    assert expected > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["triplet_mixture", "margin_mixture"])
def test_a_mixture_begins_as_the_fixed_loss(name, x64):
    kind = "semihard" if name == "triplet_mixture" else "distance"
    mixture, fixed = LOSSES[name](), LOSSES[name.removesuffix("_mixture")]()
    values = [loss.apply(loss.init(jax.random.key(0)), points(), LABELS) for loss in (mixture, fixed)]
    np.testing.assert_allclose(*values, rtol=1e-12)
    assert kind in str(LOSSES[name].__kwdefaults__["negatives"])


@pytest.mark.parametrize("name", [*FIXED, *TAUGHT])
def test_a_masked_example_is_in_no_pair(name, x64):
    """NaN in it reaches neither values nor derivatives; the others are as if it were not there."""
    loss, phi = LOSSES[name](), parameters(name)
    kept = np.arange(B) != 4
    broken = points().at[4].set(jnp.nan)
    total = lambda x, mask: loss.apply(phi, x, jnp.asarray(LABELS)[: len(x)], mask=mask).sum()  # noqa: E731
    slope = jax.grad(total)(broken, jnp.asarray(kept))
    assert np.all(np.isfinite(slope)) and not np.any(slope[4]) and np.any(slope[0])
    without = loss.apply(phi, points()[kept], jnp.asarray(LABELS[kept]))
    np.testing.assert_allclose(loss.apply(phi, broken, jnp.asarray(LABELS), mask=jnp.asarray(kept))[kept], without)


@pytest.mark.parametrize("name", [*FIXED, *TAUGHT])
def test_equal_and_vanishing_embeddings_have_finite_derivatives(name):
    """Of first and second order: two equal embeddings, all equal, all 0, and a batch without any triplet."""
    loss, phi = LOSSES[name](), LOSSES[name]().init(jax.random.key(0))
    inner = lambda x, y: jnp.sum(loss.apply(phi, losses.embeddings(x, y).outputs, y))  # noqa: E731
    second = jax.jit(lambda x, y: jax.grad(lambda x: jnp.vdot(jax.grad(inner)(x, y), jnp.cos(x + 1)))(x))
    twice = points().at[1].set(points()[0]).at[3].set(points()[0])
    one_class = jnp.zeros(B, int)
    for x, y in ((twice, LABELS), (jnp.ones((B, D)), LABELS), (jnp.zeros((B, D)), LABELS), (points(), one_class)):
        assert np.all(np.isfinite(inner(x, jnp.asarray(y)))) and np.all(np.isfinite(second(x, jnp.asarray(y))))


def test_the_sampler_draws_what_it_should():
    """Far ones never, near ones as if farther; an anchor without a negative in reach draws none."""
    x = points(3).at[10].set(-points(3)[9])
    pairs = pairs_of(x, LABELS)
    expected = chances(np.asarray(pairs.distances), LABELS)
    q = distance_weights(pairs)
    np.testing.assert_allclose(q, expected, rtol=1e-4, atol=1e-7)
    drawn = np.stack([draw_negatives(key, pairs) for key in jax.random.split(jax.random.key(0), 2000)])
    for a in range(B):
        share = np.bincount(drawn[:, a], minlength=B + 1) / 2000
        np.testing.assert_allclose(share[:B], q[a], atol=4 * 0.5 / np.sqrt(2000))
    far = pairs_of(jnp.array([[1.0, 0], [0.99, 0.1], [-1, 0]]), jnp.array([0, 0, 1]))
    np.testing.assert_array_equal(draw_negatives(jax.random.key(0), far)[:2], [3, 3])


def test_a_step_takes_the_chances_as_given(x64):
    """Its gradient is that with constant chances; with chances that move it would be another."""

    def written(x, held):
        pairs = pairs_of(on_sphere(x), LABELS)
        q = held(distance_weights(pairs))
        near, far = jax.nn.relu(pairs.distances - 1), jax.nn.relu(1.4 - pairs.distances)
        terms = ((pairs.same, near), (pairs.same.sum(1, keepdims=True) * q, far))
        return sum((w * v).sum() for w, v in terms) / sum((w * (v > 0)).sum() for w, v in terms)

    student = from_linen(Given())
    inner = inner_objective(student, TASK, LOSSES["margin"]())
    ours = lambda x: inner({"scale": jnp.ones(())}, {}, {"beta": 1.2}, Batch(x, jnp.asarray(LABELS)))[0]  # noqa: E731
    found, held, moving = (
        jax.grad(f)(points())
        for f in (ours, lambda x: written(x, jax.lax.stop_gradient), lambda x: written(x, lambda q: q))
    )
    np.testing.assert_allclose(found, held, rtol=1e-9, atol=1e-12)
    assert np.abs(found - moving).max() > 1e-3


def test_an_oracle_agrees():
    """pytorch-metric-learning on the same embeddings: triplet, margin and the distances its sampler draws."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    x, y = np.asarray(points(1, 30), np.float32), np.arange(30) % 4
    given = torch.from_numpy(x), torch.from_numpy(y)
    for kind in ("semihard", "all"):
        triplets = miners.TripletMarginMiner(margin=0.2, type_of_triplets=kind)(*given)
        if kind == "all":  # of theirs, those whose loss is not 0
            triplets = None
        expected = theirs.TripletMarginLoss(margin=0.2)(*given, triplets)
        np.testing.assert_allclose(mean_loss("triplet", kind, x, y, {}), float(expected), rtol=1e-4)
    # Theirs adds the means of positives and of negatives that are not 0; every negative once, evenly.
    pairs = pairs_of(jnp.asarray(x), jnp.asarray(y))
    d = np.asarray(pairs.distances)
    near = np.maximum(0, 0.2 + d - 1.2)[np.asarray(pairs.same) > 0]
    far = np.maximum(0, 0.2 - d + 1.2)[np.asarray(pairs.other) > 0]
    anchors, positives, negatives = [], [], []
    for a in range(30):
        for p in np.flatnonzero(np.asarray(pairs.same)[a]):
            for n in np.flatnonzero(np.asarray(pairs.other)[a]):
                anchors.append(a), positives.append(p), negatives.append(n)
    every = tuple(torch.tensor(each) for each in (anchors, positives, negatives))
    expected = theirs.MarginLoss(margin=0.2, nu=0, beta=1.2)(*given, every)
    # As many of each anchor's positives as it has negatives: all alike here but for the sizes of classes.
    weights = np.asarray(pairs.other).sum(1)
    near_weighted = np.repeat(weights, np.asarray(pairs.same).sum(1).astype(int))
    far_weighted = np.repeat(np.asarray(pairs.same).sum(1), weights.astype(int))
    total = (near_weighted * near).sum() + (far_weighted * far).sum()
    count = (near_weighted * (near > 0)).sum() + (far_weighted * (far > 0)).sum()
    np.testing.assert_allclose(total / count, float(expected), rtol=1e-4)
    # The sampler: how often each negative is drawn.
    miner = miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)
    counts = np.zeros((30, 30))
    for seed in range(60):
        torch.manual_seed(seed)
        a, _, n = (np.asarray(index) for index in miner(*given))
        np.add.at(counts, (a, n), 1)
    drawn = counts.sum(1, keepdims=True)
    gap = counts / np.maximum(drawn, 1) - np.asarray(distance_weights(pairs))
    assert drawn.min() > 200 and np.abs(gap).max() < 5 * 0.5 / np.sqrt(drawn.min())


# Hypergradients


class Small(nn.Module):
    """A smooth student."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(D, name="output")(nn.tanh(nn.Dense(3, name="hidden")(x)))


def instance(count=12, steps=3):
    rng = np.random.default_rng(2)
    student = from_linen(Small())
    batch = lambda *shape: Batch(  # noqa: E731
        jnp.asarray(rng.normal(size=(*shape, 5))), jnp.asarray(rng.integers(0, 3, shape))
    )
    train, validation = batch(steps, count), batch(count)
    variables = toy.to_x64(student.init(jax.random.key(0), validation.inputs))
    return student, init_state(variables, SGD), train, validation


TRUE = [*((name, kind) for name, kind in KINDS if name in TAUGHT)]


@pytest.mark.parametrize(("name", "negatives"), TRUE)
def test_hypergradients_are_those_of_differences(name, negatives, x64):
    """In every mode; where negatives are weighted by chance only reverse over reverse is right, and the others refuse.

    The step holds the chances fixed, and yet they are others for another student: a hypergradient without that is off.
    """
    student, state, train, validation = instance()
    loss, phi = built(name, negatives), parameters(name)
    inner, outer = inner_objective(student, TASK, loss), outer_objective(student, TASK)

    @jax.jit
    def error(phi):
        params = state.params
        for i in range(3):
            grads, _ = jax.grad(inner, has_aux=True)(params, {}, phi, jax.tree.map(lambda x, i=i: x[i], train))
            params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        return outer(params, {}, validation)[0]

    found = {}
    for mode in ("save", "remat", "mixed", "nested"):
        compute = jax.jit(hypergradient(inner, outer, SGD, memory=mode))
        if negatives == "distance" and mode in ("mixed", "nested"):
            with pytest.raises(ValueError, match='reverse mode only: use memory="save"'):
                compute(phi, state, train, validation)
            continue
        found[mode] = compute(phi, state, train, validation)
    for leaf, path in zip(jax.tree.leaves(phi), range(9), strict=False):
        for i in range(leaf.size):
            moved = []
            for h in (1e-6, -1e-6):
                leaves = jax.tree.leaves(phi)
                leaves[path] = leaf + h * jnp.eye(leaf.size)[i].reshape(leaf.shape)
                moved.append(error(jax.tree.unflatten(jax.tree.structure(phi), leaves)))
            slope = (moved[0] - moved[1]) / 2e-6
            for mode in found.values():
                ours = jnp.ravel(jax.tree.leaves(mode.gradient)[path])[i]
                np.testing.assert_allclose(ours, slope, rtol=2e-5, atol=1e-9)
    assert np.any(jax.tree.leaves(found["save"].gradient)[-1])


@pytest.mark.parametrize("name", ["triplet_mixture", "margin_mixture", "focal_triplet", "nca"])
def test_halves_of_a_batch_on_two_devices_are_the_whole(name, x64):
    """Values and gradients: pairs are formed over the whole batch, by its embeddings from both."""
    student, state, train, validation = instance()
    batch, phi, loss = jax.tree.map(lambda x: x[0], train), parameters(name), LOSSES[name]()
    both = lambda task, axis: (  # noqa: E731
        inner_objective(student, task, loss, axis_name=axis),
        outer_objective(student, task, axis_name=axis),
    )

    def of(task, axis):
        inner, outer = both(task, axis)

        def compute(params, batch, validation):
            value, slope = jax.value_and_grad(lambda p: inner(p, {}, phi, batch)[0])(params)
            error, down = jax.value_and_grad(lambda p: outer(p, {}, validation)[0])(params)
            return value, slope, error, down

        return compute

    whole = jax.jit(of(TASK, None))(state.params, batch, validation)
    split = task_module.metric_learning(made(), embedding=D, axis_name="d")
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), (batch, validation))
    parts = jax.jit(jax.vmap(of(split, "d"), in_axes=(None, 0, 0), axis_name="d"))(state.params, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.mean(0), b, rtol=1e-10, atol=1e-14), parts, whole)


# Batches


@pytest.mark.parametrize("apart", [False, True])
def test_a_pass_has_every_example_once_in_blocks_of_a_class(apart):
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 9, 200)
    blocks = Blocks(kinds, 4, apart)
    plan = Plan(9, 3, 8, 10, 0.3, 200, 1, blocks=blocks, fixed_split=apart)
    for epoch in (0, 1):
        split = plan.split(5, epoch)
        assert sorted([*split.train, *split.validation]) == list(range(200))
        alone = set(kinds[split.train]) & set(kinds[split.validation])
        assert len(alone) <= 1 if apart else len(alone) == 9
    assert (plan.split(5, 0).train.tolist() == plan.split(5, 1).train.tolist()) == apart
    assert plan.split(5, 0).train.tolist() != plan.split(6, 0).train.tolist()
    steps = 140 // 8
    batches = np.concatenate([plan.indices(5, r)[0][0] for r in range(6)])[:steps]
    assert len(set(batches.ravel())) == batches.size and set(batches.ravel()) <= set(plan.split(5, 0).train)
    pure = [len(set(kinds[block])) == 1 for block in batches.reshape(-1, 4)]
    full = sum(np.bincount(kinds[plan.split(5, 0).train]) // 4)
    assert all(pure[:full]) and not all(pure)
    order = [kinds[block[0]] for block in batches.reshape(-1, 4)[:full]]
    assert order != sorted(order)  # blocks are shuffled
    validation = plan.indices(5, 0)[1][0]
    assert [len(set(kinds[block])) for block in validation[:8].reshape(-1, 4)] == [1, 1]
    with pytest.raises(ValueError, match="batch_size=4 holds one block of 4"):
        Plan(9, 2, 4, 10, 0.3, 200, 1, blocks=blocks)


# The score


def test_recall_is_that_of_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = np.asarray(points(2, 150), np.float64), np.random.default_rng(0).integers(0, 30, 150)
    x, y = x[np.isin(y, np.flatnonzero(np.bincount(y) > 1))], y[np.isin(y, np.flatnonzero(np.bincount(y) > 1))]
    near = neighbors.NearestNeighbors(n_neighbors=101, algorithm="brute").fit(x).kneighbors(x)[1][:, 1:]
    expected = {f"recall@{k}": np.mean((y[near[:, :k]] == y[:, None]).any(1)) for k in (1, 10, 100)}
    assert 0 < expected["recall@1"] < expected["recall@10"] < expected["recall@100"]
    assert recalls(x, y) == pytest.approx(expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_module, "MANY", 700)  # in several pieces
        assert recalls(x, y) == pytest.approx(expected)


def test_ties_are_no_hits():
    y = np.array([0, 0, 1, 1])
    assert recalls(np.ones((4, 2)) / np.sqrt(2), y)["recall@1"] == 0
    assert recalls(np.array([[1, 0], [1, 0], [0, 1], [0, 1.0]]), y)["recall@1"] == 1
    ours = TASK.metrics(jnp.array([[1.0, 0], [1, 0], [0, 1], [1, 0]]), jnp.array([0, 0, 1, 1]))["recall@1"]
    assert ours.tolist() == [0, 0, 0, 0]


def test_a_student_is_scored_on_the_whole_set_whatever_the_batch():
    data, student = made(60), from_linen(Small())
    variables = student.init(jax.random.key(0), jnp.zeros((2, 5)))
    outputs, _ = student.apply(variables, data.test["inputs"], False)
    expected = recalls(np.asarray(on_sphere(outputs)), data.test["labels"])
    for size in (7, 1000):
        assert evaluate(student, variables, data.test, TASK, size) == pytest.approx(expected)
    assert list(expected) == ["recall@1", "recall@10"]  # of 30 examples


# ALA


def policy_method(name, **knobs):
    student, *_ = instance()
    signals, view = SIGNALS[name], dict(TASK.views)["embeddings"]
    of = lambda x, y: signals.of(pairs_of(*view(x, y)[:2]))  # noqa: E731
    moved = elements(LOSSES[name](), of, signals.low, signals.high)
    given = {"window": 3, "steps": 30, "history": 4, "replay": 5, "minibatch": 3} | knobs
    return ala(student, TASK, SGD, moved=moved, **given), moved


def round_of(seed, count=12):
    rng = np.random.default_rng(seed)
    batch = lambda *shape: Batch(  # noqa: E731
        jnp.asarray(rng.normal(size=(*shape, 5)), jnp.float32), jnp.asarray(rng.integers(0, 3, shape))
    )
    return RoundBatches(batch(3, 1, count), batch(3, count), jnp.array(False))


@pytest.mark.parametrize("name", TAUGHT)
def test_ala_moves_phi_and_is_told_of_distances(name):
    method, moved = policy_method(name)
    state = method.init(jax.random.key(0), jnp.zeros((2, 5)))
    run, begun = jax.jit(method.round), state.loss["phi"]
    for r in range(4):
        before = state
        state, metrics = run(state, round_of(r))
        step = np.asarray(state.loss["phi"] - before.loss["phi"]) / 0.1
        assert np.all(np.isclose(step, np.rint(step), atol=1e-4)) and np.all(state.loss["phi"] <= 1)
        assert np.all(state.loss["phi"] >= SIGNALS[name].low)
        assert (r > 0) == bool(np.any(before.carried["replay"].stored < state.carried["replay"].stored))
    assert np.any(state.loss["phi"] != begun) and state.teacher is not None
    assert jax.tree.map(np.shape, state.carried["history"]) == (4, len(begun), 2)
    np.testing.assert_allclose(metrics["validation_recall@1"], np.clip(metrics["validation_recall@1"], 0, 1))
    rest = {key: value for key, value in state.loss.items() if key != "phi"}
    assert rest == {key: value for key, value in before.loss.items() if key != "phi"}
    # What it is told: the means of the last window, of the student that took its steps.
    x, y = points(), jnp.asarray(LABELS)
    told, d = moved.look(x, y)[0], np.sqrt(((points()[:, None] - points()[None]) ** 2).sum(-1))
    same = (LABELS[:, None] == LABELS[None]) & ~np.eye(B, dtype=bool)
    other = LABELS[:, None] != LABELS[None]
    np.testing.assert_allclose(told[0], [d[same].mean(), d[other].mean()], rtol=1e-5)
    second = (
        [d[other].mean(), d[same].mean()]
        if name == "focal_triplet"
        else [(d[k] ** 2 / 2).mean() for k in (same, other)]
    )
    np.testing.assert_allclose(told[1], second, rtol=1e-5)


def test_a_policy_goes_over_to_a_loss_of_another_number_of_parameters():
    method, _ = policy_method("triplet_mixture")
    trained = method.init(jax.random.key(0), jnp.zeros((2, 5))).teacher
    other, _ = policy_method("focal_triplet", learn=False)
    state = other.init(jax.random.key(1), jnp.zeros((2, 5)))._replace(teacher=trained)
    after, _ = jax.jit(other.round)(state, round_of(0))
    after, _ = jax.jit(other.round)(after, round_of(1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), after.teacher, trained))
    assert after.carried["replay"] == ()


def test_ala_refuses_a_loss_without_a_vector():
    with pytest.raises(ValueError, match="ALA moves the elements of a vector"):
        elements(LOSSES["cross_entropy"](), lambda *_: None)
    method = CONFIG.__class__(**{**CONFIG.__dict__, "methods": ("ala",)})
    with pytest.raises(UsageError, match="--method=ala: it teaches triplet_mixture"):
        from l2t_jax.runs.setting import Own

        build_setting(method, Options(""), made(800, 8), Own(loss=LOSSES["triplet_mixture"]()))


# Data


def test_classes_are_divided_and_disjoint():
    data = load("digits", task="metric_learning")
    assert set(data.train["labels"]) == set(range(5)) and set(data.test["labels"]) == set(range(5, 10))
    assert len(data.train["labels"]) + len(data.test["labels"]) == 1797
    assert data.info.mean == pytest.approx((data.train["inputs"].mean(),))


def images(folder, classes, each=3, size=(6, 5), first=0):
    rng = np.random.default_rng(first)
    for c in range(first, first + classes):
        place = folder / f"alphabet{c % 2}" / f"character{c}"
        place.mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(place / f"{i}.png")


def test_a_folder_of_class_folders(tmp_path):
    images(tmp_path / "whole", 5)
    data = load(str(tmp_path / "whole"), task="metric_learning")
    assert data.train["inputs"].shape == (9, 6, 5, 1) and data.test["inputs"].shape == (6, 6, 5, 1)
    assert data.info.names == tuple(f"alphabet0/character{c}" for c in (0, 2, 4))
    assert not set(data.train["labels"]) & set(data.test["labels"])
    images(tmp_path / "both" / "train", 2)
    images(tmp_path / "both" / "test", 3, first=2)
    both = load(str(tmp_path / "both"), task="metric_learning")
    assert len(set(both.train["labels"])) == 2 and len(set(both.test["labels"])) == 3
    task = task_module.metric_learning(data, side=4)
    assert task.gather(data.train, jnp.arange(6).reshape(2, 3), None).inputs.shape == (2, 3, 4, 4, 1)


def test_images_of_all_sizes_are_read_on_the_host(tmp_path):
    """As Stanford Online Products is: cropped at random in training, the same for the same seeds."""
    rng = np.random.default_rng(0)
    sizes = [(20 + i, 30 - i, 3) for i in range(12)]
    pictures = objects([rng.integers(0, 256, size, dtype=np.uint8) for size in sizes])
    labels = np.repeat(np.arange(4, dtype=np.int32), 3)
    parts = [{"image": pictures[part], "labels": labels[part]} for part in (labels < 2, labels > 1)]
    data = Dataset("products", *parts, Embedded((0.0,) * 3, (1.0,) * 3, augment=True, side=8))
    task_module.check(data)
    task = task_module.metric_learning(data, embedding=D)
    seen = [task.read(data.train, np.arange(4), [(i,) for i in range(4)])["inputs"] for _ in range(2)]
    np.testing.assert_array_equal(*seen)
    plain = task.read(data.train, np.arange(4), None)["inputs"]
    assert plain.shape == (4, 8, 8, 3) and np.mean(plain != seen[0]) > 0.5
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    assert abs(resized_crop(ramp, 8, None)[0, :, 0].mean() - 31.5) < 0.6  # the middle
    turned = [resized_crop(ramp, 8, np.random.default_rng(i))[0, :, 0] for i in range(20)]
    assert 3 < sum(row[0] > row[-1] for row in turned) < 17
    student = from_linen(Flat())
    variables = student.init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
    assert set(evaluate(student, variables, data.test, task)) == {"recall@1"}


class Flat(nn.Module):
    """A linear student of images."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(D, name="output")(x.reshape(len(x), -1))


def altered(part, **changes):
    data = made()
    return Dataset(
        "made", **{"train": data.train, "test": data.test, part: getattr(data, part) | changes}, info=data.info
    )


@pytest.mark.parametrize(
    ("part", "labels", "line"),
    [
        ("train", np.zeros(20, np.int32), "made train: there is one class"),
        ("test", np.r_[np.full(19, 4), 5].astype(np.int32), r"made test: class .* has one example \(1 such\)"),
        ("test", np.arange(20, dtype=np.int32) % 4, "trains and tests"),
    ],
)
def test_sets_that_cannot_be_learned_from(part, labels, line):
    with pytest.raises(DataError, match=line) as error:
        task_module.check(altered(part, labels=labels))
    assert "\n" not in str(error.value)


def test_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    images(tmp_path / "one", 1)
    images(tmp_path / "same" / "train", 2)
    images(tmp_path / "same" / "test", 2)
    images(tmp_path / "alone", 4, each=1)
    for name, line in (
        ("empty", "holds no image in class folders"),
        ("one", "there is 1 class: expected at least 4"),
        ("same", "is in train and in test"),
        ("absent/", "is not there"),
    ):
        with pytest.raises(DataError, match=line) as error:
            load(str(tmp_path / name) + ("/" if name.endswith("/") else ""), task="metric_learning")
        assert "\n" not in str(error.value)
    assert launch(metric_learning, f"--dataset={tmp_path / 'alone'}", f"--workdir={tmp_path / 'w'}") == 2


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--embedding=0",), "--embedding=0 is no dimension: give at least 1"),
        (("--per_class=1",), "--per_class=1: a positive needs a second example"),
        (("--batch_size=5",), "batch_size=5 holds one block of 5 examples of a class"),
        (("--validation_batch_size=4",), "validation_batch_size=4 holds one block"),
        (("--loss=cross_entropy",), "--loss=cross_entropy cannot be taught here"),
        (("--validate=some",), "--validate=some: choose examples or classes"),
        (("--side=-1",), "--side=-1 is no size"),
        (("--method=slf",), "--method=slf: it is of classes"),
        (("--method=cross_entropy",), "--method=cross_entropy: it is of classes"),
        (("--class_weight=balanced",), "class weights are of classes of examples"),
        (("--method=triplet", "--set=triplet.negatives=none"), "negatives 'none'"),
        (("--method=triplet", "--set=triplet.margin=0"), "margin=0.0 must lie between 0 and 2"),
        (("--set=margin_mixture.beta=0.6",), "is of margin_mixture, which --loss does not name"),
        (("--loss=margin_mixture", "--set=margin_mixture.margin=0"), "margin=0.0 must lie between 0 and 2"),
        (
            ("--loss=margin_mixture", "--memory=mixed", "--rounds=1", "--seeds=1", "--method=l2t_dln"),
            "differentiated in reverse alone: give memory=save",
        ),
        (("--student=pspnet_small",), "does not fit"),
    ],
)
def test_bad_flags_are_one_line(flags, line, tmp_path, capsys):
    assert launch(metric_learning, *flags, f"--workdir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


# Runs

RUN = (*SMALL, "--seeds=1", "--embedding=3", "--batch_size=20", "--validation_batch_size=20")


def numbers(workdir):
    found = json.loads((workdir / "summary.json").read_text())
    return {name: method["scores"] for name, method in found["methods"].items()}


@pytest.mark.usefixtures("small_lstm")
def test_a_run_from_the_command(tmp_path):
    methods = "--method=l2t_dln,ala,triplet,margin,nca"
    assert launch(metric_learning, *RUN, methods, f"--workdir={tmp_path / 'run'}") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metric"] == {"name": "recall@1", "unit": "%", "better": "higher"}
    assert list(summary["methods"]) == [
        *("l2t_dln", "l2t_dln_transfer", "ala", "ala_transfer", "triplet", "margin", "nca")
    ]
    for method in summary["methods"].values():
        assert 0 < method["score"]["mean"] <= 1 and method["student_steps"] == 4
        assert set(method["scores"]) == {"recall@1", "recall@10", "recall@100"}
    # What was learned is kept under the name of the loss that was moved, and can be built again from there.
    losses = finals.read_about(tmp_path / "run" / "final")["losses"]
    assert losses["ala"] == losses["l2t_dln"] == {"name": "triplet_mixture", "knobs": {}}
    kept = finals.load(tmp_path / "run" / "final", "ala", 0)["loss"]
    begun = finals.build(losses["ala"], 8).init(jax.random.key(0))
    assert jax.tree.map(np.shape, kept) == jax.tree.map(np.shape, begun)
    # A policy that was trained there teaches another loss here, and is not trained.
    source = ("--method=ala", "--loss=focal_triplet", f"--teacher_from={tmp_path / 'run'}")
    assert launch(metric_learning, *RUN, *source, f"--workdir={tmp_path / 'other'}") == 0
    assert list(numbers(tmp_path / "other")) == ["ala_transfer"]


@pytest.mark.usefixtures("small_lstm")
def test_an_interrupted_run_goes_on(tmp_path):
    arguments = (*RUN, "--rounds=3", "--method=ala,margin", "--validate=classes")
    assert launch(metric_learning, *arguments, f"--workdir={tmp_path / 'whole'}") == 0
    with failing_disk(lambda calls, rows: rows[-1]["method"] == "ala" and rows[-1]["round"] == 1):
        assert launch(metric_learning, *arguments, f"--workdir={tmp_path / 'part'}") == 1
    assert launch(metric_learning, *arguments, f"--workdir={tmp_path / 'part'}", "--resume") == 0
    assert numbers(tmp_path / "part") == numbers(tmp_path / "whole")


def test_methods_are_those_of_the_view():
    of_embeddings = method_names(view="embeddings")
    assert {"l2t_dln", "ala", "triplet", "margin", "nca"} <= set(of_embeddings)
    assert not {"cross_entropy", "slf", "sum_of_terms"} & set(of_embeddings)
    assert "triplet" not in method_names(view="terms") and "ala" not in method_names(view="terms")
