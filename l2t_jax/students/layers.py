"""Small pieces the students share.

Legend: B batch, H and W height and width in pixels, c channels.
"""

from functools import partial
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from l2t_jax.convolution import conv2d
from l2t_jax.types import Array, Head, Key, PyTree, Student

# Normal, not truncated, with variance 2 / fan_in: the initialisation of He et al. 2015, Eq. 10.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

LAST = "output"  # the name of every student's last layer


def from_linen(module: nn.Module, *, draws: bool = False) -> Student:
    """Turn a flax.linen module with the call (inputs, train) into a `Student`.

    Parameters and batch statistics take the dtype of the inputs, so a float64 run is float64 throughout:
    linen creates batch statistics in float32 whatever its arguments say, which a scan carry would refuse. Where the
    inputs are ids, they take the dtype of Python's floats: float32, or float64 where that is enabled.

    Args:
      module: maps inputs [B, ...], floats or int32 ids, and a Python bool `train` to outputs [B, C]. Both may be trees.
      draws: the module draws at random in training: its call takes keys [B] or None as a third argument, for `dropout`.

    Returns:
      A student. `init(key, inputs)` gives {"params", "batch_stats"}, the latter {} without BatchNorm;
      `apply(variables, inputs, train)` gives outputs [B, C] and the new statistics, which are those that
      came in where `train` is False; `head(variables, inputs, train)` gives the last layer apart in place of the
      outputs, where that is a Dense layer of the module itself, named "output".

    Raises:
      ValueError: `init` was given inputs that are neither floats nor ids; `head`, there is no such layer.
    """

    # Under jit the forward pass that linen traces is dropped, and only the parameters are computed.
    initial = jax.jit(lambda key, inputs: module.init(key, inputs, False))

    def init(key: Key, inputs: Array) -> dict[str, PyTree]:
        dtype = float_type(inputs)
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), initial(key, inputs))
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def apply(
        variables: dict[str, PyTree], inputs: Array, train: bool, keys: Key | None = None
    ) -> tuple[Array, PyTree]:
        old, drawn = variables["batch_stats"], (keys,) if draws else ()
        if not train or not old:
            return cast(Array, module.apply(variables, inputs, train, *drawn)), old
        outputs, updated = module.apply(variables, inputs, True, *drawn, mutable=["batch_stats"])
        return outputs, as_before(updated["batch_stats"], old)

    def head(variables: dict[str, PyTree], inputs: Array, train: bool, keys: Key | None = None) -> tuple[Head, PyTree]:
        features: list[Array] = []

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.module.path == (LAST,) and context.method_name == "__call__":
                features.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(keep):
            _, stats = apply(variables, inputs, train, keys)
        last = variables["params"].get(LAST, {})
        if not (features and {"kernel", "bias"} <= set(last)):
            raise ValueError(
                f"{type(module).__name__} has no last Dense layer with a bias named {LAST!r}, which this loss reads: "
                f"name it so, nn.Dense(num_classes, name={LAST!r}), or take a loss of outputs."
            )
        return Head(features[0], last["kernel"], last["bias"]), stats

    return Student(init, apply, head, draws)


def float_type(inputs: PyTree) -> Any:
    """The dtype of a student's parameters: that of its inputs, or that of Python's floats where these are ids.

    Raises:
      ValueError: they are neither floats nor ids.
    """
    given = jax.tree.leaves(inputs)[0].dtype
    if given not in (jnp.int32, jnp.int64) and not jnp.issubdtype(given, jnp.floating):
        raise ValueError(
            f"inputs are {given}: expected floats, or int32 ids for a student that embeds them. Pixels are "
            "normalised first, (x - mean) / std."
        )
    return given if jnp.issubdtype(given, jnp.floating) else jnp.result_type(float)


def as_before(stats: PyTree, old: PyTree) -> PyTree:
    """New statistics in the dtypes of the old: half precision is reduced in float32, and a scan's carry keeps its."""
    return jax.tree.map(lambda new, before: new.astype(before.dtype), stats, old)


def dropout(x: Array, rate: float, keys: Key | None, place: int, *, channels: bool = False) -> Array:
    """Set each entry to zero with probability `rate`, and scale the others by 1 / (1 - rate).

    Args:
      x: [B, ...].
      rate: in [0, 1).
      keys: [B], one for each example, so that how a batch is divided over devices changes nothing; None: x as it is.
      place: a number for each dropout of a network, which then draw independently.
      channels: whether a channel, the last axis, is dropped as a whole: neighbouring pixels say nearly the same.

    Source: Srivastava et al. 2014, scaled in training as is usual now; for channels Tompson et al. 2015.
    """
    if keys is None or rate == 0:
        return x
    chex.assert_shape(keys, x.shape[:1])
    shape = (*(1,) * (x.ndim - 2), x.shape[-1]) if channels else x.shape[1:]
    draw = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, shape))
    return jnp.where(draw(keys), x / (1 - rate), 0)


