"""LeNet-5 with rectifiers and max-pooling."""

from flax import linen as nn

from l2t_jax.students.layers import Conv, dense, from_linen, max_pool, pad_to, relu, require_positive
from l2t_jax.types import Array, Student


class LeNet(nn.Module):
    """Two 5x5 convolutions with 2x2 max-pooling, two hidden dense layers, linear outputs."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map images [B, H, W, c] to logits [B, C]; `train` changes nothing."""
        x = pad_to(x, 32)
        for i, channels in enumerate((self.width, round(self.width * 16 / 6)), start=1):
            conv = Conv(channels, 5, use_bias=True, name=f"conv{i}")
            x = max_pool(relu(conv(x)))
        x = x.reshape(x.shape[0], -1)
        for i, units in enumerate((20 * self.width, 14 * self.width), start=1):
            x = relu(dense(units, name=f"dense{i}")(x))
        return nn.Dense(self.num_classes, name="output")(x)


def lenet(*, num_classes: int, width: int = 6) -> Student:
    """Build LeNet-5: conv 6, conv 16, dense 120, dense 84, outputs.

    Args:
      num_classes: C.
      width: channels of the first convolution; the other widths keep the proportions 6 : 16 : 120 : 84.

    Returns:
      A student of images [B, H, W, c], zero-padded to 32x32 where smaller, and logits [B, C]. With width
      6 and 28x28x1 images it has 61 706 parameters.

    Raises:
      ValueError: a size is below 1.

    Source: LeCun et al. 1998, whose images are 32x32 too; ReLU and max-pooling in place of their sigmoids and
    trainable averages, as is usual now. The L2T papers say "LeNet" and no more.
    """
    require_positive(num_classes=num_classes, width=width)
    return from_linen(LeNet(num_classes, width))
