"""The multi-layer perceptron of the MNIST experiments."""

from flax import linen as nn

from l2t_jax.students.layers import dropout, from_linen, require_positive, require_probability
from l2t_jax.types import Array, Key, Student

_glorot = nn.initializers.glorot_uniform()


class MLP(nn.Module):
    """Flatten, one hidden tanh layer, linear outputs."""

    num_classes: int
    width: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool, keys: Key | None = None) -> Array:
        """Map inputs [B, ...] to logits [B, C]; with keys [B] hidden units are dropped out."""
        x = x.reshape(x.shape[0], -1)
        x = nn.tanh(nn.Dense(self.width, kernel_init=_glorot, name="hidden")(x))
        x = dropout(x, self.dropout, keys, 0)
        return nn.Dense(self.num_classes, kernel_init=_glorot, name="output")(x)


def mlp(*, num_classes: int, width: int = 500, dropout: float = 0.0) -> Student:
    """Build the one-hidden-layer perceptron, f(x) = W2 tanh(W1 x + b1) + b2.

    Args:
      num_classes: C.
      width: hidden units; 500 gives the 397 510 parameters of 784-500-10.
      dropout: probability of a hidden unit to be dropped in training.

    Returns:
      A student of inputs [B, ...] (flattened) and logits [B, C].

    Raises:
      ValueError: a size is below 1, or dropout is not in [0, 1).

    Source: the MNIST demo of L2T-DLF (NeurIPS 2018) for the size and tanh. Glorot & Bengio 2010
    initialisation, which is made for tanh, in both layers, as the papers state none.
    """
    require_positive(num_classes=num_classes, width=width)
    require_probability(dropout=dropout)
    return from_linen(MLP(num_classes, width, dropout), draws=dropout > 0)
