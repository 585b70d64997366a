"""WRN and DenseNet-BC: sizes, each forward pass beside one written by hand, and exact hypergradients."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from test_students import images, variables_of

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.students import STUDENTS, densenet, wide_resnet
from l2t_jax.students.layers import average_pool
from l2t_jax.types import Batch
from l2t_jax.unroll import init_state, inner_objective, outer_objective

COUNTS = [
    (wide_resnet, {"num_classes": 10}, 36_479_194),
    (wide_resnet, {"num_classes": 100}, 36_536_884),
    (wide_resnet, {"num_classes": 10, "depth": 40}, 55_841_754),
    (wide_resnet, {"num_classes": 10, "depth": 16, "width": 8}, 10_961_370),
    (wide_resnet, {"num_classes": 10, "depth": 40, "width": 2}, 2_243_546),
    (densenet, {"num_classes": 10}, 769_162),
    (densenet, {"num_classes": 10, "depth": 190, "growth": 40}, 25_624_430),
]
SMALL = {
    "wide_resnet": {"depth": 16, "width": 1},  # a block with a change of shape, and one without, in each stage
    "densenet": {"depth": 16, "growth": 3},
}


@pytest.mark.parametrize(("build", "options", "count"), COUNTS)
def test_parameter_counts(build, options, count):
    inputs = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(build(**options).init, jax.random.key(0), inputs)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


class Hand:
    """Layers of NumPy and of XLA's own convolution, in float64; running statistics are kept beside."""

    def __init__(self, variables, train):
        self.params, self.old = variables["params"], variables["batch_stats"]
        self.train, self.stats = train, {}

    def at(self, tree, path):
        for name in path:
            tree = tree[name]
        return tree

    def conv(self, x, *path, stride=1):
        kernel = self.at(self.params, path)["kernel"]
        pad = [(kernel.shape[0] // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def act(self, x, *path):
        """Normalise and cut off at zero."""
        params, old = self.at(self.params, path), self.at(self.old, path)
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if self.train else (old["mean"], old["var"])
        self.stats[path] = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}
        return np.maximum((x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"], 0)

    def output(self, x):
        last = self.params["output"]
        return self.act(x, "norm").mean((1, 2)) @ last["kernel"] + last["bias"]

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


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_statistics_are_those_by_hand(name, train, x64):
    student, x = STUDENTS[name](num_classes=3, **SMALL[name]), images(shape=(4, 8, 8, 3), dtype=jnp.float64)
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


@pytest.mark.parametrize("name", SMALL)
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


@pytest.mark.parametrize("build", [wide_resnet, densenet])
def test_sizes_that_are_none_are_told(build):
    for options, told in (
        ({"depth": 12}, r"depth=12 is not 6n \+ 4: use 10, 16, 22, 28, 34, \.\.\."),
        ({"depth": 4}, "depth=4"),
        ({"depth": 16.0}, "depth=16.0"),
        ({"width" if build is wide_resnet else "growth": 0}, "=0 is not a positive integer"),
        ({"dropout": 1.0}, "dropout=1.0 is no probability below 1"),
        ({"dropout": float("nan")}, "dropout=nan"),
    ):
        with pytest.raises(ValueError, match=told):
            build(num_classes=10, **options)


def test_maps_that_cannot_be_halved_are_told():
    x = images(shape=(2, 3, 3, 1))
    np.testing.assert_allclose(average_pool(x)[:, 0, 0], x[:, :2, :2].mean((1, 2)), rtol=1e-6)
    with pytest.raises(ValueError, match="feature map is 1x1"):
        jax.eval_shape(densenet(num_classes=3, **SMALL["densenet"]).init, jax.random.key(0), x)
