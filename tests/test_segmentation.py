"""Segmentation: the loss over labelled pixels, in pieces, the hypergradient, mIoU, and runs from the command."""

import json
import math
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import linen as nn
from launching import execute, launch
from PIL import Image

from benchmarks.pixels import temporaries_of
from experiments import compare, segmentation
from experiments._command import start
from l2t_jax import unroll
from l2t_jax.data import Dataset
from l2t_jax.data.drawn import drawn_masks
from l2t_jax.data.images import objects
from l2t_jax.data.masks import IGNORED
from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES, build_loss
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods import METHODS, method_names
from l2t_jax.runs import finals
from l2t_jax.runs.records import Metrics
from l2t_jax.students import STUDENTS, from_linen
from l2t_jax.students.layers import batch_norm
from l2t_jax.tasks import TASKS, evaluate
from l2t_jax.tasks import segmentation as task_module
from l2t_jax.tasks.segmentation import AUXILIARY, Pixels, confusion, pixels, predict
from l2t_jax.types import Backbone, Batch, Read, Segmented, Student
from l2t_jax.unroll import in_pieces, init_state, inner_objective, outer_objective

ROOT = Path(__file__).parents[1]
CLASSES = 4
SGD = optax.sgd(0.1)


class PixelWise(nn.Module):
    """Two heads on one hidden layer of 1x1 convolutions: what is seen of a pixel is that pixel."""

    num_classes: int = CLASSES
    width: int = 3
    norm: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.tanh(nn.Dense(self.width, name="hidden")(x))
        x = batch_norm(train, self.axis_name, "norm")(x) if self.norm else x
        logits = nn.Dense(self.num_classes, name="output")(x)
        second = nn.Dense(self.num_classes, name="second")(x) if train or self.is_initializing() else ()
        return Segmented(logits, second)


# A student whose parameters are what it puts out: a derivative with respect to them is one with respect to logits.
GIVEN = Student(lambda key, inputs: {}, lambda variables, inputs, train: (Segmented(**variables["params"]), {}))


def made(rng, n=6, sides=(17, 26), classes=CLASSES - 1):
    """Images of several sizes, at random; a sixth of the pixels has no label, and the last class never occurs."""
    sizes = [tuple(rng.integers(sides[0], sides[1], 2)) for _ in range(n)]
    masks = [rng.integers(0, classes, size, dtype=np.uint8) for size in sizes]
    for mask in masks:
        mask[rng.random(mask.shape) < 1 / 6] = IGNORED
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return {"image": objects(images), "mask": objects(masks)}


def dataset(crop=17, n=6):
    rng = np.random.default_rng(0)
    names = ("ground", *(f"class {c}" for c in range(1, CLASSES)))
    return Dataset("made", made(rng), made(rng, n), Pixels(names, crop))


TASK = task_module.segmentation(dataset())


