"""Segmentation: the loss over labelled pixels, in pieces, the hypergradient, mIoU, and runs from the command."""

import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import linen as nn
from launching import execute, failing_disk, launch
from PIL import Image

from benchmarks.pixels import temporaries_of
from experiments import compare, segmentation
from experiments._command import start
from l2t_jax import unroll
from l2t_jax.data import Dataset, hold_out
from l2t_jax.data.drawn import drawn_masks
from l2t_jax.data.images import objects
from l2t_jax.data.masks import IGNORED
from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES, build_loss
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods import method_names
from l2t_jax.presets import PRESETS
from l2t_jax.runs import finals
from l2t_jax.runs.config import Config, Options, UsageError
from l2t_jax.runs.records import Metrics
from l2t_jax.runs.setting import build_setting
from l2t_jax.students import STUDENTS, from_linen
from l2t_jax.students.layers import batch_norm
from l2t_jax.tasks import TASKS, evaluate, measure_all, settings_for
from l2t_jax.tasks import segmentation as task_module
from l2t_jax.tasks.segmentation import Pixels, confusion, pixels, predict
from l2t_jax.types import Backbone, Batch, RoundBatches, Segmented, Student
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
    logits = {name: jnp.asarray(rng.normal(size=(images, side, side, CLASSES))) for name in ("logits", "auxiliary")}
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
    ways = jax.tree.map(lambda x: jnp.cos(3 * jnp.arange(x.size)).reshape(x.shape), logits)
    along = lambda found: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, found, ways)))  # noqa: E731
    slope = lambda p, phi: along(jax.grad(inner)(p, phi))  # noqa: E731
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
    in_pieces_of(piece, monkeypatch)
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
    value = derivatives(*jax.tree.map(lambda x: x[without], (logits, batch)), loss, phi)[0]
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


def in_pieces_of(size, monkeypatch):
    """Compute losses of so many predictions at a time."""
    monkeypatch.setattr(unroll, "MANY", size)
    monkeypatch.setattr(unroll, "PIECE", {"cpu": size})


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
    in_pieces_of(piece, monkeypatch)
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
    in_pieces_of(30 * CLASSES, monkeypatch)
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
    """Four hidden layers of a whole image are 160 times its outputs; a piece has its own, however many there are."""
    (one, outputs), (two, _) = mebibytes(1), mebibytes(2)
    piece = 40 * unroll.PIECE["cpu"] * 4 / 2**20  # MiB of a hidden layer
    assert two - one < 4 * outputs and one < 12 * piece + 4 * outputs
    in_pieces_of(2**62, monkeypatch)
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
    for p, t in zip(
        np.concatenate([p.ravel() for p in predicted]), np.concatenate([t.ravel() for t in targets]), strict=True
    ):
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
    predicted[0] = targets[0] % 255
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
    assert {name: score[f"IoU of {name}"] for name in names[:4]} == pytest.approx(
        dict(zip(names, each.values(), strict=False))
    )
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


# It sees the column of a pixel too, so that a mirrored image is another one.
PLACED = Student(
    lambda key, x: {"params": {}, "batch_stats": {}},
    lambda variables, x, train: (
        Segmented(jnp.stack([x[..., 0], x[..., 1] * jnp.arange(x.shape[2]) / 9], -1)),
        {},
    ),
)


