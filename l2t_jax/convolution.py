"""A 2-D convolution that is closed under differentiation: three bilinear primitives, each another's transpose.

XLA:CPU is fast only on convolutions in the canonical layout (NHWC inputs, HWIO kernels). Outside a loop it rewrites the
gradients of a convolution to that layout; in the body of a loop, which is where an unroll lives, it leaves them in
whatever layout the transpose rules made, tens of times slower. Here the input gradient and the kernel gradient are
primitives of their own, so the derivative of any order is made of these three, and each emits the canonical layout
itself. On other platforms they lower to what `lax.conv_general_dilated` and its transposes would be.

    y = conv(x, w)      dx = conv_input(g, w)      dw = conv_kernel(x, g)

Legend: B batch, H x W input, h x w output, I input and O output channels, G groups, V a vmapped axis.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from l2t_jax.types import Array

NHWC = ("NHWC", "HWIO", "NHWC")
FEW_CHANNELS = 12  # input channels; up to here products of windows and bands are fastest on CPU
SHIFTS = 49  # kernel positions; a depthwise convolution of up to so many is a sum of shifted images
CACHE = 4 * 2**20  # bytes; patches that fit are faster there in one matrix product
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the three convolutions of one layer share. All are (rows, columns)."""

    input: Pair  # H, W
    kernel: Pair  # K, K before dilation
    strides: Pair
    padding: tuple[Pair, Pair]  # zeros before and after, rows and columns; may be negative
    dilation: Pair  # of the kernel
    groups: int

    @property
    def output(self) -> Pair:
        """h, w."""
        h, w = ((p - r) // s + 1 for p, r, s in zip(self.padded, self.reach, self.strides, strict=True))
        return h, w

    @property
    def padded(self) -> Pair:
        """H and W with their padding."""
        return self.input[0] + sum(self.padding[0]), self.input[1] + sum(self.padding[1])

    @property
    def reach(self) -> Pair:
        """The kernel's extent with its dilation."""
        return (self.kernel[0] - 1) * self.dilation[0] + 1, (self.kernel[1] - 1) * self.dilation[1] + 1


def conv2d(
    x: Array,
    w: Array,
    *,
    strides: int | Pair = 1,
    padding: str | int | tuple[Pair, Pair] = "SAME",
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Array:
    """Convolve, which in networks is to correlate.

    y[b, i, j, o] = sum_{k, l, c} x[b, s i + d k - p, s j + d l - p, c] w[k, l, c, o], stride s, dilation d, padding p.

    Args:
      x: [B, H, W, I].
      w: [K, K, I / G, O].
      strides, dilation: one number or (rows, columns), at least 1.
      padding: "SAME" (as lax: odd zeros go after), "VALID", zeros on every side, or ((before, after), (before, after)).
      groups: G; I gives a depthwise convolution.
    Returns:
      [B, h, w, O], the dtype of x. Equal to `lax.conv_general_dilated` in every derivative, jvp, vjp, vmap and jit.
    Raises:
      ValueError: what is no array of floats, shapes or options that do not fit, or anything empty.
    """
    for name, array in (("x", x), ("w", w)):
        if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.inexact):
            kind = getattr(array, "dtype", f"a {type(array).__name__}")
            raise ValueError(f"{name} is {kind}: expected an array of floats.")
    spec = make_spec(x.shape, w.shape, strides, padding, dilation, groups)
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}: give both the same dtype.")
    return conv_p.bind(x, w, spec=spec)


def make_spec(
    x: tuple[int, ...],
    w: tuple[int, ...],
    strides: int | Pair,
    padding: str | int | tuple[Pair, Pair],
    dilation: int | Pair,
    groups: int,
) -> Spec:
    """Check shapes and options, and make them explicit.

    Raises:
      ValueError: they do not fit.
    """
    if len(x) != 4 or len(w) != 4:
        raise ValueError(f"x is {list(x)} and w is {list(w)}: expected [B, H, W, I] and [K, K, I / G, O].")
    if 0 in (*x, *w):
        raise ValueError(f"x is {list(x)} and w is {list(w)}, one of which is empty: give images and a kernel.")
    if not isinstance(groups, int) or groups < 1 or x[3] != w[2] * groups or w[3] % groups:
        raise ValueError(f"{x[3]} input and {w[3]} output channels and a kernel of {w[2]} do not fit {groups} groups.")
    strides, dilation = _pair(strides, "strides"), _pair(dilation, "dilation")
    reach = [(w[i] - 1) * dilation[i] + 1 for i in (0, 1)]
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding {padding!r} is unknown; choose SAME, VALID, a number or pairs.")
        rows, columns = lax.padtype_to_pads(x[1:3], reach, strides, padding)
        padding = ((rows[0], rows[1]), (columns[0], columns[1]))
    elif isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    elif [len(side) if isinstance(side, (tuple, list)) else 0 for side in _listed(padding)] != [2, 2]:
        raise ValueError(
            f"padding {padding!r} is unknown; choose SAME, VALID, a number or ((before, after), (..., ...))."
        )
    else:
        rows, columns = padding
        padding = ((int(rows[0]), int(rows[1])), (int(columns[0]), int(columns[1])))
    spec = Spec((x[1], x[2]), (w[0], w[1]), strides, padding, dilation, groups)
    if min(spec.output) < 1:
        raise ValueError(f"A kernel of {reach[0]}x{reach[1]} does not fit into an input of {spec.padded} with padding.")
    return spec


