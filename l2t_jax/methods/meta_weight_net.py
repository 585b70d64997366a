"""Meta-Weight-Net: a small network V weighs every example by its loss, and learns from a clean validation batch.

Legend: B batch, V validation batch; theta student, phi parameters of the weight network, l cross entropy.
"""

from typing import Unpack

import optax

from l2t_jax.losses.weight_net import weight_net
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.teachers.from_optax import from_optax
from l2t_jax.types import How, Method, Student, Task


def meta_weight_net(
    student: Student,
    task: Task,
    student_optimizer: optax.GradientTransformation,
    *,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    units: int = 100,
    axis_name: str | None = None,
    **how: Unpack[How],
) -> Method:
    """Build Meta-Weight-Net, which is L2T-DLN's round with another loss, another teacher and N = 1.

    Each line of the paper's algorithm, and the line of `l2t_dln` with second_stage="restart" that it is:
      theta^(phi) = theta - eta d/dtheta mean_i V_phi(l_i) l_i      A: one student step under phi, thrown away.
      phi' = phi - Adam(d/dphi mean_j l_j(theta^(phi)), j of V)     B, C: hypergradient; the teacher is Adam.
      theta' = theta - eta d/dtheta mean_i V_phi'(l_i) l_i          D: the step that is kept, same batch, from theta.
    E and F have nothing to learn: Adam is a teacher without parameters.

    Args:
      student, task: the records that are composed; validation examples should be clean.
      student_optimizer: any optax transformation.
      lr, weight_decay: of V's Adam; the decay is added to the gradient before Adam (L2, not decoupled).
      units: of V's hidden layer.
      axis_name, **how: as in `hypergradient` (memory, at_once, check_gradient).
    Returns:
      a `Method` of one student step a round: train [1, 1, B, ...], validation [1, V, ...]; `merge_rounds` makes K
      of them one. V is in `MethodState.loss`, its Adam's state in `MethodState.carried`.
    Source: Shu et al., NeurIPS 2019, Algorithm 1, and the released main script: V 1-100-1, Adam 1e-3 with
    weight decay 1e-4, weights not divided by their sum. Where the student's optimizer has momentum or weight decay,
    their step A is plain SGD all the same and ours is that optimizer's, as in D: with plain SGD both are the same.
    """
    decayed_adam = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(lr))
    return l2t_dln(
        student,
        task,
        weight_net(units=units),
        from_optax(decayed_adam),
        student_optimizer,
        optax.identity(),
        second_stage="restart",
        learn=False,
        axis_name=axis_name,
        **how,
    )
