"""Detection: YOLOv3's terms against darknet's loops, what is taught of them, and runs on drawn shapes.

Run as a program, this file is the command `detection` with its small detector among the students.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import linen as nn
from launching import execute, failing_disk, launch
from lines import prepared
from PIL import Image

from experiments import classification, detection, noisy_labels, segmentation
from experiments._command import start
from l2t_jax.data.drawn import drawn_boxes
from l2t_jax.data.order import Plan
from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.runs import reporting, training
from l2t_jax.runs.streaming import Stream
from l2t_jax.students import STUDENTS, from_linen
from l2t_jax.students.layers import batch_norm
from l2t_jax.tasks import TASKS
from l2t_jax.tasks.boxes import ANCHORS
from l2t_jax.tasks.detection import _dataset, terms
from l2t_jax.types import Batch
from l2t_jax.unroll import init_state, inner_objective, outer_objective, plain_gradient, student_step, unroll

ROOT = Path(__file__).parents[1]
CLASSES, SIZE, N = 3, 64, 2
SGD = optax.sgd(2e-3)


class Peephole(nn.Module):
    """Two maps as of YOLOv3-tiny, of squares of 16 pixels: compiled in a moment, and with BatchNorm."""

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        b, h, w, _ = x.shape
        x = x.reshape(b, h // 16, 16, w // 16, 16, 3).swapaxes(2, 3).reshape(b, h // 16, w // 16, -1)
        x = nn.tanh(batch_norm(train, self.axis_name, "norm")(nn.Dense(6, name="see")(x)))
        coarse = x.reshape(b, h // 32, 2, w // 32, 2, 6).mean((2, 4))
        made = [nn.Dense(3 * (5 + self.num_classes), name=f"out{i}")(y) for i, y in enumerate((coarse, x))]
        return tuple(y.reshape(*y.shape[:3], 3, -1) for y in made)


def peephole(*, num_classes, axis_name=None):
    return from_linen(Peephole(num_classes, axis_name))


def few_shapes(data_dir, download):
    """In place of 500, which take a second to draw and several to score."""
    return _dataset("shapes", drawn_boxes(60, 12), 128)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDENTS, "peephole", peephole)
        patch.setitem(TASKS["detection"].datasets, "shapes", few_shapes)
        yield


# The terms


def overlap(a, b):
    sides = [
        min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2) for i in (0, 1)
    ]
    inner = max(sides[0], 0) * max(sides[1], 0)
    return inner / (a[2] * a[3] + b[2] * b[3] - inner)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bce(logit, target):
    return np.log1p(np.exp(logit)) - target * logit


def darknet(name, maps, truths):
    """The terms of an image, and what darknet takes from its outputs, in the order of its yolo layer.

    Args:
      name: of the anchors.
      maps: [h, w, 3, 5 + C] each.
      truths: (x, y, w, h, class) of each box, in parts of the square.
    """
    sizes, masks = ANCHORS[name]
    values, deltas = np.zeros(3), [np.zeros_like(x) for x in maps]
    for x, delta, mask in zip(maps, deltas, masks, strict=True):
        h, w = x.shape[:2]
        for j, i, a in np.ndindex(h, w, 3):
            tx, ty, tw, th, o = x[j, i, a, :5]
            extent = np.array(sizes[mask[a]]) / SIZE * np.exp([tw, th])
            box = ((i + sigmoid(tx)) / w, (j + sigmoid(ty)) / h, *extent)
            if max([overlap(box, truth) for truth in truths], default=0) <= 0.7:
                delta[j, i, a, 4] = sigmoid(o)
                values[1] += bce(o, 0)
    found = {}  # place -> the box that has it, its anchor, the classes that are right
    for truth in truths:
        shapes = [overlap((0, 0, *truth[2:4]), (0, 0, sx / SIZE, sy / SIZE)) for sx, sy in sizes]
        best = int(np.argmax(shapes))
        for m, mask in enumerate(masks):
            if best in mask:
                h, w = maps[m].shape[:2]
                place = m, min(int(truth[1] * h), h - 1), min(int(truth[0] * w), w - 1), mask.index(best)
                found[place] = truth, sizes[best], found.get(place, (0, 0, set()))[2] | {truth[4]}
    for (m, j, i, a), ((x, y, w, h, _), anchor, kinds) in found.items():
        out, delta = maps[m][j, i, a], deltas[m][j, i, a]
        rows, columns = maps[m].shape[:2]
        if delta[4]:
            values[1] -= bce(out[4], 0)  # the place had been counted as one where nothing is
        values[1] += bce(out[4], 1)
        delta[4] = sigmoid(out[4]) - 1
        right = np.array([kind in kinds for kind in range(CLASSES)], float)
        values[0] += bce(out[5:], right).sum()
        delta[5:] = sigmoid(out[5:]) - right
        scale, at = 2 - w * h, np.array([x * columns - i, y * rows - j])
        wanted = np.log(np.array([w, h]) * SIZE / anchor)
        values[2] += scale * (bce(out[:2], at).sum() + ((out[2:4] - wanted) ** 2).sum() / 2)
        delta[:2], delta[2:4] = scale * (sigmoid(out[:2]) - at), scale * (out[2:4] - wanted)
    return values, deltas, found


def scene(name, seed=0):
    """Outputs and truths of five images, with all that is special in one of them or another."""
    draws, count = np.random.default_rng(seed), len(ANCHORS[name].masks)
    sides = [SIZE // 32 << m for m in range(count)]
    maps = [draws.normal(size=(5, side, side, 3, 5 + CLASSES)) for side in sides]
    small = [0.3, 0.6, 0.4, 0.5]
    truths = [
        [(*draws.uniform(0.2, 0.8, 2), *draws.uniform(0.1, 0.9, 2), k % CLASSES) for k in range(5)],
        [],  # no box at all
        # Of one place and anchor: the last has it, and both classes are right. One of the same class, and a far one.
        [(*small, 0), (0.31, 0.61, 0.41, 0.49, 2), (*small, 2), (0.9, 0.1, 0.9, 0.9, 1)],
        [(1.0, 1.0, 0.3, 0.3, 1), (0.0, 0.5, 0.05, 0.1, 0)],  # centres on the border
        [(0.4, 0.4, 81 / SIZE, 82 / SIZE, 1), (0.6, 0.6, 0.12, 0.15, 0)],
    ]
    for image, of_image in enumerate(truths):  # predictions near a box, in cells that are not its own too
        for x, y, w, h, _ in of_image[:3]:
            for m, mask in enumerate(ANCHORS[name].masks):
                for shift in (-1, 0, 1):
                    column = int(np.clip(int(x * sides[m]) + shift, 0, sides[m] - 1))
                    row = min(int(y * sides[m]), sides[m] - 1)
                    a = int(draws.integers(3))
                    maps[m][image, row, column, a, :2] = [np.clip(4 * (x * sides[m] - column) - 2, -4, 4), 0.1]
                    maps[m][image, row, column, a, 2:4] = np.log(np.array([w, h]) * SIZE / ANCHORS[name].sizes[mask[a]])
    boxes, classes = np.zeros((5, 7, 4)), np.full((5, 7), -1)
    for image, of_image in enumerate(truths):
        for k, truth in enumerate(of_image):
            boxes[image, k], classes[image, k] = truth[:4], truth[4]
    return maps, truths, {"boxes": jnp.asarray(boxes), "classes": jnp.asarray(classes, jnp.int32)}


@pytest.mark.versions
@pytest.mark.parametrize("name", ANCHORS)
def test_terms_and_derivatives_are_those_of_darknet(name, x64):
    maps, truths, targets = scene(name)
    expected, deltas, places = zip(
        *(darknet(name, [x[i] for x in maps], truths[i]) for i in range(len(truths))), strict=True
    )
    outputs = tuple(map(jnp.asarray, maps))
    np.testing.assert_allclose(jax.jit(terms)(outputs, targets), expected, rtol=1e-9, atol=1e-12)
    of_term = lambda k: jax.jit(jax.grad(lambda x: terms(x, targets)[:, k].sum()))(outputs)  # noqa: E731
    found = [of_term(k) for k in range(3)]
    of_terms = (slice(5, None), slice(4, 5), slice(0, 4))
    for m in range(len(maps)):
        wanted = np.stack([delta[m] for delta in deltas])
        for k, channels in enumerate(of_terms):
            alone = np.zeros_like(wanted)
            alone[..., channels] = wanted[..., channels]
            np.testing.assert_allclose(found[k][m], alone, rtol=1e-9, atol=1e-12)
    # All that is special is there.
    ignored = [sum(np.sum(x[..., 4] == 0) for x in delta) for delta in deltas]
    assert sum(ignored) > 0 and not any(map(np.any, [delta[..., :4] for delta in deltas[1]]))
    assert {0, 2} in [kinds for *_, kinds in places[2].values()]
    if name == "yolov3_tiny":  # the anchor of 81 x 82 is of both maps
        assert {place[0] for place in places[4]} == {0, 1} and len(places[4]) == 2  # the small one has none


def test_other_outputs_than_maps_are_refused():
    with pytest.raises(ValueError, match=r"2 or 3 maps \[B, h, w, 3, 5 \+ C\], and this one \[2, 3\]"):
        terms(jnp.zeros((2, 3)), {})


# What is taught


def batches(seed, *shape):
    """Images of noise with two boxes each."""
    draws = np.random.default_rng(seed)
    boxes = np.concatenate([draws.uniform(0.2, 0.8, (*shape, 2, 2)), draws.uniform(0.2, 0.7, (*shape, 2, 2))], -1)
    classes = draws.integers(0, CLASSES, (*shape, 2))
    targets = {"boxes": jnp.asarray(boxes), "classes": jnp.asarray(classes, jnp.int32)}
    return Batch(jnp.asarray(draws.random((*shape, SIZE, SIZE, 3))), targets)


@pytest.fixture(scope="module")
def shapes():
    return _dataset("shapes", drawn_boxes(30, 8), 32)


@pytest.fixture(scope="module")
def task(shapes):
    return TASKS["detection"].build(shapes)


def test_before_anything_is_taught_the_loss_is_that_of_yolov3(task, x64):
    """The first N steps are those of the sum of the terms."""
    student = peephole(num_classes=CLASSES)
    train = batches(0, N, 2)
    after = []
    for name in ("linear_dln", "sum_of_terms"):
        loss = LOSSES[name]()
        state = toy.to_x64(init_state(student.init(jax.random.key(0), train.inputs[0]), SGD))
        step = student_step(plain_gradient(inner_objective(student, task, loss)), SGD)
        after.append(jax.jit(partial(unroll, step))(state, toy.to_x64(loss.init(jax.random.key(1))), train))
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


def slope_of(student, task, phi, state, train, validation):
    """A direction of the loss's parameters, and the derivative along it by central differences of a Python loop.

    Steps are small: what a prediction is ignored by, and which anchor is whose, must not change within them.
    """
    inner = inner_objective(student, task, LOSSES["linear_dln"]())
    outer = outer_objective(student, task)

    @jax.jit
    def error(phi):
        params, optimizer_state, stats = state.params, state.optimizer_state, state.batch_stats
        for i in range(N):
            grads, stats = jax.grad(inner, has_aux=True)(params, stats, phi, jax.tree.map(lambda x, i=i: x[i], train))
            update, optimizer_state = SGD.update(grads, optimizer_state, params)
            params = optax.apply_updates(params, update)
        return outer(params, stats, validation)[0]

    way = {"bias": jnp.array(0.7), "weights": jnp.array([0.5, -1.0, 0.8])}
    moved = lambda h: error(jax.tree.map(lambda p, d: p + h * d, phi, way))  # noqa: E731
    return way, (moved(1e-5) - moved(-1e-5)) / 2e-5


PROBLEM = {}  # of each student, once: the compiled loop of differences serves all modes


@pytest.mark.parametrize(("name", "mode"), [*(("peephole", mode) for mode in MEMORY_MODES), ("yolov3_tiny", "mixed")])
def test_the_hypergradient_of_how_much_terms_count(name, mode, task, x64):
    student = {
        "peephole": lambda: peephole(num_classes=CLASSES),
        "yolov3_tiny": lambda: STUDENTS["yolov3_tiny"](num_classes=CLASSES, width=1, norm="frozen"),
    }[name]()
    train, validation = batches(0, N, 2), batches(1, 3)
    loss = LOSSES["linear_dln"]()
    phi = {"bias": jnp.array(0.1), "weights": jnp.array([1.2, 0.8, 0.9])}
    state = toy.to_x64(init_state(student.init(jax.random.key(0), train.inputs[0]), SGD))
    if name not in PROBLEM:
        PROBLEM[name] = jax.device_get(slope_of(student, task, phi, state, train, validation))
    way, slope = PROBLEM[name]
    inner, outer = inner_objective(student, task, loss), outer_objective(student, task)
    found = jax.jit(hypergradient(inner, outer, SGD, memory=mode))(phi, state, train, validation)
    ours = sum(jnp.vdot(found.gradient[leaf], way[leaf]) for leaf in way)
    assert abs(slope) > 1e-3 and found.gradient["bias"] == 0 and np.all(found.gradient["weights"] != 0)
    np.testing.assert_allclose(ours, slope, rtol=1e-6)


# What is read ahead


class Here:
    """A program whose data lie where they are, and whose process computes all."""

    def data(self, tree):
        return tree

    def part(self, batches):
        return batches

    def owns(self, g):
        return True


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("ended", [False, True])
def test_a_stream_reads_what_its_rounds_ask_for(task, shapes, rows, ended):
    """Each example by the seed of its run, round, part and place, however rounds are divided; one run may have ended.

    What was read ahead is taken, and not read again.
    """
    plan = Plan(
        rounds=9,
        unroll_length=N,
        batch_size=2,
        validation_batch_size=3,
        validation_ratio=0.5,
        examples=shapes.examples,
        stages=2,
    )
    calls = []

    def read(examples, indices, seeds):
        calls.extend(seeds)
        return task.read(examples, indices, seeds)

    stream = Stream(task._replace(read=read), peephole(num_classes=CLASSES), shapes.train, Here())
    asked = [training._dispatch(seed, 4, 0 if ended and seed == 5 else rows, plan, rows) for seed in (5, 8)]
    for ahead in (False, True):
        calls.clear()
        if ahead:
            stream.begin(asked)
        block, given = stream.take(asked)
        of_a_run = rows * (2 * N * 2 + 2 * 3)
        assert len(calls) == of_a_run * (1 if ended else 2)
        for seed, before, dispatch in zip((5, 8), asked, given, strict=True):
            if not int(before.wanted):
                continue
            key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), training.RANDOM_DRAWS)).tolist()
            for part, name in enumerate(("train", "validation")):
                for r in range(rows):
                    indices = plan.indices(seed, 4 + r)[part]
                    seeds = [(*key, 4 + r, part, place) for place in range(indices.size)]
                    expected = task.read(shapes.train, indices.ravel(), seeds)
                    positions = getattr(dispatch, name)[r]
                    assert positions.shape == indices.shape
                    for leaf, values in expected.items():
                        np.testing.assert_array_equal(block[leaf][positions.ravel()], values)
    stream.close()


def test_what_is_drawn_of_an_example_is_its_seeds_alone(task, shapes):
    indices, seeds = np.array([3, 3, 7]), [(0, 1), (0, 2), (0, 1)]
    whole = task.read(shapes.train, indices, seeds)
    alone = task.read(shapes.train, indices[1:2], seeds[1:2])
    for leaf in whole:
        np.testing.assert_array_equal(whole[leaf][1:2], alone[leaf])
    assert np.any(whole["image"][0] != whole["image"][1])


# Runs

FEW = (
    *("--size=96", "--student=peephole", "--rounds=4", "--seeds=2", "--memory=save", "--teacher=adam"),
    *("--student_lr=0.01", "--dln_lr=0.01"),
)
METHODS = ("l2t_dln", "l2t_dln_transfer", "l2rw", "sum_of_terms")


def run(workdir, *arguments):
    return launch(detection, *arguments, f"--workdir={workdir}")


def rows_of(workdir):
    """The metrics by (method, seed), in the order of rounds."""
    found = {}
    for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault((row["method"], row["seed"]), []).append(row)
    return {key: sorted(rows, key=lambda row: row["round"]) for key, rows in found.items()}


def numbers(workdir, name):
    return {key: [row[name] for row in rows] for key, rows in rows_of(workdir).items() if name in rows[0]}


def summary(workdir):
    return json.loads((Path(workdir) / "summary.json").read_text())


def same_rows(workdir, other):
    """That the runs of one are among those of the other, bit for bit."""
    for key, rows in rows_of(workdir).items():
        assert rows == rows_of(other)[key]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three methods of a small detector, in one piece."""
    workdir = tmp_path_factory.mktemp("detection") / "whole"
    assert run(workdir, *FEW, "--method=l2t_dln,l2rw,sum_of_terms") == 0
    return workdir


