"""The residual networks for CIFAR: 6n + 2 layers in three stages of n basic blocks."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from l2t_jax.inputs import known
from l2t_jax.students.layers import (
    average_pool_to_grid,
    batch_norm,
    conv,
    from_linen,
    relu,
    require_depth,
    require_positive,
)
from l2t_jax.types import Array, Student

SHORTCUTS = ("a", "b")  # zeros, without parameters; a 1x1 convolution


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), the first convolution strided."""

    channels: int
    stride: int
    shortcut: str
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map [B, H, W, c] to [B, H / stride, W / stride, channels]."""
        y = conv(self.channels, 3, self.stride, name="conv1")(x)
        y = relu(batch_norm(train, self.axis_name, name="norm1")(y))
        y = conv(self.channels, 3, 1, name="conv2")(y)
        y = batch_norm(train, self.axis_name, name="norm2")(y)
        return relu(y + self._skip(x, train))

    def _skip(self, x: Array, train: bool) -> Array:
        if self.stride == 1 and x.shape[-1] == self.channels:
            return x
        if self.shortcut == "a":
            extra = self.channels - x.shape[-1]
            return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, extra)))
        x = conv(self.channels, 1, self.stride, name="shortcut_conv")(x)
        return batch_norm(train, self.axis_name, name="shortcut_norm")(x)


class ResNet(nn.Module):
    """Stem, three stages of widths 1, 2 and 4 times `width`, average pooling, linear outputs."""

    blocks: int  # n, per stage
    num_classes: int
    width: int
    shortcut: str
    head_grid: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map images [B, H, W, c] to logits [B, C]."""
        x = conv(self.width, 3, 1, name="stem_conv")(x)
        x = relu(batch_norm(train, self.axis_name, name="stem_norm")(x))
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = BasicBlock(self.width << stage, stride, self.shortcut, self.axis_name, name=name)(x, train)
        x = average_pool_to_grid(x, self.head_grid)
        return nn.Dense(self.num_classes, name="output")(x.reshape(x.shape[0], -1))


def resnet(
    depth: int,
    /,
    *,
    num_classes: int,
    width: int = 16,
    shortcut: Literal["a", "b"] = "a",
    head_grid: int = 1,
    axis_name: str | None = None,
) -> Student:
    """Build a CIFAR ResNet of `depth` = 6n + 2 layers.

    Args:
      depth: 8, 20, 32, ...
      num_classes: C.
      width: channels of the first stage; the others have 2 and 4 times as many.
      shortcut: where the shape changes, "a" subsamples and appends zero channels, without parameters; "b" is a
        1x1 convolution and BatchNorm.
      head_grid: the final map is averaged over head_grid x head_grid cells, then flattened; 1 is global
        pooling. The released code of L2T-DLN is width 64, shortcut "b", head_grid 2: 1024 features.
      axis_name: mapped axis over which BatchNorm averages its batch statistics as well.

    Returns:
      A student of images [B, H, W, c] and logits [B, C].

    Raises:
      ValueError: the depth is not 6n + 2, a size is below 1, the shortcut is unknown, or, when first applied,
        the final feature map does not divide into the grid.

    Source: He et al. 2016, section 4.2. Which side option A pads is not stated and only permutes channels; the
    zeros come last here. The output layer keeps linen's default initialisation.
    """
    require_depth(depth, 2)
    known(f"shortcut {shortcut!r}", shortcut, SHORTCUTS)
    require_positive(num_classes=num_classes, width=width, head_grid=head_grid)
    return from_linen(ResNet((depth - 2) // 6, num_classes, width, shortcut, head_grid, axis_name))
