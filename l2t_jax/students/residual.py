"""The residual networks for ImageNet: 18 and 50 layers, and the maps that other networks are built on.

Legend: B batch, H x W image, h x w map, c channels, C classes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from l2t_jax.inputs import known
from l2t_jax.students.layers import batch_norm, conv, from_linen, max_pool_3x3, relu, require_positive
from l2t_jax.students.state_dicts import in_dtype, load_maps, read_state_dict, require_colors
from l2t_jax.types import Array, Key, PyTree, Student

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
DEPTHS = (18, 50)


class Block(nn.Module):
    """relu(f(x) + shortcut(x)), f of two 3x3 convolutions, or of 1x1, 3x3 and 1x1 to four times the channels."""

    channels: int
    bottleneck: bool
    stride: int
    dilation: int
    frozen: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map [B, h, w, c] to [B, ceil(h / stride), ceil(w / stride), channels or four times as many]."""
        norm = partial(batch_norm, train and not self.frozen, self.axis_name)
        spatial = (3, self.stride, self.dilation)
        kinds = [(1, 1, 1), spatial, (1, 1, 1)] if self.bottleneck else [spatial, (3, 1, self.dilation)]
        y, out = x, self.channels * (4 if self.bottleneck else 1)
        for i, (kernel, stride, dilation) in enumerate(kinds, start=1):
            width = out if i == len(kinds) else self.channels
            y = conv(width, kernel, stride, f"conv{i}", dilation)(y)
            y = norm(f"norm{i}")(y)
            y = relu(y) if i < len(kinds) else y
        if self.stride > 1 or x.shape[-1] != out:
            x = norm("shortcut_norm")(conv(out, 1, self.stride, "shortcut_conv")(x))
        return relu(y + x)


class ResNetMaps(nn.Module):
    """A ResNet without its last layer. Dilated, its last two stages are so by 2 and 4 in place of their strides."""

    blocks: tuple[int, ...]  # of each stage
    width: int
    bottleneck: bool
    stem: str  # "deep" or "7x7"
    dilated: bool
    frozen: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array]:
        """Map images [B, H, W, c] to the maps of the last two stages, at stride 8 or at 16 and 32."""
        norm = partial(batch_norm, train and not self.frozen, self.axis_name)
        deep = [(self.width, 3, 2), (self.width, 3, 1), (2 * self.width, 3, 1)]
        for i, (channels, kernel, stride) in enumerate(deep if self.stem == "deep" else [(self.width, 7, 2)], start=1):
            x = conv(channels, kernel, stride, f"stem_conv{i}")(x)
            x = relu(norm(f"stem_norm{i}")(x))
        x, maps = max_pool_3x3(x), []
        strides, dilations = ((1, 2, 1, 1), (1, 1, 2, 4)) if self.dilated else ((1, 2, 2, 2), (1, 1, 1, 1))
        for stage, (count, first, dilation) in enumerate(zip(self.blocks, strides, dilations, strict=True)):
            for block in range(count):
                options = (self.bottleneck, first if block == 0 else 1, dilation, self.frozen, self.axis_name)
                x = Block(self.width << stage, *options, name=f"stage{stage + 1}_block{block + 1}")(x, train)
            maps.append(x)
        return maps[2], maps[3]


def torch_layer(path: tuple[str, ...]) -> str:
    """The name of a layer in torchvision's state dict, and semseg's, of its modules in `ResNetMaps`."""
    if len(path) == 1:
        return path[0].removeprefix("stem_").replace("norm", "bn")
    stage, block = path[0].removeprefix("stage").split("_block")
    names = {"shortcut_conv": "downsample.0", "shortcut_norm": "downsample.1"}
    return f"layer{stage}.{int(block) - 1}.{names.get(path[1], path[1].replace('norm', 'bn'))}"


class ImageNetResNet(nn.Module):
    """The last map of a ResNet, its mean over pixels, linear outputs."""

    maps: nn.Module
    num_classes: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map images [B, H, W, c] to logits [B, C]."""
        return nn.Dense(self.num_classes, name="output")(self.maps(x, train)[1].mean((1, 2)))


def imagenet_resnet(
    depth: int, /, *, num_classes: int, width: int = 64, weights: str = "", axis_name: str | None = None
) -> Student:
    """Build a ResNet for images of some 224 x 224 pixels: 7x7 stem, pooling, four stages, output stride 32.

    Args:
      depth: 18, of two 3x3 convolutions a block, or 50, of bottlenecks.
      num_classes: C.
      width: channels of the first stage, before bottlenecks widen it; each stage has twice those of the one before.
      weights: FILE of torchvision's state dict of this network, .safetensors or .pth: all layers but the last, which is
        drawn anew; empty: from random.
      axis_name: mapped axis over which BatchNorm averages its batch statistics as well.

    Returns:
      A student of images [B, H, W, c] and logits [B, C]. With 1000 classes 11 689 512 and 25 557 032 parameters.

    Raises:
      ValueError: the depth is unknown, a size is below 1, weights are missing or do not fit, or, when first applied,
        images have no 3 channels, which weights are for.

    Source: He et al. 2016; strides in the 3x3 convolutions of bottlenecks, as in torchvision. The output layer keeps
    linen's default initialisation. Weights are for images normalised by ImageNet's mean and deviation.
    """
    known(f"depth {depth}", depth, DEPTHS)
    require_positive(num_classes=num_classes, width=width)
    maps = ResNetMaps(BLOCKS[depth], width, depth >= 50, "7x7", False, axis_name=axis_name)
    student = from_linen(ImageNetResNet(maps, num_classes))
    if not weights:
        return student
    loaded = load_maps(maps, read_state_dict(weights), torch_layer, ("fc.",), weights)

    def init(key: Key, x: Array) -> dict[str, PyTree]:
        require_colors(x)
        given = jax.tree.map(jnp.asarray, in_dtype(loaded, x.dtype))
        return {kind: {**leaves, "maps": given[kind]} for kind, leaves in student.init(key, x).items()}

    return student._replace(init=init)
