"""Reweighting by what a student sees: a small network makes each example's weight of its features and its label.

Legend: B batch, V validation batch, C classes, F features, N unroll length; theta student, phi the weight network.
"""

from typing import Unpack

import jax
import optax

from l2t_jax.losses.deep_weight import deep_weight
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.teachers.from_optax import from_optax
from l2t_jax.types import Array, How, Key, Loss, Method, MethodState, Student, Task
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
    stages start from one student are ours; so is N = 1 in runs by name, as of Meta-Weight-Net.
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