def test_a_run_says_what_was_measured_and_taught(whole):
    told = summary(whole)
    assert told["metric"] == {"name": "AP50", "unit": "%", "better": "higher"} and told["baseline"] == "sum_of_terms"
    assert set(told["methods"]) == set(METHODS)
    for method in told["methods"].values():
        assert len(method["score"]["per_seed"]) == 2 and {"AP", "AP75", "AR100"} <= set(method["scores"])
        assert all(0 <= score <= 1 for score in method["score"]["per_seed"]) and not method["failed"]
    assert told["methods"]["l2t_dln"]["learned_parameters"]["loss"] == 4
    for key, rows in rows_of(whole).items():
        assert [row["round"] for row in rows] == [0, 1, 2, 3]
        parts = [sum(row[f"validation_{term}_term"] for term in ("class", "confidence", "location")) for row in rows]
        np.testing.assert_allclose(parts, [row["validation_error"] for row in rows], rtol=1e-5)
        assert key[0] in METHODS[:2] or "loss_weights_0" not in rows[0]
    for seed in (0, 1):
        weights = np.array([numbers(whole, f"loss_weights_{i}")[("l2t_dln", seed)] for i in range(3)])
        bias = numbers(whole, "loss_bias")[("l2t_dln", seed)]
        assert np.all(abs(weights[:, -1] - 1) > 1e-4) and np.all(np.array(bias) == 0)
        first = rows_of(whole)[("l2t_dln", seed)][0]["validation_error_stage_one"]
        # Before it is taught, it is the sum of the terms.
        np.testing.assert_allclose(first, numbers(whole, "validation_error")[("sum_of_terms", seed)][0], rtol=1e-6)
    pictures = {path.name for path in (whole / "plots").glob("*.png")}
    assert {"seen.png", "loss.png", "validation_error.png", "validation_location_term.png"} <= pictures