def _pair(value: int | Pair, name: str) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(_listed(value))
    if len(pair) != 2 or not all(isinstance(x, int) and x >= 1 for x in pair):
        raise ValueError(f"{name}={value} must be one or two integers of at least 1.")
    return pair[0], pair[1]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else []


# Canonical forms


def _conv(x: Array, w: Array, spec: Spec) -> Array:
    if _is_depthwise(spec, w.shape[2], w.shape[3]):
        terms = [shifted * weight for shifted, weight in zip(_shifted(x, spec), w.reshape(-1, w.shape[3]), strict=True)]
        return functools.reduce(operator.add, terms)
    if _is_banded(spec, x.shape[3]):
        return _banded(x, w, spec)
    if spec.groups == 1 and (spec.kernel == (1, 1) or _patch_bytes(x, spec) <= CACHE):
        return jnp.concatenate(_shifted(x, spec), axis=-1) @ w.reshape(-1, w.shape[3])
    return _lax_conv(x, w, spec)


def _conv_input(g: Array, w: Array, spec: Spec) -> Array:
    """The input gradient: correlate the output gradient, spread by the stride, with the flipped, transposed kernel."""
    if spec.groups == 1 and spec.kernel == (1, 1):
        g = g @ w[0, 0].T  # before it is spread
        return _spread(g, [spec.padding[i][0] for i in (0, 1)], spec.input, spec)
    if _is_banded(spec, w.shape[2]):
        return _transposed(_banded, 0, g, w, spec)
    before = [spec.padding[i][0] - spec.reach[i] + 1 for i in (0, 1)]
    g = _spread(g, before, (spec.input[0] + spec.reach[0] - 1, spec.input[1] + spec.reach[1] - 1), spec)
    k = w.reshape(*spec.kernel, w.shape[2], spec.groups, -1)  # [K, K, I / G, G, O / G]
    k = k.transpose(0, 1, 4, 3, 2).reshape(*spec.kernel, -1, w.shape[2] * spec.groups)[::-1, ::-1]
    plain = Spec((g.shape[1], g.shape[2]), spec.kernel, (1, 1), ((0, 0), (0, 0)), spec.dilation, spec.groups)
    return _conv(g, k, plain) if _is_depthwise(spec, w.shape[2], w.shape[3]) else _lax_conv(g, k, plain)


def _conv_kernel(x: Array, g: Array, spec: Spec) -> Array:
    """The kernel gradient: products over all output positions, of as many patches at once as are worth storing.

    Grouped, it is the convolution of x by g, over the batch, where output positions are kernel positions and the
    reverse.
    """
    inputs = x.shape[3] // spec.groups
    if _is_depthwise(spec, inputs, g.shape[3]):
        sums = [(shifted * g).sum((0, 1, 2)) for shifted in _shifted(x, spec)]
        return jnp.stack(sums).reshape(*spec.kernel, 1, -1)
    if _is_banded(spec, inputs):
        return _transposed(_banded, 1, g, x, spec)
    if spec.groups == 1:
        patches = _patches(x, spec)
        if _patch_bytes(x, spec) <= CACHE:
            patches = [jnp.concatenate(patches)]
        products = [p @ g.reshape(-1, g.shape[3]) for p in patches]
        return jnp.concatenate(products).reshape(*spec.kernel, inputs, -1)
    x = x.reshape(*x.shape[:3], spec.groups, inputs).transpose(4, 1, 2, 3, 0).reshape(inputs, *x.shape[1:3], -1)
    before = [spec.padding[i][0] for i in (0, 1)]
    needed = [spec.reach[i] + (spec.output[i] - 1) * spec.strides[i] for i in (0, 1)]
    after = [needed[i] - spec.input[i] - before[i] for i in (0, 1)]
    padding = ((before[0], after[0]), (before[1], after[1]))
    swapped = Spec(spec.input, spec.output, spec.dilation, padding, spec.strides, spec.groups)
    y = _lax_conv(x, g.transpose(1, 2, 0, 3), swapped)  # [I / G, ..., G B] by [h, w, B, O]
    return y.transpose(1, 2, 0, 3)  # [I / G, K, K, O] -> [K, K, I / G, O]


