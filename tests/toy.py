"""A small problem with BatchNorm that exact derivatives are checked on. B = 6, V = 7, 5 inputs, 3 classes."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from l2t_jax.students import from_linen
from l2t_jax.types import Batch, Task

CLASSES = 3


class Network(nn.Module):
    """Dense, BatchNorm, tanh, Dense: everything that makes a derivative go wrong, and smooth."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name="hidden")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(CLASSES, name="output")(jnp.tanh(x))


student = from_linen(Network())
task = Task(
    error=optax.softmax_cross_entropy_with_integer_labels,
    metrics=lambda outputs, targets: {"accuracy": jnp.argmax(outputs, -1) == targets},
    gather=lambda data, indices, key: jax.tree.map(lambda x: x[indices], data),
)


def batch(key, *shape):
    """Random examples, leaves [*shape, ...]."""
    k_inputs, k_targets = jax.random.split(jax.random.key(key))
    return Batch(jax.random.normal(k_inputs, (*shape, 5)), jax.random.randint(k_targets, shape, 0, CLASSES))


def to_x64(tree):
    """Floating leaves in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
