"""The loss of deep interactions: cross entropy times a weight that a small network makes of features and label."""

import math

import jax
import jax.numpy as jnp

from l2t_jax.losses.common import check_classes, make_loss
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.losses.perceptron import init_layers, run_layers
from l2t_jax.types import Array, Head, Key, Loss, PyTree


def deep_weight(*, num_classes: int, features: int, units: int = 256) -> Loss:
    """Build w(f, y) l, l = cross entropy, w = 2 sigmoid(v ReLU(W f / rms(f) + e_y + b)): no derivative through f in w.

    All of W, e, v start at random: where e and v were zero, so that it began as cross entropy, it learned too slowly.

    Args:
      num_classes: C, rows of e.
      features: F of the `Head`.
      units: of the hidden layer.
    Returns:
      a `Loss` that reads a `Head`; its losses [B] lie between 0 and twice cross entropy.
    Raises:
      ValueError: an argument is no positive integer.
    Source: see `deep_interactions`; the shape is ours.
    """
    for name, value in (("num_classes", num_classes), ("features", features), ("units", units)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"deep_interactions {name}={value!r} is not a positive integer: give {name} at least 1.")

    def init(key: Key) -> PyTree:
        k_layers, k_label = jax.random.split(key)
        hidden, output = init_layers(k_layers, (features, units, 1), lambda fan_in, _: 1 / math.sqrt(fan_in), bias=True)
        label = jax.random.uniform(k_label, (num_classes, units), minval=-1)
        return {"hidden": hidden, "label": label, "output": output}

    def losses_of(params: PyTree, outputs: Head, targets: Array) -> Array:
        check_classes(outputs, targets)
        plain = cross_entropy(outputs.features @ outputs.kernel + outputs.bias, targets)
        return weight_of(params, outputs.features, targets) * plain

    return make_loss(losses_of, init=init, reads="head")


def weight_of(params: PyTree, features: Array, targets: Array) -> Array:
    """w(f, y) in (0, 2) of features [B, F], which are constants here, and labels [B]."""
    seen = jax.lax.stop_gradient(features)
    # A student may have no active feature at all.
    size = jnp.sqrt(jnp.maximum(jnp.mean(seen**2, axis=-1, keepdims=True), jnp.finfo(seen.dtype).tiny))
    hidden = run_layers((params["hidden"],), seen / size) + params["label"][targets]
    return 2 * jax.nn.sigmoid(run_layers((params["output"],), jax.nn.relu(hidden))[..., 0])
