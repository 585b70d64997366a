"""L2T-DLF: a teacher rewrites the coefficients of a bilinear loss at every student step and learns through them all.

Legend: S data stages of a round, N unroll length, B batch, V validation batch, C classes, T steps of a student's life.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax

from l2t_jax.hypergradient import Hypergradient, hypergradient
from l2t_jax.inputs import known
from l2t_jax.losses.bilinear import bilinear, bilinear_low_rank, distance, untaught
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.methods.common import finite, pull_of, stage_data, train_stage
from l2t_jax.teachers.attention import (
    Attention,
    Running,
    coefficients,
    init_attention,
    newborn,
    saw_batch,
    saw_validation,
    state_features,
)
from l2t_jax.types import (
    Array,
    Batch,
    Errors,
    How,
    Key,
    Method,
    MethodState,
    PyTree,
    Read,
    RoundBatches,
    Student,
    StudentState,
    Task,
)
from l2t_jax.unroll import both_weights, errors_of, init_state, keys_for, losses_for, mean_over, weighted_mean

LIVES = ("windows", "whole")
SHARPNESS = 50.0  # of the smoothed step of the demo


def probability(outputs: Array, targets: Array) -> Array:
    """1 - p_y [B]: the 0-1 error a class drawn from p = softmax(z) would make on average; z [B, C], y [B]."""
    return 1 - _right(jax.nn.softmax(outputs), targets)


def smooth(outputs: Array, targets: Array) -> Array:
    """2 sigmoid(50 (max_j p_j - p_y)) - 1 [B], 0 with no slope for what is right; outputs z [B, C], targets y [B]."""
    p = jax.nn.softmax(outputs)
    return 2 * jax.nn.sigmoid(SHARPNESS * (jnp.max(p, axis=-1) - _right(p, targets))) - 1


def _right(p: Array, targets: Array) -> Array:
    return jnp.take_along_axis(p, targets[..., None], axis=-1)[..., 0]


MEASURES = {"probability": probability, "smooth": smooth}


def l2t_dlf(
    student: Student,
    task: Task,
    student_optimizer: optax.GradientTransformation,
    teacher_optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    steps: int,
    life: str = "windows",
    measure: str = "probability",
    slots: int = 10,
    width: int = 16,
    rank: int = 0,
    learn: bool = True,
    axis_name: str | None = None,
    **how: Unpack[How],
) -> Method:
    """Build L2T-DLF.

    theta_{t+1} = theta_t - eta d/dtheta L_{Phi_t}(theta_t, batch_t), Phi_t = mu_tau(s_t), for N steps of a round; then
    tau <- optimizer(d M(theta_N) / d tau), M a smoothed 0-1 error of the validation batch. What is classified is what
    the task has as rows: examples, pixels, tokens.

    Args:
      student, task: the records that are composed.
      student_optimizer: the paper's students use SGD with momentum.
      teacher_optimizer: of tau; the demo's is plain `optax.sgd(0.01)`.
      num_classes: C.
      steps: T, the student steps of a life.
      life: "windows": the student goes on from round to round, and the teacher learns after each window of N steps.
        "whole" (Algorithm 1): every round is the life of a new student, N = T; that of the first round is `init`'s.
      measure: M: "probability" is 1 - p_y, "smooth" the demo's 2 sigmoid(50 (max_j p_j - p_y)) - 1.
      slots, width: of the attention.
      rank: r of Phi = diag(c) + U V^T, see `bilinear_low_rank`: for a vocabulary; 0: the full matrix, as in the paper
        on images.
      learn: False freezes tau; nothing is differentiated.
      axis_name: mapped axis over which batches are split, if any.
      **how: memory, at_once, check_gradient, as in `hypergradient`.
    Returns:
      a `Method`. Its state is theta, the loss as the teacher would have it next (parameters of `bilinear`), tau, what
      it is told of the student (and for "whole" a key and a count of lives), and the state of tau's optimizer.
    Raises:
      ValueError: an unknown `life`, `measure` or `memory`; sizes that are too small; a "whole" round with N != T.
    Source: L2T-DLF (NeurIPS 2018), Algorithm 1 and its reverse-mode differentiation, in which s_t is a constant of
    every derivative. The windows are ours: a whole life of T steps is what the paper differentiates, and the demo
    restarts from one pre-trained student, which is not offered. That features are measured on the batch of the step is
    the demo's; a student's features are its own, so those on validation data stay 0 within a "whole" life (ours).
    """
    _check(life, measure, num_classes=num_classes, steps=steps, slots=slots, width=width)
    loss = bilinear_low_rank(num_classes=num_classes, rank=rank) if rank else bilinear(num_classes=num_classes)
    view, losses_of = dict(task.views)["rows"], losses_for(task, loss)

    def coefficients_at(tau: Attention, running: Running) -> PyTree:
        return coefficients(tau, state_features(running, num_classes=num_classes, steps=steps))

    def rows_of(outputs: PyTree, batch: Batch) -> Read:
        read = view(outputs, batch.targets)
        if read.outputs.shape[-1] != num_classes:
            raise ValueError(
                f"the student has {read.outputs.shape[-1]} outputs and num_classes is {num_classes}: give that."
            )
        return read._replace(weight=both_weights(read.weight, batch.weight, read.targets.shape[0]))

    def observe(running: Running, outputs: PyTree, batch: Batch, axis_name: str | None) -> Running:
        # What is told of a student is a constant of every derivative.
        read = rows_of(lax.stop_gradient(outputs), batch)
        measured = _measured(read.outputs, read.targets)
        means = {name: weighted_mean(Errors(value, read.weight), axis_name) for name, value in measured.items()}
        return saw_batch(running, mean_over(axis_name, means))

    def inner(theta: PyTree, auxiliary: PyTree, tau: Attention, batch: Batch) -> tuple[Array, PyTree]:
        variables = {"params": theta, "batch_stats": auxiliary["batch_stats"]}
        outputs, stats = student.apply(variables, batch.inputs, True, *keys_for(student, batch))
        running = observe(auxiliary["running"], outputs, batch, axis_name)
        losses = losses_of(coefficients_at(tau, running), outputs, batch)
        auxiliary = {"batch_stats": stats, "running": running._replace(steps=running.steps + 1)}
        return weighted_mean(losses, axis_name), auxiliary

    def outer(theta: PyTree, auxiliary: PyTree, batch: Batch) -> tuple[Array, PyTree]:
        variables = {"params": theta, "batch_stats": auxiliary["batch_stats"]}
        outputs, _ = student.apply(variables, batch.inputs, True)  # statistics as in `outer_objective`
        read = rows_of(outputs, batch)
        mean = lambda values, weight: weighted_mean(Errors(values, weight), axis_name)  # noqa: E731
        told = {
            "error": weighted_mean(errors_of(task, outputs, batch), axis_name),
            "correct": mean(_correct(read.outputs, read.targets), read.weight),
            "task": {name: mean(values, batch.weight) for name, values in task.metrics(outputs, batch.targets).items()},
        }
        return mean(MEASURES[measure](read.outputs, read.targets), read.weight), told

    differentiate = hypergradient(
        inner,
        outer,
        student_optimizer,
        axis_name=axis_name,
        **how,
    )
    run = differentiate if learn else train_stage(inner, outer, student_optimizer, axis_name=axis_name)

    def init(key: Key, inputs: Array) -> MethodState:
        k_student, _, k_teacher = jax.random.split(key, 3)  # as in l2t_dln: the same key gives the same student
        tau = init_attention(k_teacher, num_classes=num_classes, slots=slots, width=width, rank=rank)
        theta, running = init_state(student.init(k_student, inputs), student_optimizer), newborn()
        draws = {"key": jax.random.key_data(k_student), "lives": jnp.int32(0)} if life == "whole" else {}
        phi = jax.tree.map(jnp.copy, coefficients_at(tau, running))  # shares no buffer with tau
        return MethodState(theta, phi, tau, {"running": running, **draws}, teacher_optimizer.init(tau))

    def begin(state: MethodState, train: Batch) -> tuple[StudentState, dict[str, PyTree]]:
        if life == "windows":
            return state.student, state.carried
        if (length := jax.tree.leaves(train.targets)[0].shape[0]) != steps:
            raise ValueError(f"a round has {length} steps, a whole life {steps}: give N = T.")
        lives = state.carried["lives"]
        key = jax.random.fold_in(jax.random.wrap_key_data(state.carried["key"]), lives)
        drawn = student.init(key, jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), train.inputs))
        variables = jax.tree.map(
            lambda new, old: jnp.where(lives == 0, old, new.astype(old.dtype)), drawn, state.student.variables
        )
        running = jax.tree.map(jnp.zeros_like, state.carried["running"])
        return init_state(variables, student_optimizer), state.carried | {"running": running, "lives": lives + 1}

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        train, validation = stage_data(batches, 0)
        theta, told = begin(state, train)
        auxiliary = {"batch_stats": theta.batch_stats, "running": told["running"]}
        found = run(state.teacher, theta._replace(batch_stats=auxiliary), train, validation)
        theta = found.state._replace(batch_stats=found.state.batch_stats["batch_stats"])
        running = saw_validation(found.state.batch_stats["running"], found.metrics["correct"])

        tau, optimizer_state = state.teacher, state.optimizer_state
        if learn:
            update, optimizer_state = teacher_optimizer.update(found.gradient, optimizer_state, tau)
            tau = optax.apply_updates(tau, update)
        phi = coefficients_at(tau, running)
        moved = distance(phi, coefficients_at(tau, told["running"]))
        state = MethodState(theta, phi, tau, told | {"running": running}, optimizer_state)
        return state, _metrics(found, state, moved, distance(phi, untaught(num_classes, rank)))

    def pull(state: MethodState, batch: Batch, validation: Batch) -> Array:
        outputs, _ = student.apply(state.student.variables, batch.inputs, True)
        running = observe(state.carried["running"], outputs, batch, None)  # a record's batches are never split
        phi = coefficients_at(state.teacher, running)
        return pull_of(student, task, loss, state.student.variables, phi, batch)

    return Method(init=init, round=round, stages=1, steps_per_round=1, pull=pull, of_length="the feature t / T")


def _check(life: str, measure: str, **sizes: int) -> None:
    for name, value, names in (("life", life, LIVES), ("measure", measure, MEASURES)):
        known(f"{name} {value!r}", value, names)
    for name, size in sizes.items():
        least = 2 if name == "num_classes" else 1
        if size < least:
            raise ValueError(f"{name} is {size}, expected at least {least}.")


def _measured(outputs: Array, targets: Array) -> dict[str, Array]:
    """What the features of the state are made of, for each example [B]."""
    p = jax.nn.softmax(outputs)
    wrong = jnp.where(targets[..., None] == jnp.arange(p.shape[-1]), -jnp.inf, p)
    return {
        "loss": cross_entropy(outputs, targets),
        "accuracy": _correct(outputs, targets),
        "margin": _right(p, targets) - jnp.max(wrong, axis=-1),
    }


def _correct(outputs: Array, targets: Array) -> Array:
    # As floats of the outputs: the mean of bools is float32 whatever the rest is.
    return (jnp.argmax(outputs, axis=-1) == targets).astype(outputs.dtype)


def _metrics(found: Hypergradient, state: MethodState, moved: Array, away: Array) -> dict[str, Any]:
    return {
        "train_loss": jnp.mean(found.losses),
        "validation_error": found.metrics["error"],
        **{f"validation_{name}": value for name, value in found.metrics["task"].items()},
        "dlf_measure": found.error,
        "train_accuracy": state.carried["running"].train_accuracy,
        "hypergradient_norm": optax.tree.norm(found.gradient),
        "phi_distance": away,  # from the identity
        "phi_movement": moved,  # from the first state of the round to the last, under the new teacher
        "class_bias_norm": jnp.linalg.norm(state.loss["bias"]),
        "finite": finite(
            ("student", state.student.params),
            ("validation measure", {"measure": found.error, "e_val": found.metrics["error"]}),
            ("hypergradient", found.gradient),
            ("teacher", state.teacher),
        ),
    }