def problem(seed=0, images=3, side=5):
    """Logits of both heads, and labels of which some do not count: a different number in each image."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, (images, side, side))
    for i in range(images):
        labels[i][rng.random((side, side)) < 0.2 + 0.6 * i / images] = IGNORED
    logits = {
        name: jnp.asarray(rng.normal(size=(images, side, side, CLASSES))) for name in ("logits", "auxiliary")
    }
    return logits, Batch(jnp.zeros((images, 1)), jnp.asarray(labels))


def taught(form="paper", **knobs):
    loss = build_loss("dln", CLASSES, form=form, squash="softmax", **knobs)
    return loss, toy.to_x64(loss.init(jax.random.key(1)))


# The loss


def written_out(values, logits, labels):
    """mean l(p, y) + 0.4 mean l(aux, y) over the pixels that are labelled."""
    counted = labels != IGNORED
    return sum(
        weight * np.mean(values(np.asarray(logits[head])[counted], labels[counted]))
        for head, weight in (("logits", 1), ("auxiliary", 0.4))
    )


def cross_entropies(p, y):
    return np.log(np.exp(p).sum(-1)) - p[np.arange(len(y)), y]


def dln_values(phi):
    """Every pair (right, wrong) of the probabilities through the network; the mean over all classes."""

    def values(p, y):
        s = np.exp(p) / np.exp(p).sum(-1, keepdims=True)
        total = np.zeros(len(y))
        for j in range(CLASSES):
            x = jnp.stack([s[np.arange(len(y)), y], s[:, j]], -1)
            for layer in phi[:-1]:
                x = x @ layer.kernel + layer.bias
                x = jnp.where(x > 0, x, 0.01 * x)
            total += np.where(y == j, 0, (x @ phi[-1].kernel + phi[-1].bias)[:, 0]) / CLASSES
        return total

    return values


def test_the_loss_is_a_mean_over_labelled_pixels_of_both_heads(x64):
    logits, batch = problem()
    labels = np.asarray(batch.targets)
    plain = inner_objective(GIVEN, TASK, LOSSES["cross_entropy"]())(logits, {}, {}, batch)[0]
    np.testing.assert_allclose(plain, written_out(cross_entropies, logits, labels), rtol=1e-12)
    loss, phi = taught()
    learned = inner_objective(GIVEN, TASK, loss)(logits, {}, phi, batch)[0]
    np.testing.assert_allclose(learned, written_out(dln_values(phi), logits, labels), rtol=1e-10)
    error, metrics = outer_objective(GIVEN, TASK)(logits, {}, batch)
    np.testing.assert_allclose(error, plain, rtol=1e-12)
    counted = labels != IGNORED
    right = (np.asarray(logits["logits"]).argmax(-1) == labels) & counted
    np.testing.assert_allclose(metrics["pixel_accuracy"], np.mean(right.sum((1, 2)) / counted.sum((1, 2))))
    # Without a second head there is no second term.
    one = {"logits": logits["logits"]}
    found = inner_objective(GIVEN, TASK, LOSSES["cross_entropy"]())(one, {}, {}, batch)[0]
    np.testing.assert_allclose(found, cross_entropies(np.asarray(one["logits"])[counted], labels[counted]).mean())


def derivatives(logits, batch, loss, phi):
    """The value, its derivatives with respect to logits and phi, and the mixed second one."""
    inner = lambda p, phi: inner_objective(GIVEN, TASK, loss)(p, {}, phi, batch)[0]  # noqa: E731
    slope = lambda p, phi: sum(jnp.vdot(x, jnp.cos(3 * jnp.arange(x.size)).reshape(x.shape)) for x in jax.tree.leaves(jax.grad(inner)(p, phi)))  # noqa: E731, E501
    outer = lambda p: outer_objective(GIVEN, TASK)(p, {}, batch)[0]  # noqa: E731
    compute = lambda p, phi: (  # noqa: E731
        inner(p, phi),
        jax.grad(inner, argnums=(0, 1))(p, phi),
        jax.grad(slope, argnums=(0, 1))(p, phi),
        jax.value_and_grad(outer)(p),
    )
    return jax.jit(compute)(logits, phi)


@pytest.mark.parametrize("piece", [2**17, 4 * 8 * CLASSES])
def test_what_is_not_labelled_neither_counts_nor_leaks(piece, x64, monkeypatch):
    """NaN there changes no value and no derivative of first or second order; an image without labels is not there."""
    monkeypatch.setattr(unroll, "PIECE", piece)
    logits, batch = problem()
    batch = batch._replace(targets=batch.targets.at[1].set(IGNORED))
    loss, phi = taught()
    broken = jax.tree.map(lambda x: jnp.where((batch.targets == IGNORED)[..., None], jnp.nan, x), logits)
    expected, found = (derivatives(x, batch, loss, phi) for x in (logits, broken))
    # Between its kinks the network is linear, so its biases are in no second derivative.
    kernels = [layer.kernel for layer in expected[2][1]]
    assert all(np.any(leaf) for leaf in jax.tree.leaves((expected[:2], expected[2][0], kernels)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-16), found, expected)
    first = expected[1][0]["auxiliary"]
    assert not np.any(first[np.asarray(batch.targets) == IGNORED]) and np.any(first[0])
    without = np.array([0, 2])
    value = derivatives(jax.tree.map(lambda x: x[without], logits), batch._replace(inputs=jnp.zeros((2, 1)), targets=batch.targets[without]), loss, phi)[0]  # noqa: E501
    np.testing.assert_allclose(expected[0], value, rtol=1e-12)
    nothing = derivatives(logits, batch._replace(targets=jnp.full_like(batch.targets, IGNORED)), loss, phi)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))  # 0, not NaN


def test_halves_of_a_batch_on_two_devices_give_the_mean_of_the_whole(x64):
    """The halves have different numbers of labelled pixels, so a mean of their means is another number."""
    logits, batch = problem(images=4)
    batch = batch._replace(targets=batch.targets.at[3, 1:].set(IGNORED))
    loss, phi = taught()

    def both(axis_name):
        inner, outer = (
            inner_objective(GIVEN, TASK, loss, axis_name=axis_name),
            outer_objective(GIVEN, TASK, axis_name=axis_name),
        )
        return lambda logits, batch: (inner(logits, {}, phi, batch)[0], outer(logits, {}, batch)[0])

    whole = both(None)(logits, batch)
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (logits, batch))
    parts = jax.vmap(both("d"), axis_name="d")(*halves)
    for part, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part.mean(), expected, rtol=1e-12)
    alone = jax.vmap(both(None))(*halves)
    assert abs(alone[0].mean() - whole[0]) > 1e-3
    # A weight of an image is that of its pixels.
    weighted = batch._replace(weight=jnp.array([1.0, 0, 1, 1]))
    three = np.array([0, 2, 3])
    found = both(None)(logits, weighted)
    expected = both(None)(*jax.tree.map(lambda x: x[three], (logits, batch)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# In pieces

# Of rows of 4 classes: 75 pixels of two heads are 150 rows, which 30 divides; of 7 images of 5x5 and one head 175,
# which no number from 9 to 16 divides.
PIECES = {"divided": (3, 30 * CLASSES, True), "padded": (7, 16 * CLASSES, False)}


@pytest.mark.parametrize("kind", PIECES)
def test_pieces_give_the_numbers_of_one(kind, x64, monkeypatch):
    images, piece, two = PIECES[kind]
    logits, batch = problem(1, images)
    logits = logits if two else {"logits": logits["logits"]}
    rows = images * 25 * len(logits)
    most = piece // CLASSES
    assert any(rows % k == 0 for k in range(most, most // 2, -1)) == (kind == "divided")
    loss, phi = taught()
    whole = derivatives(logits, batch, loss, phi)
    read = pixels(Segmented(**logits), batch.targets)
    rng = np.random.default_rng(2)
    given = {"sample_weight": jnp.asarray(rng.random(rows)), "mask": jnp.asarray(rng.random(rows) < 0.7)}
    values = in_pieces(loss, phi, read, **given)
    maps = []
    monkeypatch.setattr(unroll.lax, "map", lambda f, xs, map_=jax.lax.map: maps.append(xs) or map_(f, xs))
    monkeypatch.setattr(unroll, "PIECE", piece)
    apart = derivatives(logits, batch, loss, phi)
    assert maps and {x.shape[:2] for x in jax.tree.leaves(maps)} == {
        (5, 30) if kind == "divided" else (-(-rows // most), most)
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), apart, whole)
    np.testing.assert_allclose(in_pieces(loss, phi, read, **given), values, rtol=1e-12)
    assert np.any(values) and not np.any(values[~np.asarray(given["mask"])])


def instance(norm=True, axis_name=None, side=9):
    """N = 2 steps of two images, three to validate; in float64."""
    student = from_linen(PixelWise(norm=norm, axis_name=axis_name))
    rng = np.random.default_rng(3)

    def batch(*shape):
        labels = rng.integers(0, CLASSES, (*shape, side, side))
        labels[rng.random(labels.shape) < 0.3] = IGNORED
        return Batch(jnp.asarray(rng.normal(size=(*shape, side, side, 3))), jnp.asarray(labels))

    train, validation = batch(2, 2), batch(3)
    return student, init_state(student.init(jax.random.key(0), validation.inputs), SGD), train, validation


def test_pieces_give_the_hypergradient_of_one(x64, monkeypatch):
    """2 x 2 x 81 rows are in pieces of 27, those of validation are not, as cross entropy needs no memory."""
    student, state, train, validation = instance()
    loss, phi = taught()

    def compute():
        inner, outer = inner_objective(student, TASK, loss), outer_objective(student, TASK)
        return jax.jit(hypergradient(inner, outer, SGD, memory="mixed"))(phi, state, train, validation)

    whole = compute()
    monkeypatch.setattr(unroll, "PIECE", 30 * CLASSES)
    for a, b in zip(jax.tree.leaves(compute()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def mebibytes(images, side=129, classes=21):
    """Of the temporaries of the DLN's mixed derivative, and of the outputs of both heads."""
    outputs = Segmented(*(jax.ShapeDtypeStruct((images, side, side, classes), jnp.float32) for _ in range(2)))
    targets = jax.ShapeDtypeStruct((images, side, side), jnp.int32)
    loss = build_loss("dln", classes, residual=True, squash="softmax")
    phi = jax.eval_shape(loss.init, jax.random.key(0))

    def mixed(outputs, phi, targets):
        def mean(outputs, phi):
            read = pixels(outputs, targets)
            return unroll.weighted_mean(unroll.Errors(in_pieces(loss, phi, read), read.weight))

        def slope(outputs, phi):
            return sum(jnp.vdot(x, x) for x in jax.tree.leaves(jax.grad(mean)(outputs, phi)))

        return jax.grad(slope, argnums=1)(outputs, phi)

    compiled = jax.jit(mixed).lower(outputs, phi, targets).compile()
    return temporaries_of(compiled), 2 * images * side**2 * classes * 4 / 2**20


