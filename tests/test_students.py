"""Students: sizes, dtypes, statistics, and each layer against a second way of computing it."""

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from l2t_jax.students import STUDENTS, layers, resnet
from l2t_jax.students.resnet import BasicBlock
from l2t_jax.types import Array, Student

CLASSIFIERS = ("mlp", "lenet", "resnet8", "resnet20", "resnet32")
WIDE = {"width": 64, "shortcut": "b", "head_grid": 2}  # the released code
RESNET_COUNTS = {  # (classes, options) -> parameters of ResNet-8, -20 and -32
    (10, "a"): (75_290, 269_722, 464_154),
    (10, "b"): (78_042, 272_474, 466_906),
    (100, "a"): (81_140, 275_572, 470_004),
    (100, "b"): (83_892, 278_324, 472_756),
    (10, "wide"): (1_235_274, 4_335_434, 7_435_594),
    (100, "wide"): (1_327_524, 4_427_684, 7_527_844),
}
COUNTS = [
    ("mlp", {"num_classes": 10}, (28, 28, 1), 397_510),
    ("lenet", {"num_classes": 10}, (28, 28, 1), 61_706),
    ("lenet", {"num_classes": 10}, (32, 32, 1), 61_706),
] + [
    (name, {"num_classes": classes} | (WIDE if kind == "wide" else {"shortcut": kind}), (32, 32, 3), count)
    for (classes, kind), counts in RESNET_COUNTS.items()
    for name, count in zip(("resnet8", "resnet20", "resnet32"), counts, strict=True)
]


