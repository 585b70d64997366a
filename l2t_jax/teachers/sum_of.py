"""A teacher whose update is the sum of several teachers' updates: an optimizer, and an LSTM that corrects it."""

import jax

from l2t_jax.types import Key, PyTree, Teacher


def sum_of(*teachers: Teacher) -> Teacher:
    """Add up teachers: update = sum_k update_k(hypergradient).

    Args:
      *teachers: e.g. `from_optax(optax.adam(1e-3))` and `coordinate_lstm(1e-3, silent=True)`, which together begin as
        Adam and learn what to add to it.
    Returns:
      a `Teacher` whose parameters and hidden states are tuples, an entry for each.
    Raises:
      ValueError: there is no teacher, or one is none; when called, parameters or hidden
        state have not an entry for each.
    Source: ours; not in the paper.
    """
    if not teachers or not all(isinstance(teacher, Teacher) for teacher in teachers):
        kinds = ", ".join(type(teacher).__name__ for teacher in teachers) or "none"
        raise ValueError(f"sum_of is given {kinds}: expected one or more teachers; from_optax makes one of optax's.")

    def init(key: Key) -> PyTree:
        keys = jax.random.split(key, len(teachers))
        return tuple(teacher.init(k) for teacher, k in zip(teachers, keys, strict=True))

    def hidden(phi: PyTree) -> PyTree:
        return tuple(teacher.hidden(phi) for teacher in teachers)

    def update(params: PyTree, hidden: PyTree, hypergradient: PyTree, phi: PyTree) -> tuple[PyTree, PyTree]:
        for what, given in (("parameters", params), ("hidden state", hidden)):
            if not isinstance(given, tuple) or len(given) != len(teachers):
                raise ValueError(f"the {what} of a sum of teachers must be a tuple of {len(teachers)}: see `sum_of`.")
        updates, memories = zip(
            *(
                teacher.update(own, kept, hypergradient, phi)
                for teacher, own, kept in zip(teachers, params, hidden, strict=True)
            ),
            strict=True,
        )
        return jax.tree.map(lambda *parts: sum(parts), *updates), memories

    return Teacher(init=init, hidden=hidden, update=update)
