"""The wide residual networks for CIFAR: 6n + 4 layers, BatchNorm and ReLU before each convolution.

Legend: B batch, H and W height and width in pixels, c channels, C classes, k width.
"""

from flax import linen as nn

from l2t_jax.students.layers import (
    batch_norm,
    conv,
    dropout,
    from_linen,
    relu,
    require_depth,
    require_positive,
    require_probability,
)
from l2t_jax.types import Array, Key, Student

FIRST = 16  # channels of the stem


class WideBlock(nn.Module):
    """conv(drop(act(conv(act(x))))) + x with act = relu(norm(.)); where shapes differ, a 1x1 convolution of act(x)."""

    channels: int
    stride: int
    dropout: float
    place: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool, keys: Key | None) -> Array:
        """Map [B, H, W, c] to [B, H / stride, W / stride, channels]."""
        before = relu(batch_norm(train, self.axis_name, name="norm1")(x))
        y = conv(self.channels, 3, self.stride, name="conv1")(before)
        y = relu(batch_norm(train, self.axis_name, name="norm2")(y))
        y = conv(self.channels, 3, 1, name="conv2")(dropout(y, self.dropout, keys, self.place))
        if self.stride > 1 or x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.stride, name="shortcut_conv")(before)
        return x + y


class WideResNet(nn.Module):
    """Stem, three stages of 16k, 32k and 64k channels, norm, ReLU, average pooling, linear outputs."""

    blocks: int  # n, per stage
    num_classes: int
    width: int
    dropout: float
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool, keys: Key | None = None) -> Array:
        """Map images [B, H, W, c] to logits [B, C]; with keys [B] entries are dropped out."""
        x = conv(FIRST, 3, 1, name="stem_conv")(x)
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name, place = f"stage{stage + 1}_block{block + 1}", stage * self.blocks + block
                channels = FIRST * self.width << stage
                x = WideBlock(channels, stride, self.dropout, place, self.axis_name, name=name)(x, train, keys)
        x = relu(batch_norm(train, self.axis_name, name="norm")(x))
        return nn.Dense(self.num_classes, name="output")(x.mean((1, 2)))


def wide_resnet(
    *, num_classes: int, depth: int = 28, width: int = 10, dropout: float = 0.0, axis_name: str | None = None
) -> Student:
    """Build the wide ResNet WRN-depth-k.

    Args:
      num_classes: C.
      depth: layers, 6n + 4: 10, 16, 28, 40, ...
      width: k, the channels of the stages in 16, 32 and 64.
      dropout: probability of an entry between a block's convolutions to be dropped in training; the paper's is 0.3.
      axis_name: mapped axis over which BatchNorm averages its batch statistics as well.

    Returns:
      A student of images [B, H, W, c] and logits [B, C]. WRN-28-10 has 36 479 194 parameters with 10 classes.

    Raises:
      ValueError: the depth is not 6n + 4, a size is below 1, or dropout is not in [0, 1).

    Source: Zagoruyko & Komodakis 2016. The papers do not say which one they take; WRN-40-10 has the published errors,
    WRN-28-10 is the usual one. As in the authors' code the 1x1 convolution of a shortcut reads the activated input.
    The output layer keeps linen's default initialisation.
    """
    require_depth(depth, 4)
    require_positive(num_classes=num_classes, width=width)
    require_probability(dropout=dropout)
    return from_linen(WideResNet((depth - 4) // 6, num_classes, width, dropout, axis_name), draws=dropout > 0)
