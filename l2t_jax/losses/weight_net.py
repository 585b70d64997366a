"""The loss of Meta-Weight-Net: cross entropy times a weight that a small network makes of it."""

import math

import jax

from l2t_jax.losses.common import make_loss
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.losses.perceptron import init_layers, run_layers
from l2t_jax.types import Array, Key, Loss, PyTree


def weight_net(*, units: int = 100) -> Loss:
    """Build V(l) l, l = cross entropy, V: 1 - units - 1 with ReLU and a sigmoid; no derivative through V's input.

    Args:
      units: of V's hidden layer.
    Returns:
      a `Loss` whose parameters are the two layers of V; its losses [B] lie between 0 and cross entropy.
    Raises:
      ValueError: there are no units.
    Source: Shu et al., NeurIPS 2019. From the released code: V's input is a constant to the student, losses are not
    divided by the sum of weights, and V starts by the framework's default, U(-1, 1) / sqrt(fan_in), biases too.
    """
    if not isinstance(units, int) or units < 1:
        raise ValueError(f"weight_net units={units!r} is not a positive integer: give units at least 1.")

    def init(key: Key) -> PyTree:
        return init_layers(key, (1, units, 1), lambda fan_in, fan_out: 1 / math.sqrt(fan_in), bias=True)

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        plain = cross_entropy(outputs, targets)
        return weight_of(params, jax.lax.stop_gradient(plain)) * plain

    return make_loss(losses_of, init=init)


def weight_of(params: PyTree, losses: Array) -> Array:
    """V(l), the weights in (0, 1) of losses of any shape."""
    return jax.nn.sigmoid(run_layers(params, losses[..., None])[..., 0])