def _is_depthwise(spec: Spec, inputs: int, outputs: int) -> bool:
    """Whether each channel is convolved with one kernel of its own, which XLA:CPU does channel by channel."""
    return 1 < spec.groups == outputs and inputs == 1 and math.prod(spec.kernel) <= SHIFTS


def _is_banded(spec: Spec, inputs: int) -> bool:
    return spec.groups == 1 and spec.kernel[1] > 1 and inputs <= FEW_CHANNELS


def _banded(x: Array, w: Array, spec: Spec) -> Array:
    """Convolve t neighbouring outputs of a row at once, from the window of u columns that they see together.

    The matrix of such a block is a band, in which the kernel stands t times, each a stride further down. The product is
    wider than one of patches, which few channels make thin, and a window lies in memory as it is needed, for some
    products by zero. A window needs no more than two blocks of t strides: u <= 2 t stride.
    """
    t = max(1, spec.reach[1] - 1)
    n = -(-spec.output[1] // t)  # blocks in a row
    u, block = (t - 1) * spec.strides[1] + spec.reach[1], t * spec.strides[1]
    zero = jnp.zeros((), x.dtype)
    left = spec.padding[1][0]
    edges = [(0, 0, 0), (*spec.padding[0], 0), (left, (n + 1) * block - spec.input[1] - left, 0), (0, 0, 0)]
    blocks = lax.pad(x, zero, edges).reshape(x.shape[0], -1, n + 1, block * x.shape[3])
    windows = jnp.concatenate([blocks[:, :, :-1], blocks[:, :, 1:]], axis=-1)[..., : u * x.shape[3]]
    windows = jnp.concatenate([windows[:, rows] for rows in _positions(spec)[0]], axis=-1)  # [B, h, n, K u I]
    starts = [i * spec.strides[1] for i in range(t)]
    below = [[(0, 0, 0), (i, u - i - spec.reach[1], spec.dilation[1] - 1), (0, 0, 0), (0, 0, 0)] for i in starts]
    band = jnp.stack([lax.pad(w, zero, b) for b in below], axis=3).reshape(-1, t * w.shape[3])  # [K u I, t O]
    y = windows.reshape(-1, windows.shape[-1]) @ band
    return y.reshape(x.shape[0], spec.output[0], n * t, w.shape[3])[:, :, : spec.output[1]]


def _patches(x: Array, spec: Spec) -> list[Array]:
    """What each row of the kernel sees: K arrays [K I, B h w]. With positions innermost nothing else is transposed."""
    edges = [(0, 0, 0), (0, 0, 0), (*spec.padding[0], 0), (*spec.padding[1], 0)]
    x = lax.pad(x.transpose(3, 0, 1, 2), jnp.zeros((), x.dtype), edges)
    rows, columns = _positions(spec)
    # The barrier keeps the compiler from gathering each patch from x itself: shifting by rows is cheaper from here.
    x = lax.optimization_barrier(jnp.concatenate([x[:, :, :, c] for c in columns]))  # [K I, B, padded H, w]
    return [x[:, :, r].reshape(x.shape[0], -1) for r in rows]


def _patch_bytes(x: Array, spec: Spec) -> int:
    return x.dtype.itemsize * x.shape[0] * math.prod(spec.output) * math.prod(spec.kernel) * x.shape[3]


def _shifted(x: Array, spec: Spec) -> list[Array]:
    """What each position of the kernel sees: K K arrays [B, h, w, I]."""
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (*spec.padding[0], 0), (*spec.padding[1], 0), (0, 0, 0)])
    rows, columns = _positions(spec)
    return [x[:, r, c] for r in rows for c in columns]


def _positions(spec: Spec) -> tuple[list[slice], list[slice]]:
    """Which rows and columns of the padded input each row and column of the kernel sees."""
    (h, w), (s, t), (d, e) = spec.output, spec.strides, spec.dilation
    rows = [slice(k * d, k * d + (h - 1) * s + 1, s) for k in range(spec.kernel[0])]
    return rows, [slice(k * e, k * e + (w - 1) * t + 1, t) for k in range(spec.kernel[1])]


