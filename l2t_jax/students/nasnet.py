"""NASNet-A: two cells that a search found, stacked for CIFAR and for ImageNet.

Legend: B batch, H and W height and width in pixels, c channels, C classes, F channels of a part of the first cells.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from l2t_jax.students.layers import (
    Conv,
    average_pool_3x3,
    batch_norm,
    conv,
    drop_path,
    from_linen,
    max_pool_3x3,
    relu,
    require_positive,
    require_probability,
)
from l2t_jax.types import Array, Key, Student

STACKS = 3  # of normal cells, with a reduction cell before each but the first
STEMS = 2  # reduction cells before the first stack, of images of some 224 x 224 pixels
# Sums of two operations on the states, of which 0 is the input, 1 the cell before and 2 on the sums made so far. Those
# in CONCATENATED leave the cell, in this order.
NORMAL = (
    (("separable5", 0), ("separable3", 1)),
    (("separable5", 1), ("separable3", 1)),
    (("average", 0), ("same", 1)),
    (("average", 1), ("average", 1)),
    (("separable3", 0), ("same", 0)),
)
REDUCTION = (
    (("separable5", 0), ("separable7", 1)),
    (("max", 0), ("separable7", 1)),
    (("average", 0), ("separable5", 1)),
    (("same", 3), ("average", 2)),
    (("separable3", 2), ("max", 0)),
)
CONCATENATED = {False: (1, 2, 3, 4, 5, 6), True: (3, 4, 5, 6)}  # of a normal cell, of a reduction cell


class Separable(nn.Module):
    """Twice: ReLU, a convolution of each channel by itself, a 1x1 convolution, norm. The first one is strided."""

    channels: int
    kernel: int
    stride: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map [B, H, W, c] to [B, ceil(H / stride), ceil(W / stride), channels]."""
        for i, stride in enumerate((self.stride, 1), start=1):
            wide = x.shape[-1]
            x = Conv(wide, self.kernel, stride, "SAME", groups=wide, name=f"depthwise_conv{i}")(relu(x))
            x = batch_norm(train, self.axis_name, name=f"norm{i}")(Conv(self.channels, 1, name=f"conv{i}")(x))
        return x