def drop_path(x: Array, rate: float, keys: Key | None, place: int) -> Array:
    """Set all of an example to zero with probability `rate`, and scale the others by 1 / (1 - rate).

    Args:
      x: [B, ...], what a branch of a sum made.
      rate, keys, place: see `dropout`.

    Source: Larsson et al. 2017.
    """
    if keys is None or rate == 0:
        return x
    return x * dropout(jnp.ones((len(x), 1), x.dtype), rate, keys, place).reshape(-1, *(1,) * (x.ndim - 1))


def batch_norm(train: bool, axis_name: str | None, name: str, epsilon: float = 1e-5) -> nn.BatchNorm:
    """Make the BatchNorm all students use: statistics of the batch in training, running ones otherwise.

    running <- 0.9 running + 0.1 batch, with the biased variance for both. The variance is the mean of
    (x - mean)^2 in a second pass: E x^2 - (E x)^2, linen's default, loses all digits of inputs far from zero, and on
    a whole hypergradient of ResNet-8 is not faster.

    Args:
      train: whether to normalise by the batch and to move the running statistics.
      axis_name: mapped axis over whose members the batch statistics are averaged as well, or None.
      name: submodule name.
      epsilon: what is added to the variance.

    Returns:
      An unbound linen module.

    Source: Ioffe & Szegedy 2015.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=epsilon,
        axis_name=axis_name,
        use_fast_variance=False,
        name=name,
    )


class Conv(nn.Module):
    """A square convolution, He-normal, whose gradients stay fast in loops on every platform.

    An integer padding of kernel // 2 centres output i on input stride * i; linen's "SAME" shifts strided convolutions
    by a pixel, out of line with a subsampled shortcut.
    """

    channels: int
    kernel: int
    stride: int = 1
    padding: str | int = "VALID"
    use_bias: bool = False
    dilation: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [B, H, W, c] to [B, h, w, channels]."""
        shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.channels)
        kernel = self.param("kernel", he_normal, shape).astype(x.dtype)
        apart = {"dilation": self.dilation, "groups": self.groups}
        x = conv2d(x, kernel, strides=self.stride, padding=self.padding, **apart)
        return x + self.param("bias", nn.initializers.zeros, (self.channels,)) if self.use_bias else x


