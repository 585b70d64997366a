"""Students made of modules of other libraries: flax.nnx, Equinox, Haiku. What comes out are pure functions.

The arrays of a module become dicts, {"first/kernel": array}, so no file of a run needs its library to be read.

Legend: B batch, C classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from l2t_jax.students.layers import as_before, float_type
from l2t_jax.types import Array, Key, PyTree, Student

AXIS = "batch"  # the axis over which Equinox maps examples, as its own examples call it


def from_nnx(make: Callable[[Any], Any], *, draws: bool = False) -> Student:
    """Turn what makes a flax.nnx module into a `Student`.

    Variables of the type nnx.Param are the parameters, all others (nnx.BatchStat) are batch_stats: what a call in
    training leaves in them goes to the next step, what one in evaluation leaves is dropped.

    Args:
      make: rngs, an `nnx.Rngs` -> module that maps inputs [B, ...] to outputs [B, C]; a class whose only argument is
        that. It is told by `train()` and `eval()` what it is used for, as nnx.BatchNorm is.
      draws: the module draws at random in training: its call takes keys [B] or None as a second argument, for
        `layers.dropout`.
    Raises:
      ValueError: it makes no such module, or one with a stream of random numbers of its own (nnx.Dropout); when called,
        the module makes variables that it had not before.
    """
    from flax import nnx  # here, because it takes half a second

    module = _made("from_nnx", make, nnx.Module, "rngs", lambda: nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    parts: Any = nnx.split(module, nnx.RngState, nnx.Param, ...)
    graph, streams, like, rest = parts
    if streams := _by_path(streams):
        raise ValueError(
            f"from_nnx: {type(module).__name__} holds random numbers of its own ({min(streams)}), which every step "
            "would draw alike: use students.layers.dropout with draws=True, and keep no rngs in the module."
        )

    def init(key: Key, inputs: Array) -> dict[str, PyTree]:
        parts: Any = nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)
        _, params, stats = parts
        return _variables(_by_path(params), _by_path(stats), inputs)

    def apply(
        variables: dict[str, PyTree], inputs: Array, train: bool, keys: Key | None = None
    ) -> tuple[Array, PyTree]:
        old = variables["batch_stats"]
        module = nnx.merge(graph, _filled(like, variables["params"]), _filled(rest, old))
        module.train() if train else module.eval()
        outputs = module(inputs, *((keys,) if draws else ()))
        if not train:
            return outputs, old
        new = _by_path(nnx.state(module, nnx.Not(nnx.Param)))
        if more := sorted(new.keys() - old.keys()):
            raise ValueError(
                f"the call of {type(module).__name__} makes variables ({more[0]}) that it had not before: make them in "
                "__init__, or take them out again with nnx.pop."
            )
        return outputs, as_before(new, old)

    return Student(init, apply, draws=draws)


def from_equinox(make: Callable[[Key], Any], *, draws: bool = False) -> Student:
    """Turn what makes an Equinox module into a `Student`. The module is of one example, and mapped over the batch.

    Arrays of floats are the parameters. Other arrays, and what the module keeps in `eqx.nn.State`, are batch_stats.
    What is no array (activation functions, names) is closed over, as it was when the module was made first.

    Args:
      make: key -> module with the call (x [...]) -> outputs [C], or, where it has BatchNorm or other state, the call
        (x, state) -> outputs, state; a class whose only argument is that. BatchNorm takes axis_name="batch". Layers are
        told by `eqx.nn.inference_mode` what they are used for.
      draws: the module draws at random in training: its call takes the key of its example, or None, as `key`.
    Raises:
      ImportError: Equinox is absent.
      ValueError: it makes no such module.
    """
    try:
        import equinox as eqx
    except ImportError as error:
        raise ImportError("from_equinox needs Equinox: pip install equinox.") from error

    build = eqx.nn.make_with_state(make)
    shapes = lambda: eqx.filter_eval_shape(build, jax.random.key(0))  # noqa: E731
    module, state = _made("from_equinox", make, eqx.Module, "key", shapes, lambda made: made[0])
    like, others = eqx.partition(module, _is_parameter)
    kept, static = eqx.partition(others, _is_array)
    stateful = bool(jax.tree.leaves(state))

    def init(key: Key, inputs: Array) -> dict[str, PyTree]:
        module, state = build(key)
        params, others = eqx.partition(module, _is_parameter)
        stats = {"module": eqx.filter(others, _is_array), "state": state}
        return _variables(_by_path(params), _by_path(stats), inputs)

    def apply(
        variables: dict[str, PyTree], inputs: Array, train: bool, keys: Key | None = None
    ) -> tuple[Array, PyTree]:
        old = variables["batch_stats"]
        carried = _filled({"module": kept, "state": state}, old)
        module = eqx.combine(_filled(like, variables["params"]), carried["module"], static)
        module = eqx.nn.inference_mode(module, not train)

        def one(x: Array, state: PyTree, key: Key | None) -> tuple[Array, PyTree]:
            drawn = {"key": key} if draws else {}
            return module(x, state, **drawn) if stateful else (module(x, **drawn), state)

        mapped = jax.vmap(one, axis_name=AXIS, in_axes=(0, None, None if keys is None else 0), out_axes=(0, None))
        outputs, after = mapped(inputs, carried["state"], keys)
        return outputs, as_before(_by_path({**carried, "state": after}), old) if train else old

    return Student(init, apply, draws=draws)


def from_haiku(function: Callable[..., Array], *, draws: bool = False) -> Student:
    """Turn a function of Haiku modules into a `Student`; Haiku's state is batch_stats.

    Args:
      function: (inputs [B, ...], train) -> outputs [B, C], which makes Haiku modules and calls them; not transformed.
      draws: it draws at random in training: it takes keys [B] or None as a third argument, for `layers.dropout`.
    Raises:
      ImportError: Haiku is absent.
      ValueError: it is no function, or a transformed one.
    """
    try:
        import haiku as hk
    except ImportError as error:
        raise ImportError("from_haiku needs Haiku: pip install dm-haiku.") from error

    if not callable(function):
        raise ValueError(
            f"from_haiku: {_called(function)} is no function of (inputs, train): give it as it is before "
            "hk.transform_with_state, which is done here."
        )
    pair: Any = hk.without_apply_rng(hk.transform_with_state(function))
    drawn = lambda keys: (keys,) if draws else ()  # noqa: E731
    # In training, as hk.BatchNorm makes its state there alone. Under jit only the parameters are computed.
    initial = jax.jit(lambda key, inputs: pair.init(key, inputs, True, *drawn(None)))

    def init(key: Key, inputs: Array) -> dict[str, PyTree]:
        params, state = initial(key, inputs)
        return _variables(params, state, inputs)

    def apply(
        variables: dict[str, PyTree], inputs: Array, train: bool, keys: Key | None = None
    ) -> tuple[Array, PyTree]:
        old = variables["batch_stats"]
        outputs, state = pair.apply(variables["params"], old, inputs, train, *drawn(keys))
        return outputs, as_before(state, old) if train else old

    return Student(init, apply, draws=draws)


def _made(
    door: str,
    make: Any,
    kind: type,
    argument: str,
    shapes: Callable[[], Any],
    module_of: Callable[[Any], Any] = lambda made: made,
) -> Any:
    """What `make` makes, as shapes, once it is sure to be a module that can be called."""
    cure = f"give what makes the module, {argument} -> module, so that each seed begins with parameters of its own"
    if isinstance(make, kind) or not callable(make):
        raise ValueError(f"{door} was given {_called(make)}: {cure}.")
    try:
        made = shapes()
    except Exception as error:  # somebody's own code may fail in any way
        told = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{door}: no module was made ({type(error).__name__}: {told}): {cure}.") from error
    module = module_of(made)
    if not isinstance(module, kind) or not callable(module):
        raise ValueError(f"{door}: {_called(module)} was made, which is no module that can be called: {cure}.")
    return made


def _variables(params: PyTree, stats: PyTree, inputs: Array) -> dict[str, PyTree]:
    """What a student's init gives: floats in the dtype of the inputs, as a scan carries what it was given."""
    dtype = float_type(inputs)
    cast = lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)  # noqa: E731
    return {"params": jax.tree.map(cast, params), "batch_stats": jax.tree.map(cast, stats)}


def _by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path; nnx puts each into a variable's `value`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in leaves
    }


def _filled(like: PyTree, by_path: dict[str, Any]) -> PyTree:
    """The tree with these leaves."""
    return jax.tree.unflatten(jax.tree.structure(like), [by_path[path] for path in _by_path(like)])


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_parameter(leaf: Any) -> bool:
    return _is_array(leaf) and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _called(value: Any) -> str:
    return f"an object of type {type(value).__name__}"
