"""YOLOv3 and YOLOv3-tiny: darknet's detectors, fresh or from its files of weights.

Convolutions are named by their place in darknet's files, from "conv1" on, in a backbone, its features, and a head, all
that follows. Every one is normalised and rectified, but those that predict.

Legend: B batch, H and W height and width in pixels, c channels, C classes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from l2t_jax.convolution import conv2d
from l2t_jax.inputs import known
from l2t_jax.students.darknet import floats_of, name_of, read_darknet, read_header
from l2t_jax.students.layers import from_linen, he_normal, require_positive
from l2t_jax.types import Array, Backbone, Key, PyTree, Student

ANCHORS = 3  # boxes that are predicted in each cell
PRIOR = 0.01  # objectness of a fresh head
_STRIDE = 32  # pixels of a cell of the coarsest map

TRAINED = ("all", "head")
NORMS = ("auto", "frozen", "batch")


class Unit(nn.Module):
    """A convolution without bias, BatchNorm, and a leaky rectifier of slope 0.1.

    Epsilon is 1e-5 and under the root, as on darknet's GPU: its CPU adds 1e-6 to the root. The running statistics are
    0.99 of the old. The variance is biased as everywhere here; darknet's own divides by one less.
    """

    channels: int
    kernel: int
    stride: int
    batch: bool  # whether to normalise by the batch
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [B, H, W, c] to [B, H / stride, W / stride, channels]."""
        kernel = self.param("kernel", he_normal, (self.kernel, self.kernel, x.shape[-1], self.channels))
        x = conv2d(x, kernel.astype(x.dtype), strides=self.stride, padding=self.kernel // 2)
        norm = nn.BatchNorm(
            use_running_average=not self.batch,
            momentum=0.99,
            epsilon=1e-5,
            axis_name=self.axis_name,
            use_fast_variance=False,  # as in `layers.batch_norm`
            name="norm",
        )
        return nn.leaky_relu(norm(x), 0.1)


class Predict(nn.Module):
    """The 1x1 convolution that predicts: for each box tx, ty, tw, th, the logit of objectness, and those of classes."""

    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [B, h, w, c] to [B, h, w, 3, 5 + C]."""
        values = 5 + self.num_classes
        shape = (1, 1, x.shape[-1], ANCHORS * values)
        kernel = self.param("kernel", nn.initializers.normal(0.01), shape)
        x = conv2d(x, kernel.astype(x.dtype)) + self.param("bias", _rare, shape[-1:])
        return x.reshape(*x.shape[:3], ANCHORS, values)


def _rare(key: Key, shape: tuple[int, ...]) -> Array:
    """Zeros, but for objectness, which starts at `PRIOR`."""
    bias = jnp.zeros((ANCHORS, shape[0] // ANCHORS))
    return bias.at[:, 4].set(jnp.log(PRIOR / (1 - PRIOR))).reshape(shape)


class Units:
    """Makes the convolutions of a network one after the other, and numbers them as darknet's files do."""

    def __init__(self, first: int, make: Callable[..., nn.Module], predict: Callable[..., nn.Module]) -> None:
        self.number, self.make, self.predict = first, make, predict

    def _named(self, build: Callable[..., nn.Module], *args: int) -> Any:
        self.number += 1
        return build(self.number - 1, *args)

    def conv(self, x: Array, channels: int, kernel: int, stride: int = 1) -> Array:
        """The next convolution."""
        return self._named(self.make, channels, kernel, stride)(x)

    def outputs(self, x: Array) -> Array:
        """The next convolution, which predicts."""
        return self._named(self.predict)(x)


def _darknet53(units: Units, x: Array, width: int) -> tuple[Array, ...]:
    """Images [B, H, W, 3] -> maps of strides 32, 16 and 8."""
    x = units.conv(x, width, 3)
    maps: list[Array] = []
    for stage, blocks in enumerate((1, 2, 8, 8, 4)):
        channels = width << (stage + 1)
        x = units.conv(x, channels, 3, 2)
        for _ in range(blocks):
            x = x + units.conv(units.conv(x, channels // 2, 1), channels, 3)
        maps.append(x)
    return tuple(reversed(maps[2:]))


def _yolov3_head(units: Units, maps: tuple[Array, ...], width: int) -> tuple[Array, ...]:
    outputs: list[Array] = []
    x = maps[0]
    for depth, features in enumerate(maps):
        channels = 16 * width >> depth
        if depth:
            x = jnp.concatenate([_upsample(units.conv(x, channels, 1)), features], -1)
        for i in range(3):
            branch = x = units.conv(x, channels, 1)
            x = units.conv(x, 2 * channels, 3)
            if i == 2:
                outputs.append(units.outputs(x))
        x = branch
    return tuple(outputs)


def _tiny(units: Units, x: Array, width: int) -> tuple[Array, ...]:
    """Images [B, H, W, 3] -> maps of strides 32 and 16."""
    for stage in range(5):
        fine = units.conv(x, width << stage, 3)
        x = _max_pool(fine)
    x = _max_pool_in_place(units.conv(x, 32 * width, 3))
    return units.conv(x, 64 * width, 3), fine


def _tiny_head(units: Units, maps: tuple[Array, ...], width: int) -> tuple[Array, ...]:
    coarse, fine = maps
    branch = units.conv(coarse, 16 * width, 1)
    first = units.outputs(units.conv(branch, 32 * width, 3))
    x = jnp.concatenate([_upsample(units.conv(branch, 8 * width, 1)), fine], -1)
    return first, units.outputs(units.conv(x, 16 * width, 3))


def _upsample(x: Array) -> Array:
    """Repeat each cell twice: [B, h, w, c] -> [B, 2 h, 2 w, c]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def _max_pool(x: Array) -> Array:
    """The maximum of each 2 x 2 cells: [B, 2 h, 2 w, c] -> [B, h, w, c]."""
    for axis in (1, 2):
        x = _larger(*(jax.lax.slice_in_dim(x, i, None, stride=2, axis=axis) for i in (0, 1)))
    return x


def _larger(a: Array, b: Array) -> Array:
    """The maximum of two, with the derivative to the first of equals.

    That of `max` asks which are equal to the result. Where XLA computes one of the two again, and rounds it otherwise,
    none is: the derivative is NaN or 0. Seen in the scan of an unroll, on a CPU without optimisations.
    """
    return jnp.where(b > a, b, a)


def _max_pool_in_place(x: Array) -> Array:
    """The maximum of each cell and its neighbours to the right and below, where there are any; the size stays."""
    for axis in (1, 2):
        last = jax.lax.slice_in_dim(x, x.shape[axis] - 1, None, axis=axis)
        x = _larger(x, jnp.concatenate([jax.lax.slice_in_dim(x, 1, None, axis=axis), last], axis))
    return x


class Net(NamedTuple):
    """A detector: two functions of the units it is made of, and where in a file the backbone ends."""

    backbone: Callable[[Units, Array, int], tuple[Array, ...]]
    head: Callable[[Units, tuple[Array, ...], int], tuple[Array, ...]]
    maps: int
    convolutions: int  # of the backbone
    ends: tuple[int, ...]  # after how many convolutions a file may end, beside the last
    beyond: Callable[[int], dict[int, int]] = lambda width: {}  # see `read_darknet`


# A backbone's file may go on to the first convolution that predicts, as darknet cuts files at any layer. The classifier
# that Darknet-53 is trained as ends with 1000 classes of its own.
YOLOV3 = Net(_darknet53, _yolov3_head, 3, 52, tuple(range(52, 59)), lambda width: {52: (32 * width + 1) * 1000})
TINY = Net(_tiny, _tiny_head, 2, 7, (7, 8, 9))


class Detector(nn.Module):
    """A whole detector, or its backbone, or its head."""

    net: Net
    part: Literal["all", "backbone", "head"]
    num_classes: int
    width: int
    frozen: int  # convolutions, from the first on, whose statistics stay
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Any, train: bool) -> tuple[Array, ...]:
        """Map images [B, H, W, 3], or the backbone's maps, to outputs [B, h, w, 3, 5 + C] or to maps."""

        def make(number: int, channels: int, kernel: int, stride: int) -> nn.Module:
            batch = train and number > self.frozen
            return Unit(channels, kernel, stride, batch, self.axis_name, name=name_of(number))

        def predict(number: int) -> nn.Module:
            return Predict(self.num_classes, name=name_of(number))

        units = Units(self.net.convolutions + 1 if self.part == "head" else 1, make, predict)
        if self.part == "head":
            return self.net.head(units, _maps(x, self.net.maps), self.width)
        maps = self.net.backbone(units, _images(x), self.width)
        return maps if self.part == "backbone" else self.net.head(units, maps, self.width)


def _images(x: Any) -> Array:
    shape = jnp.shape(x) if hasattr(x, "shape") else None
    if shape is None or len(shape) != 4 or shape[3] != 3 or shape[1] % _STRIDE or shape[2] % _STRIDE or 0 in shape:
        told = "no array" if shape is None else str(list(shape))
        raise ValueError(
            f"inputs are {told}: expected images [B, H, W, 3], H and W multiples of {_STRIDE}; letterbox them."
        )
    return x


def _maps(x: Any, count: int) -> tuple[Array, ...]:
    if not isinstance(x, (tuple, list)) or len(x) != count:
        raise ValueError(
            f"inputs are no tuple of {count} maps: of this student only the head is trained, so give what "
            "student.backbone.apply(student.backbone.variables, images) puts out."
        )
    return tuple(x)


def yolov3(
    *,
    num_classes: int,
    width: int = 32,
    weights: str = "",
    train: Literal["all", "head"] = "all",
    norm: Literal["auto", "frozen", "batch"] = "auto",
    fresh_head: bool = False,
    axis_name: str | None = None,
) -> Student:
    """Build YOLOv3: Darknet-53 and a head of three maps, of strides 32, 16 and 8.

    Args:
      num_classes: C.
      width: channels of the first convolution; all others are multiples of it.
      weights: PATH of darknet's weights, darknet53.conv.74, darknet53.weights, yolov3.weights or one cut between; by
        default all is drawn anew. What the file does not have is drawn.
      train: "all" trains the whole network, "head" only what follows Darknet-53, which needs weights and then becomes
        the `backbone` of the student: init and apply take its maps in place of images. It keeps its statistics.
      norm: statistics of BatchNorm in training: those of the file stay and fresh layers take those of the batch (auto),
        all stay (frozen), all are of the batch (batch). Auto is the default because statistics of a few images are
        worse than those of a whole set, which are in the file, and because a fresh layer has none: kept at 0 and 1 they
        normalise nothing, and the sums of a fresh Darknet-53 grow from block to block. A batch of 2 does, for each
        channel is normalised over all cells too, 338 at 416 pixels; images so small that maps have a single cell leave
        2 values. Scale and shift are trained in all three.
      fresh_head: draw the head anew, whatever the weights have of it.
      axis_name: mapped axis over which BatchNorm averages its batch statistics as well.

    Returns:
      A student of images [B, H, W, 3], RGB in [0, 1], H and W multiples of 32. Its outputs are three maps, the coarsest
      first, [B, h, w, 3, 5 + C]: for each of 3 anchors tx, ty, tw, th, the logit of objectness and those of classes,
      none of them decoded. With width 32 and 80 classes 61 949 149 parameters and 52 608 statistics, 40 584 928 and
      35 712 of them in Darknet-53.

    Raises:
      ValueError: a size is below 1, a name is unknown, the weights are missing or do not fit, only the head is trained
        and there are no weights, or, when first applied, the inputs do not fit.

    Source: Redmon & Farhadi 2018; darknet for all the paper leaves open. Fresh kernels are He-normal, those that
    predict normal with deviation 0.01, and the objectness of a fresh head starts at 0.01 (Lin et al. 2017, section
    4.1), where darknet's starts at a half: of the 10 647 boxes at 416 pixels a handful is there, and all others would
    make the first steps. Boxes so start as their anchors.
    """
    return _detector(YOLOV3, num_classes, width, weights, train, norm, fresh_head, axis_name)


def yolov3_tiny(
    *,
    num_classes: int,
    width: int = 16,
    weights: str = "",
    train: Literal["all", "head"] = "all",
    norm: Literal["auto", "frozen", "batch"] = "auto",
    fresh_head: bool = False,
    axis_name: str | None = None,
) -> Student:
    """Build YOLOv3-tiny: seven convolutions with max-pooling and a head of two maps, of strides 32 and 16.

    Args:
      num_classes: C.
      width: channels of the first convolution; all others are multiples of it.
      weights: PATH of darknet's weights, yolov3-tiny.weights or one cut after its features (yolov3-tiny.conv.15); by
        default all is drawn anew. What the file does not have is drawn.
      train: "all" trains the whole network, "head" only what follows the convolution of 1024 channels, which needs
        weights. The rest then becomes the `backbone` of the student: init and apply take its maps in place of images.
      norm: statistics of BatchNorm in training: those of the file stay and fresh layers take those of the batch (auto),
        all stay (frozen), all are of the batch (batch). The default is argued for in `yolov3`.
      fresh_head: draw the head anew, whatever the weights have of it.
      axis_name: mapped axis over which BatchNorm averages its batch statistics as well.

    Returns:
      A student like `yolov3`, with two maps. With width 16 and 80 classes 8 852 366 parameters and 6 368 statistics.
      The anchors of its second map are numbers 1, 2 and 3 in the published weights, not 0, 1 and 2.

    Raises:
      ValueError: as of `yolov3`.

    Source: darknet's yolov3-tiny. Its last max-pool, of size 2 and stride 1, pads on the right and below. Fresh layers
    as in `yolov3`.
    """
    return _detector(TINY, num_classes, width, weights, train, norm, fresh_head, axis_name)


def _detector(
    net: Net, num_classes: int, width: int, weights: str, train: str, norm: str, fresh_head: bool, axis_name: str | None
) -> Student:
    require_positive(num_classes=num_classes, width=width)
    known(f"train {train!r}", train, TRAINED)
    known(f"norm {norm!r}", norm, NORMS)
    if train == "head" and not weights:
        raise ValueError(
            "train='head' without weights would keep a random backbone: give weights=PATH, or train='all'."
        )
    build = partial(Detector, net, num_classes=num_classes, width=width, axis_name=axis_name)
    there = _load(net, Path(weights).expanduser(), num_classes, width, fresh_head) if weights else {}
    stay = {"auto": len(there.get("params", {})), "frozen": 1000, "batch": 0}[norm]
    backbone = None
    if train == "head":
        features = {name_of(number) for number in range(1, net.convolutions + 1)}
        fixed = {kind: {name: x for name, x in tree.items() if name in features} for kind, tree in there.items()}
        there = {kind: {name: x for name, x in tree.items() if name not in features} for kind, tree in there.items()}
        backbone = Backbone(fixed, partial(_features, build(part="backbone", frozen=1000)))
    student = from_linen(build(part="head" if train == "head" else "all", frozen=stay))
    init = partial(_init, student, there) if there else student.init
    return student._replace(init=init, head=None, backbone=backbone)


def _features(module: nn.Module, variables: PyTree, inputs: PyTree) -> PyTree:
    images = _images(inputs)
    return module.apply(jax.tree.map(lambda x: jnp.asarray(x, images.dtype), variables), images, False)


def _init(student: Student, there: dict[str, PyTree], key: Key, inputs: PyTree) -> dict[str, PyTree]:
    """What the weights have, and draws of the rest alone."""
    shapes = jax.eval_shape(student.init, key, inputs)
    kept = {
        kind: {
            name: jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), there[kind][name], tree)
            for name, tree in of.items()
            if name in there[kind]
        }
        for kind, of in shapes.items()
    }

    def rest(key: Key, inputs: PyTree) -> dict[str, PyTree]:
        drawn = student.init(key, inputs)
        return {kind: {name: x for name, x in of.items() if name not in kept[kind]} for kind, of in drawn.items()}

    drawn = {} if all(set(kept[kind]) == set(of) for kind, of in shapes.items()) else jax.jit(rest)(key, inputs)
    return {kind: {**kept[kind], **drawn.get(kind, {})} for kind in shapes}


def _load(net: Net, path: Path, num_classes: int, width: int, fresh_head: bool) -> dict[str, PyTree]:
    """Those of the network's convolutions that the file has and that are to be taken."""
    shapes, other = (_shapes(net, classes, width) for classes in (num_classes, num_classes + 1))
    of_a_class = floats_of(other) - floats_of(shapes)
    more, rest = divmod(read_header(path).floats - floats_of(shapes), of_a_class)
    if more and not rest and num_classes + more >= 1:  # a whole file, of other classes
        if not fresh_head:
            raise ValueError(
                f"weights {path} are of {num_classes + more} classes and num_classes is {num_classes}: draw the head "
                "anew with fresh_head=True."
            )
        shapes = _shapes(net, num_classes + more, width)
    read = read_darknet(path, shapes, {*net.ends, len(shapes["params"])}, net.beyond(width))
    if not fresh_head:
        return read
    features = {name_of(number) for number in range(1, net.convolutions + 1)}
    return {kind: {name: x for name, x in of.items() if name in features} for kind, of in read.items()}


def _shapes(net: Net, num_classes: int, width: int) -> dict[str, PyTree]:
    module = Detector(net, "all", num_classes, width, 0, None)
    images = jax.ShapeDtypeStruct((1, _STRIDE, _STRIDE, 3), jnp.float32)
    return jax.eval_shape(lambda key, x: module.init(key, x, False), jax.random.key(0), images)
