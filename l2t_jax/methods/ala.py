"""ALA: a policy moves the parameters of a loss, and is rewarded where the validation metric then gets better.

Legend: K student steps of a window (and data stages of a round), B batch, V validation batch, C classes, E elements of
a vector of parameters, S shape of Phi, W windows remembered, P moves kept of an episode, T student steps of the run;
theta student, Phi parameters.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from l2t_jax.losses.bilinear import bilinear
from l2t_jax.methods.common import few_entries, finite, pull_of
from l2t_jax.teachers import pair_policy
from l2t_jax.types import (
    Array,
    Batch,
    Key,
    Loss,
    Method,
    MethodState,
    PyTree,
    RoundBatches,
    Student,
    StudentState,
    Task,
)
from l2t_jax.unroll import (
    errors_of,
    init_state,
    inner_objective,
    mean_over,
    plain_gradient,
    student_step,
    weighted_mean,
)

FORGET = 0.9  # of the running mean that is the baseline


class Child(NamedTuple):
    """A student and what is its own beside it."""

    student: StudentState
    loss: PyTree  # {"phi": [*S], ...}
    history: Array  # [W, *H], newest last
    metric: Array  # [] M of its last window


class Moved(NamedTuple):
    """What of a loss the policy moves, and what it is told of it."""

    loss: Loss  # with parameters "phi" [*S]
    told: Array | np.ndarray  # [*H] what it is told before anything was seen
    moves: int  # how many parameters an episode moves
    # (outputs, targets) of a validation batch -> sums [*H] and what to divide those of each first place by, [H0]
    look: Callable[[PyTree, PyTree], tuple[Array, Array]]
    features: Callable[[Array, Array, Array], Array]  # (history [W, *H], phi, progress) -> [*S, F]
    move: Callable[[Array, Array, float], Array]  # (phi, actions [*S], beta) -> phi
    some: Callable[[Key, int], tuple[Array, ...]]  # (key, P) -> places [P] of different parameters that are moved


class Seen(NamedTuple):
    """What a window tells of a student; error and metrics are means over it."""

    costs: Array  # [*H] sums over it, of `Moved.look`
    examples: Array  # [H0]
    metric: Array  # [] M
    error: Array  # [] e_val
    metrics: dict[str, Array]


def pairs_of_classes(num_classes: int) -> Moved:
    """The coefficients of the bilinear loss, one for each ordered pair of C classes i != j; the diagonal stays 1.

    The policy is told of C_ij, the mean of - log p_j over validation examples of class i, and of C_ji.

    Raises:
      ValueError: there are fewer than two classes.
    Source: ALA (ICML 2019), 4. An ordered pair moves its own element, so Phi need not stay symmetric. Ours, where the
    source is silent: the diagonal stays 1, which keeps scale and sign of the loss; a class without examples keeps its
    C, log C before the first.
    """
    _check(num_classes=(num_classes, 2))

    def look(outputs: PyTree, targets: PyTree) -> tuple[Array, Array]:
        of_class = jax.nn.one_hot(targets, num_classes)  # [V, C]
        costs = jnp.matmul(of_class.T, -jax.nn.log_softmax(outputs), precision=lax.Precision.HIGHEST)
        return costs, jnp.sum(of_class, axis=0)

    return Moved(
        bilinear(num_classes=num_classes),
        np.full((num_classes, num_classes), math.log(num_classes)),
        num_classes * (num_classes - 1),
        look,
        pair_policy.pair_features,
        pair_policy.move,
        lambda key, count: pair_policy.some_pairs(key, num_classes, count),
    )


def elements(loss: Loss, signals: Callable[[PyTree, PyTree], Array], low: float = -1.0, high: float = 1.0) -> Moved:
    """The elements of a vector phi [E] of a loss.

    Args:
      loss: its parameters have "phi" [E]; others stay as they begin.
      signals: (outputs, targets) of a validation batch -> two numbers that tell of each element, [E, 2].
      low, high: bounds of the elements.
    Raises:
      ValueError: the loss has no such parameters.
    Source: ours, after ALA's pairs of classes; before anything was seen the policy is told of zeros.
    """
    found = jax.eval_shape(loss.init, jax.random.key(0))
    if not isinstance(found, dict) or jnp.ndim(found.get("phi", 0.0)) != 1:
        raise ValueError('ALA moves the elements of a vector: this loss has no parameters "phi" [E].')
    count = found["phi"].shape[0]

    def look(outputs: PyTree, targets: PyTree) -> tuple[Array, Array]:
        return signals(outputs, targets), jnp.ones(count)

    return Moved(
        loss,
        np.zeros((count, 2)),
        count,
        look,
        pair_policy.element_features,
        partial(pair_policy.move_all, low=low, high=high),
        lambda key, some: (jnp.arange(count) if some == count else jax.random.permutation(key, count)[:some],),
    )


def ala(
    student: Student,
    task: Task,
    student_optimizer: optax.GradientTransformation,
    *,
    moved: Moved,
    window: int,
    steps: int,
    children: int = 1,
    beta: float = 0.1,
    discount: float = 0.9,
    history: int = 10,
    replay: int = 1000,
    pairs: int = 90,
    minibatch: int = 32,
    lr: float = 1e-3,
    learn: bool = True,
    axis_name: str | None = None,
) -> Method:
    """Build ALA. A round is an episode: for every child and every parameter i that is moved

      a_i ~ pi(. | features of i) in {-beta, 0, beta};  Phi_i <- clip(Phi_i + a_i, -1, 1);
      K student steps under Phi;  M' = sum_j discount^{K-j} M_j / sum_j discount^{K-j};  r = sign(M - M');

    M_j is the share of wrong predictions on the j-th validation batch after the j-th step, 1 - the task's metric. Then
    the policy takes one Adam step of REINFORCE on a minibatch of stored episodes, with the running mean of rewards as
    baseline.

    Args:
      student, task: the records that are composed; the task's metric is one of its metrics of a validation batch too, 0
        or 1 for each example.
      student_optimizer: any optax transformation.
      moved: `pairs_of_classes` or `elements`.
      window: K; the source's is 200.
      steps: T.
      children: students that gather experience, with initial parameters, Phi and history of their own, and one policy,
        one replay and the same batches. Child 0 is the student of the state.
      beta, discount: above; history: W.
      replay, minibatch: episodes of a child that are remembered, and that a policy update draws.
      pairs: P, at most so many moves of an episode are remembered, drawn at random.
      lr: of Adam.
      learn: False is the transfer protocol: a frozen policy, of any number of parameters, whose most probable action is
        taken; nothing is stored.
      axis_name: mapped axis over which batches are split, if any.
    Returns:
      a `Method` with K stages of one training batch each (leaves [K, 1, B, ...], validation [K, V, ...]).
    Raises:
      ValueError: a size that is too small, or a round with longer stages.
    Source: ALA (ICML 2019), 3 and 4. Ours, where the source is silent: M is divided by its weights; the first round
    only observes (no action, no reward), and what it sees fills the history; experience is an episode of one child; the
    baseline is that of earlier rounds.
    """
    _check(window=(window, 1), steps=(steps, 1), children=(children, 1), history=(history, 1), pairs=(pairs, 1))
    _check(replay=(replay, children), minibatch=(minibatch, 1))
    loss, optimizer = moved.loss, optax.adam(lr)
    run = _window(student, task, student_optimizer, moved, discount, axis_name)
    kept = min(pairs, moved.moves)

    def init(key: Key, inputs: Array) -> MethodState:
        k_student, k_loss, k_teacher = jax.random.split(key, 3)  # as in l2t_dln: the same key gives the same student
        k_policy, k_draws = jax.random.split(k_teacher)

        def child(k: Key) -> Child:
            theta = init_state(student.init(k, inputs), student_optimizer)
            past = jnp.tile(jnp.asarray(moved.told), (history, *[1] * moved.told.ndim))
            return Child(theta, loss.init(k_loss), past, jnp.zeros(()))

        first, policy = child(k_student), pair_policy.init_policy(k_policy, history)
        others = [child(jax.random.fold_in(k_student, c)) for c in range(1, children)]
        carried = {
            "history": first.history,
            "metric": first.metric,
            "others": jax.tree.map(lambda *x: jnp.stack(x), *others) if others else (),
            "replay": pair_policy.empty_replay(replay, kept, history) if learn else (),
            "baseline": jnp.zeros(()),
            "rounds": jnp.int32(0),
            "key": jax.random.key_data(k_draws),
        }
        return MethodState(first.student, first.loss, policy, carried, optimizer.init(policy))

    def episode(policy: PyTree, rounds: Array, batches: RoundBatches, child: Child, key: Key) -> Any:
        k_actions, k_pairs = jax.random.split(key)
        phi, first = child.loss["phi"], rounds == 0
        progress = (window * rounds).astype(phi.dtype) / steps
        features = moved.features(child.history, phi, progress)
        chosen = pair_policy.choose(policy, features, k_actions if learn else None)  # [*S]
        actions = jnp.where(first, pair_policy.STAY, chosen)
        rewritten = child.loss | {"phi": moved.move(phi, actions, beta)}
        theta, train_loss, seen = run(child.student, rewritten, batches)
        reward = jnp.where(first, 0, jnp.sign(child.metric - seen.metric))
        some = moved.some(k_pairs, kept)
        past = pair_policy.remember(child.history, seen.costs, seen.examples, first)
        child = Child(theta, rewritten, past, seen.metric.astype(child.metric.dtype))
        return child, pair_policy.Experience(features[some], actions[some], reward), (train_loss, seen)

    def episodes(state: MethodState, batches: RoundBatches, key: Key) -> Any:  # leaves [children, ...]
        carried = state.carried
        first = Child(state.student, state.loss, carried["history"], carried["metric"])
        play = partial(episode, state.teacher, carried["rounds"], batches)
        keys = [jax.random.fold_in(key, c) for c in range(children)]
        if children == 1:  # no vmap over one: convolutions with a kernel for each child are slower ones
            return jax.tree.map(lambda x: x[None], play(first, keys[0]))
        every = jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest]), first, carried["others"])
        return jax.vmap(play)(every, jnp.stack(keys))

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        carried, rounds = state.carried, state.carried["rounds"]
        k_children, k_sample = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(carried["key"]), rounds))
        every, experience, reports = episodes(state, batches, k_children)
        child, report = jax.tree.map(lambda x: x[0], (every, reports))
        others = jax.tree.map(lambda x: x[1:], every) if children > 1 else ()
        policy, adam, filled, gradient = state.teacher, state.optimizer_state, carried["replay"], ()
        if learn:
            filled = pair_policy.store(filled, experience, rounds > 0)
            drawn = pair_policy.sample(k_sample, filled, minibatch)
            *learned, gradient = pair_policy.reinforce(optimizer, policy, adam, drawn, carried["baseline"])
            policy, adam = jax.tree.map(partial(jnp.where, rounds > 0), tuple(learned), (policy, adam))
        reward, baseline = jnp.mean(experience.reward), carried["baseline"]
        carried = carried | {
            "history": child.history,
            "metric": child.metric,
            "others": others,
            "replay": filled,
            "baseline": jnp.where(rounds > 0, FORGET * baseline + (1 - FORGET) * reward, baseline),
            "rounds": rounds + 1,
        }
        after = MethodState(child.student, child.loss, policy, carried, adam)
        told = {"reward": reward, "policy_entropy": pair_policy.entropy(state.teacher, experience.features)}
        start = loss.init(jax.random.key(0))["phi"]
        return after, told | _metrics(state, after, start, report, gradient)

    def pull(state: MethodState, batch: Batch, validation: Batch) -> Array:
        return pull_of(student, task, loss, state.student.variables, state.loss, batch)

    of_length = "the feature t / T"
    return Method(init=init, round=round, stages=window, steps_per_round=window, pull=pull, of_length=of_length)


def _window(
    student: Student,
    task: Task,
    optimizer: optax.GradientTransformation,
    moved: Moved,
    discount: float,
    axis_name: str | None,
) -> Callable[[StudentState, PyTree, RoundBatches], tuple[StudentState, Array, Seen]]:
    """Build K student steps, each followed by a look at its own validation batch."""
    inner = inner_objective(student, task, moved.loss, axis_name=axis_name)
    step = student_step(plain_gradient(inner), optimizer, axis_name=axis_name)

    def look(theta: StudentState, batch: Batch) -> tuple[PyTree, PyTree, Array]:
        outputs, _ = student.apply(theta.variables, batch.inputs, True)  # statistics as in `outer_objective`
        metrics = task.metrics(outputs, batch.targets)
        sums = moved.look(outputs, batch.targets)
        means = weighted_mean(errors_of(task, outputs, batch), axis_name), jax.tree.map(jnp.mean, metrics)
        right = metrics[task.metric.name]
        return (*sums, jnp.sum(jnp.ones_like(right))), means, jnp.sum(right)

    def run(theta: StudentState, phi: PyTree, batches: RoundBatches) -> tuple[StudentState, Array, Seen]:
        if (length := batches.train.targets.shape[1]) != 1:
            raise ValueError(f"a stage has {length} training batches, ALA takes one: give N = 1 and K stages.")

        def take(carry: tuple[StudentState, PyTree], given: tuple[Batch, Batch]) -> tuple[Any, Any]:
            theta, value = step(carry[0], phi, given[0])
            sums, means, right = look(theta, given[1])
            return (theta, jax.tree.map(jnp.add, carry[1], sums)), ((value, means), right)

        train, validation = jax.tree.map(lambda x: x[:, 0], batches.train), batches.validation
        shapes, _, _ = jax.eval_shape(look, theta, jax.tree.map(lambda x: x[0], validation))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (theta, sums), (means, right) = lax.scan(take, (theta, zeros), (train, validation))
        loss, (error, metrics) = jax.tree.map(jnp.mean, mean_over(axis_name, means))
        sums, right = (sums, right) if axis_name is None else lax.psum((sums, right), axis_name)
        # Of whole numbers, so that a tie is one however batches are divided: the reward is a sign.
        wrong = 1 - right * len(right) / sums[2]  # [K]
        weights = discount ** np.arange(len(right) - 1, -1, -1.0)
        metric = jnp.sum(wrong * (weights / weights.sum()))
        return theta, loss, Seen(sums[0], sums[1], metric, error, metrics)

    return run


def _check(**sizes: tuple[int, int]) -> None:
    for name, (size, least) in sizes.items():
        if size < least:
            raise ValueError(f"{name} is {size}, expected at least {least}.")


def _metrics(
    before: MethodState, after: MethodState, start: Array, report: tuple[Array, Seen], gradient: PyTree
) -> dict[str, Any]:
    train_loss, seen = report
    phi, others = after.loss["phi"], after.carried["others"]
    return {
        "train_loss": train_loss,
        "validation_error": seen.error,
        **{f"validation_{name}": value for name, value in seen.metrics.items()},
        **few_entries(after.loss),
        "window_metric": seen.metric,
        "reward_baseline": after.carried["baseline"],
        "phi_distance": jnp.linalg.norm(phi - start.astype(phi.dtype)),
        "phi_movement": jnp.linalg.norm(phi - before.loss["phi"]),
        "policy_gradient_norm": optax.tree.norm(gradient),
        "finite": finite(
            ("student", after.student.params),
            ("validation error", {"e_val": seen.error}),
            ("other students", others.student.params if others else {}),
            ("policy gradient", gradient),
            ("policy", after.teacher),
        ),
    }
