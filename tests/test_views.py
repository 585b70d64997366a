"""Tasks whose examples have rows: images of 12 pixels in 3 classes, with ignored ones and an auxiliary head."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES, build_loss
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods.common import pull_of
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.tasks import evaluate
from l2t_jax.types import Batch, Errors, Metric, Read, RoundBatches, Student, Task
from l2t_jax.unroll import init_state, inner_objective, outer_objective

PIXELS, CLASSES, IGNORED, AUXILIARY = 12, 3, 255, 0.4
SGD = optax.sgd(0.1)


def two_heads(variables, inputs, train):
    """Pixels [B, 12, 4] to the logits of both heads, [B, 12, 3] each."""
    params = variables["params"]
    hidden = jnp.tanh(inputs @ params["a"])
    return (hidden @ params["b"], hidden @ params["c"]), variables["batch_stats"]


def init(key, inputs):
    a, b, c = jax.random.split(key, 3)
    shapes = {"a": (a, (4, 5)), "b": (b, (5, CLASSES)), "c": (c, (5, CLASSES))}
    return {"params": {n: jax.random.normal(k, s, inputs.dtype) for n, (k, s) in shapes.items()}, "batch_stats": {}}


def pixels(outputs, targets):
    """Rows of an example one after the other: its pixels under the head, then under the auxiliary head."""
    logits = jnp.concatenate(outputs, axis=1)
    labels = jnp.concatenate([targets, targets], axis=1)
    counts = labels != IGNORED
    heads = jnp.repeat(jnp.array([1.0, AUXILIARY], logits.dtype), PIXELS)
    return Read(logits.reshape(-1, CLASSES), jnp.where(counts, labels, 0).ravel(), (counts * heads).ravel())


def pixel_errors(outputs, targets):
    read = pixels(outputs, targets)
    return Errors(optax.softmax_cross_entropy_with_integer_labels(read.outputs, read.targets), read.weight)


STUDENT = Student(init, two_heads)
SEGMENTATION = Task(
    error=pixel_errors,
    metrics=lambda outputs, targets: {},
    gather=lambda data, indices, keys: Batch(data[0][indices], data[1][indices]),
    views=(("rows", pixels),),
    measure=lambda student, variables, batch: {
        "hits": (student.apply(variables, batch.inputs, False)[0][0].argmax(-1) == batch.targets)
        & (batch.targets != IGNORED),
        "pixels": batch.targets != IGNORED,
    },
    score=lambda measured: {"pixel accuracy": float(measured["hits"].sum() / measured["pixels"].sum())},
    metric=Metric("pixel accuracy", "%"),
)


def images(seed, *shape):
    """With a quarter of the pixels ignored, in one example nearly all, and NaN in the inputs of none."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, CLASSES, (*shape, PIXELS))
    labels = np.where(draws.random(labels.shape) < 0.25, IGNORED, labels)
    labels[..., 0, :] = IGNORED
    labels[..., 0, 0] = 1
    return Batch(jnp.asarray(draws.normal(size=(*shape, PIXELS, 4))), jnp.asarray(labels))


def problem():
    loss = LOSSES["dln"](form="paper", squash="softmax")
    train, validation = images(1, 3, 4), images(2, 6)
    state = init_state(STUDENT.init(jax.random.key(0), train.inputs[0]), SGD)
    return loss, toy.to_x64(loss.init(jax.random.key(1))), state, train, validation


