"""Memory modes: what the compiler says they keep, what is predicted of them, and what "auto" makes of it."""

import functools
import logging
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2t_jax import memory
from l2t_jax.hypergradient import hypergradient
from l2t_jax.memory import FITS, MEMORY_MODES, choose, kept_bytes, segments
from l2t_jax.unroll import init_state

OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.1, eps_root=1e-8)}
# Width, layers, batch. In "wide" a layer has 32 times as many parameters as activations, in "deep" an eighth.
SIZES = {"wide": (128, 2, 4), "deep": (32, 4, 256), "tiny": (3, 2, 4)}
STUDENTS = ("wide", "deep")
FASTEST = {"wide": "save", "deep": "mixed"}


def inner(params, stats, phi, batch):
    hidden = batch
    for kernel in params:
        hidden = jnp.tanh(hidden @ kernel)
    return jnp.mean(phi * hidden**2), stats


def outer(params, stats, batch):
    return jnp.mean((batch @ params[0]) ** 2), {}


def problem(name, length, optimizer="sgd"):
    width, layers, batch = SIZES[name]
    keys = jax.random.split(jax.random.key(0), layers + 2)
    params = [jax.random.normal(key, (width, width)) / math.sqrt(width) for key in keys[:layers]]
    batches, validation = jax.random.normal(keys[-2], (length, batch, width)), jax.random.normal(keys[-1], (8, width))
    return jnp.array(1.0), init_state({"params": params}, OPTIMIZERS[optimizer]), batches, validation


def shapes(name, length, optimizer="sgd"):
    return jax.eval_shape(lambda: problem(name, length, optimizer))


def theta_bytes(name):
    width, layers, _ = SIZES[name]
    return 4 * layers * width**2


@functools.cache
def temporary(name, mode, length, optimizer="sgd"):
    """The compiler's own number."""
    compute = jax.jit(hypergradient(inner, outer, OPTIMIZERS[optimizer], memory=mode))
    return compute.lower(*shapes(name, length, optimizer)).compile().memory_analysis().temp_size_in_bytes


def predicted(name, mode, length, optimizer="sgd"):
    phi, state, batches, _ = shapes(name, length, optimizer)
    return kept_bytes(inner, OPTIMIZERS[optimizer], None, state, phi, batches)[mode]


def growth(count, name, mode, optimizer="sgd", lengths=(16, 32)):
    """Bytes a further step takes; with less than 16 of them, what is short-lived may hide it."""
    short, long = lengths
    return (count(name, mode, long, optimizer) - count(name, mode, short, optimizer)) / (long - short)


@pytest.mark.parametrize("name", STUDENTS)
def test_mixed_keeps_one_set_of_parameters_a_step(name):
    assert 0.9 * theta_bytes(name) < growth(temporary, name, "mixed") < 1.2 * theta_bytes(name)


def test_plain_autodiff_keeps_much_more_where_activations_are_large():
    assert growth(temporary, "deep", "save") > 20 * growth(temporary, "deep", "mixed")


def test_linearize_keeps_less_than_the_parameters_of_a_wide_student():
    """It reads activations and every kernel but the first, here one of two."""
    assert growth(temporary, "wide", "linearize") < 0.8 * theta_bytes("wide")


@pytest.mark.parametrize("name", STUDENTS)
def test_nested_keeps_about_the_root_of_the_steps(name):
    """With four times the steps it grows twice as much as before, where linear growth would be four times as much."""
    short, middle, long = (temporary(name, "nested", length) for length in (64, 256, 1024))
    assert long - middle < 2.5 * (middle - short)
    assert growth(temporary, name, "nested", lengths=(64, 256)) < 0.4 * theta_bytes(name)


@pytest.mark.parametrize(
    ("mode", "optimizer", "lengths"),
    [
        ("save", "sgd", (16, 32)),
        ("mixed", "sgd", (16, 32)),
        ("mixed", "adam", (16, 32)),
        ("linearize", "sgd", (16, 32)),
        ("nested", "sgd", (64, 256)),
    ],
)
@pytest.mark.parametrize("name", STUDENTS)
def test_what_is_predicted_is_what_the_compiler_keeps(name, mode, optimizer, lengths):
    expected = growth(predicted, name, mode, optimizer, lengths)
    np.testing.assert_allclose(growth(temporary, name, mode, optimizer, lengths), expected, rtol=0.25)


