"""The teacher of L2T-DLN: one small LSTM shared by all coordinates of the DLN.

Legend: P loss parameters (the LSTM's batch axis), H units of a layer, F input features of a coordinate (1 or 2).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from l2t_jax.inputs import check_floats, check_like
from l2t_jax.types import Array, Key, PyTree, Teacher

UNITS = (64, 64, 64, 1)


class Cell(NamedTuple):
    """One LSTM layer, gates in the order i, f, g, o. Two biases, as in the released code: 84 236 parameters in all."""

    input_kernel: Array  # [F or H, 4H]
    hidden_kernel: Array  # [H, 4H]
    input_bias: Array  # [4H]
    hidden_bias: Array  # [4H]


class CellState(NamedTuple):
    """What a layer remembers of every coordinate."""

    hidden: Array  # [P, H]
    cell: Array  # [P, H]


class Aged(NamedTuple):
    """The hidden state of a teacher with a window."""

    states: PyTree
    age: Array  # [] int32, rounds


def coordinate_lstm(
    dln_lr: float = 1e-3,
    *,
    update_sign: int = 1,
    preprocess: float | None = 10.0,
    odd: bool = False,
    silent: bool = False,
    window: int = 0,
    units: Sequence[int] | None = None,
) -> Teacher:
    """Build the coordinate-wise LSTM 64-64-64-1: update = sign * gamma * g, [g, h] = T(hypergradient, h).

    Args:
      dln_lr: gamma, the bound on any coordinate's change in one update, since g is an LSTM output in (-1, 1).
      update_sign: +1 as in Eq. 3, -1 as in the released code. Immaterial in principle (T is learned), not in practice.
      preprocess: p of the log/sign preprocessing; None feeds the raw hypergradient.
      odd: use (T(d) - T(-d)) / 2, which has no common offset over the coordinates at initialisation. Not in the paper.
      silent: begin with zeros in what makes the last layer's candidate values, so that g = 0 whatever the
        hypergradient until the teacher has learned something. Not in the paper.
      window: rounds after which the hidden state is cleared; 0 never, as in the released code. Its cells add up what
        they read, and one round's derivative does not tell the teacher to forget: without it they saturate, and the
        update is then the same in every round, whatever the hypergradient. Not in the paper.
      units: of the layers before the last, which has one; None: 64, 64, 64, as in the paper. Its cost is of the order
        of P times their squares.
    Returns:
      a `Teacher` whose hidden state holds h and the cell state for every coordinate and, with a window, its age.
    Raises:
      ValueError: an argument is out of its range; when called, the hypergradient is not like the loss parameters, or
        hidden state or parameters are those of a teacher of other loss parameters or other arguments.
    Source: L2T-DLN (NeurIPS 2023) Eq. 3 and 5.1; coordinate-wise after Andrychowicz et al. 2016. The paper does not
    mention preprocessing; the released code has it with p = 10. The output is the last layer's hidden state.
    """
    if isinstance(dln_lr, (int, float, str)) and not (not isinstance(dln_lr, str) and 0 <= dln_lr < math.inf):
        raise ValueError(f"dln_lr={dln_lr!r} is not a finite number of at least 0: give gamma.")
    if update_sign not in (-1, 1):
        raise ValueError(f"update_sign={update_sign!r} is no sign: give 1 or -1.")
    if preprocess is not None and not 0 < preprocess < math.inf:
        raise ValueError(f"preprocess={preprocess!r} is not a positive, finite number: give p, or None for none.")
    if not isinstance(window, int) or window < 0:
        raise ValueError(f"a window of {window} rounds is none: give at least 1, or 0 to clear nothing.")
    if units is not None and not (units and all(isinstance(h, int) and h > 0 for h in units)):
        raise ValueError(f"units={units!r} are none of layers: give positive whole numbers, e.g. (20, 20).")
    features = 1 if preprocess is None else 2
    layers = UNITS if units is None else (*units, 1)

    def init(key: Key) -> tuple[Cell, ...]:
        cells = init_cells(key, features, layers)
        return (*cells[:-1], silenced(cells[-1])) if silent else cells

    def hidden_of(phi: PyTree) -> PyTree:
        flat, _ = ravel_pytree(phi)
        states = (zero_states(flat, layers), zero_states(flat, layers)) if odd else zero_states(flat, layers)
        return Aged(states, jnp.int32(0)) if window else states

    def update(params: PyTree, hidden: PyTree, hypergradient: PyTree, phi: PyTree) -> tuple[PyTree, PyTree]:
        check_like(phi, hypergradient, "the hypergradient", "the loss parameters")
        check_floats(hypergradient, "the hypergradient")
        expected = jax.eval_shape(hidden_of, phi)
        check_like(
            expected,
            hidden,
            "the teacher's hidden state",
            "what `hidden` gives for this phi and these arguments",
        )
        check_like(jax.eval_shape(init, jax.random.key(0)), params, "the teacher's parameters", "what `init` gives")
        if window:
            kept = hidden.age % window > 0
            states = jax.tree.map(lambda x: jnp.where(kept, x, 0), hidden.states)
            result, states = at_once(params, states, hypergradient)
            return result, Aged(states, hidden.age + 1)
        return at_once(params, hidden, hypergradient)

    def at_once(params: PyTree, hidden: PyTree, hypergradient: PyTree) -> tuple[PyTree, PyTree]:
        flat, unravel = ravel_pytree(hypergradient)  # [P]
        if odd:
            up, up_hidden = run_cells(params, hidden[0], features_of(flat, preprocess))
            down, down_hidden = run_cells(params, hidden[1], features_of(-flat, preprocess))
            output, hidden = (up - down) / 2, (up_hidden, down_hidden)
        else:
            output, hidden = run_cells(params, hidden, features_of(flat, preprocess))
        return unravel(update_sign * dln_lr * output), hidden

    return Teacher(init=init, hidden=hidden_of, update=update)


def init_cells(key: Key, features: int, units: tuple[int, ...]) -> tuple[Cell, ...]:
    """Draw every entry of a layer from U(-1, 1) / sqrt(H), the released code's initialisation."""
    cells = []
    for k, inputs, h in zip(jax.random.split(key, len(units)), (features, *units[:-1]), units, strict=True):
        bound = 1 / math.sqrt(h)
        shapes = ((inputs, 4 * h), (h, 4 * h), (4 * h,), (4 * h,))
        keys = jax.random.split(k, len(shapes))
        cells.append(
            Cell(*(jax.random.uniform(q, s, minval=-bound, maxval=bound) for q, s in zip(keys, shapes, strict=True)))
        )
    return tuple(cells)


