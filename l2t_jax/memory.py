"""Memory modes: how the derivative through an unroll trades memory for time. All of them are exact.

| memory    | kept for each of the N steps             | work of a step, beside the gradient            |
|-----------|------------------------------------------|------------------------------------------------|
| save      | all that plain autodiff keeps            | its transpose                                  |
| remat     | the student's state                      | the gradient again, its transpose              |
| mixed     | the parameters (and, where the optimizer | one forward-over-reverse product               |
|           | is not linear, its state and gradient)   |                                                |
| linearize | what the linearised gradient reads       | the linear part of that product                |
| nested    | as mixed, for about 2 sqrt(N) steps only | the gradient again, the product                |
| auto      | takes save where it keeps no more than mixed, nested where that would not fit, else mixed         |

Legend: theta student parameters, phi loss parameters, N unroll length, u cotangent of the gradient.
"""

import logging
import math
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend.core import Literal

from l2t_jax.inputs import length_of
from l2t_jax.optimizers import check_optimizer
from l2t_jax.second_order import gradient_gap, linearized_gradient, mixed_gradient
from l2t_jax.types import Array, PyTree, StudentState
from l2t_jax.unroll import InnerLoss, Step, Unroll, plain_gradient, student_step, unroll

logger = logging.getLogger(__name__)

FORWARD = ("mixed", "linearize", "nested")  # forward over reverse: they need a gradient that is one
FITS = 0.5  # the share of the device's memory that what is kept over an unroll may take before "auto" nests