@pytest.mark.versions
def test_choice_by_what_is_kept_and_what_is_there():
    small, large = {"save": 3.0, "mixed": 4.0, "nested": 1.0}, {"save": 5.0, "mixed": 4.0, "nested": 1.0}
    assert (choose(small, 1e9), choose(large, 1e9)) == ("save", "mixed")
    assert choose({"save": 4.0, "mixed": 4.0}, 1e9) == "save"  # nothing is computed again
    for kept, fastest in ((small, "save"), (large, "mixed")):
        assert choose(kept, kept[fastest] / FITS) == fastest
        assert choose(kept, 0.99 * kept[fastest] / FITS) == "nested"
    only_reverse = {"save": 5.0, "remat": 4.0}  # a loss that cannot be differentiated forward
    assert (choose(only_reverse, 10.0), choose(only_reverse, 9.9)) == ("save", "remat")


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("name", STUDENTS)
def test_auto_takes_what_it_says_and_says_it_once(name, fits, monkeypatch, caplog):
    """However often a hypergradient is traced, also under vmap: one line, with what every mode would keep."""
    expected = FASTEST[name] if fits else "nested"
    monkeypatch.setattr(memory, "device_bytes", lambda: (4 if fits else 1) * predicted(name, FASTEST[name], 16))
    compute, arguments = hypergradient(inner, outer, OPTIMIZERS["sgd"], memory="auto"), shapes(name, 16)
    several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), arguments)
    with caplog.at_level(logging.INFO, "l2t_jax.memory"):
        compiled = jax.jit(compute).lower(*arguments).compile()
        jax.jit(compute).lower(*arguments)
        jax.eval_shape(jax.vmap(compute), *several)
    assert compiled.memory_analysis().temp_size_in_bytes == temporary(name, expected, 16)
    (line,) = caplog.messages
    assert f"takes {expected} for N = 16" in line
    saved = (predicted(name, "save", 16) - predicted(name, expected, 16)) / 2**20
    told = re.findall(r" and saves ([\d.]+) MiB of plain autodiff;", line)
    np.testing.assert_allclose([float(size) for size in told], [saved] if saved > 0 else [], rtol=1e-2)
    for mode in set(MEMORY_MODES) - {"auto"}:
        (size,) = re.findall(rf"\b{mode} ([\d.e+]+)", line)
        np.testing.assert_allclose(float(size), predicted(name, mode, 16) / 2**20, rtol=1e-2)


def test_auto_speaks_again_of_another_length_and_of_another_hypergradient(caplog):
    with caplog.at_level(logging.INFO, "l2t_jax.memory"):
        for lengths in ((2, 3, 2), (2,)):
            compute = hypergradient(inner, outer, OPTIMIZERS["sgd"], memory="auto")
            for length in lengths:
                jax.eval_shape(compute, *shapes("tiny", length))
    assert [re.search(r"N = (\d)", line)[1] for line in caplog.messages] == ["2", "3", "2"]


@pytest.mark.versions
@pytest.mark.parametrize("fits", [True, False])
def test_auto_mapped_over_losses_and_shards(fits, monkeypatch, x64):
    """Mapped over losses, each with its batches split in two: as each alone on the whole."""
    monkeypatch.setattr(memory, "device_bytes", lambda: 1e9 if fits else 1.0)
    _, state, batches, validation = problem("tiny", 5)
    phi = jnp.array([1.0, 2.0])
    whole = jax.jit(jax.vmap(hypergradient(inner, outer, OPTIMIZERS["sgd"], memory="save"), (0, None, None, None)))
    parts = jnp.moveaxis(batches.reshape(5, 2, 2, 3), 1, 0), validation.reshape(2, 4, 3)
    split = hypergradient(inner, outer, OPTIMIZERS["sgd"], memory="auto", axis_name="shards")
    over_shards = jax.vmap(split, (None, None, 0, 0), axis_name="shards")
    ours = jax.jit(jax.vmap(over_shards, (0, None, None, None)))(phi, state, *parts).gradient
    expected = whole(phi, state, batches, validation).gradient
    np.testing.assert_allclose(ours, np.stack([expected, expected], 1), rtol=1e-10)


def test_segments_cover_every_unroll():
    for length in range(1, 101):
        count, size = segments(length)
        assert 1 <= length - count * size <= size
        assert count + size <= 2 * math.sqrt(length) + 1


@pytest.mark.parametrize("length", [1, 2, 3, 10])
def test_nested_and_linearize_are_exact(length, x64):
    """No segment to compute again, a last one of a single step, of several: the gradient, state and losses of save."""
    phi, *rest = problem("tiny", length)
    results = {
        mode: jax.jit(hypergradient(inner, outer, OPTIMIZERS["sgd"], memory=mode))(phi, *rest)
        for mode in ("save", "nested", "linearize")
    }
    assert abs(results["save"].gradient) > 1e-3 and results["save"].losses.shape == (length,)
    chex.assert_trees_all_close(results["nested"], results["save"], rtol=1e-12)
    chex.assert_trees_all_close(results["linearize"], results["save"], rtol=1e-12)


def test_auto_shares_the_device_among_those_at_once(monkeypatch, caplog):
    """What fits once need not fit five times side by side."""
    monkeypatch.setattr(memory, "device_bytes", lambda: 4 * predicted("deep", FASTEST["deep"], 16))
    with caplog.at_level(logging.INFO, "l2t_jax.memory"):
        for at_once in (1, 2, 5):
            compute = hypergradient(inner, outer, OPTIMIZERS["sgd"], memory="auto", at_once=at_once)
            jax.eval_shape(compute, *shapes("deep", 16))
    taken = [re.search(r"takes (\w+)", line)[1] for line in caplog.messages]
    assert taken == [FASTEST["deep"], FASTEST["deep"], "nested"]
    assert "for each of 5 at once" in caplog.messages[2]
