"""AUCPR and AUCROC: losses by hand, multipliers that ascend, derivatives of what happens, scores as scikit-learn's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from launching import SMALL, launch
from sklearn.metrics import average_precision_score, roc_auc_score

from experiments import ranking as experiment
from l2t_jax.losses import LOSSES, build_loss
from l2t_jax.losses.ranking import READS, aucpr, pairwise_aucroc
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.runs.records import Metrics
from l2t_jax.students import from_linen
from l2t_jax.tasks import TASKS, evaluate, load
from l2t_jax.tasks.ranking import average_precision, whole
from l2t_jax.types import RoundBatches, Student

C, A, R, ETA = 3, 4, 12, 0.5
RNG = np.random.default_rng(0)
Z, Y = RNG.normal(size=(R, C)), np.arange(R) % C
PARAMS = {"bias": RNG.normal(size=(C, A)), "lambda": RNG.uniform(0.2, 2, (C, A))}
P = np.array([0.2, 0.4, 0.6, 0.8])


def softplus(x):
    return np.log1p(np.exp(x))


def by_hand(z, y, params):
    """The Lagrangian, class by class and anchor by anchor."""
    total = 0.0
    for c in range(C):
        for a, p in enumerate(P):
            multiplier, score, positive = params["lambda"][c, a], z[:, c] + params["bias"][c, a], y == c
            share = positive.mean()
            total += np.mean(np.where(positive, (1 + multiplier * (1 - p)) * softplus(-score), 0))
            total += np.mean(np.where(positive, 0, multiplier * p * softplus(score)))
            total -= multiplier * (1 - p) * share * np.log(2)
    return total * 0.2 / (1 - 0.2) / C


def test_the_lagrangian_by_hand(x64):
    loss = aucpr(num_classes=C, anchors=A)
    values = loss.apply(jax.tree.map(jnp.asarray, PARAMS), jnp.asarray(Z), jnp.asarray(Y))
    assert values.shape == (R,)
    np.testing.assert_allclose(values.mean(), by_hand(Z, Y, PARAMS), rtol=1e-12)
    half = aucpr(num_classes=C, anchors=1 + 1, low=0.5).apply(
        {"bias": jnp.zeros((C, 2)), "lambda": jnp.ones((C, 2))}, jnp.asarray(Z), jnp.asarray(Y)
    )
    assert np.isfinite(half).all()


def test_a_multiplier_is_that_of_the_bound_on_precision(x64):
    """dL/dlambda ~ p FP - (1 - p) TP, of bounds: true positives from below, false positives from above."""
    loss = aucpr(num_classes=C, anchors=A)
    slope = jax.grad(lambda params: jnp.mean(loss.apply(params, jnp.asarray(Z), jnp.asarray(Y))))(
        jax.tree.map(jnp.asarray, PARAMS)
    )["lambda"]
    for c in range(C):
        for a, p in enumerate(P):
            score, positive = Z[:, c] + PARAMS["bias"][c, a], c == Y
            true = np.sum(positive * (1 - softplus(-score) / np.log(2)))
            false = np.sum(~positive * softplus(score) / np.log(2))
            assert true <= np.sum(positive & (score > 0)) and false >= np.sum(~positive & (score > 0))
            expected = 0.25 / C * np.log(2) * (p * false - (1 - p) * true) / R
            np.testing.assert_allclose(slope[c, a], expected, rtol=1e-10)


def training():
    """Two student steps of the toy under AUCPR, as a function of the state's floats."""
    loss = aucpr(num_classes=toy.CLASSES, anchors=A)
    method = fixed_loss(toy.student, toy.task, loss, optax.sgd(ETA))
    state = toy.to_x64(method.init(jax.random.key(0), jnp.zeros((2, 5))))
    return loss, method, state, RoundBatches(toy.batch(1, 1, 2, 6), toy.batch(2, 1, 8), jnp.array(False))


def test_multipliers_ascend_while_student_and_thresholds_descend(x64):
    loss, method, state, batches = training()
    one = batches._replace(train=jax.tree.map(lambda x: x[:, :1], batches.train))
    batch = jax.tree.map(lambda x: x[0, 0], batches.train)

    def value(theta, phi):
        outputs, _ = toy.student.apply(state.student._replace(params=theta).variables, batch.inputs, True)
        return jnp.mean(loss.apply(phi, outputs, batch.targets))

    of_theta, of_phi = jax.grad(value, (0, 1))(state.student.params, state.loss)
    after, _ = method.round(state, one)
    np.testing.assert_allclose(after.loss["bias"], -ETA * of_phi["bias"], rtol=1e-10)
    np.testing.assert_allclose(after.loss["lambda"], 1 + 0.1 * ETA * of_phi["lambda"], rtol=1e-10)
    assert np.ptp(after.loss["lambda"]) > 1e-4
    moved = jax.tree.map(lambda p, g: p - ETA * g, state.student.params, of_theta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), after.student.params, moved)


def test_derivatives_through_training_are_those_of_what_happens(x64):
    """After two steps: multipliers that ascend change the student, and the student the multipliers."""
    _, method, state, batches = training()

    def after(theta, phi):
        begun = state._replace(student=state.student._replace(params=theta), loss=phi)
        ended, _ = method.round(begun, batches)
        return ended.student.params, ended.loss

    at = (state.student.params, state.loss)
    way = toy.to_x64(optax.tree.random_like(jax.random.key(3), at))
    _, exact = jax.jvp(after, at, way)
    there, here = (after(*optax.tree.add_scale(at, h, way)) for h in (1e-5, -1e-5))
    difference = jax.tree.map(lambda a, b: (a - b) / 2e-5, there, here)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), exact, difference)


