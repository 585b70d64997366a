"""Any optax transformation is a teacher without parameters."""

import jax
import optax

from l2t_jax.inputs import check_like
from l2t_jax.optimizers import check_optimizer, update_with
from l2t_jax.types import Key, PyTree, Teacher


def from_optax(optimizer: optax.GradientTransformation) -> Teacher:
    """Make a teacher that descends the hypergradient with an optax transformation.

    Args:
      optimizer: e.g. `optax.adam(1e-3)`; its learning rate is gamma, its state is the teacher's hidden state.
    Returns:
      a `Teacher` with parameters `{}`, so there is nothing for the teacher's own learning to change: no method
      differentiates its update, and Adam needs no `eps_root` here.
    Raises:
      ValueError: this is no optax transformation; when called, the hypergradient is not like the loss parameters, the
        hidden state is not of these, or the transformation wants more than a gradient.
    Source: L2T-DLN (NeurIPS 2023), Table 6, which compares Adam, SGD and RMSProp with the LSTM.
    """
    check_optimizer(optimizer, "the teacher")

    def update(params: PyTree, hidden: PyTree, hypergradient: PyTree, phi: PyTree) -> tuple[PyTree, PyTree]:
        check_like(phi, hypergradient, "the hypergradient", "the loss parameters")
        check_like(jax.eval_shape(optimizer.init, phi), hidden, "the teacher's hidden state", "what `hidden` gives")
        return update_with(optimizer, hypergradient, hidden, phi, "the teacher")

    def init(key: Key) -> PyTree:
        return {}

    return Teacher(init=init, hidden=optimizer.init, update=update)
