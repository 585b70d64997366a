"""MentorNet: weights from how an example's loss compares with a moving percentile, by a rule or by a network.

Legend: B batch, V validation batch, T student steps of a run; phi parameters of the network, l cross entropy.
An epoch is a hundredth of the run, 0 to 99, as in the source, whatever the passes over the data.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from l2t_jax.hypergradient import hypergradient
from l2t_jax.inputs import known, length_of
from l2t_jax.methods.common import finite, pull_of_errors, stage_data, train_stage
from l2t_jax.types import Array, Batch, How, Key, Method, MethodState, PyTree, RoundBatches, Student, Task
from l2t_jax.unroll import (
    InnerLoss,
    OuterError,
    each_example,
    errors_of,
    examples_of,
    init_state,
    keys_for,
    mean_over,
    outer_objective,
)

CURRICULA = ("predefined", "data_driven")
EPOCHS = 100
SOFT = 90  # the epoch from which the predefined curriculum is linear
DROPOUT = ((0.5, 17), (0.05, 83))  # (rate, for how many epochs), ...


class Network(NamedTuple):
    """The weights of MentorNet's network."""

    cell_kernel: Array  # [2 features, 2 directions, 2 gates]
    cell_bias: Array  # [2 directions, 2 gates]
    label: Array  # [2]: the embedding of label 0, which every example has
    epochs: Array  # [100, 5]: the embedding of the epoch, never trained
    hidden_kernel: Array  # [9, 20]
    hidden_bias: Array  # [20]
    output_kernel: Array  # [20]
    output_bias: Array  # []


class Given(NamedTuple):
    """What a student step is given."""

    batch: Batch
    keep: Array  # [B] bool: examples that are not dropped
    epoch: Array  # [] int
    everyone: Array  # [] bool: burn-in, when every example that is not dropped weighs 1


class Carried(NamedTuple):
    """What a student step carries in place of the batch statistics."""

    batch_stats: PyTree
    percentile: Array  # []: m, the moving percentile of the losses
    weight: Array  # []: mean weight of the last batch, for the record