def test_pairs_by_hand(x64):
    expected = np.zeros(R)
    for i in range(R):
        for j in range(R):
            for c in range(C):
                order = int(Y[i] == c) - int(Y[j] == c)
                expected[i] += abs(order) * softplus(-order * (Z[i, c] - Z[j, c])) / (2 * R * C)
    np.testing.assert_allclose(pairwise_aucroc(jnp.asarray(Z), jnp.asarray(Y)), expected, rtol=1e-10)


@pytest.mark.parametrize("decimals", [0, 1, 9])  # of the first two many scores are equal
def test_average_precision_is_scikit_learns(decimals):
    scores, classes = np.round(RNG.normal(size=(60, 4)), decimals), RNG.integers(0, 3, 60)  # of the last there is none
    found = jax.jit(average_precision)(jnp.asarray(scores, jnp.float32), jnp.asarray(classes))
    expected = [average_precision_score(classes == c, scores[:, c]) for c in range(3)]
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def test_a_student_is_scored_on_the_whole_set():
    digits = load("digits", task="ranking")
    task = TASKS["ranking"].build(digits)
    weights = jnp.asarray(RNG.normal(size=(64, 10)), jnp.float32)
    student = Student(lambda key, x: {}, lambda variables, x, train: (x.reshape(len(x), -1) @ weights, {}))
    test = jax.tree.map(jnp.asarray, digits.test)
    score = evaluate(student, {"params": {}, "batch_stats": {}}, test, task, 50)
    batch = task.gather(digits.test, np.arange(len(digits.test["labels"])), None)
    outputs, labels = np.asarray(batch.inputs.reshape(len(batch.inputs), -1) @ weights), np.asarray(batch.targets)
    each = [average_precision_score(labels == c, outputs[:, c]) for c in range(10)]
    areas = [roc_auc_score(labels == c, outputs[:, c]) for c in range(10)]
    assert score["AUCPR"] == pytest.approx(np.mean(each), abs=1e-5) and score["AUCPR of 3"] == pytest.approx(
        each[3], abs=1e-5
    )
    assert score["AUCROC"] == pytest.approx(np.mean(areas), abs=1e-5)


def test_a_batch_in_two_parts_is_ranked_as_a_whole(x64):
    """Pairs are of the whole batch: two devices take the step of one."""
    method = lambda student, axis: fixed_loss(  # noqa: E731
        student,
        toy.task._replace(views=((READS, lambda z, y: whole(z, y, axis)),)),
        LOSSES["pairwise_aucroc"](),
        optax.sgd(ETA),
        axis_name=axis,
    )
    one, two = method(toy.student, None), method(from_linen(toy.Network("devices")), "devices")
    batches = RoundBatches(toy.batch(1, 1, 2, 6), toy.batch(2, 1, 8), jnp.array(False))
    state = toy.to_x64(one.init(jax.random.key(0), jnp.zeros((2, 5))))
    halves = batches._replace(
        train=jax.tree.map(lambda x: jnp.moveaxis(x.reshape(1, 2, 2, 3, *x.shape[3:]), 2, 0), batches.train),
        validation=jax.tree.map(lambda x: jnp.moveaxis(x.reshape(1, 2, 4, *x.shape[2:]), 1, 0), batches.validation),
    )
    axes = (None, RoundBatches(0, 0, None))
    parts, _ = jax.jit(jax.vmap(two.round, axes, axis_name="devices"))(state, halves)
    together, _ = jax.jit(one.round)(state, batches)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-9, atol=1e-10), parts.student, together.student
    )


def test_the_command_and_that_ala_is_rewarded_by_aucpr(tmp_path):
    run = (f"--workdir={tmp_path}", "--seeds=1", "--imbalance=20", *SMALL, "--unroll_length=1")
    assert launch(experiment, *run, "--method=cross_entropy,aucpr,pairwise_aucroc,ala,l2t_dln") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metric"]["name"] == "AUCPR"
    for method in summary["methods"].values():
        assert method["score"]["mean"] > 0.08 and {"AUCROC", "accuracy", "AUCPR of 9"} <= set(method["scores"])
    rows = [row for row in Metrics.read(tmp_path / "metrics.jsonl") if row["method"] == "ala"]
    assert len(rows) == 2
    for row in rows:
        assert row["window_metric"] == pytest.approx(1 - row["validation_AUCPR"], abs=1e-6)
        assert abs(row["validation_AUCPR"] - row["validation_accuracy"]) > 1e-3


def test_pairs_of_examples_with_weights_are_refused(capsys):
    """On two devices weights would stand beside other rows than their own."""
    assert launch(experiment, "--method=pairwise_aucroc", "--class_weight=balanced", "--seeds=1", "--rounds=1") == 2
    assert (
        "--method=pairwise_aucroc: this loss reads 'batch', and the task offers rows, head" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"anchors": 1}, "anchors=1 is not an integer of at least 2"),
        ({"low": 0.5, "high": 0.5}, "low=0.5, high=0.5 are no range of precision"),
        ({"high": 1.5}, "are no range of precision"),
        ({"dual_rate": -1}, "dual_rate=-1 is out of range"),
        ({"num_classes": 1}, "num_classes=1 is not an integer of at least 2"),
    ],
)
def test_bad_knobs(knobs, match):
    with pytest.raises(ValueError, match=match):
        aucpr(**knobs)


def test_outputs_of_other_classes():
    with pytest.raises(ValueError, match="was built for 4 classes and is given outputs of 3"):
        loss = build_loss("aucpr", 4)
        loss.apply(loss.init(jax.random.key(0)), jnp.zeros((2, 3)), jnp.zeros(2, int))
    with pytest.raises(ValueError, match="outputs"):
        pairwise_aucroc(jnp.zeros(3), jnp.zeros(3, int))