def test_scales_and_mirrors_are_averaged(x64):
    """By hand: scaled with corners on corners, seen, scaled back; mirrored, seen, mirrored back."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(1, 17, 17, 3))

    def seen(x):
        logits = np.stack([x[..., 0], x[..., 1] * np.arange(x.shape[2]) / 9], -1)
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


# Runs


def pixelwise(*, num_classes, width=3, axis_name=None):
    return from_linen(PixelWise(num_classes, width, True, axis_name))


def maps_of(variables, x):
    return nn.tanh(x @ variables["params"]["kernel"] + variables["params"]["bias"])


class OnMaps(nn.Module):
    """The rest of a student, and a backbone of fixed numbers where it is not apart."""

    num_classes: int
    width: int
    inside: bool

    @nn.compact
    def __call__(self, x, train):
        x = maps_of(backbone_variables(self.width), x) if self.inside else x
        logits = nn.Dense(self.num_classes, name="output")(x)
        second = nn.Dense(self.num_classes, name="second")(x) if train or self.is_initializing() else ()
        return Segmented(logits, second)


def backbone_variables(width):
    rng = np.random.default_rng(8)
    return {"params": {"kernel": rng.normal(size=(3, width)).astype(np.float32), "bias": np.ones(width, np.float32)}}


def on_maps(*, num_classes, width=6, train="all"):
    if train == "all":  # what is here a constant is never moved
        return from_linen(OnMaps(num_classes, width, True))
    student = from_linen(OnMaps(num_classes, width, False))
    return student._replace(backbone=Backbone(backbone_variables(width), maps_of))


def few(data_dir, download):
    """As shapes is, of fewer and smaller images: nine windows each."""
    drawn = drawn_masks(32, 5)
    for part in (drawn.train, drawn.test):
        for kind, each in part.items():
            part[kind] = objects(x[20 : 75 + i % 5, 20 : 80 - i % 7] for i, x in enumerate(each))
    return task_module._dataset("shapes", drawn, 33)


NEW = (
    (STUDENTS, "pixelwise", pixelwise),
    (STUDENTS, "on_maps", on_maps),
    (TASKS["segmentation"].datasets, "shapes", few),
)
FEW = ("--student=pixelwise", "--crop=33", "--rounds=5", "--memory=save", "--teacher=sgd", "--checkpoint_seconds=0")
RUN = (*FEW, "--seeds=1", "--method=l2t_dln,l2rw,focal")


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        for registry, name, entry in NEW:
            patch.setitem(registry, name, entry)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Several methods in one piece."""
    workdir = tmp_path_factory.mktemp("segmentation") / "run"
    assert launch(segmentation, *RUN, f"--workdir={workdir}") == 0
    return workdir


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def finals_of(workdir, name, seed=0):
    return jax.tree.leaves(finals.load(workdir / "final", name, seed))


def test_a_run_leaves_its_scores_and_a_picture(run):
    found = summary(run)
    assert found["metric"] == {"name": "mIoU", "unit": "%", "better": "higher"}
    assert set(found["methods"]) == {"l2t_dln", "l2t_dln_transfer", "l2rw", "focal"}
    for method in found["methods"].values():
        scores = method["scores"]
        assert {"mIoU", "pixel accuracy", "IoU of background", "IoU of circle"} <= set(scores)
        assert 0 < method["score"]["mean"] < 1 and method["score"] == scores["mIoU"]
        each = [scores[f"IoU of {name}"]["per_seed"][0] for name in ("background", "circle", "square", "triangle")]
        np.testing.assert_allclose(method["score"]["per_seed"][0], np.mean(each), rtol=1e-6)
    with Image.open(run / "plots" / "seen.png") as picture:
        assert min(picture.size) > 500
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 5 and all(0 <= row["validation_pixel_accuracy"] <= 1 for row in rows)


def test_what_a_run_ends_with_can_be_read_and_scored(run):
    """The student of the files, built as about.json says, has the score of the summary."""
    about = finals.read_about(run / "final")
    assert about["task"] == "segmentation" and about["classes"] == ["background", "circle", "square", "triangle"]
    assert about["student"] == {"name": "pixelwise", "knobs": {}, "outputs": CLASSES}
    assert about["inputs"]["shape"] == [33, 33, 3] and about["inputs"]["mean"][0] == 123.675
    loss = finals.build(about["losses"]["l2t_dln"], CLASSES)
    left = finals.load(run / "final", "l2t_dln", 0)
    assert len(jax.tree.leaves(loss.init(jax.random.key(0)))) == len(jax.tree.leaves(left["loss"]))
    data = few(None, False)
    student = STUDENTS[about["student"]["name"]](num_classes=about["student"]["outputs"])
    score = evaluate(student, left["student"], data.test, task_module.segmentation(data, crop=33))
    np.testing.assert_allclose(score["mIoU"], summary(run)["methods"]["l2t_dln"]["score"]["per_seed"][0], rtol=1e-6)