def mentornet(
    student: Student,
    task: Task,
    student_optimizer: optax.GradientTransformation,
    *,
    steps: int,
    curriculum: str = "predefined",
    percentile: float = 0.7,
    ema: float = 0.5,
    gamma: float = 1.0,
    burn_in: float = 0.19,
    dropout: Sequence[tuple[float, int]] = DROPOUT,
    lr: float = 1e-3,
    axis_name: str | None = None,
    **how: Unpack[How],
) -> Method:
    """Build MentorNet: a student step on (1/B) sum_i v_i l_i, over all B examples: v is not divided by its sum.

    m <- ema m + (1 - ema) percentile(l),  m = 0 before the first step;  d_i = l_i - m
    v_i = [i is kept] * (1 in burn-in, else weight(l_i, d_i, epoch)), constants to the student's derivative

    Args:
      student, task: the records that are composed.
      student_optimizer: any optax transformation; its weight decay is not scaled by the mean of v, as the source's is.
      steps: T.
      curriculum: "predefined": `predefined_weight`, exactly the rule that the source trains a network to imitate.
        "data_driven": `network_weight`, learned here as Meta-Weight-Net learns its own: before each step phi descends
        the derivative of the error on the validation batch, which should be clean, after a virtual step. The source
        trains it beforehand on examples of which it is known whether their label is wrong; no method here is told that,
        so this is ours. It learns during burn-in too, when it is not used yet.
      percentile, ema: see above; nearest rank, not interpolated.
      gamma: width of the rule's linear part.
      burn_in: share of the run in which v is 1: epochs 0 to 18, as in the rule (0 to 16 in released data-driven runs).
      dropout: (rate, for how many epochs), ..., 100 epochs in all; each step keeps floor((1 - rate) B) random examples.
      lr: of the network's Adam; ours.
      axis_name, **how: as in `hypergradient` (memory, at_once, check_gradient).
    Returns:
      a `Method` of one student step a round: train [1, 1, B, ...], validation [1, V, ...]; `merge_rounds` makes K
      of them one. The network is in `MethodState.loss`; m, the step and the key of dropout are in
      `MethodState.carried`.
    Raises:
      ValueError: an argument is out of its range; a round is given more than one training batch.
    Source: Jiang et al., ICML 2018, and the released code. Its data-driven runs hold the epoch at 18 after burn-in (the
    same dropout in effect); here the network is given the epoch as it is, since it learns as the epochs go by: ours.
    """
    _check(curriculum, steps, gamma, dropout, percentile=percentile, ema=ema, burn_in=burn_in)
    learned, burning = curriculum == "data_driven", int(EPOCHS * burn_in + 0.5)

    def epoch_at(count: Array) -> Array:
        return jnp.minimum(EPOCHS * count // steps, EPOCHS - 1)

    def weigh(phi: PyTree, losses: Array, before: Array, epoch: Array, axis: str | None) -> tuple[Array, Array]:
        losses = lax.stop_gradient(losses)
        moving = ema * before + (1 - ema) * percentile_of(losses, percentile, axis).astype(before.dtype)
        d = losses - moving
        return network_weight(phi, losses, d, epoch) if learned else predefined_weight(d, epoch, gamma), moving

    inner, outer = _objectives(student, task, partial(weigh, axis=axis_name), axis_name)
    optimizer = optax.adam(lr)
    look_ahead = hypergradient(
        inner,
        outer,
        student_optimizer,
        axis_name=axis_name,
        **how,
    )
    train = train_stage(inner, outer, student_optimizer, axis_name=axis_name)

    def init(key: Key, inputs: Array) -> MethodState:
        k_student, k_loss, k_teacher = jax.random.split(key, 3)  # as in l2t_dln: the same key gives the same student
        theta = init_state(student.init(k_student, inputs), student_optimizer)
        phi: PyTree = init_network(k_loss) if learned else {}
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(theta.params)))
        start = {"key": jax.random.key_data(k_teacher), "steps": jnp.int32(0), "percentile": zero}
        return MethodState(theta, phi, {}, start, optimizer.init(phi) if learned else {})

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        batch, validation = stage_data(batches, 0)
        if (length := length_of(batch)) != 1:
            raise ValueError(f"MentorNet takes one student step a round, not {length}: use merge_rounds.")
        count, moving, epoch = state.carried["steps"], state.carried["percentile"], epoch_at(state.carried["steps"])
        key = jax.random.fold_in(jax.random.wrap_key_data(state.carried["key"]), count)
        keep = kept_examples(key, epoch, examples_of(jax.tree.map(lambda x: x[0], batch)), dropout, axis_name)
        given = Given(batch, keep[None], epoch[None], epoch[None] < burning)
        start = state.student._replace(batch_stats=Carried(state.student.batch_stats, moving, jnp.zeros_like(moving)))
        phi, adam, d_phi = state.loss, state.optimizer_state, {}
        if learned:
            d_phi = look_ahead(phi, start, given._replace(everyone=jnp.array([False])), validation).gradient
            update, adam = optimizer.update(d_phi, adam, phi)
            phi = optax.apply_updates(phi, update)
        kept = train(phi, start, given, validation)
        stats, moving, weight = kept.state.batch_stats
        theta = kept.state._replace(batch_stats=stats)
        return MethodState(theta, phi, {}, state.carried | {"steps": count + 1, "percentile": moving}, adam), {
            "train_loss": jnp.mean(kept.losses),
            "validation_error": kept.error,
            **{f"validation_{name}": value for name, value in kept.metrics.items()},
            "hypergradient_norm": optax.tree.norm(d_phi),
            "loss_percentile": moving,
            "mean_weight": mean_over(axis_name, weight),
            "finite": finite(("hypergradient", d_phi), ("student", theta), ("validation error", {"e_val": kept.error})),
        }

    def pull(state: MethodState, batch: Batch, validation: Batch) -> Array:
        """Before dropout: which examples it would take is not known."""
        variables, epoch, moving = (
            state.student.variables,
            epoch_at(state.carried["steps"]),
            state.carried["percentile"],
        )
        outputs, _ = student.apply(variables, batch.inputs, True)
        losses = each_example(errors_of(task, outputs, batch), examples_of(batch))
        weights = jnp.where(epoch < burning, 1, weigh(state.loss, losses, moving, epoch, None)[0])
        return pull_of_errors(student, task, variables, batch, weights)

    return Method(init=init, round=round, stages=1, steps_per_round=1, pull=pull, of_length="the curriculum")


def percentile_of(losses: Array, share: float, axis_name: str | None = None) -> Array:
    """The percentile (nearest rank, not interpolated) of losses [B], or of those of all devices."""
    whole = losses if axis_name is None else lax.all_gather(losses, axis_name, tiled=True)
    return jnp.quantile(whole, share, method="nearest")


def kept_examples(
    key: Key, epoch: Array, examples: int, dropout: Sequence[tuple[float, int]], axis_name: str | None = None
) -> Array:
    """Draw which of the B examples of all devices are kept, floor((1 - rate) B): this device's, [examples] bool."""
    whole = examples * (1 if axis_name is None else lax.axis_size(axis_name))
    rates = np.concatenate([np.full(epochs, rate) for rate, epochs in dropout])  # [100]
    kept = jnp.asarray(np.floor(whole * (1 - rates) + 1e-6), jnp.int32)[epoch]  # 10 * (1 - 0.9) is 1
    keep = jax.random.permutation(key, whole) < kept
    return keep if axis_name is None else lax.dynamic_slice(keep, [examples * lax.axis_index(axis_name)], [examples])


