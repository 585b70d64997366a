"""The door of an unroll: what it is given is looked at, by shape and dtype, before anything is computed with it.

Each of these shapes and dtypes would otherwise give a wrong derivative without a word, or fail somewhere inside jax.

Legend: B batch, V validation batch, N unroll length.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.types import Array, PyTree, StudentState


def as_arrays(tree: PyTree, what: str) -> PyTree:
    """A tree of arrays, in which Python numbers have become arrays.

    Args:
      tree: arrays, tracers, NumPy arrays or Python numbers.
      what: what to call the tree.
    Raises:
      ValueError: names the first leaf that is none of these.
    """

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, (bool, int, float, complex)):
            return jnp.asarray(leaf)
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "biufcV":
            raise ValueError(f"{_leaf(what, path)} is a NumPy array of {leaf.dtype}: expected numbers.")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(
                f"{_leaf(what, path)} is {_kind(leaf)}: expected an array. Keep what is no array (functions, names, "
                "settings of a module) out of the tree and close over it."
            )
        return leaf

    return jax.tree_util.tree_map_with_path(one, tree)


def known(called: str, name: Any, names: Iterable[Any], error: type[ValueError] = ValueError) -> Any:
    """Check that a name is one of those that are known.

    Args:
      called: what the message calls it, e.g. "loss 'dln'".
      name: what was given.
      names: the known ones.
      error: what is raised.
    Returns:
      the name.
    Raises:
      ValueError (or `error`): it is none of them; the message lists all, and names a near one.
    """
    choices = list(names)
    if name in choices:
        return name
    near = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise error(f"{called} is unknown; choose one of {', '.join(map(str, choices))}.{hint}")


def check_floats(tree: PyTree, what: str) -> None:
    """Check that every leaf of what is differentiated is of floats.

    Raises:
      ValueError: names the first leaf that is not.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(_type(leaf).dtype, jnp.inexact):
            raise ValueError(
                f"{_leaf(what, path)} is {_type(leaf).dtype}: only floats have a derivative. Make it a float, or keep "
                "it in batch_stats, or close over it."
            )


def length_of(batches: PyTree) -> int:
    """N, the leading size of every leaf of batches.

    Raises:
      ValueError: there is no leaf, a leaf has no such axis or another N, or any size is zero.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    if not leaves:
        raise ValueError("batches hold no array: expected leaves [N, B, ...], a batch for each of the N student steps.")
    for path, leaf in leaves:
        shape = list(jnp.shape(leaf))
        if not shape:
            raise ValueError(
                f"{_leaf('batches', path)} is a single number: expected [N, B, ...], N batches in one array."
            )
        if 0 in shape:
            raise ValueError(
                f"{_leaf('batches', path)} is {shape}, which is empty: give at least one batch of one example."
            )
    lengths = {_leaf("batches", path): int(jnp.shape(leaf)[0]) for path, leaf in leaves}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"the leaves of batches differ in N, the number of student steps: {told}.")
    return next(iter(lengths.values()))


def check_validation(batches: PyTree, validation: PyTree) -> None:
    """Check that a validation batch has examples, and that batches have one axis more than it where they are alike.

    Batches without the leading N would be taken for N = B batches of one example each, without a word.

    Raises:
      ValueError: a leaf is empty, or batches have the ranks of the validation batch.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(validation):
        if 0 in jnp.shape(leaf):
            raise ValueError(f"{_leaf('validation', path)} is {list(jnp.shape(leaf))}, which is empty: give examples.")
    if not _alike(batches, validation):
        return
    given = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    expected = [jnp.shape(leaf) for leaf in jax.tree.leaves(validation)]
    same = all(len(a) == len(b) for a, b in zip(given, expected, strict=True))
    if same and max(map(len, given)) > 1:
        raise ValueError(
            f"batches {[list(x) for x in given]} have as many axes as the validation batch "
            f"{[list(x) for x in expected]}: expected [N, B, ...], a batch for each of N student steps. For one step "
            "give x[None]; for steps of one example each, x[:, None]."
        )


def check_inner(results: Any, params: PyTree, batch_stats: PyTree) -> tuple[Array, PyTree]:
    """Check what an inner loss returned: a scalar float, and statistics like those it was given.

    Returns:
      the loss [], the new statistics.
    Raises:
      ValueError: it returned something else, or the loss is split over devices in a way that jax would sum up.
    """
    loss, stats = _pair(results, "the inner loss", "a scalar loss and the new batch_stats ({} without any)")
    loss = _scalar(loss, "the inner loss", "take its mean over the batch")
    check_axes(_axes(loss), params, "the inner loss")
    check_carried(batch_stats, stats, "the inner loss", "batch_stats")
    return loss, stats


def check_effects(inner: Callable[..., Any], *arguments: PyTree) -> None:
    """Check that an inner loss calls nothing outside jax but by `jax.debug`.

    jax drops `io_callback` from a differentiated scan without a word, or refuses it, or runs it backwards.

    Args:
      inner: the inner loss.
      *arguments: what it is given, a single batch among it.
    Raises:
      ValueError: it has other effects.
    """
    effects = {type(effect).__name__ for effect in jax.make_jaxpr(inner)(*arguments).effects}
    if others := {name for name in effects if "Debug" not in name and "NamedAxis" not in name}:
        raise ValueError(
            f"the inner loss has effects ({', '.join(sorted(others))}), as of an io_callback, which are lost where it "
            "is differentiated: use jax.debug.callback or jax.debug.print, or return the value in batch_stats."
        )