@pytest.mark.parametrize("name", [name for name in toy.OF_CLASSES if name != "large_margin_softmax"])
def test_every_loss_of_classes_runs_on_pixels(name, x64):
    """The mean of the losses of labelled pixels, 0.4 of the auxiliary head's; what is ignored has no derivative."""
    loss = build_loss(name, CLASSES)
    params = toy.to_x64(loss.init(jax.random.key(1)))
    batch = images(1, 4)
    variables = STUDENT.init(jax.random.key(0), batch.inputs)
    inner = inner_objective(STUDENT, SEGMENTATION, loss)
    value, _ = inner(variables["params"], {}, params, batch)
    total, weights = 0.0, 0.0
    for head, weight in zip(two_heads(variables, batch.inputs, True)[0], (1, AUXILIARY), strict=True):
        counts = np.asarray(batch.targets != IGNORED)
        each = loss.apply(params, head[counts], batch.targets[counts])
        total, weights = total + weight * each.sum(), weights + weight * counts.sum()
    np.testing.assert_allclose(value, total / weights, rtol=1e-10)
    slope = jax.grad(lambda x: inner(variables["params"], {}, params, batch._replace(inputs=x))[0])(batch.inputs)
    ignored = np.asarray(batch.targets == IGNORED)
    assert not np.any(slope[ignored]) and np.any(slope[~ignored])


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_weights_are_normalised_over_all_devices(mode, x64):
    """Halves with unequal numbers of labelled pixels give the numbers of the whole; a mean of means does not."""
    loss, phi, state, train, validation = problem()

    def compute(axis_name, inside):
        inner = inner_objective(STUDENT, SEGMENTATION, loss, axis_name=inside)
        outer = outer_objective(STUDENT, SEGMENTATION, axis_name=inside)
        return hypergradient(inner, outer, SGD, memory=mode, axis_name=axis_name)

    whole = jax.jit(compute(None, None))(phi, state, train, validation)
    halves = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(3, 2, 2, *x.shape[2:]), 1, 0), train)
    parts = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), validation)

    def split(inside):
        mapped = jax.vmap(compute("d", inside), (None, None, 0, 0), axis_name="d")
        return jax.jit(mapped)(phi, state, halves, parts)

    ours, canary = split("d"), split(None)
    for d in range(2):
        for a, b in zip(jax.tree.leaves(ours.gradient), jax.tree.leaves(whole.gradient), strict=True):
            np.testing.assert_allclose(a[d], b, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(ours.error, [whole.error] * 2, rtol=1e-12)
    assert abs(canary.error[0] - whole.error) > 1e-3


def test_an_example_of_weight_zero_is_not_there(x64):
    """Padding: whatever it holds, the loss, the error and their derivatives are those of the others."""
    loss, phi, state, train, validation = problem()
    filled = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :1]], 1), train)
    padded = filled._replace(weight=jnp.ones((3, 5)).at[:, -1].set(0))
    weighted = validation._replace(weight=jnp.ones(6))
    inner, outer = inner_objective(STUDENT, SEGMENTATION, loss), outer_objective(STUDENT, SEGMENTATION)
    for mode in ("save", "mixed"):
        compute = jax.jit(hypergradient(inner, outer, SGD, memory=mode))
        expected = compute(phi, state, train, weighted)
        found = compute(phi, state, padded, weighted)
        for a, b in zip(jax.tree.leaves(found.gradient), jax.tree.leaves(expected.gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-15)
    broken = padded._replace(inputs=padded.inputs.at[:, -1].set(jnp.nan))  # its loss is NaN, and does not count
    value, _ = inner(state.params, {}, phi, jax.tree.map(lambda x: x[0], broken))
    np.testing.assert_allclose(value, inner(state.params, {}, phi, jax.tree.map(lambda x: x[0], train))[0], rtol=1e-10)


def test_a_whole_set_is_measured_and_then_scored(x64):
    """Hits and pixels of all images are added up: the mean of each image's share would be another number."""
    data = images(3, 10)
    variables = STUDENT.init(jax.random.key(0), data.inputs)
    outputs = np.asarray(two_heads(variables, data.inputs, False)[0][0])
    counts = np.asarray(data.targets != IGNORED)
    hits = (outputs.argmax(-1) == np.asarray(data.targets)) & counts
    for batch_size in (3, 10):
        found = evaluate(STUDENT, variables, (data.inputs, data.targets), SEGMENTATION, batch_size)
        np.testing.assert_allclose(found["pixel accuracy"], hits.sum() / counts.sum(), rtol=1e-12)
    assert abs((hits.sum(1) / counts.sum(1)).mean() - hits.sum() / counts.sum()) > 1e-3


def test_a_round_and_the_pull_of_its_examples(x64):
    """L2T-DLN teaches pixels as it teaches images; an image of one labelled pixel pulls less than the others."""
    loss, _, _, train, validation = problem()
    method = l2t_dln(STUDENT, SEGMENTATION, loss, toy.teacher, SGD, SGD, second_stage="restart")
    state = toy.to_x64(method.init(jax.random.key(0), train.inputs[0]))
    round_data = jax.tree.map(lambda x: x[None], (train, validation))
    after, metrics = jax.jit(method.round)(state, RoundBatches(*round_data, jnp.array(True)))
    assert jnp.isfinite(metrics["validation_error"]) and metrics["dln_update_norm"] > 0
    pull = pull_of(STUDENT, SEGMENTATION, loss, after.student.variables, after.loss, images(1, 4))
    assert pull.shape == (4,) and pull[0] == min(pull)


def test_weights_that_are_not_of_each_row(x64):
    """[R, 1] beside [R] would be broadcast to [R, R] without a word."""
    loss, phi, state, train, validation = problem()
    wide = SEGMENTATION._replace(
        views=(("rows", lambda *x: (read := pixels(*x))._replace(weight=read.weight[:, None])),)
    )
    with pytest.raises(ValueError, match=r"the weights of rows are \[96, 1\]: expected \[96\], one for each row"):
        inner_objective(STUDENT, wide, loss)(state.params, {}, phi, jax.tree.map(lambda x: x[0], train))
    bad = SEGMENTATION._replace(error=lambda *x: (found := pixel_errors(*x))._replace(weight=found.weight[:-1]))
    with pytest.raises(ValueError, match=r"the weights of rows are \[143\]: expected \[144\]"):
        outer_objective(STUDENT, bad)(state.params, {}, validation)


def test_a_view_that_a_task_does_not_offer():
    loss = LOSSES["large_margin_softmax"]()
    with pytest.raises(ValueError, match="this loss reads 'head', and the task offers rows: take another"):
        inner_objective(STUDENT._replace(head=two_heads), SEGMENTATION, loss)