def test_memory_grows_with_the_outputs_and_not_with_the_hidden_layers(monkeypatch):
    """The four hidden layers of a whole image are 160 times its outputs; a piece has its own, however many there are."""
    (one, outputs), (two, _) = mebibytes(1), mebibytes(2)
    piece = 40 * unroll.PIECE * 4 / 2**20  # MiB of a hidden layer
    assert two - one < 4 * outputs and one < 12 * piece
    monkeypatch.setattr(unroll, "PIECE", 2**62)
    whole, _ = mebibytes(1)
    assert whole > 4 * one


# The hypergradient


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_the_hypergradient_is_that_of_differences(mode, x64):
    student, state, train, validation = instance()
    loss, phi = taught()
    inner, outer = inner_objective(student, TASK, loss), outer_objective(student, TASK)

    @jax.jit
    def error(phi):
        params, stats = state.params, state.batch_stats
        for i in range(2):
            grads, stats = jax.grad(inner, has_aux=True)(params, stats, phi, jax.tree.map(lambda x, i=i: x[i], train))
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return outer(params, stats, validation)[0]

    leaves, structure = jax.tree.flatten(phi)
    rng = np.random.default_rng(4)
    way = jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape)) for x in leaves])
    moved = lambda h: error(jax.tree.map(lambda p, d: p + h * d, phi, way))  # noqa: E731
    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    found = jax.jit(hypergradient(inner, outer, SGD, memory=mode))(phi, state, train, validation)
    ours = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(found.gradient), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose(ours, slope, rtol=1e-6)
    np.testing.assert_allclose(found.error, error(phi), rtol=1e-12)