def _save(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    return student_step(plain_gradient(inner), optimizer, axis_name=axis_name)


def _remat(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    # In a scan nothing can be merged across iterations, so the barriers that would prevent it are only in the way.
    return jax.checkpoint(_save(inner, optimizer, axis_name), prevent_cse=False)


def _mixed(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    return student_step(mixed_gradient(inner), _lean(optimizer), axis_name=axis_name)


def _linearize(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    return student_step(linearized_gradient(inner), _lean(optimizer), axis_name=axis_name)


def _lean(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep a non-linear optimizer (Adam) from storing its intermediate values."""
    check_optimizer(optimizer, "the student's optimizer")
    return optax.GradientTransformation(optimizer.init, jax.checkpoint(optimizer.update, prevent_cse=False))


STEPS: dict[str, Callable[[InnerLoss, optax.GradientTransformation, str | None], Step]] = {
    "save": _save,
    "remat": _remat,
    "mixed": _mixed,
    "linearize": _linearize,
}


def _nested(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Unroll:
    """Keep the state at the start of each segment of about sqrt(N) steps, and what mixed keeps within one segment."""
    step = _mixed(inner, optimizer, axis_name)

    def run(state: StudentState, phi: PyTree, batches: PyTree) -> tuple[StudentState, Array]:
        count, size = segments(length_of(batches))

        def segment(state: StudentState, begin: Array | int, length: int) -> tuple[StudentState, Array]:
            # Sliced here, so that the batches of one segment are copied at a time and not those of all.
            part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, begin, length), batches)
            return unroll(step, state, phi, part)

        again = jax.checkpoint(partial(segment, length=size), prevent_cse=False)
        state, losses = lax.scan(again, state, size * jnp.arange(count))
        # The last segment is differentiated first, so nothing is gained by computing it again.
        state, last = segment(state, count * size, length_of(batches) - count * size)
        return state, jnp.concatenate([losses.reshape(-1), last])

    return run


def segments(length: int) -> tuple[int, int]:
    """How "nested" divides N steps: segments that are computed again, and the steps of each; 1 to size steps remain."""
    size = math.ceil(math.sqrt(length))
    return (length - 1) // size, size


def auto(
    inner: InnerLoss,
    optimizer: optax.GradientTransformation,
    axis_name: str | None,
    at_once: int = 1,
    check_gradient: bool = False,
) -> Unroll:
    """Choose by what each mode would keep, and say so; `at_once` unrolls share a device (vmap, which is not seen).

    Modes that cannot differentiate this inner loss are left out, as are, with `check_gradient`, those that would be
    wrong since a custom derivative in it is not its derivative.
    """
    explained, found = set(), {}

    @cache  # each mode's step is traced to know it, and a method differentiates two stages of the same shapes
    def predicted(structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[dict[str, float], str]:
        return _predict(inner, optimizer, axis_name, *jax.tree.unflatten(structure, leaves))

    def run(state: StudentState, phi: PyTree, batches: PyTree) -> tuple[StudentState, Array]:
        length = length_of(batches)
        leaves, structure = jax.tree.flatten((state, phi, batches))
        known = structure, tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
        kept, why = predicted(*known)
        if check_gradient and "mixed" in kept:
            if known not in found:
                found[known] = untrue(inner, axis_name, state, phi, batches)
            if found[known]:
                kept, why = {name: size for name, size in kept.items() if name not in FORWARD}, found[known]
        available = device_bytes() / at_once
        mode = choose(kept, available)
        sizes = ", ".join(f"{name} {_mib(size)}" for name, size in kept.items())
        saved = kept.get("save", 0) - kept[mode]
        saves = f" and saves {_mib(saved)} MiB of plain autodiff" if saved > 0 else ""
        line = f"memory mode auto takes {mode} for N = {length}{saves}; predicted MiB to keep: {sizes}"
        if line not in explained:
            explained.add(line)
            shared = f", for each of {at_once} at once" if at_once > 1 else ""
            without = f"; not {', '.join(sorted({*STEPS, 'nested'} - kept.keys()))}: {why}" if why else ""
            logger.info("%s; the device has %s%s%s", line, _mib(available), shared, without)
        return MEMORY_MODES[mode](inner, optimizer, axis_name)(state, phi, batches)

    return run


def untrue(inner: InnerLoss, axis_name: str | None, state: StudentState, phi: PyTree, batches: PyTree) -> str:
    """Why the modes that are forward over reverse would be wrong for this inner loss, "" if they are right.

    Args: as in `kept_bytes`.
    """
    first = jax.tree.map(lambda x: x[0], batches)
    gap = gradient_gap(inner, state.params, state.batch_stats, phi, first, axis_name=axis_name)
    precision = max(float(jnp.finfo(jnp.result_type(x)).eps) for x in jax.tree.leaves(state.params))
    if gap <= min(0.3, 30 * math.sqrt(precision)):
        return ""
    return f"a custom derivative in the inner loss is not its derivative (off by {100 * gap:.2g} %)"


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g}" if size < 1000 * 2**20 else f"{size / 2**20:.0f}"


def choose(kept: dict[str, float], available: float) -> str:
    """The mode "auto" takes, from the bytes each mode keeps over an unroll and those of the device.

    The faster of save and mixed is, measured, the one that keeps less; linearize keeps what save does.
    """
    fastest = min((name for name in ("save", "mixed") if name in kept), key=lambda name: kept[name])
    if kept[fastest] <= FITS * available:
        return fastest
    return next((name for name in ("nested", "remat") if name in kept), fastest)


def kept_bytes(
    inner: InnerLoss,
    optimizer: optax.GradientTransformation,
    axis_name: str | None,
    state: StudentState,
    phi: PyTree,
    batches: PyTree,
) -> dict[str, float]:
    """Predict, by abstract evaluation, how many bytes each mode keeps for the backward pass of an unroll.

    Args:
      inner, optimizer, axis_name: as in `hypergradient`.
      state, phi, batches (leaves [N, B, ...]): arrays, tracers or `jax.ShapeDtypeStruct`s.
    Returns:
      mode -> bytes, without the modes that cannot differentiate this inner loss. What the batches and the loss
      parameters occupy anyway is not counted, nor is the working memory of
      a single step, except that of "remat", where it is the memory of the gradient that is computed again. "nested"
      copies the batches of two segments: of the last one, and of the one it computes again.
    """
    return _predict(inner, optimizer, axis_name, state, phi, batches)[0]


def _predict(
    inner: InnerLoss,
    optimizer: optax.GradientTransformation,
    axis_name: str | None,
    state: StudentState,
    phi: PyTree,
    batches: PyTree,
) -> tuple[dict[str, float], str]:
    """What `kept_bytes` says, and why a mode is not among them: no forward mode, or effects; "" if all are."""
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
    step, why = {}, ""
    for name, build in STEPS.items():
        try:
            step[name] = _residual_bytes(build(inner, optimizer, axis_name), state, phi, first)
        except Exception as error:
            if name == "save":  # which any loss that has a hypergradient can be differentiated in
                raise
            why = why or str(error).splitlines()[0]
    if "linearize" not in step:
        step.pop("mixed", None)  # whose forward pass can be traced all the same
    carried = sum(_bytes(leaf) for leaf in jax.tree.leaves(state))
    length = length_of(batches)
    count, size = segments(length)
    kept = {name: length * size for name, size in step.items()}
    if "remat" in kept:
        kept["remat"] += step["save"]
    if {"mixed", "remat"} <= step.keys():
        copied = sum(_bytes(leaf) for leaf in jax.tree.leaves(first))
        kept["nested"] = count * carried + size * (step["mixed"] + 2 * copied)
    return kept, why


def _residual_bytes(step: Step, state: StudentState, phi: PyTree, batch: PyTree) -> float:
    """The bytes that differentiating one step keeps, beside its batch and the loss parameters."""

    def residuals(state: StudentState, phi: PyTree, batch: PyTree) -> list[Any]:
        _, backward = jax.vjp(lambda state, phi: step(state, phi, batch), state, phi)
        return jax.tree.leaves(backward)

    jaxpr = jax.make_jaxpr(residuals)(state, phi, batch).jaxpr
    there = set(jaxpr.invars[len(jax.tree.leaves(state)) :])
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - there
    return sum(_bytes(v.aval) for v in kept)


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * (0 if x.dtype == jax.dtypes.float0 else x.dtype.itemsize)


def device_bytes() -> float:
    """The memory of one device: the allocator's limit, or for a CPU the machine's memory."""
    statistics: dict[str, int] = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _steps(name: str) -> Callable[[InnerLoss, optax.GradientTransformation, str | None], Unroll]:
    return lambda inner, optimizer, axis_name: partial(unroll, STEPS[name](inner, optimizer, axis_name))


MEMORY_MODES: dict[str, Callable[[InnerLoss, optax.GradientTransformation, str | None], Unroll]] = {
    **{name: _steps(name) for name in STEPS},
    "nested": _nested,
    "auto": auto,
}
