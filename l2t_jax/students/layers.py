"""Small pieces the students share.

Legend: B batch, H and W height and width in pixels, c channels.
"""

from functools import partial
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
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
      module: maps inputs [B, ...], floats or int32 ids, or a tuple of them, and a bool `train` to outputs [B, C].
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
        kind = jax.tree.leaves(inputs)[0].dtype
        if kind not in (jnp.int32, jnp.int64) and not jnp.issubdtype(kind, jnp.floating):
            raise ValueError(
                f"inputs are {kind}: expected floats, or int32 ids for a student that embeds them. Pixels are "
                "normalised first, (x - mean) / std."
            )
        dtype = kind if jnp.issubdtype(kind, jnp.floating) else jnp.result_type(float)
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), initial(key, inputs))
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def apply(
        variables: dict[str, PyTree], inputs: Array, train: bool, keys: Key | None = None
    ) -> tuple[Array, PyTree]:
        old, drawn = variables["batch_stats"], (keys,) if draws else ()
        if not train or not old:
            return cast(Array, module.apply(variables, inputs, train, *drawn)), old
        outputs, updated = module.apply(variables, inputs, True, *drawn, mutable=["batch_stats"])
        # linen reduces half precision in float32; the carry of a scan keeps its dtype.
        return outputs, jax.tree.map(lambda a, b: a.astype(b.dtype), updated["batch_stats"], old)

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


def dropout(x: Array, rate: float, keys: Key | None, place: int) -> Array:
    """Set each entry to zero with probability `rate`, and scale the others by 1 / (1 - rate).

    Args:
      x: [B, ...].
      rate: in [0, 1).
      keys: [B], one for each example, so that how a batch is divided over devices changes nothing; None: x as it is.
      place: a number for each dropout of a network, which then draw independently.

    Source: Srivastava et al. 2014, scaled in training as is usual now.
    """
    if keys is None or rate == 0:
        return x
    chex.assert_shape(keys, x.shape[:1])
    draw = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, x.shape[1:]))
    return jnp.where(draw(keys), x / (1 - rate), 0)


def batch_norm(train: bool, axis_name: str | None, name: str) -> nn.BatchNorm:
    """Make the BatchNorm all students use: statistics of the batch in training, running ones otherwise.

    running <- 0.9 running + 0.1 batch, with the biased variance for both; epsilon is 1e-5. The variance is the mean of
    (x - mean)^2 in a second pass: E x^2 - (E x)^2, linen's default, loses all digits of inputs far from zero, and on
    a whole hypergradient of ResNet-8 is not faster.

    Args:
      train: whether to normalise by the batch and to move the running statistics.
      axis_name: mapped axis over whose members the batch statistics are averaged as well, or None.
      name: submodule name.

    Returns:
      An unbound linen module.

    Source: Ioffe & Szegedy 2015.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
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

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [B, H, W, c] to [B, h, w, channels]."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", he_normal, shape).astype(x.dtype)
        x = conv2d(x, kernel, strides=self.stride, padding=self.padding)
        return x + self.param("bias", nn.initializers.zeros, (self.channels,)) if self.use_bias else x


def conv(channels: int, kernel: int, stride: int, name: str) -> Conv:
    """Make the convolution of the residual networks: no bias, centred."""
    return Conv(channels, kernel, stride, kernel // 2, name=name)


def max_pool(x: Array, window: int = 2) -> Array:
    """Take the maximum over windows that do not overlap: [B, H, W, c] -> [B, H // window, W // window, c].

    Rows and columns left over are dropped. A reshape and a maximum, because the gradient of XLA's own
    max-pool is slow inside loops on CPU; where values tie, the gradient is shared equally instead of going to
    the first.
    """
    b, h, w, c = x.shape
    x = x[:, : h - h % window, : w - w % window]
    return x.reshape(b, h // window, window, w // window, window, c).max((2, 4))


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


dense = partial(nn.Dense, kernel_init=he_normal)
