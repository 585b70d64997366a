"""What the study of a run measures at a state: the DLN, its hypergradient, its teacher, how far its advice carries.

Legend: B batch, V validation batch, N unroll length, K rounds looked ahead, G grid points of an axis.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from l2t_jax.analysis import Curvature, CurvatureError, lowest_curvature, taught_error
from l2t_jax.losses.dln import surface
from l2t_jax.methods.common import Life
from l2t_jax.methods.parts import sound, taught_loss, teacher_arguments
from l2t_jax.runs.setting import Setting
from l2t_jax.teachers import build_teacher
from l2t_jax.types import Array, Batch, Loss, Method, MethodState, PyTree, StudentState
from l2t_jax.unroll import (
    errors_of,
    inner_objective,
    outer_objective,
    plain_gradient,
    student_step,
    unroll,
    weighted_mean,
)

HORIZONS = (1, 4, 16)  # in units of N
HELD_OUT = 1000  # held-out examples that judge, and examples of the validation part beside them
POINTS = 21  # G


class Instruments:
    """Measures a state of L2T-DLN on the data of its next rounds, and on held-out examples.

    dln_low, dln_high: range of the DLN over all pairs of predictions, without cross entropy where that is added.
    push_right, push_wrong: mean derivative of the loss with respect to the logit of the right class, and its sum over
      the wrong ones; cross entropy's are s_y - 1 and 1 - s_y.
    step_ratio, step_cosine: norm of the student's gradient under the DLN over that under cross entropy, and the cosine
      between the two: the effective student step.
    position_1 ... position_N: norm of the part of the hypergradient that comes through the loss of step i.
    hypergradient: norm of the whole.
    update_norm: of the teacher's update of the DLN in answer to it, in units of gamma sqrt(P).
    update_offset: |mean| over root mean square of the update's entries; 1 where all drift together.
    agreement: share of the entries whose update has the sign of descent, where the hypergradient is not zero.
    gain_1, gain_4, gain_16: validation error on held-out examples after so many times N steps under cross entropy,
      less that under the DLN, from the same student and batches; positive where the DLN helps.
    advice_1, advice_4, advice_16: the same, DLN before the update less DLN after it; positive where the update helps.
    leak: error on held-out examples less that on the current validation part, in evaluation mode.
    curvature, curvature_student: lowest eigenvalue of the Hessian of `analysis.taught_error` over student and DLN, on
      the batches of the next round, and the share of its direction that lies in the student; at some moments only.
    """

    def __init__(self, setting: Setting, method: Method, curvature_at: frozenset[int] = frozenset()) -> None:
        """Compile for one method; the state of any of its seeds can be measured.

        Args:
          setting, method: of the run.
          curvature_at: rounds done at which the curvature is found, which takes seconds.
        """
        config, parts = setting.config, setting.parts
        student, task = parts.student, parts.task
        self._plan = setting.parts.plan.of(method.stages)
        dln = taught_loss(parts)
        teacher = build_teacher(**teacher_arguments(config.teacher, config.settings))
        fixed = sound("cross_entropy", "cross_entropy", parts)
        outer = outer_objective(student, task)
        tests = len(jax.tree.leaves(setting.dataset.test)[0])
        length = self._plan.unroll_length

        def steps(loss: Loss) -> Any:
            step = student_step(plain_gradient(inner_objective(student, task, loss)), parts.optimizer)
            return lambda params, state, batches: unroll(step, state, params, batches)[0]

        taught, untaught = steps(dln), steps(fixed)

        def judged(run: Any, params: PyTree, state: StudentState, batches: Batch, judge: Batch) -> Array:
            """The error after N, 4 N, 16 N steps, [3]."""
            errors, begin = [], 0
            for horizon in HORIZONS:
                part = jax.tree.map(lambda x, a=begin, b=horizon * length: x[a:b], batches)
                state, begin = run(params, state, part), horizon * length
                errors.append(outer(state.params, state.batch_stats, judge)[0])
            return jnp.stack(errors)

        def by_position(phi: PyTree, state: StudentState, batches: Batch, validation: Batch) -> PyTree:
            """The hypergradient with a DLN of its own for every step, leaves [N, ...]: the parts sum to the whole."""
            step = student_step(plain_gradient(inner_objective(student, task, dln)), parts.optimizer)

            def error(phis: PyTree) -> Array:
                end, _ = jax.lax.scan(lambda carry, x: step(carry, *x), state, (phis, batches))
                return outer(end.params, end.batch_stats, validation)[0]

            return jax.grad(error)(jax.tree.map(lambda p: jnp.broadcast_to(p, (length, *p.shape)), phi))

        def pushes(phi: PyTree, state: StudentState, batch: Batch) -> tuple[Array, Array]:
            outputs, _ = student.apply(state.variables, batch.inputs, True)
            slope = jax.grad(lambda z: jnp.sum(dln.apply(phi, z, batch.targets)))(outputs)  # [B, C]
            right = jnp.take_along_axis(slope, batch.targets[:, None], axis=-1)[:, 0]
            return right.mean(), (slope.sum(-1) - right).mean()

        def gradient(loss: Loss, params: PyTree, state: StudentState, batch: Batch) -> Array:
            inner = inner_objective(student, task, loss)
            grads = jax.grad(lambda p: inner(p, state.batch_stats, params, batch)[0])(state.params)
            return ravel_pytree(grads)[0]

        def look(
            data: PyTree, held: PyTree, state: MethodState, train: Array, validation: Array, current: Array
        ) -> dict[str, Array]:
            phi, theta = state.loss, state.student
            batches, first = task.gather(data, train, None), task.gather(data, train[:length], None)
            judge = task.gather(held, jnp.arange(min(HELD_OUT, tests)), None)
            values = surface(phi, config.settings.squash, POINTS, config.settings.compress)
            whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), first)  # the examples of N steps as one batch
            under_dln, under_ce = gradient(dln, phi, theta, whole), gradient(fixed, {}, theta, whole)
            norms = jnp.linalg.norm(under_dln), jnp.linalg.norm(under_ce)
            parts = by_position(phi, theta, first, task.gather(data, validation, None))
            d = jax.tree.map(lambda x: x.sum(0), parts)
            hidden = state.carried.carried if isinstance(state.carried, Life) else state.carried
            update, _ = teacher.update(state.teacher, hidden, d, phi)
            flat, u = ravel_pytree(d)[0], ravel_pytree(update)[0]
            after = optax.apply_updates(phi, update)
            errors = [judged(taught, p, theta, batches, judge) for p in (phi, after)]
            plain = judged(untaught, {}, theta, batches, judge)
            right, wrong = pushes(phi, theta, whole)
            error = lambda batch: weighted_mean(  # noqa: E731
                errors_of(task, student.apply(theta.variables, batch.inputs, False)[0], batch)
            )
            return {
                "dln_low": jnp.nanmin(values),
                "dln_high": jnp.nanmax(values),
                "push_right": right,
                "push_wrong": wrong,
                "step_ratio": norms[0] / norms[1],
                "step_cosine": under_dln @ under_ce / (norms[0] * norms[1]),
                "position": jnp.sqrt(sum(jnp.sum(x.reshape(length, -1) ** 2, -1) for x in jax.tree.leaves(parts))),
                "hypergradient": jnp.linalg.norm(flat),
                "update_norm": jnp.sqrt(jnp.mean(u**2)) / config.settings.dln_lr,
                "update_offset": jnp.abs(u.mean()) / jnp.sqrt(jnp.mean(u**2)),
                "agreement": jnp.sum((jnp.sign(u) == -jnp.sign(flat)) & (flat != 0)) / jnp.sum(flat != 0),
                "gain": plain - errors[0],
                "advice": errors[0] - errors[1],
                "leak": error(judge) - error(task.gather(data, current, None)),
            }

        def curvature(data: PyTree, state: MethodState, train: Any, validation: Any) -> Curvature:
            data_of = (task.gather(data, train[:length], None), task.gather(data, validation, None))
            objective = taught_error(student, task, dln, parts.optimizer, state.student, *data_of)
            return lowest_curvature(objective, state.student.params, state.loss, jax.random.key(0))

        self._data, self._held = jax.device_put(setting.dataset.train), jax.device_put(setting.dataset.test)
        self._look, self._curvature, self._curvature_at = jax.jit(look), curvature, curvature_at
        self._steps_per_round = length * method.steps_per_round

    def __call__(self, seed: int, done: int, state: PyTree) -> dict[str, float]:
        """Measure the state of a seed after so many rounds."""
        ahead = [self._plan.indices(seed, done + k) for k in range(HORIZONS[-1])]
        train = np.concatenate([indices[0] for indices, _ in ahead])  # [K N, B], of the first stage of each round
        epoch = max(done - 1, 0) // self._plan.rounds_per_epoch
        split = self._plan.split(seed, epoch)
        found = self._look(self._data, self._held, state, train, ahead[0][1][0], split.validation[:HELD_OUT])
        row: dict[str, float] = {"student_steps": done * self._steps_per_round}
        for name, value in jax.device_get(found).items():
            if value.ndim == 0:
                row[name] = float(value)
                continue
            places = range(1, len(value) + 1) if name == "position" else HORIZONS
            row |= {f"{name}_{place}": float(x) for place, x in zip(places, value, strict=True)}
        if done in self._curvature_at:
            try:
                lowest = self._curvature(self._data, state, train, ahead[0][1][0])
                row |= {"curvature": lowest.value, "curvature_student": lowest.first_share}
            except CurvatureError:  # a run that diverges has none; it is told by its other numbers
                pass
        return row
