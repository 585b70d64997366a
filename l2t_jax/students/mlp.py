"""The multi-layer perceptron of the MNIST experiments."""

from flax import linen as nn

from l2t_jax.students.layers import from_linen, require_positive
from l2t_jax.types import Array, Student

_glorot = nn.initializers.glorot_uniform()


class MLP(nn.Module):
    """Flatten, one hidden tanh layer, linear outputs."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map inputs [B, ...] to logits [B, C]; `train` changes nothing."""
        x = x.reshape(x.shape[0], -1)
        x = nn.tanh(nn.Dense(self.width, kernel_init=_glorot, name="hidden")(x))
        return nn.Dense(self.num_classes, kernel_init=_glorot, name="output")(x)


def mlp(*, num_classes: int, width: int = 500) -> Student:
    """Build the one-hidden-layer perceptron, f(x) = W2 tanh(W1 x + b1) + b2.

    Args:
      num_classes: C.
      width: hidden units; 500 gives the 397 510 parameters of 784-500-10.

    Returns:
      A student of inputs [B, ...] (flattened) and logits [B, C].

    Raises:
      ValueError: a size is below 1.

    Source: the MNIST demo of L2T-DLF (NeurIPS 2018) for the size and tanh. Glorot & Bengio 2010
    initialisation, which is made for tanh, in both layers, as the papers state none.
    """
    require_positive(num_classes=num_classes, width=width)
    return from_linen(MLP(num_classes, width))
