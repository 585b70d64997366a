"""A small problem with BatchNorm that exact derivatives are checked on. B = 6, V = 7, 5 inputs, 3 classes."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from l2t_jax.losses import LOSSES
from l2t_jax.methods.parts import is_of_classes
from l2t_jax.students import from_linen
from l2t_jax.types import Batch, Loss, Task, Teacher

CLASSES = 3
OF_CLASSES = [name for name, build in LOSSES.items() if is_of_classes(build())]  # losses of rows that are classified


class Network(nn.Module):
    """Dense, BatchNorm, tanh, Dense: everything that makes a derivative go wrong, and smooth."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name="hidden")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm")(x)
        return nn.Dense(CLASSES, name="output")(jnp.tanh(x))


student = from_linen(Network())
task = Task(
    error=optax.softmax_cross_entropy_with_integer_labels,
    metrics=lambda outputs, targets: {"accuracy": jnp.argmax(outputs, -1) == targets},
    gather=lambda data, indices, keys: jax.tree.map(lambda x: x[indices], data),
)


def small_loss():
    """Cross entropy scaled and bent by two parameters: a loss whose every derivative is alive."""

    def apply(params, outputs, targets):
        plain = task.error(outputs, targets)
        return jax.nn.softplus(params["scale"]) * plain + params["bend"] * jnp.tanh(plain) ** 2

    return Loss(lambda key: {"scale": jnp.array(0.5), "bend": jnp.array(0.1)}, apply)


def _teach(tau, hidden, hypergradient, phi):
    hidden = jax.tree.map(lambda h, d: 0.5 * h + d, hidden, hypergradient)
    return jax.tree.map(lambda h: -jnp.exp(tau["log_rate"]) * h, hidden), hidden


# A learned rate and a hidden state: all that an LSTM has, and compiled sooner than one.
teacher = Teacher(lambda key: {"log_rate": jnp.array(-2.0)}, lambda phi: jax.tree.map(jnp.zeros_like, phi), _teach)

# Keeps tau as it is and the teacher gradient as its state, so that a test can read it.
READ_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def batch(key, *shape):
    """Random examples, leaves [*shape, ...]."""
    k_inputs, k_targets = jax.random.split(jax.random.key(key))
    return Batch(jax.random.normal(k_inputs, (*shape, 5)), jax.random.randint(k_targets, shape, 0, CLASSES))


def to_x64(tree):
    """Floating leaves in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
