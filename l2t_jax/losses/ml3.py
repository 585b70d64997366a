"""The learned loss of ML3: a small network that sees the prediction and the label of one class at a time."""

import math

import jax
import jax.numpy as jnp

from l2t_jax.losses.common import check_classes, make_loss
from l2t_jax.losses.perceptron import init_layers, run_layers
from l2t_jax.types import Array, Key, Loss, PyTree

SIZES = (2, 50, 50, 1)


def ml3() -> Loss:
    """Build sum_j softplus(MLP(p_j, onehot(y)_j)), p = softmax(z).

    Returns:
      a `Loss` whose parameters are the layers 2-50-50-1 of the network, ReLU, without biases: 2650 numbers.
    Source: Bechtle et al., ICPR 2021; layers and Glorot-uniform initialisation are those of the released code. There
    f(x) is the output of a regression; softmax probabilities, and one network that is summed over the classes, are
    how it is used in classification here, and that is ours.
    """

    def init(key: Key) -> PyTree:
        return init_layers(key, SIZES, lambda fan_in, fan_out: math.sqrt(6 / (fan_in + fan_out)), bias=False)

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        check_classes(outputs, targets)
        labels = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
        pairs = jnp.stack([jax.nn.softmax(outputs), labels], axis=-1)  # [B, C, 2]
        return jnp.sum(jax.nn.softplus(run_layers(params, pairs)[..., 0]), axis=-1)

    return make_loss(losses_of, init=init)
