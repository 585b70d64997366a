"""SLF: at every student step some losses of a pool are drawn, and the probabilities are learned on validation data.

Legend: K losses of the pool, R sets of draws, N unroll length, B batch, V validation batch, T student steps of the run;
theta student, v decision logits, z_k whether loss k is on.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from l2t_jax.hypergradient import Hypergradient, hypergradient
from l2t_jax.losses import build_loss, make_loss
from l2t_jax.methods.common import finite, pull_of, stage_data, train_stage
from l2t_jax.types import Array, Batch, Head, How, Key, Loss, Method, MethodState, PyTree, RoundBatches, Student, Task
from l2t_jax.unroll import examples_of, init_state, inner_objective, mean_over, outer_objective

POOL = ("cross_entropy", "smooth_zero_one", "mae", "generalized_cross_entropy", "focal")
KNOBS = {"smooth_zero_one": {"k": 20.0}}  # K fixed: its slope grows with K, and s_k is measured but once
SETS = 8  # R
ON = 1  # the column of v that switches a loss on


def slf(
    student: Student,
    task: Task,
    student_optimizer: optax.GradientTransformation,
    *,
    pool: Sequence[str | Loss] = POOL,
    num_classes: int,
    steps: int,
    lr: float = 1e-3,
    temperature: tuple[float, float] = (1.0, 0.1),
    axis_name: str | None = None,
    **how: Unpack[How],
) -> Method:
    """Build SLF. A round is one student step, so take several as one (`merge_rounds`). It draws Gumbel noise, then

      A) theta -> theta_A with L = sum_k z_k s_k l_k / sum_k z_k;  d = d e_val(theta_A) / dv.
      B) v <- Adam(d);  theta steps again, from where A began, on the same batch with the same noise and the new v.

    z is one for what is on and zero else, with the derivative of softmax((v + noise) / temperature); s_k makes the
    initial gradient of l_k, of the first training batch with respect to theta, of norm one.

    Args:
      student, task: the records that are composed.
      student_optimizer: any optax transformation.
      pool: losses or their names, at least two, without parameters that are learned.
      num_classes: C, of which some losses have parameters.
      steps: T.
      lr: of Adam.
      temperature: at the first step and after the last, exponential between them.
      axis_name: mapped axis over which batches are split, if any.
      **how: memory, at_once, check_gradient, as in `hypergradient`.
    Returns:
      a `Method` of one stage, leaves [1, N, B, ...] with N = 1; a larger N looks N steps ahead with one draw.
    Raises:
      ValueError: a pool, a temperature or a T that does not do, an unknown memory mode.
    Source: Stochastic Loss Function (AAAI 2020), abstract: a decision net switches losses of a pool on and off by
    Gumbel-softmax and is adapted to validation performance. All else is ours, as the rest is not available to us: the
    pool (K = 20 in smooth_zero_one), logits in place of a net with inputs, s_k, temperatures, the unroll of one step.
    """
    losses, names = _pool(pool, num_classes)
    if steps < 1 or min(temperature) <= 0:
        raise ValueError(f"steps is {steps} and temperature {temperature}: expected at least 1, and two above 0.")
    loss, optimizer = mixture(losses), optax.adam(lr)
    inner = inner_objective(student, task, loss, axis_name=axis_name)
    outer = outer_objective(student, task, axis_name=axis_name)
    differentiate = hypergradient(
        inner,
        outer,
        student_optimizer,
        axis_name=axis_name,
        **how,
    )
    only_train = train_stage(inner, outer, student_optimizer, axis_name=axis_name)

    def init(key: Key, inputs: Array) -> MethodState:
        k_student, k_loss, k_teacher = jax.random.split(key, 3)  # as in l2t_dln: the same key gives the same student
        theta, params = init_state(student.init(k_student, inputs), student_optimizer), loss.init(k_loss)["params"]
        v = jnp.zeros((len(losses), 2))
        draws = {"scale": jnp.ones(len(losses)), "steps": jnp.int32(0), "key": jax.random.key_data(k_teacher)}
        return MethodState(theta, {"logits": v, "params": params}, {}, draws, optimizer.init(v))

    def done(state: MethodState) -> Array:
        return state.carried["steps"].astype(state.carried["scale"].dtype) / steps

    def pool_at(state: MethodState) -> tuple[PyTree, ...]:
        progress = done(state)
        return tuple(one.at(p, progress) for one, p in zip(losses, state.loss["params"], strict=True))

    def scale_at(state: MethodState, params: PyTree, batch: Batch) -> Array:
        """The scales s [K]: computed in the first round, remembered afterwards."""

        def compute(_: Any) -> tuple[Array, Array]:
            return initial_scale(inner, state.student, params, batch, axis_name).astype(old.dtype), jnp.bool_(True)

        old, known = state.carried["scale"], state.carried["steps"] > 0
        # No cond: with runs side by side (vmap) that would compute its branch in every round and drop the result.
        return lax.while_loop(lambda carry: ~carry[1], compute, (old, known))[0]

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        train, validation = stage_data(batches, 0)
        count, v, params = state.carried["steps"], state.loss["logits"], pool_at(state)
        scale = scale_at(state, params, jax.tree.map(lambda x: x[0], train))
        key = jax.random.fold_in(jax.random.wrap_key_data(state.carried["key"]), count)
        noise, now = draw(key, v), temperature_at(done(state), temperature)

        weights, chain = jax.vjp(lambda v: mix(select(v, noise, now), scale), v)
        ahead = differentiate({"weights": weights, "params": params}, state.student, train, validation)
        (gradient,) = chain(ahead.gradient["weights"].astype(weights.dtype))
        update, adam = optimizer.update(gradient, state.optimizer_state, v)
        v = v + update
        z = select(v, noise, now)
        kept = only_train({"weights": mix(z, scale), "params": params}, state.student, train, validation)

        after = {**state.carried, "scale": scale, "steps": count + examples_of(train)}
        state = MethodState(kept.state, {**state.loss, "logits": v}, {}, after, adam)
        return state, _metrics(kept, ahead.error, v, z, gradient, names)

    def pull(state: MethodState, batch: Batch, validation: Batch) -> Array:
        weights = mix(probability(state.loss["logits"]), state.carried["scale"])  # nothing is drawn for a record
        phi = {"weights": weights, "params": pool_at(state)}
        return pull_of(student, task, loss, state.student.variables, phi, batch)

    return Method(init=init, round=round, stages=1, steps_per_round=1, pull=pull, of_length="the temperature")


def mixture(losses: Sequence[Loss]) -> Loss:
    """The loss sum_k w_k l_k with parameters {"weights": [K], "params": those of each loss}."""
    head = any(one.reads == "head" for one in losses)

    def losses_of(params: PyTree, outputs: Any, targets: Array) -> Array:
        plain = outputs.features @ outputs.kernel + outputs.bias if isinstance(outputs, Head) else outputs
        read = [outputs if one.reads == "head" else plain for one in losses]
        values = [one.apply(p, x, targets) for one, p, x in zip(losses, params["params"], read, strict=True)]
        return jnp.tensordot(params["weights"], jnp.stack(values), axes=1)

    def init(key: Key) -> PyTree:
        keys = jax.random.split(key, len(losses))
        params = tuple(one.init(k) for one, k in zip(losses, keys, strict=True))
        return {"weights": jnp.full(len(losses), 1 / len(losses)), "params": params}

    return make_loss(losses_of, init=init, reads="head" if head else "rows")


def temperature_at(progress: Array, ends: tuple[float, float]) -> Array:
    """first * (last / first)^progress, progress [] in [0, 1]."""
    return ends[0] * (ends[1] / ends[0]) ** progress


def probability(v: Array) -> Array:
    """How probable it is that each loss is on [K], given v [K, 2]."""
    return jax.nn.softmax(v, axis=-1)[:, ON]


def draw(key: Key, v: Array) -> Array:
    """Gumbel noise [K, 2]: of R sets the first that switches any loss on, else the first of all."""
    sets = jax.random.gumbel(key, (SETS, *v.shape), v.dtype)
    some = jnp.any(jnp.argmax(v + sets, axis=-1) == ON, axis=-1)  # [R]
    return sets[jnp.argmax(some)]


def select(v: Array, noise: Array, temperature: Array) -> Array:
    """Straight-through Gumbel-softmax: z [K] is 0 or 1, its derivative that of softmax((v + noise) / temperature).

    Args:
      v: decision logits [K, 2], off and on.
      noise: of `draw`, [K, 2].
      temperature: [].
    Returns:
      z [K]. Where nothing is on, the most probable loss is.
    """
    chex.assert_equal_shape([v, noise])
    soft = probability((v + noise) / temperature)
    on = jnp.argmax(v + noise, axis=-1) == ON
    best = jnp.arange(len(v)) == jnp.argmax(v[:, ON] - v[:, 1 - ON])
    hard = jnp.where(jnp.any(on), on, best).astype(v.dtype)
    return hard + (soft - lax.stop_gradient(soft))  # in this order z is exactly 0 or 1


def mix(z: Array, scale: Array) -> Array:
    """The weights of the losses, w_k = z_k s_k / sum z [K]; sum z >= 1 as one is on, so this is max(1, sum z)."""
    chex.assert_equal_shape([z, scale])
    return z * scale / jnp.sum(z)


def initial_scale(inner: Any, theta: Any, params: PyTree, batch: Batch, axis_name: str | None) -> Array:
    """s_k = 1 / |d l_k / d theta| [K], l_k the mean over a batch; 1 for a loss without slope there.

    Args:
      inner: the objective of `mixture`.
      theta: `StudentState`.
      params: of the losses.
      batch: leaves [B, ...].
      axis_name: mapped axis over which the batch is split, if any.
    """

    def values(weights: Array, student: PyTree) -> Array:
        return inner(student, theta.batch_stats, {"weights": weights, "params": params}, batch)[0]

    gradient = jax.vmap(jax.grad(values, argnums=1), in_axes=(0, None))(jnp.eye(len(params)), theta.params)
    squares = [
        jnp.sum(x.reshape(len(params), -1) ** 2, axis=-1) for x in jax.tree.leaves(mean_over(axis_name, gradient))
    ]
    norm = jnp.sqrt(sum(squares))
    return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 1)


def _pool(pool: Sequence[str | Loss], num_classes: int) -> tuple[list[Loss], list[str]]:
    losses = [build_loss(one, num_classes, **KNOBS.get(one, {})) if isinstance(one, str) else one for one in pool]
    names = [one if isinstance(one, str) else f"loss_{k}" for k, one in enumerate(pool)]
    if len(losses) < 2:
        raise ValueError(f"the pool has {len(losses)} losses, expected at least 2 to choose from.")
    for name, one in zip(names, losses, strict=True):
        if one.learned != "no":
            raise ValueError(f"{name} has parameters that are learned: give losses with learned='no' as the pool.")
    return losses, names


def _metrics(
    kept: Hypergradient, ahead: Array, v: Array, z: Array, gradient: Array, names: Sequence[str]
) -> dict[str, Any]:
    return {
        "train_loss": jnp.mean(kept.losses),
        "validation_error": kept.error,
        **{f"validation_{name}": value for name, value in kept.metrics.items()},
        "validation_error_before": ahead,
        "losses_on": jnp.sum(z),
        **{f"probability_{name}": p for name, p in zip(names, probability(v), strict=True)},
        "hypergradient_norm": jnp.linalg.norm(gradient),
        "finite": finite(
            ("student", kept.state.params),
            ("validation error", {"e_val": kept.error}),
            ("hypergradient", {"v": gradient}),
            ("decision logits", {"v": v}),
        ),
    }
