"""YOLOv3 and YOLOv3-tiny: sizes, darknet's files, each layer against PyTorch, and what is trained and normalised."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax.knobs import knobs_of
from l2t_jax.students import STUDENTS
from l2t_jax.students.darknet import name_of, read_darknet, read_header, write_darknet
from l2t_jax.types import Student

NETS = ("yolov3", "yolov3_tiny")
BACKBONE = {"yolov3": 52, "yolov3_tiny": 7}  # convolutions
SMALL = {"yolov3": {"num_classes": 2, "width": 1}, "yolov3_tiny": {"num_classes": 2, "width": 2}}


def shapes_of(student: Student, shape: tuple[int, ...] = (2, 64, 64, 3)) -> dict:
    return jax.eval_shape(student.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def drawn(student: Student, seed: int = 0) -> dict:
    """Variables of plausible sizes from NumPy, without compiling."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.normal(size=leaf.shape)
        kind = path[-1].key
        if kind == "kernel":
            values *= np.sqrt(2 / np.prod(leaf.shape[:3]))
        elif kind in ("scale", "var"):
            values = 0.7 + 0.3 * np.abs(values)
        else:
            values *= 0.2
        return values.astype(np.float32)

    return jax.tree.map_with_path(draw, shapes_of(student))


def images(count: int = 2, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(1).random((count, height, width, 3), np.float32)


def size(tree: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def numbers(tree: dict) -> list[int]:
    return sorted(int(name.removeprefix("conv")) for name in tree)


@pytest.fixture(scope="module", params=NETS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    """A small network, its variables, and a file of them."""
    variables = drawn(STUDENTS[request.param](**SMALL[request.param]))
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.weights"
    write_darknet(path, variables, seen=32_013_312)
    return request.param, variables, path


# Sizes


@pytest.mark.versions
@pytest.mark.parametrize(
    "name, params, stats, features, feature_stats",
    [("yolov3", 61_949_149, 52_608, 40_584_928, 35_712), ("yolov3_tiny", 8_852_366, 6_368, 6_294_416, 4_064)],
)
def test_parameter_counts(name: str, params: int, stats: int, features: int, feature_stats: int) -> None:
    variables = shapes_of(STUDENTS[name](num_classes=80))
    assert (size(variables["params"]), size(variables["batch_stats"])) == (params, stats)
    backbone = {
        kind: size([x for n, x in of.items() if numbers([n])[0] <= BACKBONE[name]]) for kind, of in variables.items()
    }
    assert backbone == {"params": features, "batch_stats": feature_stats}


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_maps_the_coarsest_first(name: str) -> None:
    student = STUDENTS[name](num_classes=4, width=2)
    x = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    variables = shapes_of(student, x.shape)
    outputs, _ = jax.eval_shape(partial(student.apply, train=True), variables, x)
    strides = (32, 16, 8)[: len(outputs)]
    assert [o.shape for o in outputs] == [(2, 64 // s, 96 // s, 3, 9) for s in strides]
    assert len(outputs) == {"yolov3": 3, "yolov3_tiny": 2}[name] and student.head is None


def test_knobs_become_flags() -> None:
    for name in NETS:
        knobs = knobs_of(STUDENTS[name])
        assert set(knobs) == {"width", "weights", "train", "norm", "fresh_head"}
        assert all(knob.text for knob in knobs.values())


# Files


@pytest.mark.versions
def test_files_are_read_as_they_were_written(written: tuple[str, dict, Path], tmp_path: Path) -> None:
    name, variables, path = written
    read = read_darknet(path, shapes_of(STUDENTS[name](**SMALL[name])))
    jax.tree.map(np.testing.assert_array_equal, read, variables)
    assert jax.tree.structure(read) == jax.tree.structure(variables)
    header = read_header(path)
    assert header == ((0, 2, 0), 32_013_312, 20, size(variables))
    write_darknet(tmp_path / "again", read, seen=header.seen)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "version, bytes_", [((0, 1, 0), 16), ((0, 2, 5), 20), ((1, 0, 0), 20), ((1000, 2, 0), 16), ((0, 1000, 0), 16)]
)
def test_headers_of_all_versions(version: tuple[int, int, int], bytes_: int, tmp_path: Path) -> None:
    kernel = np.arange(2 * 3 * 9, dtype=np.float32).reshape(3, 3, 3, 2)
    variables = {"params": {"conv1": {"kernel": kernel, "bias": np.float32([7, 8])}}, "batch_stats": {}}
    write_darknet(tmp_path / "w", variables, seen=5, version=version)
    assert read_header(tmp_path / "w") == (version, 5, bytes_, 56)
    raw = np.frombuffer((tmp_path / "w").read_bytes()[bytes_:], "<f4")
    np.testing.assert_array_equal(raw[:2], [7, 8])
    np.testing.assert_array_equal(raw[2:].reshape(2, 3, 3, 3), kernel.transpose(3, 2, 0, 1))  # out, in, rows, columns
    read = read_darknet(tmp_path / "w", variables)
    np.testing.assert_array_equal(read["params"]["conv1"]["kernel"], kernel)


def test_convolutions_have_to_be_numbered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="conv1, conv2"):
        write_darknet(tmp_path / "w", {"params": {"conv2": {}}, "batch_stats": {}})


def build(name: str, path: object, **options: object) -> Student:
    return STUDENTS[name](**{**SMALL[name], "weights": str(path), **options})


def test_wrong_files_are_named_with_their_size(written: tuple[str, dict, Path], tmp_path: Path) -> None:
    name, _, path = written
    whole, bad = path.read_bytes(), tmp_path / "bad.weights"

    def refused(content: bytes, *told: str, **options: object) -> None:
        bad.write_bytes(content)
        with pytest.raises(ValueError) as error:
            build(name, bad, **options)
        message = str(error.value)
        assert "\n" not in message and all(part in message for part in (str(bad), *told)), message

    for content in (whole[:-4], whole + bytes(4)):
        refused(content, str(len(content)), str(len(whole)), "another network")
    refused(whole[:-2], str(len(whole) - 2))
    for content in (b"", whole[:10], whole[:18]):
        refused(content, f"{len(content)} bytes")
    refused(whole, str(len(whole)), width=3)
    refused(whole, "of 2 classes and num_classes is 3", "fresh_head", num_classes=3)
    refused(whole[:400] + np.float32(np.nan).tobytes() + whole[404:], "not finite")
    for absent in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            build(name, absent)


def test_the_files_of_one_network_do_not_fit_the_other(written: tuple[str, dict, Path]) -> None:
    name, _, path = written
    with pytest.raises(ValueError, match="another network"):
        build(next(other for other in NETS if other != name), path)


@pytest.mark.parametrize("fresh_head", [False, True])
def test_files_may_end_early(written: tuple[str, dict, Path], fresh_head: bool, tmp_path: Path) -> None:
    """As darknet53.conv.74 and yolov3-tiny.conv.15 do: what is not there is drawn."""
    name, variables, _ = written
    for more in (0, 2):
        count = BACKBONE[name] + more
        part = {kind: {n: x for n, x in of.items() if numbers([n])[0] <= count} for kind, of in variables.items()}
        write_darknet(tmp_path / "part", part)
        student = build(name, tmp_path / "part", fresh_head=fresh_head, train="head")
        assert numbers(student.backbone.variables["params"]) == list(range(1, BACKBONE[name] + 1))
        jax.tree.map(
            np.testing.assert_array_equal,
            student.backbone.variables,
            {kind: {n: part[kind][n] for n in of} for kind, of in student.backbone.variables.items()},
        )
        maps = jax.eval_shape(student.backbone.apply, student.backbone.variables, images())
        drawn_head = jax.eval_shape(student.init, jax.random.key(0), maps)
        assert numbers(drawn_head["params"]) == numbers(variables["params"])[BACKBONE[name] :]
    write_darknet(tmp_path / "short", {kind: {n: of[n] for n in list(of) if n == "conv1"} for kind, of in part.items()})
    with pytest.raises(ValueError, match="cut off"):
        build(name, tmp_path / "short")


def test_the_classifier_of_darknet53_gives_its_features(tmp_path: Path) -> None:
    variables = drawn(STUDENTS["yolov3"](**SMALL["yolov3"]))
    part = {kind: {n: x for n, x in of.items() if numbers([n])[0] <= 52} for kind, of in variables.items()}
    part["params"]["conv53"] = {"kernel": np.ones((1, 1, 32, 1000), np.float32), "bias": np.ones(1000, np.float32)}
    write_darknet(tmp_path / "darknet53.weights", part)
    student = build("yolov3", tmp_path / "darknet53.weights", train="head")
    kernel = student.backbone.variables["params"]["conv52"]["kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["conv52"]["kernel"])


# Layers


class Torch:
    """Darknet's networks once more, written down with PyTorch from the file alone."""

    def __init__(self, path: Path, classes: int) -> None:
        self.values, self.place, self.classes = np.fromfile(path, "<f4", offset=20), 0, classes

    def take(self, *shape: int) -> "object":
        import torch

        count = int(np.prod(shape))
        self.place += count
        return torch.from_numpy(self.values[self.place - count : self.place].reshape(shape).copy())

    def conv(self, x, out, kernel, stride=1):  # type: ignore[no-untyped-def]
        import torch.nn.functional as F  # noqa: N812

        beta, gamma, mean, var = (self.take(out) for _ in range(4))
        x = F.conv2d(x, self.take(out, x.shape[1], kernel, kernel), None, stride, kernel // 2)
        return F.leaky_relu(F.batch_norm(x, mean, var, gamma, beta, eps=1e-5), 0.1)

    def predict(self, x):  # type: ignore[no-untyped-def]
        import torch.nn.functional as F  # noqa: N812

        out = 3 * (5 + self.classes)
        bias = self.take(out)
        y = F.conv2d(x, self.take(out, x.shape[1], 1, 1), bias)
        return y.reshape(y.shape[0], 3, -1, *y.shape[2:]).permute(0, 3, 4, 1, 2).numpy()

    def up(self, x):  # type: ignore[no-untyped-def]
        import torch.nn.functional as F  # noqa: N812

        return F.interpolate(x, scale_factor=2, mode="nearest")

    def yolov3_tiny(self, x, w):  # type: ignore[no-untyped-def]
        import torch
        import torch.nn.functional as F  # noqa: N812

        for i in range(5):
            route = self.conv(x, w * 2**i, 3)
            x = F.max_pool2d(route, 2)
        x = self.conv(x, w * 32, 3)
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2, 1)
        x = self.conv(x, w * 64, 3)
        y = self.conv(x, w * 16, 1)
        first = self.predict(self.conv(y, w * 32, 3))
        x = torch.cat([self.up(self.conv(y, w * 8, 1)), route], 1)
        return first, self.predict(self.conv(x, w * 16, 3))

    def yolov3(self, x, w):  # type: ignore[no-untyped-def]
        import torch

        x = self.conv(x, w, 3)
        routes = []
        for out, blocks in ((2, 1), (4, 2), (8, 8), (16, 8), (32, 4)):
            x = self.conv(x, w * out, 3, 2)
            for _ in range(blocks):
                x = x + self.conv(self.conv(x, w * out // 2, 1), w * out, 3)
            routes.append(x)
        outputs = []
        for out, route in ((16, None), (8, routes[3]), (4, routes[2])):
            if route is not None:
                x = torch.cat([self.up(self.conv(x, w * out, 1)), route], 1)
            for _ in range(2):
                x = self.conv(self.conv(x, w * out, 1), w * out * 2, 3)
            x = self.conv(x, w * out, 1)
            outputs.append(self.predict(self.conv(x, w * out * 2, 3)))
        return tuple(outputs)


def test_outputs_are_those_of_pytorch(written: tuple[str, dict, Path]) -> None:
    torch = pytest.importorskip("torch")
    name, _, path = written
    options = SMALL[name]
    x = images(2, 64, 96)
    net = Torch(path, options["num_classes"])
    with torch.no_grad():
        expected = getattr(net, name)(torch.from_numpy(x).permute(0, 3, 1, 2), options["width"])
    assert net.place == len(net.values)
    student = build(name, path)
    variables = student.init(jax.random.key(0), x)
    outputs, _ = jax.jit(partial(student.apply, train=False))(variables, x)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert np.std(theirs) > 1e-2
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * np.abs(theirs).max())


# What is trained, what is normalised


def test_training_the_head_puts_out_what_the_whole_does(written: tuple[str, dict, Path]) -> None:
    name, variables, path = written
    whole, head = build(name, path), build(name, path, train="head")
    x = images()
    everything = whole.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, everything, variables)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(head.backbone.variables))
    maps = jax.jit(head.backbone.apply)(head.backbone.variables, x)
    part = head.init(jax.random.key(0), maps)
    assert numbers(part["params"]) == numbers(variables["params"])[BACKBONE[name] :]
    for train in (False, True):
        expected, stats = jax.jit(partial(whole.apply, train=train))(everything, x)
        outputs, _ = jax.jit(partial(head.apply, train=train))(part, maps)
        for ours, theirs in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
        jax.tree.map(np.testing.assert_array_equal, stats, everything["batch_stats"])  # they stay as they came


@pytest.mark.parametrize("name", ["yolov3_tiny"])
@pytest.mark.parametrize("norm", ["auto", "frozen", "batch"])
def test_norms_of_a_file_with_a_fresh_head(name: str, norm: str, tmp_path: Path) -> None:
    variables = drawn(STUDENTS[name](**SMALL[name]))
    write_darknet(tmp_path / "w", variables)
    student = build(name, tmp_path / "w", num_classes=3, fresh_head=True, norm=norm)
    x = images()
    start = student.init(jax.random.key(0), x)
    outputs, stats = jax.jit(partial(student.apply, train=True))(start, x)
    assert all(np.isfinite(o).all() for o in outputs) and outputs[0].shape[-1] == 8
    old, new = ({numbers([n])[0]: x["norm"] for n, x in of.items()} for of in (start["batch_stats"], stats))
    moved, normalised = [n for n in sorted(old) if np.any(old[n]["var"] != new[n]["var"])], sorted(old)
    assert moved == {"auto": [n for n in normalised if n > 7], "frozen": [], "batch": normalised}[norm]
    if norm == "batch":
        kernel = variables["params"]["conv1"]["kernel"]
        maps = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        expected = 0.99 * old[1]["mean"] + 0.01 * np.mean(maps, (0, 1, 2))
        np.testing.assert_allclose(new[1]["mean"], expected, rtol=1e-4, atol=1e-6)
    same = student.apply(start, x, False)[1]
    jax.tree.map(np.testing.assert_array_equal, same, start["batch_stats"])


@pytest.mark.parametrize("name", NETS)
def test_fresh_networks_of_a_batch_of_two(name: str) -> None:
    """Objects are rare at first, boxes are their anchors, and gradients are finite."""
    student = STUDENTS[name](num_classes=2, width=1)
    x = images()
    if name == "yolov3":  # the whole of it compiles for long, and is the same modules
        shapes = jax.eval_shape(partial(student.apply, train=True), shapes_of(student), x)
        assert jax.tree.structure(shapes[1]) == jax.tree.structure(shapes_of(student)["batch_stats"])
        return
    start = student.init(jax.random.key(0), x)
    outputs, _ = jax.jit(partial(student.apply, train=True))(start, x)
    for out in outputs:
        np.testing.assert_allclose(jax.nn.sigmoid(out[..., 4]), 0.01, atol=0.005)
        assert np.abs(np.delete(np.asarray(out), 4, -1)).max() < 0.5

    def total(params: dict) -> jax.Array:
        outputs, _ = student.apply({**start, "params": params}, x, True)
        return sum((out**2).mean() for out in outputs)

    gradient = jax.jit(jax.grad(total))(start["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(tree["kernel"]).max() > 0 for tree in gradient.values())


def test_fresh_heads_differ_and_features_do_not(written: tuple[str, dict, Path]) -> None:
    name, variables, path = written
    student = build(name, path, fresh_head=True, train="head")
    maps = jax.eval_shape(student.backbone.apply, student.backbone.variables, images())
    assert jax.tree.structure(jax.eval_shape(student.init, jax.random.key(0), maps)["params"])
    if name == "yolov3":
        return
    whole = build(name, path, fresh_head=True)
    one, other = (whole.init(jax.random.key(seed), images())["params"] for seed in (0, 1))
    for number in numbers(one):
        kernels = [np.asarray(tree[name_of(number)]["kernel"]) for tree in (one, other, variables["params"])]
        assert (kernels[0] == kernels[1]).all() == (number <= BACKBONE[name])
        assert (kernels[0] == kernels[2]).all() == (number <= BACKBONE[name])


def test_float64_and_vmapped_starts(written: tuple[str, dict, Path]) -> None:
    name, variables, path = written
    student = build(name, path)
    with jax.enable_x64(True):
        start = student.init(jax.random.key(0), images().astype(np.float64))
        assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {np.dtype("float64")}
    starts = jax.vmap(student.init, (0, None))(jax.random.split(jax.random.key(0), 2), images())
    np.testing.assert_array_equal(starts["params"]["conv1"]["kernel"][1], variables["params"]["conv1"]["kernel"])


# Errors


@pytest.mark.parametrize("name", NETS)
def test_inputs_that_do_not_fit(name: str) -> None:
    student = STUDENTS[name](**SMALL[name])
    for shape in ((2, 64, 65, 3), (2, 48, 64, 3), (2, 64, 64, 1), (64, 64, 3), (2, 4), (2, 0, 32, 3)):
        with pytest.raises(ValueError, match="multiples of 32"):
            shapes_of(student, shape)


def test_arguments_that_do_not_fit(written: tuple[str, dict, Path]) -> None:
    name, _, path = written
    with pytest.raises(ValueError, match="train='head' without weights"):
        STUDENTS[name](**SMALL[name], train="head")
    with pytest.raises(ValueError, match="train 'body' is unknown"):
        STUDENTS[name](**SMALL[name], train="body")
    with pytest.raises(ValueError, match="norm 'group' is unknown"):
        STUDENTS[name](**SMALL[name], norm="group")
    student = build(name, path, train="head")
    with pytest.raises(ValueError, match="only the head is trained"):
        shapes_of(student)
    with pytest.raises(ValueError, match="multiples of 32"):
        student.backbone.apply(student.backbone.variables, images(1, 40, 64))
