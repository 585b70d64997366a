"""Rounds under a teacher as a function of its parameters: the values are L2T-DLN's, the derivative is that of Eq. 8."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.methods.horizon import Taught, Window, horizon
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.types import RoundBatches, Teacher
from l2t_jax.unroll import init_state

N = 3
SGD = optax.sgd(0.1, momentum=0.9)
PARTS = toy.student, toy.task, toy.small_loss()


def build(teacher=toy.teacher):
    return horizon(*PARTS, teacher, SGD, memory="save")


def begin(teacher=toy.teacher):
    phi = toy.small_loss().init(jax.random.key(1))
    theta = init_state(toy.student.init(jax.random.key(0), jnp.zeros((2, 5))), SGD)
    tau = teacher.init(jax.random.key(2))
    return toy.to_x64((tau, Taught(theta, phi, teacher.hidden(phi))))


def window(rounds, judged_by_what_is_seen=False):
    validation = toy.batch(1, rounds, 7)
    judge = validation if judged_by_what_is_seen else toy.batch(2, rounds, 9)
    return toy.to_x64(Window(toy.batch(0, rounds, N, 6), validation, judge))


def test_one_round_has_the_derivative_of_eq_8(x64):
    """And the student, the loss and the error of `l2t_dln`."""
    (tau, taught), read = begin(), window(1, judged_by_what_is_seen=True)
    errors = build()
    (error, after), gradient = jax.jit(jax.value_and_grad(lambda tau: _first(errors(tau, taught, read)), has_aux=True))(
        tau
    )
    method = l2t_dln(*PARTS, toy.teacher, SGD, toy.READ_GRADIENT, second_stage="restart", memory="save")
    state = method.init(jax.random.key(0), jnp.zeros((2, 5)))
    state = state._replace(student=taught.student, loss=taught.loss, teacher=tau, carried=taught.hidden)
    state = toy.to_x64(state)
    expected, metrics = jax.jit(method.round)(state, RoundBatches(read.train, read.validation, jnp.array(False)))
    np.testing.assert_allclose(error, metrics["validation_error"], rtol=1e-12)
    chex.assert_trees_all_close(
        after, Taught(expected.student, expected.loss, expected.carried), rtol=1e-12, atol=1e-14
    )
    chex.assert_trees_all_close(gradient, expected.optimizer_state, rtol=1e-9)


def _first(pair):
    errors, taught = pair
    return errors[0], taught


def test_the_derivative_through_three_rounds_against_differences(x64):
    """What the teacher reads is a constant: in the differences it is given what it read at the middle."""
    (tau, taught), read = begin(), window(3)
    seen = []

    def listening(tau, hidden, d, phi):
        jax.debug.callback(lambda d: seen.append(d), d, ordered=True)
        return toy.teacher.update(tau, hidden, d, phi)

    value = lambda errors: lambda tau: jnp.sum(errors(tau, taught, read)[0] * jnp.arange(1.0, 4))  # noqa: E731
    jax.jit(value(build(toy.teacher._replace(update=listening))))(tau)
    jax.effects_barrier()
    read_then = jax.tree.map(lambda *d: jnp.stack(d), *seen)

    def reading(tau, hidden, d, phi):
        h, count = hidden
        update, h = toy.teacher.update(tau, h, jax.tree.map(lambda x: x[count], read_then), phi)
        return update, (h, count + 1)

    played = Teacher(toy.teacher.init, lambda phi: (toy.teacher.hidden(phi), jnp.int32(0)), reading)
    constant = jax.jit(
        lambda tau: jnp.sum(
            build(played)(tau, taught._replace(hidden=(taught.hidden, jnp.int32(0))), read)[0] * jnp.arange(1.0, 4)
        )
    )
    middle, gradient = jax.jit(jax.value_and_grad(value(build())))(tau)
    np.testing.assert_allclose(constant(tau), middle, rtol=1e-10)
    at = lambda h: constant({"log_rate": tau["log_rate"] + h})  # noqa: E731
    difference = (8 * (at(1e-3) - at(-1e-3)) - (at(2e-3) - at(-2e-3))) / 12e-3
    np.testing.assert_allclose(gradient["log_rate"], difference, rtol=1e-7)
    # The horizon shows: the later errors depend on the first update too.
    alone = sum(jax.grad(lambda tau, r=r: _round_alone(tau, taught, read, r))(tau)["log_rate"] for r in range(3))
    assert abs(alone / gradient["log_rate"] - 1) > 1e-3


def _round_alone(tau, taught, read, r):
    """(r + 1) times the error of round r, of which Eq. 8 sees only that round's update."""
    errors = build()
    if r:
        _, taught = jax.lax.stop_gradient(errors(tau, taught, jax.tree.map(lambda x: x[:r], read)))
    found, _ = errors(tau, taught, jax.tree.map(lambda x: x[r : r + 1], read))
    return (r + 1) * found[0]


def test_what_judges_is_not_what_the_teacher_sees(x64):
    (tau, taught), read = begin(), window(2)
    errors = jax.jit(build())
    values, after = errors(tau, taught, read)
    others, same = errors(tau, taught, read._replace(judge=toy.batch(5, 2, 9)))
    chex.assert_trees_all_equal(after, same)
    assert np.all(np.abs(values - others) > 1e-4)
    _, moved = errors(tau, taught, read._replace(validation=toy.batch(6, 2, 7)))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(after.loss, moved.loss, rtol=1e-5)
