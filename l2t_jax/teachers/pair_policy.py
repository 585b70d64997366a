"""The teacher of ALA: a policy that moves one coefficient of the loss at a time, shared by all pairs of classes.

It sees a pair of classes and not how many there are, so that a policy of ten classes can teach a hundred.

Legend: C classes, W windows remembered, F = 2 W + 4 features of a pair, P pairs of an episode, R episodes of a replay.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.types import Array, Key, PyTree

UNITS = (32, 32)
ACTIONS = 3  # -beta, 0, +beta
STAY = 1  # the action that moves nothing
SMALLEST = 1e-8  # a mean of -log p that is taken as zero


class Layer(NamedTuple):
    """One linear layer."""

    kernel: Array  # [inputs, outputs]
    bias: Array  # [outputs]


class Experience(NamedTuple):
    """What is kept of an episode; a minibatch of them has a leading axis."""

    features: Array  # [P, F]
    actions: Array  # [P] int32
    reward: Array  # []


class Replay(NamedTuple):
    """The last R episodes."""

    experience: Experience  # leaves [R, ...]
    stored: Array  # [] int32, how many were ever stored


def init_policy(key: Key, history: int) -> tuple[Layer, ...]:
    """Draw the network F -> 32 -> 32 -> 3 for W windows of history: all entries U(-1, 1) / sqrt(inputs).

    Source: the sizes are those of a public re-implementation of ALA; the law is not published and is ours.
    """
    sizes = (2 * history + 4, *UNITS, ACTIONS)
    layers = []
    for k, inputs, outputs in zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True):
        k_kernel, k_bias = jax.random.split(k)
        bound = 1 / math.sqrt(inputs)
        draw = lambda k, *shape: jax.random.uniform(k, shape, minval=-bound, maxval=bound)  # noqa: B023, E731
        layers.append(Layer(draw(k_kernel, inputs, outputs), draw(k_bias, outputs)))
    return tuple(layers)


def action_logits(policy: tuple[Layer, ...], features: Array) -> Array:
    """Unnormalised log-probabilities [..., 3] of the actions -beta, 0, +beta, given features [..., F]."""
    for layer in policy[:-1]:
        features = jax.nn.relu(features @ layer.kernel + layer.bias)
    return features @ policy[-1].kernel + policy[-1].bias


def choose(policy: tuple[Layer, ...], features: Array, key: Key | None) -> Array:
    """Draw an action [...] for features [..., F], or where the key is None take the most probable one."""
    logits = action_logits(policy, features)
    return jnp.argmax(logits, axis=-1) if key is None else jax.random.categorical(key, logits)


def move(phi: Array, actions: Array, beta: float) -> Array:
    """Phi' = clip(Phi + a, -1, 1) off the diagonal, which stays as it is; Phi [C, C], actions [C, C] in 0, 1, 2."""
    chex.assert_shape([phi, actions], (len(phi), len(phi)))
    return jnp.where(jnp.eye(len(phi), dtype=bool), phi, move_all(phi, actions, beta))


def move_all(phi: Array, actions: Array, beta: float, low: float = -1, high: float = 1) -> Array:
    """Phi' = clip(Phi + a, low, high) of every element; Phi [...], actions [...] in 0, 1, 2."""
    return jnp.clip(phi + beta * (actions - STAY).astype(phi.dtype), low, high)


def entropy(policy: tuple[Layer, ...], features: Array) -> Array:
    """Mean entropy [] of pi(. | features), features [..., F], in nats."""
    log_pi = jax.nn.log_softmax(action_logits(policy, features))
    return -jnp.mean(jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1))


def remember(history: Array, costs: Array, examples: Array, first: Array) -> Array:
    """Append C_ij = costs_ij / examples_i to a history [W, C, C] and drop the oldest; what is seen `first` fills it."""
    chex.assert_shape(examples, costs.shape[:1])
    chex.assert_shape(history, (None, *costs.shape))
    means = costs / jnp.maximum(examples, 1)[:, None]
    newest = jnp.where(examples[:, None] > 0, means, history[-1]).astype(history.dtype)
    return jnp.where(first, newest, jnp.concatenate([history[1:], newest[None]]))


def pair_features(history: Array, phi: Array, progress: Array) -> Array:
    """What the policy is told of each ordered pair of classes (i, j).

    C_ij of the last W windows, C_ji of the same, the relative change of the newest C_ij and C_ji from their means over
    these windows, Phi_ij, and the part of all student steps that is done.

    Args:
      history: [W, C, C], newest last; C_ij is the mean of -log p_j over validation examples of class i.
      phi: coefficients [C, C].
      progress: [] in [0, 1).
    Returns:
      features [C, C, F].
    Source: ALA (ICML 2019), 4: [C_ij, C_ji] of a pair. The history, the change, Phi and the progress are those of a
    public re-implementation, as the paper's numbers are not available to us; their order is ours.
    """
    chex.assert_shape(phi, history.shape[1:])
    forth = jnp.moveaxis(history, 0, -1)  # [C, C, W]
    return _features(forth, jnp.swapaxes(forth, 0, 1), phi, progress)


