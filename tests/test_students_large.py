"""Large students: sizes, each forward pass beside one written by hand, and exact hypergradients."""

import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax import lax
from test_students import images, variables_of

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.students import STUDENTS
from l2t_jax.students.layers import average_pool, average_pool_3x3, drop_path, max_pool_3x3
from l2t_jax.students.nasnet import Cell
from l2t_jax.students.residual import torch_layer
from l2t_jax.types import Batch
from l2t_jax.unroll import init_state, inner_objective, outer_objective

COUNTS = [
    ("wide_resnet", 32, {"num_classes": 10}, 36_479_194),
    ("wide_resnet", 32, {"num_classes": 100}, 36_536_884),
    ("wide_resnet", 32, {"num_classes": 10, "depth": 40}, 55_841_754),
    ("wide_resnet", 32, {"num_classes": 10, "depth": 16, "width": 8}, 10_961_370),
    ("wide_resnet", 32, {"num_classes": 10, "depth": 40, "width": 2}, 2_243_546),
    ("densenet", 32, {"num_classes": 10}, 769_162),
    ("densenet", 32, {"num_classes": 10, "depth": 190, "growth": 40}, 25_624_430),
    ("nasnet", 32, {"num_classes": 10}, 3_346_538),
    ("nasnet", 32, {"num_classes": 100}, 3_415_748),
    ("nasnet", 32, {"num_classes": 10, "cells": 2, "width": 8}, 110_562),
    ("nasnet_mobile", 224, {"num_classes": 1000}, 5_289_978),
    ("resnet18", 224, {"num_classes": 1000}, 11_689_512),
    ("resnet50", 224, {"num_classes": 1000}, 25_557_032),
]
SMALL = {
    "wide_resnet": {"depth": 16, "width": 1},  # a block with a change of shape, and one without, in each stage
    "densenet": {"depth": 16, "growth": 3},
    "nasnet": {"cells": 2, "width": 3},  # odd, so that the halves of a strided shortcut differ
    "nasnet_mobile": {"cells": 1, "width": 4},
    "resnet18": {"width": 2},
    "resnet50": {"width": 1},
}
SIDES = {"nasnet_mobile": 65, "resnet18": 64, "resnet50": 64}  # pixels; of the others 8


