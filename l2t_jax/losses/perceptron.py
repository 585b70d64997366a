"""A small multi-layer perceptron, ReLU between its layers: the networks of learned losses."""

from collections.abc import Callable, Sequence

import jax

from l2t_jax.losses.dln import Layer
from l2t_jax.types import Array, Key


def init_layers(key: Key, sizes: Sequence[int], bound: Callable[[int, int], float], *, bias: bool) -> tuple[Layer, ...]:
    """Draw every entry of a layer from U(-1, 1) * bound(fan_in, fan_out).

    Args:
      key: random key.
      sizes: units of the input, of every hidden layer and of the output.
      bound: of a layer's kernel and bias.
      bias: whether layers have one.
    Returns:
      layers with kernels [inputs, outputs] and biases [outputs] or ().
    """
    layers = []
    for k, fan_in, fan_out in zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True):
        k_kernel, k_bias = jax.random.split(k)
        limit = bound(fan_in, fan_out)
        kernel = jax.random.uniform(k_kernel, (fan_in, fan_out), minval=-limit, maxval=limit)
        drawn = jax.random.uniform(k_bias, (fan_out,), minval=-limit, maxval=limit) if bias else ()
        layers.append(Layer(kernel, drawn))
    return tuple(layers)


def run_layers(layers: tuple[Layer, ...], x: Array) -> Array:
    """Map x [..., inputs] to [..., outputs], linear at the end."""
    for depth, layer in enumerate(layers):
        x = x @ layer.kernel
        if not isinstance(layer.bias, tuple):
            x = x + layer.bias
        if depth < len(layers) - 1:
            x = jax.nn.relu(x)
    return x