def images(seed: int = 0, shape: tuple[int, ...] = (4, 8, 8, 1), dtype: type = jnp.float32) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def variables_of(init: Callable, *args: object) -> dict:
    """What `init` would give, drawn by NumPy: XLA takes a second on CPU to compile each shape of random normals."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        center = path[-1].key in ("scale", "var")
        spread = 0.3 if path[0].key == "params" else 0.0
        return jnp.asarray(center + spread * rng.normal(size=leaf.shape), leaf.dtype)

    drawn = jax.tree.map_with_path(draw, shapes)
    return {"batch_stats": {}} | drawn


@pytest.mark.parametrize("name, options, shape, count", COUNTS)
def test_parameter_counts(name: str, options: dict, shape: tuple[int, ...], count: int) -> None:
    inputs = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    variables = jax.eval_shape(STUDENTS[name](**options).init, jax.random.key(0), inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("x64", [False, True])
def test_dtypes_and_shapes_follow_the_inputs(name: str, x64: bool) -> None:
    student = STUDENTS[name](num_classes=7, width=3)
    with jax.enable_x64(x64):
        inputs = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float64 if x64 else jnp.float32)
        variables = jax.eval_shape(student.init, jax.random.key(0), inputs)
        outputs, stats = jax.eval_shape(partial(student.apply, train=True), variables, inputs)
    assert outputs.shape == (4, 7)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs, stats))} == {inputs.dtype}
    # A scan carries the statistics, so they must not change their form.
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])


@pytest.mark.versions
def test_init_draws_parameters_in_the_dtype_of_the_inputs_and_standard_statistics() -> None:
    mlp = STUDENTS["mlp"](num_classes=5, width=4)
    with jax.enable_x64(True):
        variables = mlp.init(jax.random.key(0), images(dtype=jnp.float64))
        assert variables["batch_stats"] == {}
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float64")}
        other = mlp.init(jax.random.key(1), images(dtype=jnp.float64))
    kernels = [np.asarray(v["params"]["hidden"]["kernel"]) for v in (variables, other)]
    assert np.abs(kernels[0] - kernels[1]).min() > 0
    assert np.abs(kernels[0]).max() <= np.sqrt(6 / (64 + 4))  # Glorot uniform
    norm = layers.batch_norm(False, None, name="norm").init(jax.random.key(0), images())["batch_stats"]
    assert norm == {"mean": jnp.zeros(1), "var": jnp.ones(1)}


@pytest.mark.versions
@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet8"])
def test_float64_computes_in_float64(name: str) -> None:
    student = STUDENTS[name](num_classes=5, width=2)
    with jax.enable_x64(True):
        x = images(dtype=jnp.float64)
        variables = variables_of(student.init, x)
        apply = jax.jit(partial(student.apply, train=True))
        (outputs, stats), (nudged, _) = apply(variables, x), apply(variables, x * (1 + 1e-11))
        assert {leaf.dtype for leaf in jax.tree.leaves((outputs, stats))} == {np.dtype("float64")}
        # A detour through float32 anywhere would round this nudge away.
        assert 0 < abs(np.asarray(nudged - outputs)).max() < 1e-8


@pytest.mark.versions
def test_half_precision_statistics_keep_their_dtype() -> None:
    student = STUDENTS["resnet8"](num_classes=5, width=2)
    inputs = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.bfloat16)
    variables = jax.eval_shape(student.init, jax.random.key(0), inputs)
    _, stats = jax.eval_shape(partial(student.apply, train=True), variables, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {np.dtype(jnp.bfloat16)}


@pytest.fixture(scope="module")
def small() -> tuple[Student, dict]:
    student = STUDENTS["resnet8"](num_classes=5, width=2, shortcut="b")
    return student, variables_of(student.init, images())


@pytest.mark.versions
def test_running_statistics_move_in_training_only(small: tuple[Student, dict]) -> None:
    student, variables = small
    _, kept = student.apply(variables, images(), False)
    assert kept is variables["batch_stats"]
    _, moved = jax.jit(partial(student.apply, train=True))(variables, images())
    kernel = variables["params"]["stem_conv"]["kernel"]
    maps = np.asarray(
        jax.lax.conv_general_dilated(images(), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    np.testing.assert_allclose(moved["stem_norm"]["mean"], 0.1 * maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved["stem_norm"]["var"], 0.9 + 0.1 * maps.var((0, 1, 2)), rtol=1e-4)
    changed = jax.tree.map(lambda a, b: bool((a != b).all()), moved, variables["batch_stats"])
    assert all(jax.tree.leaves(changed)) and len(jax.tree.leaves(changed)) == 2 * 9


def test_an_example_depends_on_its_batch_in_training_only(small: tuple[Student, dict]) -> None:
    student, variables = small
    other = images().at[1:].multiply(3.0)
    evaluate, train = (jax.jit(partial(student.apply, train=t)) for t in (False, True))
    evaluated = [evaluate(variables, x)[0][0] for x in (images(), other)]
    trained = [train(variables, x)[0][0] for x in (images(), other)]
    np.testing.assert_allclose(*evaluated, rtol=1e-6)
    assert abs(trained[0] - trained[1]).max() > 1e-2


@pytest.mark.versions
def test_axis_name_makes_parts_of_a_batch_act_as_the_whole(small: tuple[Student, dict]) -> None:
    student, variables = small
    parted = STUDENTS["resnet8"](num_classes=5, width=2, shortcut="b", axis_name="d")
    halves = images().reshape(2, 2, 8, 8, 1)
    apply = jax.vmap(partial(parted.apply, train=True), in_axes=(None, 0), axis_name="d")
    outputs, stats = jax.jit(apply)(variables, halves)
    whole, whole_stats = jax.jit(partial(student.apply, train=True))(variables, images())
    np.testing.assert_allclose(outputs.reshape(4, 5), whole, rtol=1e-3, atol=1e-4)
    for part, one in zip(jax.tree.leaves(stats), jax.tree.leaves(whole_stats), strict=True):
        np.testing.assert_allclose(part, np.stack([one, one]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("train", [True, False])
def test_head_is_the_last_layer_taken_apart(name: str, train: bool) -> None:
    """Run, not only traced, for one ResNet: the others are the same module with more blocks."""
    student = STUDENTS[name](num_classes=3, width=2)
    variables = variables_of(student.init, images())
    assert student.head is not None

    def both(variables: dict, x: Array) -> tuple:
        head, stats = student.head(variables, x, train)
        return head, head.features @ head.kernel + head.bias, stats, *student.apply(variables, x, train)

    if name in ("resnet20", "resnet32"):
        head, rebuilt, stats, outputs, expected = jax.eval_shape(both, variables, images())
        assert jax.tree.map(jnp.shape, (rebuilt, stats)) == jax.tree.map(jnp.shape, (outputs, expected))
        return
    head, rebuilt, stats, outputs, expected = jax.jit(both)(variables, images())
    assert head.kernel.shape == (head.features.shape[-1], 3) and np.std(outputs) > 1e-4
    np.testing.assert_allclose(rebuilt, outputs, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(stats), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.versions
def test_head_under_grad_and_vmap() -> None:
    """A derivative through the head is that of the outputs, the last layer's included; seeds run side by side."""
    student = STUDENTS["mlp"](num_classes=3, width=4)
    assert student.head is not None
    first = variables_of(student.init, images())
    seeds = [first, jax.tree.map(lambda leaf: leaf + 0.1, first)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)

    def through_head(variables: dict, x: Array) -> Array:
        head, _ = student.head(variables, x, True)
        return jnp.sum(jnp.tanh(head.features @ head.kernel + head.bias))

    def through_outputs(variables: dict, x: Array) -> Array:
        return jnp.sum(jnp.tanh(student.apply(variables, x, True)[0]))

    side_by_side = jax.jit(jax.vmap(jax.grad(through_head), in_axes=(0, None)))(stacked, images())
    for seed, variables in enumerate(seeds):
        expected = jax.grad(through_outputs)(variables, images())
        for ours, theirs in zip(jax.tree.leaves(side_by_side), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours[seed], theirs, rtol=1e-4, atol=1e-6)
            assert np.abs(theirs).max() > 1e-4