def _spread(g: Array, before: list[int], size: Pair, spec: Spec) -> Array:
    """Put the strides' zeros between the positions of g [B, h, w, c] and cut or fill to size, from -before on."""
    spread = [(spec.output[i] - 1) * spec.strides[i] + 1 for i in (0, 1)]
    edges = [(-before[i], size[i] - spread[i] + before[i], spec.strides[i] - 1) for i in (0, 1)]
    return lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


# As lax would have it, for platforms whose compilers choose layouts well


def _lax_conv(x: Array, w: Array, spec: Spec) -> Array:
    return lax.conv_general_dilated(
        x,
        w,
        spec.strides,
        spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=NHWC,
        feature_group_count=spec.groups,
    )


def _lax_conv_input(g: Array, w: Array, spec: Spec) -> Array:
    return _transposed(_lax_conv, 0, g, w, spec)


def _lax_conv_kernel(x: Array, g: Array, spec: Spec) -> Array:
    return _transposed(_lax_conv, 1, g, x, spec)


def _transposed(convolve: Callable[..., Array], operand: int, g: Array, other: Array, spec: Spec) -> Array:
    """The transpose of a convolution with respect to its input (operand 0) or its kernel (1), at g."""
    if operand == 0:
        shape = (g.shape[0], *spec.input, other.shape[2] * spec.groups)
        linear = lambda x: convolve(x, other, spec)  # noqa: E731
    else:
        shape = (*spec.kernel, other.shape[3] // spec.groups, g.shape[3])
        linear = lambda w: convolve(other, w, spec)  # noqa: E731
    return jax.linear_transpose(linear, jax.ShapeDtypeStruct(shape, g.dtype))(g)[0]


# The primitives


def _primitive(name: str, canonical: Callable[..., Array], other: Callable[..., Array]) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="spec"))
    primitive.def_abstract_eval(
        lambda a, b, *, spec: jax.core.ShapedArray(jax.eval_shape(partial(canonical, spec=spec), a, b).shape, a.dtype)
    )
    mlir.register_lowering(primitive, mlir.lower_fun(other, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(canonical, multiple_results=False), platform="cpu")
    batching.primitive_batchers[primitive] = partial(_batch, primitive)
    return primitive


def _batch(primitive: Primitive, operands: Any, dims: Any, *, spec: Spec) -> tuple[Array, int]:
    """vmap: the mapped axis joins the batch where only images are mapped, else it becomes groups of channels."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    if dims[1] is None and primitive is not conv_kernel_p:
        images = jnp.moveaxis(operands[0], dims[0], 0)
        out = primitive.bind(images.reshape(-1, *images.shape[2:]), operands[1], spec=spec)
        return out.reshape(size, -1, *out.shape[1:]), 0
    merged = []
    for x, d in zip(operands, dims, strict=True):  # an operand that is not mapped is repeated
        x = jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], size, x.shape[3])) if d is None else jnp.moveaxis(x, d, 3)
        merged.append(
            x.reshape(*x.shape[:3], -1)
        )  # V slower than the channels: whole sets of groups, one after another
    out = primitive.bind(*merged, spec=dataclasses.replace(spec, groups=spec.groups * size))
    return out.reshape(*out.shape[:3], size, -1), 3


conv_p = _primitive("conv2d", _conv, _lax_conv)
conv_input_p = _primitive("conv2d_input", _conv_input, _lax_conv_input)
conv_kernel_p = _primitive("conv2d_kernel", _conv_kernel, _lax_conv_kernel)

# <g, conv(x, w)> = <conv_input(g, w), x> = <conv_kernel(x, g), w>: each row is one of these, read for another operand.
ad.defbilinear(
    conv_p,
    lambda g, x, w, *, spec: conv_input_p.bind(g, w, spec=spec),
    lambda g, x, w, *, spec: conv_kernel_p.bind(x, g, spec=spec),
)
ad.defbilinear(
    conv_input_p,
    lambda x, g, w, *, spec: conv_p.bind(x, w, spec=spec),
    lambda x, g, w, *, spec: conv_kernel_p.bind(x, g, spec=spec),
)
ad.defbilinear(
    conv_kernel_p,
    lambda w, x, g, *, spec: conv_input_p.bind(g, w, spec=spec),
    lambda w, x, g, *, spec: conv_p.bind(x, w, spec=spec),
)