def test_the_command_as_it_stands(small_lstm, tmp_path):
    """Few flags: the data set, N and methods of the task with a learned teacher, and its student, YOLOv3-tiny."""
    flags = ("--rounds=1", "--size=64", "--seeds=1", "--memory=save")
    assert run(tmp_path / "methods", *flags, "--student=peephole") == 0
    assert run(tmp_path / "student", *flags, "--width=2", "--method=sum_of_terms") == 0
    methods, student = summary(tmp_path / "methods"), summary(tmp_path / "student")
    assert (methods["dataset"], methods["unroll_length"], student["student"]) == ("shapes", 2, "yolov3_tiny")
    assert set(methods["methods"]) == {"l2t_dln", "l2t_dln_transfer", "sum_of_terms"}
    for told in (methods, student):
        assert all(0 <= method["score"]["mean"] <= 1 for method in told["methods"].values())


def test_it_resumes_bit_for_bit(whole, tmp_path):
    """Stopped by a failing disk, between rounds and in the next run, and gone on with."""
    arguments = (*FEW, "--method=l2t_dln", "--checkpoint_seconds=0")
    with failing_disk(lambda calls, rows: calls in (2, 9)):
        codes = [run(tmp_path / "again", *arguments, *resume) for resume in ((), ("--resume",), ("--resume",))]
    assert codes == [1, 1, 0]
    same_rows(tmp_path / "again", whole)
    for method, told in summary(tmp_path / "again")["methods"].items():
        assert told["scores"] == summary(whole)["methods"][method]["scores"]