class Cell(nn.Module):
    """Five sums of two operations, each on the input, on the cell before, or on a sum; those left over concatenated."""

    channels: int  # of a part
    reduction: bool
    drop_path: float  # probability of an operation to be left out
    place: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, before: Array | None, train: bool, keys: Key | None) -> Array:
        """Map [B, H, W, c], and the cell before that, to [B, H, W, 6 channels]; a reduction to half H, W and 4."""
        states = [self._projected(relu(x), "input", train), x if before is None else self._fitted(before, x, train)]
        for i, pair in enumerate(REDUCTION if self.reduction else NORMAL):
            operands = [
                self._operation(kind, states[state], 2 if self.reduction and state < 2 else 1, f"sum{i + 1}_{j}", train)
                for j, (kind, state) in enumerate(pair, start=1)
            ]
            for j, (kind, _) in enumerate(pair):
                if kind != "same":
                    operands[j] = drop_path(operands[j], self.drop_path, keys, 10 * self.place + 2 * i + j)
            states.append(operands[0] + operands[1])
        kept = CONCATENATED[self.reduction]
        if 1 in kept and states[1].shape[-1] != self.channels:
            states[1] = self._projected(states[1], "rest", train)
        return jnp.concatenate([states[i] for i in kept], axis=-1)

    def _operation(self, kind: str, x: Array, stride: int, name: str, train: bool) -> Array:
        if kind.startswith("separable"):
            return Separable(self.channels, int(kind[-1]), stride, self.axis_name, name=name)(x, train)
        pool: dict[str, Callable[[Array], Array]] = {
            "max": lambda x: max_pool_3x3(x, stride, same=True),
            "average": lambda x: average_pool_3x3(x, stride),
            "same": lambda x: x,
        }
        fits = x.shape[-1] == self.channels
        x = pool[kind](relu(x) if kind == "same" and not fits else x)
        return x if fits else self._projected(x, name, train)

    def _projected(self, x: Array, name: str, train: bool) -> Array:
        return batch_norm(train, self.axis_name, name=f"{name}_norm")(Conv(self.channels, 1, name=f"{name}_conv")(x))

    def _fitted(self, before: Array, x: Array, train: bool) -> Array:
        """The cell before, in the size of x and with the channels of a part."""
        if before.shape[1:3] == x.shape[1:3]:
            fits = before.shape[-1] == self.channels
            return before if fits else self._projected(relu(before), "before", train)
        before = relu(before)
        shifted = jnp.pad(before[:, 1:, 1:], ((0, 0), (0, 1), (0, 1), (0, 0)))
        halves = [
            Conv(self.channels // 2 + i * (self.channels % 2), 1, name=f"before_conv{i + 1}")(half[:, ::2, ::2])
            for i, half in enumerate((before, shifted))
        ]
        return batch_norm(train, self.axis_name, name="before_norm")(jnp.concatenate(halves, axis=-1))


class NASNet(nn.Module):
    """Stem, three stacks of normal cells with a reduction cell between, ReLU, average pooling, linear outputs."""

    stems: int  # reduction cells before the first stack, and 0 for images of some 32 x 32 pixels
    cells: int  # of a stack
    num_classes: int
    width: int
    drop_path: float
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool, keys: Key | None = None) -> Array:
        """Map images [B, H, W, c] to logits [B, C]; with keys [B] operations are left out."""
        first = Conv(32, 3, 2, name="stem_conv") if self.stems else conv(3 * self.width, 3, 1, name="stem_conv")
        x = first(x)
        x, before = batch_norm(train, self.axis_name, name="stem_norm")(x), None

        cells = [(f"stem_cell{stem}", self.width * 2**stem // 8, True) for stem in range(1, self.stems + 1)]
        for stack in range(STACKS):
            channels = self.width << stack
            cells += [(f"reduction{stack}", channels, True)] if stack else []
            cells += [(f"stack{stack + 1}_cell{i}", channels, False) for i in range(1, self.cells + 1)]
        for place, (name, channels, reduction) in enumerate(cells):
            rate = self.drop_path * (place + 1) / len(cells)  # the deeper, the more often
            cell = Cell(channels, reduction, rate, place, self.axis_name, name=name)
            x, before = cell(x, before, train, keys), x
        return nn.Dense(self.num_classes, name="output")(relu(x).mean((1, 2)))


def nasnet(
    *, num_classes: int, cells: int = 6, width: int = 32, drop_path: float = 0.0, axis_name: str | None = None
) -> Student:
    """Build NASNet-A for images of some 32 x 32 pixels, N @ 24 F: N normal cells a stack, 24 F channels at the end.

    Args:
      num_classes: C.
      cells: N, normal cells of each of three stacks.
      width: F, channels of a part of a cell in the first stack; each stack has twice those of the one before.
      drop_path: probability of an operation of the last cell to be left out in training, of an example as a whole;
        that of cell i of n is i / n times as much. The paper's is 0.4.
      axis_name: mapped axis over which BatchNorm averages its batch statistics as well.

    Returns:
      A student of images [B, H, W, c] and logits [B, C]. 6 @ 768 has 3 346 538 parameters with 10 classes.

    Raises:
      ValueError: a size is below 1, or drop_path is not in [0, 1).

    Source: Zoph et al. 2018, in the form of the authors' TensorFlow code. Pooling and strided convolutions pad as
    there, on the right first, and averages are of what is inside the image. Two things are left out: the auxiliary
    head, and that drop-path grows with the steps, for a student does not know how long it is trained. BatchNorm takes
    a tenth of each batch's statistics, as all of ours.
    """
    require_positive(num_classes=num_classes, cells=cells, width=width)
    require_probability(drop_path=drop_path)
    return from_linen(NASNet(0, cells, num_classes, width, drop_path, axis_name), draws=drop_path > 0)


def nasnet_mobile(
    *, num_classes: int, cells: int = 4, width: int = 44, drop_path: float = 0.0, axis_name: str | None = None
) -> Student:
    """Build NASNet-A for images of some 224 x 224 pixels, whose stem divides sides by 8: the mobile network, 4 @ 1056.

    Args:
      num_classes: C.
      cells: N, normal cells of each of three stacks.
      width: F, channels of a part of a cell in the first stack, a multiple of 4; each stack has twice those of the one
        before.
      drop_path: as of `nasnet`. The paper's is 0 for this network.
      axis_name: mapped axis over which BatchNorm averages its batch statistics as well.

    Returns:
      A student of images [B, H, W, c] and logits [B, C]. With 1000 classes 5 289 978 parameters.

    Raises:
      ValueError: a size is below 1, width is no multiple of 4, drop_path is not in [0, 1), or, when first applied,
        images are smaller than 3 x 3.

    Source: as of `nasnet`.
    """
    require_positive(num_classes=num_classes, cells=cells, width=width)
    require_probability(drop_path=drop_path)
    if width % 4:
        near = width + -width % 4
        raise ValueError(f"width={width} is not a multiple of 4: the first cell has a quarter of it, use {near}.")
    return from_linen(NASNet(STEMS, cells, num_classes, width, drop_path, axis_name), draws=drop_path > 0)
