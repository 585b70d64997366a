"""Any optax transformation is a teacher without parameters."""

import optax

from l2t_jax.types import Key, PyTree, Teacher


def from_optax(optimizer: optax.GradientTransformation) -> Teacher:
    """Make a teacher that descends the hypergradient with an optax transformation.

    Args:
      optimizer: e.g. `optax.adam(1e-3)`; its learning rate is gamma, its state is the teacher's memory.
    Returns:
      a `Teacher` with parameters `{}`, so there is nothing for the teacher's own learning to change.
    Source: L2T-DLN (NeurIPS 2023), Table 6, which compares Adam, SGD and RMSProp with the LSTM.
    """

    def update(params: PyTree, memory: PyTree, hypergradient: PyTree, loss_params: PyTree) -> tuple[PyTree, PyTree]:
        return optimizer.update(hypergradient, memory, loss_params)

    def init(key: Key) -> PyTree:
        return {}

    return Teacher(init=init, memory=optimizer.init, update=update)