def test_dispatches_change_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "STREAMED_ROUNDS", 3)
    monkeypatch.setattr(training, "SECONDS_PER_DISPATCH", 1e6)
    assert run(tmp_path / "several", *FEW, "--method=sum_of_terms", "--rounds=4") == 0
    same_rows(tmp_path / "several", whole)


def test_a_run_that_has_ended_beside_one_that_goes_on(whole, tmp_path):
    """The first seed ended before the second failed; then both are taken up side by side."""
    arguments = (*FEW, "--method=sum_of_terms", "--checkpoint_seconds=0")
    with failing_disk(lambda calls, rows: (rows[-1]["seed"], rows[-1]["round"]) == (1, 1)):
        assert run(tmp_path / "both", *arguments) == 1
    assert run(tmp_path / "both", *arguments, "--resume", "--seeds_at_once=2") == 0
    for key, rows in rows_of(tmp_path / "both").items():
        errors = [row["validation_error"] for row in rows]
        np.testing.assert_allclose(errors, [row["validation_error"] for row in rows_of(whole)[key]], rtol=2e-5)


def test_on_two_devices_the_numbers_are_the_same(whole, tmp_path):
    arguments = (*FEW, "--method=l2t_dln", f"--workdir={tmp_path}/two", "--devices=2")
    said = execute([sys.executable, __file__, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "Files:" in said.stdout, said.stderr
    for name in ("validation_error", "validation_location_term", "loss_weights_2"):
        for key, values in numbers(tmp_path / "two", name).items():
            np.testing.assert_allclose(values, numbers(whole, name)[key], rtol=2e-4)


def test_settings_can_be_held_out_and_students_scored_as_they_are(tmp_path, monkeypatch, capsys):
    few = (*FEW, "--method=sum_of_terms", "--rounds=0", "--seeds=1")
    sizes, evaluate = [], reporting.evaluate

    def spied(student, variables, data, task):
        sizes.append(len(data["image"]))
        return evaluate(student, variables, data, task)

    monkeypatch.setattr(reporting, "evaluate", spied)
    for name, flags in (("none", ()), ("held", ("--held_out=0.1",))):
        assert run(tmp_path / name, *few, *flags) == 0
        told = summary(tmp_path / name)["methods"]["sum_of_terms"]
        assert told["student_steps"] == 0 and 0 <= told["score"]["mean"] <= 1
    assert sizes == [12, 6] and "held-out AP50" in capsys.readouterr().out


# A folder of one's own


def coco(folder, n=24, tested=4):
    """Drawn images in COCO's layout."""
    drawn = drawn_boxes(n, tested)
    (folder / "annotations").mkdir(parents=True)
    for part, name in ((drawn.train, "train"), (drawn.test, "val")):
        (folder / name).mkdir()
        images, annotations = [], []
        for i, image in enumerate(part["image"]):
            height, width = image.shape[:2]
            Image.fromarray(image).save(folder / name / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
            for (x, y, w, h), kind in zip(part["boxes"][i].tolist(), part["classes"][i].tolist(), strict=True):
                box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
                annotations.append({"id": len(annotations), "image_id": i, "category_id": kind, "bbox": box})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k, "name": name} for k, name in enumerate(drawn.names)],
        }
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return folder