class Headless(nn.Module):
    """Its last layer has another name, no bias, or belongs to a module inside."""

    kind: str

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if self.kind == "inside":
            return Headless("whole", name="inner")(x, train)
        name = "logits" if self.kind == "another name" else "output"
        return nn.Dense(3, use_bias=self.kind != "no bias", name=name)(x)


@pytest.mark.parametrize("kind", ["another name", "no bias", "inside"])
def test_a_student_without_a_last_layer_of_that_name_has_no_head(kind: str) -> None:
    student, x = layers.from_linen(Headless(kind)), jnp.ones((2, 4))
    variables = student.init(jax.random.key(0), x)
    assert student.head is not None and student.apply(variables, x, True)[0].shape == (2, 3)
    with pytest.raises(ValueError, match="Headless has no last Dense layer with a bias named 'output'"):
        student.head(variables, x, True)


@pytest.mark.versions
@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 5, 3)])
def test_max_pool_is_that_of_flax_gradient_included(shape: tuple[int, ...]) -> None:
    x, weights = images(0, shape), images(1, (2, shape[1] // 2, shape[2] // 2, 3))

    def total(pool, x):
        return (weights * pool(x)).sum()

    def flax_pool(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    np.testing.assert_array_equal(layers.max_pool(x), flax_pool(x))
    grads = [jax.jit(jax.grad(partial(total, pool)))(x) for pool in (layers.max_pool, flax_pool)]
    np.testing.assert_array_equal(*grads)


def test_strided_convolution_is_a_subsampled_one() -> None:
    full, strided = (layers.conv(5, 3, stride, name="c") for stride in (1, 2))
    variables = variables_of(full.init, images())
    np.testing.assert_allclose(
        strided.apply(variables, images()), full.apply(variables, images())[:, ::2, ::2], atol=1e-5
    )


def test_shortcut_a_subsamples_and_appends_zero_channels() -> None:
    block = BasicBlock(channels=5, stride=2, shortcut="a", axis_name=None)
    x = images(0, (2, 8, 8, 3))
    variables = variables_of(partial(block.init, train=False), x)
    params = variables["params"]
    params["conv2"]["kernel"] *= 0  # leaves the shortcut alone
    params["norm2"]["bias"] *= 0
    y = jax.jit(partial(block.apply, train=False))({**variables, "params": params}, x)
    np.testing.assert_array_equal(y[..., :3], jnp.maximum(x[:, ::2, ::2], 0))
    np.testing.assert_array_equal(y[..., 3:], 0)


def test_average_pooling_over_cells() -> None:
    x = images(0, (2, 8, 8, 3))
    np.testing.assert_allclose(layers.average_pool_to_grid(x, 2), nn.avg_pool(x, (4, 4), (4, 4)), atol=1e-6)
    np.testing.assert_allclose(layers.average_pool_to_grid(x, 1)[:, 0, 0], x.mean((1, 2)), atol=1e-6)


def test_lenet_pads_small_images_centred() -> None:
    student = STUDENTS["lenet"](num_classes=3, width=2)
    x = images(0, (2, 28, 28, 1))
    variables = variables_of(student.init, x)
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    outputs, expected = (jax.jit(partial(student.apply, train=True))(variables, i)[0] for i in (x, padded))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-6)
    assert np.std(outputs) > 1e-3


def test_convolutions_have_the_variance_of_he() -> None:
    kernel = layers.he_normal(jax.random.key(0), (3, 3, 64, 128))
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.01)


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("option", ["num_classes", "width"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_impossible_sizes_are_refused_by_name(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        STUDENTS[name](**{"num_classes": 10, option: value})


@pytest.mark.parametrize("name", STUDENTS)
def test_unknown_arguments_are_errors(name: str) -> None:
    with pytest.raises(TypeError, match="height"):
        STUDENTS[name](num_classes=10, height=3)
    parameters = inspect.signature(STUDENTS[name]).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}


def test_resnet_errors() -> None:
    with pytest.raises(ValueError, match="6n"):
        resnet(18, num_classes=10)
    with pytest.raises(ValueError, match="shortcut 'c' is unknown"):
        resnet(8, num_classes=10, shortcut="c")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head_grid=3"):
        jax.eval_shape(resnet(8, num_classes=10, head_grid=3).init, jax.random.key(0), images())


def test_integer_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        STUDENTS["mlp"](num_classes=10).init(jax.random.key(0), jnp.zeros((2, 4), jnp.uint8))


@pytest.mark.parametrize(("offset", "tolerance"), [(0, 2e-6), (100, 1e-4), (1000, 1e-3)])
def test_batch_norm_of_inputs_far_from_zero(offset, tolerance):
    """In float32, of inputs so many deviations from zero: E x^2 - (E x)^2 would be off by 2e-3 and 0.6."""
    x = (np.random.default_rng(0).normal(size=(100, 8)) + offset).astype(np.float32)
    norm = layers.batch_norm(True, None, name="norm")
    ours, _ = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    exact = x.astype(np.float64)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(ours, expected, atol=tolerance)
