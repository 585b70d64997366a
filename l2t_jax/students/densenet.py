"""The densely connected networks for CIFAR, with bottlenecks and compression (DenseNet-BC): 6n + 4 layers.

Legend: B batch, H and W height and width in pixels, c channels, C classes, k growth.
"""

import jax.numpy as jnp
from flax import linen as nn

from l2t_jax.students.layers import (
    average_pool,
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

BLOCKS, BOTTLENECK, COMPRESSION = 3, 4, 2  # channels of a bottleneck in k; by what a transition divides them


class DenseNet(nn.Module):
    """Stem, three blocks of n bottlenecks with a transition after each but the last, norm, ReLU, mean, outputs."""

    layers: int  # n, per block
    num_classes: int
    growth: int
    dropout: float
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool, keys: Key | None = None) -> Array:
        """Map images [B, H, W, c] to logits [B, C]; with keys [B] entries are dropped out."""

        def activated(x: Array, name: str) -> Array:
            return relu(batch_norm(train, self.axis_name, name=name)(x))

        place = 0

        def dropped(x: Array) -> Array:
            nonlocal place
            place += 1
            return dropout(x, self.dropout, keys, place)

        x = conv(2 * self.growth, 3, 1, name="stem_conv")(x)
        for block in range(1, BLOCKS + 1):
            for layer in range(1, self.layers + 1):
                name = f"block{block}_layer{layer}"
                y = conv(BOTTLENECK * self.growth, 1, 1, name=f"{name}_conv1")(activated(x, f"{name}_norm1"))
                y = conv(self.growth, 3, 1, name=f"{name}_conv2")(activated(dropped(y), f"{name}_norm2"))
                x = jnp.concatenate([x, dropped(y)], axis=-1)
            if block < BLOCKS:
                name = f"transition{block}"
                x = conv(x.shape[-1] // COMPRESSION, 1, 1, name=f"{name}_conv")(activated(x, f"{name}_norm"))
                x = average_pool(dropped(x))
        return nn.Dense(self.num_classes, name="output")(activated(x, "norm").mean((1, 2)))


def densenet(
    *, num_classes: int, depth: int = 100, growth: int = 12, dropout: float = 0.0, axis_name: str | None = None
) -> Student:
    """Build DenseNet-BC: each layer reads what all layers of its block before it have put out.

    A layer maps x to (x, conv3x3(act(conv1x1(act(x))))), where act is relu(norm(.)).

    Args:
      num_classes: C.
      depth: layers, 6n + 4: 10, 40, 100, 190, ...
      growth: k, the channels that a layer adds; the stem has 2k and a bottleneck 4k.
      dropout: probability of an entry after a convolution to be dropped in training; the paper's is 0.2 without
        augmentation.
      axis_name: mapped axis over which BatchNorm averages its batch statistics as well.

    Returns:
      A student of images [B, H, W, c] and logits [B, C]. With 10 classes DenseNet-BC (100, 12) has 769 162 parameters,
      that of the papers, (190, 40), 25 624 430.

    Raises:
      ValueError: the depth is not 6n + 4, a size is below 1, or dropout is not in [0, 1).

    Source: Huang et al. 2017; a transition halves channels, rounded down, and pixels. The output layer keeps linen's
    default initialisation.
    """
    require_depth(depth, 4)
    require_positive(num_classes=num_classes, growth=growth)
    require_probability(dropout=dropout)
    return from_linen(DenseNet((depth - 4) // 6, num_classes, growth, dropout, axis_name), draws=dropout > 0)