def test_an_image_that_cannot_be_read_in_the_middle_of_a_run(tmp_path, capsys):
    """One line that names it; once it is mended the run goes on, to what it gives in one piece."""
    folder = coco(tmp_path / "data")
    few = (*FEW, f"--dataset={folder}", "--method=sum_of_terms", "--seeds=1", "--checkpoint_seconds=0", "--rounds=5")
    few = (*few, "--validation_batch_size=4")
    plan = Plan(
        rounds=5, unroll_length=2, batch_size=2, validation_batch_size=4, validation_ratio=0.5, examples=24, stages=1
    )
    seen = [set(np.concatenate([np.ravel(x) for x in plan.indices(0, r)]).tolist()) for r in range(5)]
    late = next(i for i in range(2, 23) if i not in seen[0] | seen[1] and any(i in rest for rest in seen[2:]))
    assert run(tmp_path / "whole", *few) == 0
    file = folder / "train" / f"{late}.png"
    content = file.read_bytes()
    file.write_bytes(content[:60] + bytes(len(content) - 60))
    capsys.readouterr()
    assert run(tmp_path / "broken", *few) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "round" not in line and "files go to" not in line]
    assert line.startswith(f"error: {file} cannot be read as an image")
    done = len(rows_of(tmp_path / "broken")[("sum_of_terms", 0)])
    assert 2 <= done < 5  # what was computed before is there
    file.write_bytes(content)
    assert run(tmp_path / "broken", *few, "--resume") == 0
    same_rows(tmp_path / "broken", tmp_path / "whole")
    # Other data are no reason to go on.
    other = folder / "train" / "5.png"
    Image.open(other).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    capsys.readouterr()
    assert run(tmp_path / "broken", *few, "--resume") == 2
    said = capsys.readouterr().err
    assert "dataset_sha256" in said and "Traceback" not in said


