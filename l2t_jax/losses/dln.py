"""The dynamic loss network (DLN): a small network that scores pairs (right class, wrong class) and is the loss.

Legend: B batch, C classes, F input features of a pair (2 or 4), P loss parameters.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2t_jax.inputs import known
from l2t_jax.losses.common import check_classes, make_loss
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.types import Array, Key, Loss, PyTree

SQUASH = {
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "identity": lambda outputs: outputs,
}
REDUCTION = {
    "mean": lambda classes: 1 / classes,  # over C rows, the zero row of the right class included: released code
    "mean_pairs": lambda classes: 1 / (classes - 1),
    "sum": lambda classes: 1.0,
}
INPUTS = {"released": 4, "paper": 2}  # form -> F
HIDDEN = (40, 40, 40, 40)
SLOPE = 0.01  # of LeakyReLU


class Layer(NamedTuple):
    """One linear layer; `bias` is () where there is none, so that it has no leaves."""

    kernel: Array  # [inputs, outputs]
    bias: Array | tuple[()]  # [outputs]


def dln(
    *,
    form: str = "released",
    squash: str = "sigmoid",
    reduction: str = "mean",
    residual: bool = False,
    compress: float = 0.0,
) -> Loss:
    """Build the dynamic loss network of L2T-DLN, 1-vs-1 over any number of classes.

    l(z, y) = r * sum_{j != y} DLN(pair(s_y, s_j)), s = squash(z).

    Args:
      form: "released": pair = [s_y, s_j, 1, 0], no bias, 5000 parameters; "paper": pair = [s_y, s_j], biases, 5081.
      squash: what makes predictions of logits: "sigmoid" (released), "softmax", "log_softmax" (with which a loss can
        take cross entropy back where predictions are certain, as derivatives of the others vanish there) or "identity".
      reduction: r: "mean" = 1/C (released: the zero row of class y is counted), "mean_pairs" = 1/(C-1), "sum" = 1.
      residual: add cross entropy and start from a zero last layer, so that the loss begins as cross entropy and the
        network learns a correction to it. Not in the paper.
      compress: c > 0 takes c asinh(v / c) for the value v of a pair: v where it is small, sign(v) c log(2 |v| / c)
        where it is large, so that its range grows slowly however far a teacher goes; 0 leaves v as it is. Not in the
        paper.
    Returns:
      a `Loss`; its losses [B] may be negative, as the output is linear.
    Raises:
      ValueError: an unknown form, squash or reduction, or a `compress` that is negative or not finite.
    Source: L2T-DLN (NeurIPS 2023), 5.2 and Visualization: five linear layers, 40 units, LeakyReLU, Kaiming-normal.
    The paper names neither inputs nor biases; the released code has the 4-input, bias-free form. In that form
    DLN(0) = 0, so its zero row for class y adds nothing, and leaving it out is the same function.
    """
    for name, value, names in (
        ("form", form, INPUTS),
        ("squash", squash, SQUASH),
        ("reduction", reduction, REDUCTION),
    ):
        known(f"DLN {name} {value!r}", value, names)
    if not 0 <= compress < math.inf:
        raise ValueError(f"DLN compress {compress} must be a positive, finite number, or 0 for none.")

    def init(key: Key) -> PyTree:
        layers = init_network(key, form)
        return (*layers[:-1], jax.tree.map(jnp.zeros_like, layers[-1])) if residual else layers

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        check_classes(outputs, targets)
        classes = outputs.shape[-1]
        s = SQUASH[squash](outputs)  # [B, C]
        right = jnp.take_along_axis(s, targets[..., None], axis=-1)  # [B, 1]
        values = pair_value(params, jnp.broadcast_to(right, s.shape), s, compress)  # [B, C]
        wrong = targets[..., None] != jnp.arange(classes)  # [B, C]
        losses = REDUCTION[reduction](classes) * jnp.sum(jnp.where(wrong, values, 0), axis=-1)  # [B]
        return losses + cross_entropy(outputs, targets) if residual else losses

    return make_loss(losses_of, init=init)


def init_network(key: Key, form: str) -> tuple[Layer, ...]:
    """Draw the network: kernels N(0, 2 / ((1 + slope^2) fan_out)), biases U(-1, 1) / sqrt(fan_in).

    fan_out is the released code's mode; the law of the biases (paper form only) is not published and is ours: the
    default of the framework the authors used.
    """
    sizes = (INPUTS[form], *HIDDEN, 1)
    layers = []
    for k, fan_in, fan_out in zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True):
        k_kernel, k_bias = jax.random.split(k)
        std = math.sqrt(2 / (1 + SLOPE**2) / fan_out)
        kernel = std * jax.random.normal(k_kernel, (fan_in, fan_out))
        bound = 1 / math.sqrt(fan_in)
        bias = jax.random.uniform(k_bias, (fan_out,), minval=-bound, maxval=bound) if form == "paper" else ()
        layers.append(Layer(kernel, bias))
    return tuple(layers)


def surface(params: PyTree, squash: str, points: int, compress: float = 0.0) -> Array:
    """DLN value of every pair of predictions from 0 to 1, right class first: [points, points], as in Figure 3.

    Under "log_softmax" the network sees logarithms: those of predictions below 1e-3 are drawn as that of 1e-3.
    """
    axis = jnp.linspace(0, 1, points)
    seen = jnp.log(jnp.maximum(axis, 1e-3)) if squash == "log_softmax" else axis
    right, wrong = jnp.meshgrid(seen, seen, indexing="ij")
    return pair_value(params, right, wrong, compress)


def pair_value(params: PyTree, right: Array, wrong: Array, compress: float = 0.0) -> Array:
    """DLN value of pairs: the surface of Figure 3.

    Args:
      params: layers of `init_network`; the form is read from the first kernel.
      right: squashed prediction of the right class, any shape.
      wrong: squashed prediction of a wrong class, same shape.
      compress: see `dln`.
    Returns:
      values, same shape.
    """
    features = [right, wrong]
    if params[0].kernel.shape[0] == INPUTS["released"]:
        features += [jnp.ones_like(right), jnp.zeros_like(right)]  # the label bits of the released code
    x = jnp.stack(features, axis=-1)  # [..., F]
    for depth, layer in enumerate(params):
        x = x @ layer.kernel
        if not isinstance(layer.bias, tuple):
            x = x + layer.bias
        if depth < len(params) - 1:
            x = jax.nn.leaky_relu(x, SLOPE)
    value = x[..., 0]
    return compress * jnp.arcsinh(value / compress) if compress else value
