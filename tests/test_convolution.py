"""The closed convolution against lax in float64: value, both gradients, Hessian-vector products, vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from l2t_jax import convolution
from l2t_jax.convolution import conv2d, conv_input_p, conv_kernel_p, conv_p

SHAPES = {  # name: H, W, I, O, kernel, options
    "plain": (7, 6, 3, 4, (3, 3), {}),
    "one_by_one": (6, 6, 3, 5, (1, 1), {}),
    "one_by_one_strided": (8, 7, 3, 5, (1, 1), {"strides": 2}),
    "same_strided": (8, 8, 3, 4, (3, 3), {"strides": 2}),
    "zeros_around": (7, 9, 4, 4, (3, 3), {"strides": 2, "padding": 1}),
    "valid_rest_unused": (9, 8, 2, 3, (3, 2), {"strides": (2, 3), "padding": "VALID"}),
    "dilated": (9, 9, 2, 3, (3, 3), {"dilation": 2}),
    "dilated_strided": (9, 8, 2, 3, (3, 2), {"dilation": (2, 1), "strides": (1, 3), "padding": "VALID"}),
    "groups": (6, 6, 4, 6, (3, 3), {"groups": 2}),
    "depthwise": (8, 7, 4, 4, (3, 3), {"groups": 4, "strides": 2, "padding": 2, "dilation": 2}),
    "depthwise_strided": (8, 8, 4, 8, (3, 3), {"groups": 4, "strides": 2}),
    "even_kernel_odd_padding": (6, 6, 2, 2, (4, 4), {"padding": ((2, 0), (-1, 3))}),
    "kernel_as_large_as_input": (5, 5, 2, 2, (5, 5), {"padding": "VALID"}),
    "many_inputs": (4, 4, 64, 2, (3, 3), {"strides": 2}),
    "some_inputs": (5, 5, 6, 3, (3, 3), {"strides": 2}),
}


def by_lax(x, w, *, strides=1, padding="SAME", dilation=1, groups=1):
    """The reference, with lax's own differentiation rules."""
    pair = lambda v: (v, v) if isinstance(v, int) else v  # noqa: E731
    padding = ((padding,) * 2,) * 2 if isinstance(padding, int) else padding
    return lax.conv_general_dilated(
        x,
        w,
        pair(strides),
        padding,
        rhs_dilation=pair(dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def operands(name, lead=()):
    h, w, i, o, kernel, options = SHAPES[name]
    keys = jax.random.split(jax.random.key(len(name)), 4)
    shapes = ((*lead, 2, h, w, i), (*lead, *kernel, i // options.get("groups", 1), o)) * 2
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)], options


def derivatives(convolve, x, w, dx, dw):
    """Value, gradients, forward-over-reverse and reverse-over-reverse, inside a loop as in an unroll."""

    def total(x, w):
        def body(carry, _):
            return carry + jnp.sum(jnp.sin(convolve(carry * 0.1 + x, w))), None

        return lax.scan(body, jnp.zeros((), x.dtype), None, length=2)[0]

    first = jax.grad(total, argnums=(0, 1))
    forward = jax.jvp(first, (x, w), (dx, dw))[1]
    reverse = jax.grad(lambda x, w: sum(map(jnp.vdot, first(x, w), (dx, dw))), argnums=(0, 1))(x, w)
    return convolve(x, w), jax.jvp(convolve, (x, w), (dx, dw))[1], first(x, w), forward, reverse


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_lax(name, x64):
    arguments, options = operands(name)
    run = lambda c: jax.jit(lambda *a: derivatives(lambda x, w: c(x, w, **options), *a))(*arguments)  # noqa: E731
    assert_close(run(conv2d), run(by_lax))


@pytest.mark.parametrize("mapped", [(0, 0), (0, None), (None, 0), pytest.param((2, 3), marks=pytest.mark.versions)])
@pytest.mark.parametrize("name", ["same_strided", "groups", "dilated_strided", "depthwise"])
def test_vmap(name, mapped, x64):
    (x, w, _, _), options = operands(name, lead=(3,))
    pick = lambda a, d: a[0] if d is None else jnp.moveaxis(a, 0, d)  # noqa: E731
    arguments = [pick(a, d) for a, d in zip((x, w), mapped, strict=True)]

    def gradients(convolve):
        total = lambda x, w: jnp.sum(jnp.sin(convolve(x, w, **options)))  # noqa: E731
        first = jax.grad(total, argnums=(0, 1))
        second = jax.grad(lambda x, w: sum(jnp.sum(g**2) for g in first(x, w)), argnums=(0, 1))
        return lambda x, w: (convolve(x, w, **options), first(x, w), second(x, w))

    run = lambda c: jax.jit(jax.vmap(gradients(c), in_axes=mapped))(*arguments)  # noqa: E731
    assert_close(run(conv2d), run(by_lax))


@pytest.mark.versions
def test_derivatives_are_made_of_the_three_in_canonical_layout():
    """No derivative brings back lax's own rules, and what is lowered on CPU has one layout only."""
    x, w = jnp.ones((2, 8, 8, 64)), jnp.ones((3, 3, 64, 64))
    total = lambda x, w: jnp.sum(jnp.sin(conv2d(x, w, strides=2)))  # noqa: E731
    second = jax.grad(lambda x, w: jnp.sum(jax.grad(total, argnums=1)(x, w) ** 2), argnums=(0, 1))
    names = {e.primitive.name for e in jax.make_jaxpr(second)(x, w).eqns}
    assert {p.name for p in (conv_p, conv_input_p, conv_kernel_p)} <= names
    assert "conv_general_dilated" not in names
    text = jax.jit(second).trace(x, w).lower(lowering_platforms=("cpu",)).as_text()
    layouts = {
        line.split("dim_numbers = ")[1].split(",  window")[0].split(", window")[0]
        for line in text.splitlines()
        if "stablehlo.convolution" in line
    }
    assert layouts == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


@pytest.mark.versions
def test_other_platforms_get_lax(x64):
    """The lowering for accelerators is lax's own transposes: it agrees where it can be run."""
    from l2t_jax import convolution as c

    (x, w, _, _), options = operands("dilated_strided")
    spec = c.make_spec(x.shape, w.shape, options["strides"], options["padding"], options["dilation"], 1)
    g = conv2d(x, w, **options)
    assert_close(c._lax_conv_input(g, w, spec), c._conv_input(g, w, spec))
    assert_close(c._lax_conv_kernel(x, g, spec), c._conv_kernel(x, g, spec))


def test_patches_that_are_not_worth_storing(x64, monkeypatch):
    """Where they exceed the cache: the convolution itself, and a product for each row of the kernel."""
    monkeypatch.setattr(convolution, "CACHE", 0)
    arguments, options = operands("many_inputs")
    run = lambda c: jax.jit(lambda *a: derivatives(lambda x, w: c(x, w, **options), *a))(*arguments)  # noqa: E731
    assert_close(run(conv2d), run(by_lax))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 8, 8), (3, 3, 3, 4), {}), "expected \\[B, H, W, I\\]"),
        (((2, 8, 8, 3), (3, 3, 4, 4), {}), "do not fit 1 groups"),
        (((2, 8, 8, 4), (3, 3, 2, 3), {"groups": 2}), "do not fit 2 groups"),
        (((2, 8, 8, 3), (3, 3, 3, 4), {"padding": "FULL"}), "choose SAME, VALID"),
        (((2, 8, 8, 3), (3, 3, 3, 4), {"strides": 0}), "strides=0 must be"),
        (((2, 2, 2, 3), (3, 3, 3, 4), {"padding": "VALID"}), "does not fit into an input"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    x, w, options = arguments
    with pytest.raises(ValueError, match=message):
        conv2d(jnp.ones(x), jnp.ones(w), **options)
    with pytest.raises(ValueError, match="give both the same dtype"):
        conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1), jnp.bfloat16))