# What is refused


REFUSED = [
    (detection, ("--size=100",), "size=100: the coarsest cells are of 32 pixels: use 96 or 128"),
    (detection, ("--crop=97",), "--crop=97 is of classification | segmentation, not of --task=detection"),
    (segmentation, ("--size=64",), "--size=64 is of detection, not of --task=segmentation"),
    (segmentation, ("--crop=100",), "crop=100"),
    (segmentation, ("--task=detection",), "--task=detection is not what experiments.segmentation is for"),
    (classification, ("--size=64",), "--size=64 is of detection"),
    (detection, ("--train=head", "--student=yolov3_tiny"), "train='head' without weights"),
    (detection, ("--labels=some.csv",), "--labels=some.csv: it is of classes of examples, and shapes has none"),
    (detection, ("--clean=some.csv",), "--clean=some.csv: it is of classes of examples, and shapes has none"),
    (detection, ("--class_weight=balanced",), "class weights are of classes of examples, and this data set has none"),
    (detection, ("--method=meta_weight_net",), "--method=meta_weight_net: it is of classes"),
    (detection, ("--method=mae",), "--method=mae: it is of classes"),
    (detection, ("--method=ala",), "--method=ala: it is of classes"),
    (classification, ("--method=sum_of_terms",), "--method=sum_of_terms: "),
    (segmentation, ("--method=sum_of_terms",), "--method=sum_of_terms: "),
    (noisy_labels, ("--task=detection",), "--task=detection is not what experiments.noisy_labels is for"),
    (
        detection,
        ("--student=lenet",),
        "--student=lenet does not fit --task=detection: its students put out 2 or 3 maps",
    ),
    (detection, ("--student=mlp",), "and this one [2, 3]. Students of --task=detection are like yolov3_tiny."),
    (detection, ("--student=pspnet_small",), "Students of --task=detection are like yolov3_tiny."),
    (
        segmentation,
        ("--student=lenet",),
        "its students put out a `Segmented`, logits [B, H, W, C], and this one [2, 4].",
    ),
    (segmentation, ("--student=yolov3_tiny",), "Students of --task=segmentation are like pspnet_small."),
    (classification, ("--student=yolov3_tiny",), "Students of --task=classification are like mlp."),
    (classification, ("--student=pspnet_small",), "Students of --task=classification are like mlp."),
]