def check_outer(results: Any) -> tuple[Array, PyTree]:
    """Check what an outer error returned: a scalar float, and anything to report.

    Raises:
      ValueError: it returned something else.
    """
    error, metrics = _pair(results, "the outer error", "a scalar validation error and anything to report ({})")
    return _scalar(error, "the outer error", "take its mean over the validation batch"), metrics


def check_mapped(phi: PyTree, state: StudentState, batches: PyTree, validation: PyTree) -> None:
    """Check that jax will not sum the derivatives of all devices up.

    Raises:
      ValueError: data or state are known to differ between devices and phi or params are not (`jax.shard_map` with
        check_vma=True).
    """
    axes = frozenset[Any]().union(*map(_axes, jax.tree.leaves((phi, state, batches, validation))))
    check_axes(axes, (phi, state.params), "what the hypergradient is given")


def check_axes(axes: frozenset[Any], by: PyTree, what: str) -> None:
    """Check that a value split over these mapped axes is differentiated by nothing that is not."""
    for leaf in jax.tree.leaves(by):
        if more := axes - _axes(leaf):
            raise ValueError(
                f"{what} is split over the mapped axis {', '.join(sorted(map(str, more)))}, and what it is "
                "differentiated by is not: under jax.shard_map with check_vma=True jax adds the derivatives of all "
                "devices up. Give shard_map check_vma=False, or use jax.pmap, or mark phi and the state by "
                'jax.lax.pcast(..., to="varying").'
            )


def check_carried(before: PyTree, after: PyTree, who: str, what: str) -> None:
    """Check that what a student step carries to the next one keeps its structure, shapes and dtypes.

    Raises:
      ValueError: names the first leaf that changed.
    """
    if not _alike(before, after):
        raise ValueError(
            f"{who} changes the structure of {what}, which every step hands to the next: it is given "
            f"{jax.tree.structure(before)} and returns {jax.tree.structure(after)}."
        )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        old, new = _type(a), _type(b)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"{who} changes {_leaf(what, path)} from {old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}: "
                "a step must return the shapes and dtypes it was given."
            )


def check_like(expected: PyTree, given: PyTree, what: str, like: str) -> None:
    """Check that a tree has the structure of another, and its leaves the shapes of that one's.

    Raises:
      ValueError: names the first leaf that is another.
    """
    if not _alike(expected, given):
        raise ValueError(
            f"{what} has another structure than {like}: expected {jax.tree.structure(expected)}, given "
            f"{jax.tree.structure(given)}."
        )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(given), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"{_leaf(what, path)} is {list(jnp.shape(b))} and {_leaf(like, path)} is {list(jnp.shape(a))}: "
                "expected the same shape."
            )


def run_now(function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Compile and run a function of known values at once, also in the middle of a trace."""
    # As it runs once, it is not worth the time of optimising it.
    compiled = jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": "0"})
    with jax.ensure_compile_time_eval():
        return jax.device_get(compiled(*arguments))


def is_known(tree: PyTree) -> bool:
    """Whether all values are there already: none is traced."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def is_finite(tree: PyTree) -> bool:
    """Whether all values of a tree that is known are finite."""
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def _pair(results: Any, who: str, expected: str) -> tuple[Any, Any]:
    if not isinstance(results, (tuple, list)) or len(results) != 2:
        found = f"{len(results)} things" if isinstance(results, (tuple, list)) else _kind(results)
        raise ValueError(f"{who} returns {found}: expected two, {expected}.")
    return results[0], results[1]


def _scalar(value: Any, who: str, cure: str) -> Array:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise ValueError(f"{who} is {_kind(value)}: expected a scalar array that depends on what it is given.")
    if value.shape:
        raise ValueError(f"{who} is {value.dtype}{list(value.shape)}: expected one number; {cure}.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{who} is of {value.dtype}: expected a float, since only floats have a derivative.")
    return jnp.asarray(value)


def _alike(one: PyTree, other: PyTree) -> bool:
    structures: list[Any] = [jax.tree.structure(one), jax.tree.structure(other)]
    return bool(structures[0] == structures[1])


def _axes(value: Any) -> frozenset[Any]:
    """The mapped axes over which a value is known to vary; none but under jax.shard_map with check_vma=True."""
    kind = _type(value)
    varying = getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    return frozenset(varying if varying is not None else getattr(kind, "vma", ()))


def full_like(kind: Any, value: float) -> Array:
    """An array of one value, of a shape, a dtype and the mapped axes of an abstract one."""
    array, axes = jnp.full(kind.shape, value, kind.dtype), tuple(_axes(kind))
    return jax.lax.pcast(array, axes, to="varying") if axes else array


def _type(leaf: Any) -> Any:
    return (
        jax.typeof(leaf) if isinstance(leaf, (bool, int, float, complex, np.generic, np.ndarray, jax.Array)) else leaf
    )


def _leaf(what: str, path: Any) -> str:
    inside = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"{what}/{inside}" if inside else what


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return "one array" if isinstance(value, jax.Array) else f"a {type(value).__name__}"
