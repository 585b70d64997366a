"""Reweighting by what a student sees: a small network makes each example's weight of its features and its label.

Legend: B batch, V validation batch, C classes, F features, N unroll length; theta student, phi the weight network.
"""

import math
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from l2t_jax.losses.common import check_classes, make_loss
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.losses.perceptron import init_layers, run_layers
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.teachers.from_optax import from_optax
from l2t_jax.types import Array, Head, How, Key, Loss, Method, MethodState, PyTree, Student, Task
from l2t_jax.unroll import outputs_for


def deep_interactions(
    student: Student,
    task: Task,
    student_optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    lr: float = 1e-3,
    units: int = 256,
    axis_name: str | None = None,
    **how: Unpack[How],
) -> Method:
    """Build the teacher that reads the student's last hidden features and the label ("L2R" of L2T-DLN's poster).

    It is L2T-DLN's round, second_stage="restart", whose loss is `deep_weight` and whose teacher is Adam: phi descends
    the derivative of the validation error through N student steps. Not `l2rw` (Ren et al. 2018), which learns nothing
    and weighs by the agreement of gradients; nor Meta-Weight-Net, whose network sees the loss alone and N = 1.

    Args:
      student, task: the records that are composed; validation examples should be clean. The student has a `head`.
      student_optimizer: any optax transformation.
      num_classes: C.
      lr: of the weight network's Adam.
      units: of its hidden layer.
      axis_name, **how: as in `hypergradient` (memory, at_once, check_gradient).
    Returns:
      a `Method` of N student steps a round; the weight network is in `MethodState.loss`.
    Raises:
      ValueError: the student has no `head`; units or classes are no positive integers.
    Source: Fan et al., AAAI 2021 (Learning to Reweight with Deep Interactions): internal states and the label give the
    weight, meta-gradients from a validation set train what makes it. The network's shape, its rate and that both
    stages start from one student are ours.
    """

    def loss(features: int) -> Loss:
        return deep_weight(num_classes=num_classes, features=features, units=units)

    def build(features: int) -> Method:
        return l2t_dln(
            student,
            task,
            loss(features),
            from_optax(optax.adam(lr)),
            student_optimizer,
            optax.identity(),
            second_stage="restart",
            learn=False,
            axis_name=axis_name,
            **how,
        )

    def init(key: Key, inputs: Array) -> MethodState:
        variables = jax.eval_shape(student.init, key, inputs)
        outputs, _ = jax.eval_shape(lambda variables, x: head(variables, x, False), variables, inputs)
        return build(outputs.features.shape[-1]).init(key, inputs)

    # Only init must know how many features there are: later the parameters do.
    head = outputs_for(student, loss(1))
    return build(1)._replace(init=init)


def deep_weight(*, num_classes: int, features: int, units: int = 256) -> Loss:
    """Build w(f, y) l, l = cross entropy, w = 2 sigmoid(v ReLU(W f / rms(f) + e_y + b)): no derivative through f in w.

    v starts at zero, so before it is taught every example weighs 1 and the loss is cross entropy.

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