@pytest.mark.parametrize(("module", "arguments", "line"), REFUSED)
def test_what_does_not_fit_is_said_in_one_line(module, arguments, line, tmp_path, capsys):
    one_line(module, arguments, line, tmp_path, capsys)


def one_line(module, arguments, line, tmp_path, capsys):
    few = ("--rounds=1", "--seeds=1", "--memory=save", f"--workdir={tmp_path}/refused")
    capsys.readouterr()
    assert launch(module, *few, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and line in said and said.count("\n") == 1 and len(said) < 600, said
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()


def test_images_that_a_detector_fits_and_classes_that_it_does_not_give(tmp_path, capsys):
    """Whatever their size, so that only the outputs tell."""
    for side, student, kind in ((32, "yolov3_tiny", "tuple"), (33, "pspnet_small", "Segmented")):
        x = np.zeros((200, side, side, 3), np.uint8)
        np.savez(tmp_path / f"{side}.npz", x_train=x, y_train=np.arange(200) % 2, x_test=x, y_test=np.arange(200) % 2)
        line = f"--student={student} does not fit --task=classification: outputs are a {kind}: expected an array"
        one_line(classification, (f"--dataset={tmp_path}/{side}.npz", f"--student={student}"), line, tmp_path, capsys)


def weights_of(path, num_classes, width=1):
    """A file as darknet's, of YOLOv3-tiny of so many classes."""
    shapes = jax.eval_shape(
        lambda: STUDENTS["yolov3_tiny"](num_classes=num_classes, width=width).init(
            jax.random.key(0), jnp.zeros((1, 32, 32, 3))
        )
    )
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes))
    head = np.array([0, 2, 0], "<i4").tobytes() + np.array([7], "<u8").tobytes()
    path.write_bytes(head + np.full(int(count), 0.1, "<f4").tobytes())
    return path