def test_it_resumes_bit_for_bit(run, tmp_path):
    """Stopped after several dispatches by a failing disk, and gone on with, it ends where it ends in one piece."""
    workdir = tmp_path / "again"
    arguments = (*FEW, "--seeds=1", "--method=l2t_dln", f"--workdir={workdir}")

    with failing_disk(lambda calls, rows: calls in (2, 7)):
        assert launch(segmentation, *arguments) == 1
        assert [launch(segmentation, *arguments, "--resume") for _ in range(2)] == [1, 0]
    for name in ("l2t_dln", "l2t_dln_transfer"):
        assert summary(workdir)["methods"][name]["scores"] == summary(run)["methods"][name]["scores"]
        for a, b in zip(finals_of(workdir, name), finals_of(run, name), strict=True):
            np.testing.assert_array_equal(a, b)


def test_on_two_devices_the_numbers_are_the_same(run, tmp_path):
    """Each has another number of labelled pixels."""
    arguments = (*FEW, "--seeds=1", "--method=l2t_dln", f"--workdir={tmp_path}/two", "--devices=2")
    execute([sys.executable, __file__, *arguments], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for name in ("l2t_dln", "l2t_dln_transfer"):
        for a, b in zip(finals_of(tmp_path / "two", name), finals_of(run, name), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_a_part_is_held_out_and_scored(tmp_path):
    """A quarter of the training images, none of them trained on, in the place of the test set."""
    options = ("--method=cross_entropy", "--seeds=1", "--held_out=0.25", "--rounds=1", "--validation_batch_size=4")
    assert launch(segmentation, *FEW, *options, f"--workdir={tmp_path}") == 0
    assert summary(tmp_path)["config"]["held_out"] == 0.25
    data = hold_out(few(None, False), 0.25)
    assert data.examples == 24 and len(data.test["image"]) == 8
    left = finals.load(tmp_path / "final", "cross_entropy", 0)["student"]
    score = evaluate(pixelwise(num_classes=4), left, data.test, task_module.segmentation(data, crop=33))
    np.testing.assert_allclose(score["mIoU"], summary(tmp_path)["methods"]["cross_entropy"]["score"]["mean"], rtol=1e-6)


def test_no_rounds_score_the_student_as_it_begins(tmp_path):
    assert launch(segmentation, *FEW, "--method=l2rw", "--seeds=1", "--rounds=0", f"--workdir={tmp_path}") == 0
    assert (tmp_path / "plots" / "seen.png").is_file()
    assert 0 < summary(tmp_path)["methods"]["l2rw"]["score"]["mean"] < 1


def test_a_backbone_apart_is_one_that_is_frozen_inside(tmp_path):
    """Its maps, once a batch, give the student that has the same numbers as constants."""
    for train in ("head", "all"):
        arguments = (*FEW, "--student=on_maps", f"--train={train}", "--method=meta_weight_net", "--seeds=1")
        assert launch(segmentation, *arguments, f"--workdir={tmp_path / train}") == 0
    name = "meta_weight_net"
    for a, b in zip(*(finals_of(tmp_path / train, name) for train in ("head", "all")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    scores = [summary(tmp_path / train)["methods"][name]["score"]["mean"] for train in ("head", "all")]
    np.testing.assert_allclose(*scores, rtol=1e-3)


def test_scales_and_mirrors_are_flags(tmp_path):
    """They change how a student is scored, and nothing of how it is trained."""
    given = ((), ("--scales=0.75+1", "--mirror"))
    for i, options in enumerate(given):
        arguments = (*FEW, "--method=cross_entropy", "--seeds=1", "--rounds=2", *options)
        assert launch(segmentation, *arguments, f"--workdir={tmp_path}/{i}") == 0
    assert summary(tmp_path / "1")["config"]["task_knobs"] == {"crop": 33, "scales": "0.75+1", "mirror": True}
    for a, b in zip(*(finals_of(tmp_path / str(i), "cross_entropy") for i in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)
    scores = [summary(tmp_path / str(i))["methods"]["cross_entropy"]["score"]["mean"] for i in range(2)]
    assert 0 < abs(scores[0] - scores[1]) < 0.1
    data = few(None, False)
    task = task_module.segmentation(data, crop=33, scales="0.75+1", mirror=True)
    left = finals.load(tmp_path / "1" / "final", "cross_entropy", 0)["student"]
    np.testing.assert_allclose(evaluate(pixelwise(num_classes=4), left, data.test, task)["mIoU"], scores[1], rtol=1e-6)


# What is refused


@pytest.mark.parametrize("name", method_names())
def test_methods_run_on_pixels_or_say_that_they_do_not(name):
    """In a line when they are built; all others trace a whole round."""
    data = few(None, False)
    config = Config(
        dataset="shapes", student="pixelwise", methods=(name,), preset="stable", teacher="sgd", rounds=1,
        memory="save", seeds=(0,), task="segmentation", task_knobs={"crop": 17}, student_knobs={},
        settings=settings_for(TASKS["segmentation"], PRESETS["stable"]),
    )  # fmt: skip
    if name in REFUSED:
        with pytest.raises(UsageError, match=f"^--method={name}: {REFUSED[name]}") as told:
            build_setting(config, Options(workdir=""), data)
        assert "\n" not in str(told.value)
        return
    setting, entries = build_setting(config, Options(workdir=""), data)
    task, plan = setting.parts.task, setting.parts.plan.of(entries[0].method.stages)
    train, validation = plan.indices(0, 0)
    block = task.read(data.train, np.arange(2), None)
    block = jax.tree.map(lambda x: jnp.asarray(x[:, :17, :17]), block)
    method = entries[0].method
    state = jax.eval_shape(method.init, jax.random.key(0), setting.inputs)

    def one_round(state):
        batches = (task.gather(block, jnp.asarray(x % 2), None) for x in (train, validation))
        return method.round(state, RoundBatches(*batches, jnp.array(True)))

    after, metrics = jax.eval_shape(one_round, state)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert {"validation_error", "validation_pixel_accuracy", "finite"} <= metrics.keys()


EXAMPLES = "it is of examples that are classified, and this task's rows are parts of them"
REFUSED = {
    "ala": EXAMPLES,
    **dict.fromkeys(("large_margin_softmax", "deep_interactions"), "this loss reads 'head', and the task offers rows"),
    "pairwise_aucroc": "this loss reads 'batch', and the task offers rows",
    "sum_of_terms": "this loss reads 'terms', and the task offers rows",
    **dict.fromkeys(("triplet", "margin", "nca"), "this loss reads 'embeddings', and the task offers rows"),
}


def voc(folder, n=20, sides=(20, 30)):
    """A folder in VOC's layout with four classes of one's own; all but four images are trained on."""
    for kind in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / kind).mkdir(parents=True)
    rng = np.random.default_rng(9)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(folder / "JPEGImages" / f"{i:02}.png")
        save(folder, i, rng.integers(0, CLASSES, sides))
    (folder / "classes.txt").write_text("ground\na\nb\nc\n")
    for name, which in (("train", range(n - 4)), ("val", range(n - 4, n))):
        lines = "".join(f"{i:02}\n" for i in which)
        (folder / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(lines)
    return folder


def save(folder, i, mask):
    """Uncompressed, so that a mask of other classes has as many bytes."""
    Image.fromarray(np.uint8(mask)).save(folder / "SegmentationClass" / f"{i:02}.png", compress_level=0)


def refused(capsys, *arguments):
    """The one line that a command says."""
    capsys.readouterr()
    code = launch(segmentation, *FEW, "--method=cross_entropy", "--seeds=1", *arguments)
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "Traceback" not in said, said
    return last


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--crop=100",), "error: --crop=100: students halve images three times, keeping corners: use 97 or 105."),
        (("--crop=9",), "crop=9: .*: use 17 or 25."),
        (("--crop=-1",), "--crop=-1"),
        (("--window=50",), "--window=50: .*: use 49 or 57."),
        (("--scales=x",), "scales='x' are none: give positive numbers joined by"),
        (("--scales=1+0",), r"scales='1\+0' are none"),
        (("--size=416",), "--size=416 is of detection, not of --task=segmentation"),
        (("--class_weight=1,1,1,1",), "class weights are of classes of examples"),
        (("--task=classification",), "--task=classification is not what experiments.segmentation is for"),
    ],
)
def test_flags_that_are_refused(options, told, tmp_path, capsys):
    line = refused(capsys, *options, f"--workdir={tmp_path}/r")
    assert re.search(told, line), line


@pytest.mark.parametrize("flag", ["labels", "clean"])
def test_labels_are_of_examples(flag, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", inputs=np.zeros((3, 2)), labels=np.arange(3))
    np.save(tmp_path / "a.npy", np.arange(32) % 4)
    file = tmp_path / ("a.npy" if flag == "labels" else "a.npz")
    assert f"--{flag}={file}: it is of classes of examples, and shapes has none." in refused(
        capsys, f"--{flag}={file}", f"--workdir={tmp_path}/r"
    )


def test_wrong_labels_are_of_examples(tmp_path, capsys):
    code = launch(compare, *FEW, "--task=segmentation", "--table=noisy", f"--workdir={tmp_path}/r")
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said


def test_folders_that_are_refused(tmp_path, capsys):
    folder = voc(tmp_path / "voc")
    arguments = ("--crop=17", f"--dataset={folder}", f"--workdir={tmp_path}/r")
    first = folder / "SegmentationClass" / "00.png"
    kept = first.read_bytes()
    save(folder, 0, np.zeros((20, 31)))
    assert "00.png is 20x31 and its image" in refused(capsys, *arguments)
    save(folder, 0, np.full((20, 30), 7))
    assert "00.png has the class 7: expected 0 to 3, or 255" in refused(capsys, *arguments)
    first.unlink()
    assert "train.txt, line 1: the mask" in refused(capsys, *arguments)
    first.write_bytes(kept)
    assert "16 examples at validation_ratio" in refused(capsys, *arguments, "--batch_size=500")


@pytest.mark.parametrize("kind", ["class", "gone"])
def test_a_mask_that_is_bad_in_the_middle_of_a_run(kind, tmp_path, capsys):
    """Found by a reading thread: a line, exit code 2; mended, the run goes on, bit for bit."""
    folder = voc(tmp_path / "voc")
    arguments = ("--crop=17", "--rounds=6", f"--dataset={folder}")
    assert launch(segmentation, *FEW, *arguments, "--method=focal", "--seeds=1", f"--workdir={tmp_path}/whole") == 0
    bad = folder / "SegmentationClass" / "07.png"
    kept, append = bad.read_bytes(), Metrics.append

    def breaking(self, rows):
        """After the second round."""
        append(self, rows)
        if rows[-1]["round"] == 1:
            save(folder, 7, np.full((20, 30), 9)) if kind == "class" else bad.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "append", breaking)
        line = refused(capsys, *arguments, "--method=focal", f"--workdir={tmp_path}/again")
    assert "07.png" in line and ("has the class 9" if kind == "class" else "is not there") in line
    bad.write_bytes(kept)
    again = (*FEW, *arguments, "--method=focal", "--seeds=1", f"--workdir={tmp_path}/again", "--resume")
    assert launch(segmentation, *again) == 0
    assert len((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()) == 6
    for a, b in zip(*(finals_of(tmp_path / name, "focal") for name in ("again", "whole")), strict=True):
        np.testing.assert_array_equal(a, b)
    # Other data are another run.
    Image.new("RGB", (30, 20)).save(folder / "JPEGImages" / "03.png")
    said = refused(capsys, *arguments, "--method=focal", f"--workdir={tmp_path}/again", "--resume")
    assert "dataset_sha256" in said or "data" in said


def test_images_smaller_than_a_crop_are_padded(tmp_path):
    """Of 12 x 13 pixels: what is around them has no label, and they are scored as large as they are."""
    folder = voc(tmp_path / "voc", sides=(12, 13))
    arguments = ("--crop=17", "--rounds=1", f"--dataset={folder}", "--method=cross_entropy", "--seeds=1")
    assert launch(segmentation, *FEW, *arguments, f"--workdir={tmp_path}/r") == 0
    data = TASKS["segmentation"].open(folder)
    left = finals.load(tmp_path / "r" / "final", "cross_entropy", 0)["student"]
    measured = measure_all(pixelwise(num_classes=4), left, data.test, task_module.segmentation(data, crop=17))
    assert measured["confusion"].sum((1, 2)).tolist() == [12 * 13] * 4


if __name__ == "__main__":
    for registry, name, entry in NEW:
        registry[name] = entry
    start(segmentation.main)