def predefined_weight(difference: Array, epoch: Array, gamma: float = 1.0) -> Array:
    """Weights [B] after burn-in from d = l - m [B]: 1[d <= 0], and from epoch 90 on clip(1 - d / gamma, 0, 1).
    Source: the target of MentorNet PD in the released code: self-paced, then linear.
    """
    return jnp.where(epoch >= SOFT, jnp.clip(1 - difference / gamma, 0, 1), (difference <= 0).astype(difference.dtype))


def network_weight(params: Network, losses: Array, difference: Array, epoch: Array) -> Array:
    """Weights [B] in (0, 1) of the network, from losses l [B], d = l - m [B] and the epoch [].

    A bidirectional LSTM of one unit a direction takes one step on (l, d). Its 2 cell states and the embeddings of label
    and epoch are 9 features of a layer of 20 tanh units, read by a sigmoid.
    Source: the released code, which reads the cell states. In one step from a zero state only the input gate and the
    candidate act on them: the other gates are left out. Its output bias is added to the kernel instead; not here.
    """
    chex.assert_rank(losses, 1)
    chex.assert_equal_shape([losses, difference])
    gates = jnp.einsum("bf,fdg->bdg", jnp.stack([losses, difference], -1), params.cell_kernel) + params.cell_bias
    cells = jax.nn.sigmoid(gates[..., 0]) * jnp.tanh(gates[..., 1])  # [B, 2]
    fixed_part = jnp.concatenate([params.label, lax.stop_gradient(params.epochs)[epoch]])  # [7]
    features = jnp.concatenate([jnp.broadcast_to(fixed_part, (losses.size, fixed_part.size)), cells], -1)
    hidden = jnp.tanh(features @ params.hidden_kernel + params.hidden_bias)
    return jax.nn.sigmoid(hidden @ params.output_kernel + params.output_bias)


def init_network(key: Key) -> Network:
    """Draw the network as the released code does, but its output layer as zeros: all weights are first 1/2 (ours)."""
    k_cell, k_label, k_epochs, k_hidden, k_bias = jax.random.split(key, 5)
    uniform = partial(jax.random.uniform, minval=-1)
    return Network(
        cell_kernel=math.sqrt(6 / (3 + 4))
        * uniform(k_cell, (2, 2, 2)),  # as of [2 features and a hidden unit, 4 gates]
        cell_bias=jnp.zeros((2, 2)),
        label=math.sqrt(6 / (2 + 2)) * uniform(k_label, (2,)),
        epochs=math.sqrt(6 / (EPOCHS + 5)) * uniform(k_epochs, (EPOCHS, 5)),
        hidden_kernel=jax.random.normal(k_hidden, (9, 20)),
        hidden_bias=jax.random.normal(k_bias, (20,)),
        output_kernel=jnp.zeros(20),
        output_bias=jnp.zeros(()),
    )


def _objectives(
    student: Student, task: Task, weigh: Callable[..., Any], axis_name: str | None
) -> tuple[InnerLoss, OuterError]:
    validate = outer_objective(student, task, axis_name=axis_name)

    def inner(params: PyTree, carried: Carried, phi: PyTree, given: Given) -> tuple[Array, Carried]:
        batch, variables = given.batch, {"params": params, "batch_stats": carried.batch_stats}
        outputs, stats = student.apply(variables, batch.inputs, True, *keys_for(student, batch))
        losses = each_example(errors_of(task, outputs, batch), examples_of(batch))
        weights, moving = weigh(phi, losses, carried.percentile, given.epoch)
        weights = jnp.where(given.everyone, 1, weights) * given.keep
        return jnp.mean(weights * losses), Carried(stats, moving, jnp.mean(weights).astype(moving.dtype))

    return inner, lambda params, carried, validation: validate(params, carried.batch_stats, validation)


def _check(curriculum: str, steps: int, gamma: float, dropout: Sequence[tuple[float, int]], **shares: float) -> None:
    known(f"curriculum {curriculum!r}", curriculum, CURRICULA)
    if steps < 1 or gamma <= 0:
        raise ValueError(f"MentorNet's steps={steps} and gamma={gamma} must both be positive.")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"MentorNet's {name}={share} is not a share: give a number in [0, 1].")
    if sum(epochs for _, epochs in dropout) != EPOCHS or not all(0 <= rate <= 1 for rate, _ in dropout):
        raise ValueError(
            f"MentorNet's dropout {dropout} is not (rate in [0, 1], epochs), ... for {EPOCHS} epochs in all."
        )