def test_weights_that_do_not_fit_are_said_in_one_line(tmp_path, capsys):
    other, good = weights_of(tmp_path / "other.weights", 5), weights_of(tmp_path / "good.weights", 3)
    cut = tmp_path / "cut.weights"
    cut.write_bytes(good.read_bytes()[:-400])
    few = ("--width=1", "--size=32", "--method=sum_of_terms")
    for file, more, line in (
        (other, (), "are of 5 classes and num_classes is 3: draw the head anew with fresh_head=True"),
        (cut, (), str(cut)),
        (good, ("--student=yolov3",), str(good)),
        (good, ("--width=2",), str(good)),
    ):
        one_line(detection, (*few, f"--weights={file}", *more), line, tmp_path, capsys)
    fits = (f"--weights={other}", "--fresh_head", "--train=head", "--rounds=0", "--seeds=1", "--memory=save")
    assert run(tmp_path / "fits", *few, *fits) == 0


def test_folders_with_broken_parts_are_said_in_one_line(tmp_path, capsys):
    annotations = coco(tmp_path / "data", 12, 2) / "annotations" / "instances_train.json"
    content = annotations.read_text()
    broken = json.loads(content)
    broken["annotations"][0]["bbox"] = [1, 2, 3]
    for text, line in (
        (content[:100], "cannot be read as JSON"),
        ("{}", "has no list images"),
        (json.dumps(broken), "expected four numbers"),
    ):
        annotations.write_text(text)
        one_line(detection, (f"--dataset={tmp_path}/data",), line, tmp_path, capsys)
    annotations.write_text(content)
    (tmp_path / "data" / "train" / "0.png").rename(tmp_path / "0.png")
    one_line(detection, (f"--dataset={tmp_path}/data",), "0.png", tmp_path, capsys)
    annotations.unlink()
    one_line(detection, (f"--dataset={tmp_path}/data",), "instances_train*.json is not there", tmp_path, capsys)
    one_line(detection, (f"--dataset={tmp_path}/nowhere",), "nowhere", tmp_path, capsys)


# Real weights


def test_the_published_weights_reach_their_precision(tmp_path):
    """YOLOv3-tiny on 281 images of COCO: an independent implementation has AP 0.201129 and AP50 0.401520."""
    pytest.importorskip("faster_coco_eval")
    data = prepared("coco_mini")
    weights = Path(os.environ.get("L2T_WEIGHTS") or data.parent / "weights") / "yolov3-tiny.weights"
    if not weights.exists():
        pytest.skip(f"needs {weights.name} in {weights.parent}")
    few = ("--dataset=coco_mini", f"--data_dir={data}", f"--weights={weights}", "--method=sum_of_terms", "--rounds=0")
    assert run(tmp_path / "real", *few, "--seeds=1") == 0
    scores = summary(tmp_path / "real")["methods"]["sum_of_terms"]["scores"]
    assert scores["AP"]["mean"] == pytest.approx(0.201129, abs=3e-3)
    assert scores["AP50"]["mean"] == pytest.approx(0.401520, abs=3e-3)


if __name__ == "__main__":
    STUDENTS["peephole"] = peephole
    TASKS["detection"].datasets["shapes"] = few_shapes
    start(detection.main)