@pytest.mark.parametrize(("name", "side", "options", "count"), COUNTS)
def test_parameter_counts(name, side, options, count):
    inputs = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    params = jax.eval_shape(STUDENTS[name](**options).init, jax.random.key(0), inputs)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_the_page_has_the_counts():
    """Of every student in the table, on images of CIFAR, on MNIST's where the table or the student says so."""
    page = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text().partition("## Students of images")[2]
    lines = [line for line in page.partition("\n\n##")[0].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    told = {}
    for names, _, _, counts in rows:
        numbers = [int(count.replace(" ", "")) for count in counts.partition("(")[0].split(",")]
        told |= zip(re.findall(r"`(\w+)`", names), numbers, strict=True)
    assert {"mlp", "densenet", "nasnet_mobile", "resnet50"} <= set(told)
    for name, count in told.items():
        inputs = jnp.zeros((2, 28, 28, 1) if name in ("mlp", "lenet") else (2, 32, 32, 3))
        params = jax.eval_shape(STUDENTS[name](num_classes=10).init, jax.random.key(0), inputs)["params"]
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count, name


def picture(name, dtype=jnp.float32):
    side = SIDES.get(name, 8)
    return images(shape=(4, side, side, 3), dtype=dtype)


class Hand:
    """Layers of NumPy and of XLA's own convolution, in float64; running statistics are kept beside."""

    def __init__(self, variables, train):
        self.params, self.old = variables["params"], variables["batch_stats"]
        self.train, self.stats = train, {}

    def at(self, tree, path):
        for name in path:
            tree = tree[name]
        return tree

    def conv(self, x, *path, stride=1, pad=None, groups=1):
        kernel = self.at(self.params, path)["kernel"]
        pad = pad or [(kernel.shape[0] // 2,) * 2] * 2
        names = ("NHWC", "HWIO", "NHWC")
        return np.asarray(
            lax.conv_general_dilated(x, kernel, (stride,) * 2, pad, dimension_numbers=names, feature_group_count=groups)
        )

    def norm(self, x, *path):
        params, old = self.at(self.params, path), self.at(self.old, path)
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if self.train else (old["mean"], old["var"])
        self.stats[path] = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}
        return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]

    def act(self, x, *path):
        """Normalise and cut off at zero."""
        return np.maximum(self.norm(x, *path), 0)

    def output(self, x, norm="norm"):
        last = self.params["output"]
        return (self.act(x, norm) if norm else x).mean((1, 2)) @ last["kernel"] + last["bias"]

    def wide_resnet(self, x):
        x = self.conv(x, "stem_conv")
        for stage, block in ((s, b) for s in (1, 2, 3) for b in (1, 2)):
            name = f"stage{stage}_block{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            first = self.act(x, name, "norm1")
            y = self.act(self.conv(first, name, "conv1", stride=stride), name, "norm2")
            kept = "shortcut_conv" not in self.params[name]
            assert kept == (block == 2 or stage == 1)
            x = self.conv(y, name, "conv2") + (x if kept else self.conv(first, name, "shortcut_conv", stride=stride))
        return self.output(x)

    def densenet(self, x):
        maps = [self.conv(x, "stem_conv")]
        for block in (1, 2, 3):
            for layer in (1, 2):
                name = f"block{block}_layer{layer}"
                y = self.conv(self.act(np.concatenate(maps, -1), f"{name}_norm1"), f"{name}_conv1")
                maps.append(self.conv(self.act(y, f"{name}_norm2"), f"{name}_conv2"))
            if block < 3:
                y = self.conv(self.act(np.concatenate(maps, -1), f"transition{block}_norm"), f"transition{block}_conv")
                maps = [sum(y[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4]
        return self.output(np.concatenate(maps, -1))

    def resnet(self, x, blocks):
        x = self.act(self.conv(x, "maps", "stem_conv1", stride=2), "maps", "stem_norm1")
        x = np.asarray(
            lax.reduce_window(x, -np.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), *[(1, 1)] * 2, (0, 0)])
        )
        for stage, count in enumerate(blocks, start=1):
            for block in range(1, count + 1):
                at = ("maps", f"stage{stage}_block{block}")
                stride = 2 if stage > 1 and block == 1 else 1
                if "conv3" in self.at(self.params, at):
                    y = self.act(self.conv(x, *at, "conv1"), *at, "norm1")
                    y = self.act(self.conv(y, *at, "conv2", stride=stride), *at, "norm2")
                    y = self.norm(self.conv(y, *at, "conv3"), *at, "norm3")
                else:
                    y = self.act(self.conv(x, *at, "conv1", stride=stride), *at, "norm1")
                    y = self.norm(self.conv(y, *at, "conv2"), *at, "norm2")
                if block == 1 and y.shape != x.shape:
                    x = self.norm(self.conv(x, *at, "shortcut_conv", stride=stride), *at, "shortcut_norm")
                x = np.maximum(x + y, 0)
        return self.output(x, norm=None)

    def resnet18(self, x):
        return self.resnet(x, (2, 2, 2, 2))

    def resnet50(self, x):
        return self.resnet(x, (3, 4, 6, 3))

    def separable(self, x, *path, stride=1):
        for i, step in ((1, stride), (2, 1)):
            y = self.conv(np.maximum(x, 0), *path, f"depthwise_conv{i}", stride=step, pad="SAME", groups=x.shape[-1])
            x = self.norm(self.conv(y, *path, f"conv{i}"), *path, f"norm{i}")
        return x

    def pointwise(self, x, cell, name):
        return self.norm(self.conv(x, cell, f"{name}_conv"), cell, f"{name}_norm")

    def pool(self, x, kind, stride=1):
        how = ((1, 3, 3, 1), (1, stride, stride, 1), "SAME")
        if kind == "max":
            return np.asarray(lax.reduce_window(x, -np.inf, lax.max, *how))
        return np.asarray(
            lax.reduce_window(x, 0.0, lax.add, *how) / lax.reduce_window(np.ones_like(x), 0.0, lax.add, *how)
        )

    def before(self, p, x, cell):
        """The cell before the last one, in the last one's size."""
        if p.shape[1:] == (*x.shape[1:3], self.params[cell]["input_conv"]["kernel"].shape[-1]):
            return p  # in the mobile network of this size, by chance
        p = np.maximum(p, 0)
        if p.shape[1:3] == x.shape[1:3]:
            return self.pointwise(p, cell, "before")
        shifted = np.pad(p, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]
        halves = (self.conv(half[:, ::2, ::2], cell, f"before_conv{i}") for i, half in ((1, p), (2, shifted)))
        return self.norm(np.concatenate(list(halves), -1), cell, "before_norm")

    def normal(self, p, x, cell):
        first, channels = p is None, self.params[cell]["input_conv"]["kernel"].shape[-1]
        h = self.pointwise(np.maximum(x, 0), cell, "input")
        p = x if first else self.before(p, x, cell)
        fit = (lambda y, name: self.pointwise(y, cell, name)) if p.shape[-1] != channels else (lambda y, name: y)
        a = self.separable(h, cell, "sum1_1") + self.separable(p, cell, "sum1_2")
        b = self.separable(p, cell, "sum2_1") + self.separable(p, cell, "sum2_2")
        c = self.pool(h, "average") + fit(np.maximum(p, 0) if first else p, "sum3_2")
        d = fit(self.pool(p, "average"), "sum4_1") + fit(self.pool(p, "average"), "sum4_2")
        e = self.separable(h, cell, "sum5_1") + h
        return np.concatenate([fit(p, "rest"), a, b, c, d, e], -1)

    def reduction(self, p, x, cell):
        h = self.pointwise(np.maximum(x, 0), cell, "input")
        p = x if p is None else self.before(p, x, cell)
        a = self.separable(h, cell, "sum1_1", stride=2) + self.separable(p, cell, "sum1_2", stride=2)
        b = self.pool(h, "max", 2) + self.separable(p, cell, "sum2_2", stride=2)
        c = self.pool(h, "average", 2) + self.separable(p, cell, "sum3_2", stride=2)
        return np.concatenate(
            [b, c, b + self.pool(a, "average"), self.separable(a, cell, "sum5_1") + self.pool(h, "max", 2)], -1
        )

    def nasnet(self, x):
        maps = [None, self.norm(self.conv(x, "stem_conv"), "stem_norm")]
        return self.stacks(maps, 2)

    def nasnet_mobile(self, x):
        maps = [None, self.norm(self.conv(x, "stem_conv", stride=2, pad="VALID"), "stem_norm")]
        for stem in (1, 2):
            maps.append(self.reduction(maps[-2], maps[-1], f"stem_cell{stem}"))
        return self.stacks(maps, 1)

    def stacks(self, maps, cells):
        for stack in (1, 2, 3):
            if stack > 1:
                maps.append(self.reduction(maps[-2], maps[-1], f"reduction{stack - 1}"))
            for cell in range(1, cells + 1):
                maps.append(self.normal(maps[-2], maps[-1], f"stack{stack}_cell{cell}"))
        return self.output(np.maximum(maps[-1], 0), norm=None)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_statistics_are_those_by_hand(name, train, x64):
    student, x = STUDENTS[name](num_classes=3, **SMALL[name]), picture(name, jnp.float64)
    variables = variables_of(student.init, x)
    outputs, stats = jax.jit(partial(student.apply, train=train))(variables, x)
    hand = Hand(variables, train)
    np.testing.assert_allclose(outputs, getattr(hand, name)(np.asarray(x)), rtol=1e-10)
    assert np.std(outputs) > 1e-2
    leaves = jax.tree.leaves(variables["batch_stats"])
    assert len(hand.stats) * 2 == len(leaves)
    for path, expected in hand.stats.items():
        found = hand.at(stats, path)
        for moment in ("mean", "var"):
            np.testing.assert_allclose(
                found[moment], expected[moment] if train else hand.at(hand.old, path)[moment], rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize("name", ["wide_resnet", "densenet"])
def test_the_hypergradient_is_the_slope_of_the_error(name, x64):
    """Through two steps with dropout, against differences: the draws are of the batch, so they stay the same."""
    draws, student = np.random.default_rng(0), STUDENTS[name](num_classes=3, **SMALL[name] | {"depth": 10}, dropout=0.3)
    train = Batch(
        jnp.asarray(draws.normal(size=(2, 6, 8, 8, 2))),
        jnp.asarray(draws.integers(0, 3, (2, 6)), jnp.int32),
        key=jax.random.split(jax.random.key(0), (2, 6)),
    )
    validation = Batch(jnp.asarray(draws.normal(size=(5, 8, 8, 2))), jnp.asarray(draws.integers(0, 3, 5), jnp.int32))
    loss, sgd = LOSSES["dln"](squash="softmax"), optax.sgd(0.1, momentum=0.9)
    state = init_state(variables_of(student.init, train.inputs[0]), sgd)
    phi = toy.to_x64(loss.init(jax.random.key(1)))
    compute = jax.jit(
        hypergradient(inner_objective(student, toy.task, loss), outer_objective(student, toy.task), sgd, memory="save")
    )
    way = jax.tree.map(lambda leaf: jnp.asarray(draws.normal(size=leaf.shape)), phi)
    found = optax.tree.vdot(compute(phi, state, train, validation).gradient, way)
    errors = [compute(optax.tree.add_scale(phi, step, way), state, train, validation).error for step in (1e-7, -1e-7)]
    slope = (errors[0] - errors[1]) / 2e-7
    assert abs(slope) > 1e-4
    np.testing.assert_allclose(found, slope, rtol=1e-6)
    other = compute(phi, state, train._replace(key=jax.random.split(jax.random.key(1), (2, 6))), validation)
    assert abs(other.error - errors[0]) > 1e-4  # it does draw


@pytest.mark.parametrize(("name", "count"), [("wide_resnet", 6), ("densenet", 14)])
def test_each_dropout_draws_for_itself(name, count, monkeypatch):
    """One between a block's convolutions; one after each of a layer's and a transition's."""
    places, module = [], sys.modules[f"l2t_jax.students.{name}"]
    monkeypatch.setattr(module, "dropout", lambda x, rate, keys, place: places.append((rate, place)) or x)
    student, x = STUDENTS[name](num_classes=3, **SMALL[name], dropout=0.3), images()
    variables = jax.eval_shape(student.init, jax.random.key(0), x)
    places.clear()
    jax.eval_shape(partial(student.apply, train=True), variables, x, keys=jax.random.split(jax.random.key(0), 4))
    assert len(places) == len(set(places)) == count and {rate for rate, _ in places} == {0.3}


DEPTHS = [
    ({"depth": 12}, r"depth=12 is not 6n \+ 4: use 10, 16, 22, 28, 34, \.\.\."),
    ({"depth": 4}, "depth=4"),
    ({"depth": 16.0}, "depth=16.0"),
    ({"dropout": 1.0}, "dropout=1.0 is no probability below 1"),
    ({"dropout": float("nan")}, "dropout=nan"),
]
CELLS = [
    ({"cells": 0}, "cells=0 is not a positive integer"),
    ({"drop_path": -0.1}, "drop_path=-0.1 is no probability"),
    ({"width": 0}, "width=0 is not"),
]
WRONG = [
    *(("wide_resnet", *case) for case in (*DEPTHS, ({"width": 0}, "=0 is not a positive integer"))),
    *(("densenet", *case) for case in (*DEPTHS, ({"growth": 0}, "=0 is not a positive integer"))),
    *((name, *case) for name in ("nasnet", "nasnet_mobile") for case in CELLS),
    ("nasnet_mobile", {"width": 6}, "width=6 is not a multiple of 4: .* use 8"),
    ("resnet50", {"width": 0}, "width=0 is not"),
    ("resnet50", {"weights": "none.pth"}, "weights=none.pth: there is no such file"),
]


@pytest.mark.parametrize(("name", "options", "told"), WRONG)
def test_sizes_that_are_none_are_told(name, options, told):
    with pytest.raises(ValueError, match=told):
        STUDENTS[name](num_classes=10, **options)


@pytest.mark.parametrize("length", [1, 2, 7, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_pools_are_those_of_xla(stride, length):
    x = -1 - abs(images(shape=(2, length, 5, 3)))  # a zero outside would win
    hand, how = Hand({"params": {}, "batch_stats": {}}, False), {"stride": stride}
    np.testing.assert_array_equal(max_pool_3x3(x, **how, same=True), hand.pool(x, "max", **how))
    np.testing.assert_allclose(average_pool_3x3(x, **how), hand.pool(x, "average", **how), rtol=1e-6)


def test_drop_path_leaves_an_example_out_as_a_whole():
    x = 1 + abs(images(shape=(400, 3, 3, 2)))
    keys = jax.random.split(jax.random.key(0), 400)
    y = drop_path(x, 0.25, keys, 1)
    kept = np.asarray(y[:, 0, 0, 0] != 0)
    np.testing.assert_allclose(y, np.where(kept[:, None, None, None], x / 0.75, 0), rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.07  # three deviations
    assert (kept != np.asarray(drop_path(x, 0.25, keys, 2)[:, 0, 0, 0] != 0)).any()
    np.testing.assert_array_equal(drop_path(x[7:9], 0.25, keys[7:9], 1), y[7:9])  # however a batch is divided
    for off in (drop_path(x, 0.0, keys, 1), drop_path(x, 0.25, None, 1)):
        np.testing.assert_array_equal(off, x)


def test_deeper_cells_leave_out_more(monkeypatch):
    """Eight operations of a normal cell and nine of a reduction cell, the last with the rate itself."""
    places, module = [], sys.modules["l2t_jax.students.nasnet"]
    monkeypatch.setattr(module, "drop_path", lambda x, rate, keys, place: places.append((place, rate)) or x)
    student, x = (
        STUDENTS["nasnet_mobile"](num_classes=3, **SMALL["nasnet_mobile"], drop_path=0.7),
        picture("nasnet_mobile"),
    )
    jax.eval_shape(student.init, jax.random.key(0), x)
    cells = ["reduction"] * 2 + ["normal", "reduction"] * 2 + ["normal"]  # with one normal cell a stack
    assert len({place for place, _ in places}) == len(places)
    rates = [
        0.7 * (i + 1) / len(cells) for i, kind in enumerate(cells) for _ in range({"normal": 8, "reduction": 9}[kind])
    ]
    np.testing.assert_allclose([rate for _, rate in places], rates)


@pytest.mark.parametrize("reduction", [False, True])
def test_second_derivatives_of_a_cell_are_slopes_of_the_first(reduction, x64):
    cell, draws = Cell(2, reduction, 0.3, 0, None), np.random.default_rng(0)
    x, before = (jnp.asarray(draws.normal(size=(4, side, side, 3))) for side in (5, 9))
    keys = jax.random.split(jax.random.key(1), 4)
    variables = variables_of(lambda key, x: cell.init(key, x, before, False, None), x)
    weight = jnp.asarray(draws.normal(size=cell.apply(variables, x, before, False, None).shape))

    def error(x, before):
        given = (variables, x, before, True, keys)
        return jnp.sum(weight * jnp.tanh(cell.apply(*given, mutable=["batch_stats"])[0]))

    gradient = jax.jit(jax.grad(error, (0, 1)))
    way = tuple(jnp.asarray(draws.normal(size=y.shape)) for y in (x, before))
    found = jax.jit(lambda *at: jax.jvp(gradient, at, way)[1])(x, before)
    ends = [gradient(*optax.tree.add_scale((x, before), step, way)) for step in (1e-6, -1e-6)]
    for exact, one, other in zip(found, *ends, strict=True):
        assert abs(exact).max() > 1e-2
        np.testing.assert_allclose(exact, (one - other) / 2e-6, atol=1e-5 * abs(exact).max())


def test_weights_fill_all_but_the_last_layer(tmp_path):
    save = pytest.importorskip("safetensors.numpy").save_file
    student, x = STUDENTS["resnet18"](num_classes=3, width=2), picture("resnet18")
    random, draws = variables_of(student.init, x), np.random.default_rng(0)
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {"fc.weight": np.zeros((1000, 16), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    for kind in random:
        for path, leaf in jax.tree_util.tree_leaves_with_path(random[kind].get("maps", {})):
            *layer, last = (part.key for part in path)
            array = draws.normal(size=leaf.shape).astype(np.float32)
            laid = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
            state[f"{torch_layer(tuple(layer))}.{names[last]}"] = np.ascontiguousarray(laid)
    assert {"conv1.weight", "layer2.0.downsample.1.running_var", "layer4.1.bn2.bias"} <= set(state)
    save(state, tmp_path / "a.safetensors")
    taught = STUDENTS["resnet18"](num_classes=3, width=2, weights=str(tmp_path / "a.safetensors"))
    found = taught.init(jax.random.key(5), x)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, random)
    np.testing.assert_array_equal(
        found["params"]["maps"]["stage2_block1"]["conv2"]["kernel"].transpose(3, 2, 0, 1),
        state["layer2.0.conv2.weight"],
    )
    np.testing.assert_array_equal(found["batch_stats"]["maps"]["stem_norm1"]["var"], state["bn1.running_var"])
    np.testing.assert_array_equal(
        found["params"]["output"]["kernel"], student.init(jax.random.key(5), x)["params"]["output"]["kernel"]
    )
    with pytest.raises(ValueError, match="images of 3 channels"):
        taught.init(jax.random.key(0), x[..., :1])
    with pytest.raises(ValueError, match="do not fit this network"):
        STUDENTS["resnet50"](num_classes=3, width=2, weights=str(tmp_path / "a.safetensors"))


def test_maps_that_cannot_be_halved_are_told():
    x = images(shape=(2, 3, 3, 1))
    np.testing.assert_allclose(average_pool(x)[:, 0, 0], x[:, :2, :2].mean((1, 2)), rtol=1e-6)
    with pytest.raises(ValueError, match="feature map is 1x1"):
        jax.eval_shape(STUDENTS["densenet"](num_classes=3, **SMALL["densenet"]).init, jax.random.key(0), x)