def silenced(cell: Cell) -> Cell:
    """Set to zero what a layer makes its candidate values of (gate g), so that it puts out 0; its other gates stay."""
    units = cell.hidden_kernel.shape[0]
    return Cell(*(x.at[..., 2 * units : 3 * units].set(0) for x in cell))


def zero_states(flat: Array, units: tuple[int, ...]) -> tuple[CellState, ...]:
    """All layers' states before the first update, for loss parameters [P]; no two share a buffer."""
    return tuple(CellState(*(jnp.zeros((flat.size, h), flat.dtype) for _ in CellState._fields)) for h in units)


def features_of(gradient: Array, p: float | None) -> Array:
    """Turn a gradient [P] that spans many orders of magnitude into LSTM inputs [P, F].

    (log(|d| + 1e-8) / p, sign d) where |d| >= e^-p, else (-1, e^p d); d itself where p is None.

    Source: Andrychowicz et al. 2016, Appendix A, with the 1e-8 of the released code.
    """
    if p is None:
        return gradient[:, None]
    magnitude = jnp.abs(gradient)
    large = magnitude >= math.exp(-p)
    first = jnp.where(large, jnp.log(magnitude + 1e-8) / p, -1.0)
    second = jnp.where(large, jnp.sign(gradient), math.exp(p) * gradient)
    return jnp.stack([first, second], axis=-1).astype(gradient.dtype)


def run_cells(cells: tuple[Cell, ...], hidden: tuple[CellState, ...], x: Array) -> tuple[Array, tuple[CellState, ...]]:
    """Run one time step of all layers for all coordinates: x [P, F] -> output [P] in (-1, 1), new states."""
    states = []
    for cell, state in zip(cells, hidden, strict=True):
        gates = x @ cell.input_kernel + state.hidden @ cell.hidden_kernel + cell.input_bias + cell.hidden_bias
        i, f, g, o = jnp.split(gates, 4, axis=-1)  # [P, H] each
        new_cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        x = jax.nn.sigmoid(o) * jnp.tanh(new_cell)
        states.append(CellState(x, new_cell))
    return x[:, 0], tuple(states)