def element_features(history: Array, phi: Array, progress: Array) -> Array:
    """What the policy is told of each element of a vector of parameters, in the form of a pair of classes.

    Args:
      history: [W, E, 2], newest last: two numbers that tell of an element, in place of C_ij and C_ji.
      phi: [E].
      progress: [] in [0, 1).
    Returns:
      features [E, F].
    Source: ours. ALA says what the policy is told of pairs of classes; so a policy may go from one task to another.
    """
    chex.assert_shape(history, (None, len(phi), 2))
    both = jnp.moveaxis(history, 0, -1)  # [E, 2, W]
    return _features(both[:, 0], both[:, 1], phi, progress)


def _features(forth: Array, back: Array, phi: Array, progress: Array) -> Array:
    """Of two histories [..., W] and a parameter [...]."""
    changes = []
    for past in (forth, back):
        mean = jnp.mean(past, axis=-1)
        changes.append((past[..., -1] - mean) / jnp.maximum(mean, SMALLEST))
    told = jnp.stack([*changes, phi, jnp.full_like(phi, progress)], axis=-1)  # [..., 4]
    return jnp.concatenate([forth, back, told], axis=-1)


def some_pairs(key: Key, num_classes: int, count: int) -> tuple[Array, Array]:
    """Draw `count` different ordered pairs i != j without replacement: i [count], j [count]."""
    i, j = np.nonzero(~np.eye(num_classes, dtype=bool))
    chosen = jnp.arange(count) if count == len(i) else jax.random.permutation(key, len(i))[:count]
    return jnp.asarray(i)[chosen], jnp.asarray(j)[chosen]


def empty_replay(episodes: int, pairs: int, history: int) -> Replay:
    """A replay of R episodes with nothing in it."""
    features = jnp.zeros((episodes, pairs, 2 * history + 4))
    return Replay(
        Experience(features, jnp.zeros((episodes, pairs), jnp.int32), jnp.zeros(episodes)), stored=jnp.int32(0)
    )


def store(replay: Replay, new: Experience, keep: Array) -> Replay:
    """Put n <= R episodes (leaves [n, ...]) where the oldest are; they count only if `keep` [] says so."""
    count = new.reward.shape[0]
    slots = (replay.stored + jnp.arange(count)) % replay.experience.reward.shape[0]
    put = lambda old, new: old.at[slots].set(new.astype(old.dtype))  # noqa: E731
    # What is not counted lies where the next episode will, so nothing needs to be copied to keep it out.
    return Replay(jax.tree.map(put, replay.experience, new), replay.stored + jnp.where(keep, count, 0))


def sample(key: Key, replay: Replay, count: int) -> Experience:
    """Draw episodes evenly, with replacement, among those stored: leaves [count, ...]; zeros where there is none."""
    filled = jnp.minimum(replay.stored, replay.experience.reward.shape[0])
    drawn = jax.random.randint(key, (count,), 0, jnp.maximum(filled, 1))
    return jax.tree.map(lambda x: x[drawn], replay.experience)


def reinforce_loss(policy: PyTree, experience: Experience, baseline: Array) -> Array:
    """- mean over episodes and pairs of (r - b) log pi(a | s): its gradient is that of REINFORCE, downhill.

    Args:
      policy: of `init_policy`.
      experience: a minibatch, leaves [M, ...].
      baseline: b [].
    Returns:
      [].
    Source: ALA (ICML 2019), 3: episodes of one step, so the return is the reward. log pi is that of the current
    policy also where an older one acted, without importance weights, as there. All pairs of an episode share its
    reward, and the mean over them in place of the sum only scales the gradient, which Adam does not see.
    """
    log_pi = jax.nn.log_softmax(action_logits(policy, experience.features))  # [M, P, 3]
    taken = jnp.take_along_axis(log_pi, experience.actions[..., None], axis=-1)[..., 0]
    return -jnp.mean((experience.reward - baseline)[..., None] * taken)


def reinforce(
    optimizer: optax.GradientTransformation, policy: PyTree, state: PyTree, experience: Experience, baseline: Array
) -> tuple[PyTree, PyTree, PyTree]:
    """One step of an optimizer down `reinforce_loss`: the new policy, the optimizer's new state, the gradient."""
    gradient = jax.grad(reinforce_loss)(policy, experience, baseline)
    update, state = optimizer.update(gradient, state, policy)
    return optax.apply_updates(policy, update), state, gradient