# mIoU


def score_of(predicted, targets, classes=CLASSES):
    """Of every pixel of the set by loops: the IoU of each class that occurs or is predicted, and the share right."""
    both, union, right, count = [0] * classes, [0] * classes, 0, 0
    for p, t in zip(np.concatenate([p.ravel() for p in predicted]), np.concatenate([t.ravel() for t in targets]), strict=True):  # noqa: E501
        if t == IGNORED:
            continue
        count += 1
        right += int(p == t)
        for c in range(classes):
            both[c] += int(p == c and t == c)
            union[c] += int(p == c or t == c)
    each = {c: both[c] / union[c] for c in range(classes) if union[c]}
    return sum(each.values()) / len(each), right / count, each


def test_the_score_is_that_of_loops_and_of_scikit_learn():
    """One class is absent, one is only predicted; most pixels of one image have no label."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(5)
    targets = rng.integers(0, 3, (5, 9, 7))
    targets[rng.random(targets.shape) < 0.2] = IGNORED
    targets[0, 1:] = IGNORED
    predicted = np.where(rng.random(targets.shape) < 0.5, targets % 255, rng.integers(0, 4, targets.shape))
    names = ("ground", "a", "b", "predicted", "absent")
    counts = np.asarray(confusion(jnp.asarray(predicted), jnp.asarray(targets), len(names)))
    assert counts.shape == (5, 5, 5) and counts.dtype == np.int32
    kept = targets != IGNORED
    for found, p, t, k in zip(counts, predicted, targets, kept, strict=True):
        np.testing.assert_array_equal(found, metrics.confusion_matrix(t[k], p[k], labels=range(5)))
    score = task_module._score(names, {"confusion": counts})
    mean, right, each = score_of(predicted, targets, 5)
    np.testing.assert_allclose(score["mIoU"], mean, rtol=1e-12)
    np.testing.assert_allclose(score["pixel accuracy"], right, rtol=1e-12)
    assert {name: score[f"IoU of {name}"] for name in names[:4]} == pytest.approx(dict(zip(names, each.values(), strict=False)))
    assert each[3] == 0 and "IoU of absent" not in score
    theirs = metrics.jaccard_score(targets[kept], predicted[kept], labels=range(4), average="macro")
    np.testing.assert_allclose(score["mIoU"], theirs, rtol=1e-12)
    # Added up over the set: the mean of the scores of each image is another number.
    by_image = [task_module._score(names, {"confusion": counts[i : i + 1]})["mIoU"] for i in range(5)]
    assert abs(np.mean(by_image) - mean) > 0.02
    nothing = task_module._score(names, {"confusion": np.zeros_like(counts)})
    assert nothing == {"mIoU": 0.0, "pixel accuracy": 0.0}


def seen_at_once(data, task_knobs, crop=17):
    """A pixel-wise student that is sure of itself, and its task."""
    task = task_module.segmentation(data, crop=crop, **task_knobs)
    student = from_linen(PixelWise(norm=True))
    variables = student.init(jax.random.key(2), jnp.zeros((2, 17, 17, 3)))
    variables["params"] = jax.tree.map(lambda x: 3 * x, variables["params"])
    return task, student, variables


def test_images_of_all_sizes_score_as_each_alone():
    """On a canvas for all, of which a part belongs to no image, in batches that do and do not divide."""
    data = dataset(n=7)
    task, student, variables = seen_at_once(data, {})
    predicted = []
    for image in data.test["image"]:
        x = (jnp.asarray(image[None], jnp.float32) - jnp.array(data.info.mean)) / jnp.array(data.info.std)
        predicted.append(np.asarray(student.apply(variables, x, False)[0].logits.argmax(-1))[0])
    mean, right, each = score_of(predicted, data.test["mask"])
    assert len(each) == CLASSES and len({mask.shape for mask in data.test["mask"]}) == 7
    scores = [evaluate(student, variables, data.test, task, batch_size) for batch_size in (1, 3, 7, None)]
    assert all(score == scores[0] for score in scores)
    np.testing.assert_allclose(scores[0]["mIoU"], mean, rtol=1e-6)
    np.testing.assert_allclose(scores[0]["pixel accuracy"], right, rtol=1e-6)


@pytest.mark.parametrize("shape", [(17, 17), (17, 33), (41, 26), (9, 30)])
def test_windows_see_what_the_whole_sees(shape, x64):
    """1x1 convolutions see a pixel alike wherever it is; the places that windows do not cover would be seen."""
    _, student, variables = seen_at_once(dataset(), {})
    variables = toy.to_x64(variables)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(2, *shape, 3)))
    whole = jax.nn.softmax(student.apply(variables, x, False)[0].logits)
    np.testing.assert_allclose(predict(student, variables, x, 17), whole, rtol=1e-6)
    begins = [list(task_module._begins(max(17, side), 17)) for side in shape]
    assert len(begins[0]) == 1 + (shape[0] > 17) + (shape[0] > 29) and begins[0][-1] == max(0, shape[0] - 17)


# It sees where a pixel is: its column, as a share of the width.
PLACED = Student(
    lambda key, x: {"params": {}, "batch_stats": {}},
    lambda variables, x, train: (
        Segmented(jnp.stack([x[..., 0], x[..., 1] * jnp.linspace(-1, 1, x.shape[2])], -1)),
        {},
    ),
)


def test_scales_and_mirrors_are_averaged(x64):
    """By hand: scaled with corners on corners, seen, scaled back; mirrored, seen, mirrored back."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(1, 17, 17, 3))

    def seen(x):
        logits = np.stack([x[..., 0], x[..., 1] * np.linspace(-1, 1, x.shape[2])], -1)
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    def resized(x, side):
        """Linearly, one side after the other."""
        for axis in (1, 2):
            at = np.linspace(0, x.shape[axis] - 1, side)
            x = np.apply_along_axis(lambda row, at=at: np.interp(at, np.arange(len(row)), row), axis, x)
        return x

    parts = []
    for scale, side in ((1, 17), (1.2, 25)):  # 1.2 x 17 = 20.4, of which 25 is the next that is 8 k + 1
        scaled = x if scale == 1 else resized(x, side)
        for turn in (1, -1):
            found = seen(scaled[:, :, ::turn])[:, :, ::turn]
            parts.append(found if scale == 1 else resized(found, 17))
    found = predict(PLACED, {"params": {}, "batch_stats": {}}, jnp.asarray(x), 33, (1.0, 1.2), True)
    np.testing.assert_allclose(found, np.mean(parts, axis=0), rtol=1e-6)
    alone = predict(PLACED, {"params": {}, "batch_stats": {}}, jnp.asarray(x), 33)
    assert np.abs(found - alone).max() > 0.01