def conv(channels: int, kernel: int, stride: int, name: str, dilation: int = 1) -> Conv:
    """Make the convolution of the residual networks: no bias, centred."""
    return Conv(channels, kernel, stride, dilation * (kernel // 2), dilation=dilation, name=name)


def relu(x: Array) -> Array:
    """Rectify: max(x, 0), whose derivative at 0 is 0.

    `jax.nn.relu` says the same, and is not used for what jax 0.10 makes of it: differentiated twice through a scan (a
    batch in parts) it forgets its rule, and has a half at 0, as maxima have. Dark borders of images end in zeros.
    """
    return jnp.where(x <= 0, 0, x)  # and not x > 0, which would hide a NaN


def max_pool(x: Array, window: int = 2) -> Array:
    """Take the maximum over windows that do not overlap: [B, H, W, c] -> [B, H // window, W // window, c].

    Rows and columns left over are dropped. A reshape and a maximum, because the gradient of XLA's own
    max-pool is slow inside loops on CPU; where values tie, the gradient is shared equally instead of going to
    the first.
    """
    b, h, w, c = x.shape
    x = x[:, : h - h % window, : w - w % window]
    return x.reshape(b, h // window, window, w // window, window, c).max((2, 4))


def max_pool_3x3(x: Array, stride: int = 2, *, same: bool = False) -> Array:
    """Take the maximum over 3x3 windows: [B, H, W, c] -> [B, ceil(H / stride), ceil(W / stride), c].

    Slices and maxima, first of rows, then of columns, for the reason of `max_pool`.

    Args:
      x: [B, H, W, c].
      stride: of the windows.
      same: place the windows as TensorFlow's "SAME"; otherwise window i is centred on stride * i.
    """
    for axis in (1, 2):
        parts = _threes(x, axis, stride, same, -jnp.inf)
        x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
    return x


def average_pool_3x3(x: Array, stride: int = 1) -> Array:
    """Average 3x3 windows, of what is in the image: [B, H, W, c] -> [B, ceil(H / stride), ceil(W / stride), c].

    The windows are placed as TensorFlow's "SAME".
    """
    for axis in (1, 2):
        inside = jnp.ones([length if i == axis else 1 for i, length in enumerate(x.shape)], x.dtype)
        total, count = (jnp.sum(jnp.stack(_threes(y, axis, stride, True, 0.0)), axis=0) for y in (x, inside))
        x = total / count
    return x


def _threes(x: Array, axis: int, stride: int, same: bool, outside: float) -> list[Array]:
    """The first, second and third of each three neighbours along an axis, with a number for those outside."""
    length = x.shape[axis]
    last = (length - 1) // stride * stride  # where the last window begins, with the padding
    missing = last + 3 - length
    before = max(0, missing) // 2 if same else 1
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (before, missing - before, 0)
    padded = jax.lax.pad(x, jnp.asarray(outside, x.dtype), edges)
    return [jax.lax.slice_in_dim(padded, i, last + i + 1, stride=stride, axis=axis) for i in range(3)]


def resize_aligned(x: Array, size: tuple[int, int]) -> Array:
    """Interpolate bilinearly with corners on corners: output i lies at i (h - 1) / (H - 1) of the input.

    Args:
      x: [B, h, w, c].
      size: (H, W). Along an axis of length 1 all outputs are alike, and one output is the first input.

    Returns:
      [B, H, W, c].
    """
    x = x[:, : x.shape[1] if size[0] > 1 else 1, : x.shape[2] if size[1] > 1 else 1]
    shape = (x.shape[0], *size, x.shape[3])
    axes = [axis for axis in (1, 2) if x.shape[axis] not in (1, shape[axis])]
    if axes:
        scale = np.array([(shape[axis] - 1) / (x.shape[axis] - 1) for axis in axes])
        there = tuple(shape[axis] if axis in axes else length for axis, length in enumerate(x.shape))
        shift, dtype = 0.5 - scale / 2, jnp.promote_types(x.dtype, jnp.float32)
        scales = jnp.asarray(scale, dtype), jnp.asarray(shift, dtype)
        x = jax.image.scale_and_translate(x, there, axes, *scales, "linear", antialias=False)
    return jnp.broadcast_to(x, shape)


def adaptive_average_pool(x: Array, grid: int) -> Array:
    """Average a feature map over grid x grid cells, which overlap where it does not divide into them.

    Cell i of n goes from floor(i h / n) to ceil((i + 1) h / n), exclusive.

    Args:
      x: [B, h, w, c], of any size.
      grid: n.

    Returns:
      [B, n, n, c].
    """
    rows, columns = (_cells(length, grid).astype(x.dtype) for length in x.shape[1:3])
    # Rows first, and in the precision of x: a GPU would round the operands of a product otherwise.
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision="highest")
    return jnp.einsum("jw,biwc->bijc", columns, x, precision="highest")


def _cells(length: int, grid: int) -> np.ndarray:
    weights = np.zeros((grid, length))
    for i in range(grid):
        cell = slice(i * length // grid, -(-(i + 1) * length // grid))
        weights[i, cell] = 1 / (cell.stop - cell.start)
    return weights


def average_pool(x: Array) -> Array:
    """Average 2x2 windows that do not overlap: [B, H, W, c] -> [B, H // 2, W // 2, c]; what is left over is dropped.

    Raises:
      ValueError: there is no such window.
    """
    b, h, w, c = x.shape
    if min(h, w) < 2:
        raise ValueError(f"A feature map is {h}x{w} where 2x2 windows of it are averaged: use larger images.")
    return x[:, : h - h % 2, : w - w % 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def average_pool_to_grid(x: Array, grid: int) -> Array:
    """Average a feature map over grid x grid equal cells: [B, H, W, c] -> [B, grid, grid, c].

    Raises:
      ValueError: the map cannot be divided into that many equal cells.
    """
    b, h, w, c = x.shape
    if h % grid or w % grid:
        raise ValueError(
            f"The final feature map is {h}x{w}, which does not divide into head_grid={grid} equal cells a "
            "side: use head_grid=1 or larger images."
        )
    return x.reshape(b, grid, h // grid, grid, w // grid, c).mean((2, 4))


def pad_to(x: Array, size: int) -> Array:
    """Pad images with zeros, centred, up to size x size; images at least that large are left alone."""
    missing = [max(0, size - length) for length in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)))


def require_positive(**sizes: int) -> None:
    """Check that every named size of a builder is an integer of at least 1.

    Raises:
      ValueError: names the first that is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} is not a positive integer: give {name} at least 1.")


def require_depth(depth: int, rest: int) -> None:
    """Check that a network has `rest` layers beside three equal stages of two or more.

    Raises:
      ValueError: the depth is not 6n + rest.
    """
    if not isinstance(depth, int) or depth < 6 + rest or (depth - rest) % 6:
        some = ", ".join(str(6 * n + rest) for n in range(1, 6))
        raise ValueError(f"depth={depth} is not 6n + {rest}: use {some}, ...")


def require_probability(**rates: float) -> None:
    """Check that every named rate can be one of dropout.

    Raises:
      ValueError: names the first that is not.
    """
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name}={rate!r} is no probability below 1: give a number in [0, 1).")


dense = partial(nn.Dense, kernel_init=he_normal)
