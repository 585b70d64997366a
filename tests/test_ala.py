"""ALA: the REINFORCE gradient, what an episode observes, moves and stores, children, transfer, resuming."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.losses.bilinear import bilinear
from l2t_jax.methods.ala import ala, pairs_of_classes
from l2t_jax.teachers import pair_policy
from l2t_jax.teachers.pair_policy import Experience
from l2t_jax.types import Batch, RoundBatches, Student
from l2t_jax.unroll import inner_objective

K, C, SGD = 3, toy.CLASSES, optax.sgd(0.1, momentum=0.9)
OFF = ~np.eye(C, dtype=bool)
GRADIENT = jax.jit(jax.grad(pair_policy.reinforce_loss))
STORE, SAMPLE = jax.jit(pair_policy.store), jax.jit(pair_policy.sample, static_argnums=2)


def batches_of(round, window=K):
    return RoundBatches(toy.batch(10 * round, window, 1, 6), toy.batch(10 * round + 1, window, 8), jnp.array(False))


def halves(batches):
    """Each batch cut in two, the parts along a new first axis."""
    cut = lambda axis: lambda x: np.stack(np.split(np.asarray(x), 2, axis))  # noqa: E731
    train, validation = jax.tree.map(cut(2), batches.train), jax.tree.map(cut(1), batches.validation)
    return RoundBatches(train, validation, batches.first_of_epoch)


def part(tree, i):
    """Entry i of all leaves."""
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def build(student=toy.student, **knobs):
    given = {"moved": pairs_of_classes(C), "window": K, "steps": 30, "history": 4, "replay": 5, "minibatch": 3} | knobs
    method = ala(student, toy.task, SGD, **given)
    return method, jax.jit(method.init)(jax.random.key(0), np.zeros((2, 5)))


def policy_of(history=4, seed=0):
    return jax.jit(pair_policy.init_policy, static_argnums=1)(jax.random.key(seed), history)


def test_reinforce_gradient_is_that_of_the_expected_reward(x64):
    """One pair, three actions: enumerated with weights 3 pi(a), for which the mean over actions is the expectation."""
    policy, features = policy_of(), jax.random.normal(jax.random.key(1), (12,))
    rewards = jnp.array([1.0, -1.0, 0.5])
    pi = jax.nn.softmax(pair_policy.action_logits(policy, features))
    expected = jax.jit(jax.grad(lambda p: jax.nn.softmax(pair_policy.action_logits(p, features)) @ rewards))(policy)
    tiled = jnp.tile(features, (3, 1, 1))
    for baseline in (0.0, 0.7):  # which changes nothing in expectation
        every = Experience(tiled, jnp.arange(3)[:, None], 3 * pi * (rewards - baseline))
        ours = GRADIENT(policy, every, jnp.array(0.0))
        chex.assert_trees_all_close(ours, jax.tree.map(jnp.negative, expected), rtol=1e-9, atol=1e-14)
    assert optax.tree.norm(expected) > 1e-2
    as_usual = Experience(tiled, jnp.arange(3)[:, None], jnp.full(3, 0.7))  # no better than the baseline: no gradient
    assert optax.tree.norm(GRADIENT(policy, as_usual, jnp.array(0.7))) == 0


def test_sampled_reinforce_gradient_within_its_standard_error(x64):
    policy, features, n = policy_of(), jax.random.normal(jax.random.key(1), (12,)), 20_000
    rewards, baseline = jnp.array([1.0, -1.0, 0.5]), 0.3
    log_pi = lambda p: jax.nn.log_softmax(pair_policy.action_logits(p, features))  # noqa: E731
    _, push = jax.linearize(log_pi, policy)
    actions = pair_policy.choose(policy, jnp.tile(features, (n, 1, 1)), jax.random.key(5))
    drawn = Experience(jnp.tile(features, (n, 1, 1)), actions, rewards[actions[:, 0]])
    ours = GRADIENT(policy, drawn, jnp.array(baseline))
    for seed in range(4):
        direction = toy.to_x64(optax.tree.random_like(jax.random.key(seed), policy))
        slopes = push(direction)  # of log pi(a) along the direction
        terms, pi = slopes * (rewards - baseline), jnp.exp(log_pi(policy))
        mean = pi @ terms
        error = jnp.sqrt((pi @ terms**2 - mean**2) / n)
        assert abs(-optax.tree.vdot(ours, direction) - mean) < 4 * error
        assert abs(mean) > 20 * error  # so that a wrong sign or baseline would show


def test_a_rewarded_action_becomes_the_chosen_one():
    """A bandit: +1 for the last action, -1 for the others, from the replay with the method's own update."""
    policy, optimizer, replay = policy_of(), optax.adam(1e-2), pair_policy.empty_replay(20, 2, 4)
    features = jax.random.normal(jax.random.key(1), (1, 2, 12))

    def play(carry, key):
        policy, adam, replay = carry
        k_action, k_sample = jax.random.split(key)
        actions = jnp.full((1, 2), 0) + pair_policy.choose(policy, features, k_action)[:, :1]
        new = Experience(features, actions, jnp.where(actions[:, 0] == 2, 1.0, -1.0))
        replay = pair_policy.store(replay, new, jnp.array(True))
        drawn = pair_policy.sample(k_sample, replay, 8)
        policy, adam, _ = pair_policy.reinforce(optimizer, policy, adam, drawn, jnp.array(0.0))
        return (policy, adam, replay), None

    start = (policy, optimizer.init(policy), replay)
    (learned, _, _), _ = jax.lax.scan(play, start, jax.random.split(jax.random.key(2), 150))
    probability = lambda p: jax.nn.softmax(pair_policy.action_logits(p, features))[0, :, 2]  # noqa: E731
    assert np.all(probability(policy) < 0.5) and np.all(probability(learned) > 0.9)
    np.testing.assert_array_equal(pair_policy.choose(learned, features, None), 2)


def test_replay_is_circular_and_empty_slots_are_not_drawn():
    replay, one = pair_policy.empty_replay(4, 1, 4), jnp.ones((2, 1, 12))
    new = lambda *rewards: Experience(one, jnp.zeros((2, 1), int), jnp.array(rewards))  # noqa: E731
    drawn = lambda replay: set(SAMPLE(jax.random.key(0), replay, 60).reward.tolist())  # noqa: E731
    replay = STORE(replay, new(9.0, 9.0), jnp.array(False))
    assert replay.stored == 0
    replay = STORE(replay, new(1.0, 2.0), jnp.array(True))
    assert drawn(replay) == {1.0, 2.0}
    for rewards in ((3.0, 4.0), (5.0, 6.0)):
        replay = STORE(replay, new(*rewards), jnp.array(True))
    assert drawn(replay) == {3.0, 4.0, 5.0, 6.0} and replay.stored == 6


def test_features_of_a_pair():
    history, phi = jax.random.uniform(jax.random.key(0), (4, C, C)), jax.random.normal(jax.random.key(1), (C, C))
    features = jax.jit(pair_policy.pair_features)(history, phi, 0.25)
    chex.assert_shape(features, (C, C, 12))
    h, i, j = np.asarray(history), 0, 2
    change = lambda x: (x[-1] - x.mean()) / x.mean()  # noqa: E731
    told = [*h[:, i, j], *h[:, j, i], change(h[:, i, j]), change(h[:, j, i]), phi[i, j], 0.25]
    np.testing.assert_allclose(features[i, j], told, rtol=1e-5)


def test_pairs_are_off_the_diagonal_and_different():
    for count in (5, 12):
        i, j = jax.jit(pair_policy.some_pairs, static_argnums=(1, 2))(jax.random.key(3), 4, count)
        assert np.all(i != j) and len(set(zip(i.tolist(), j.tolist(), strict=True))) == count


def test_phi_is_clipped_and_keeps_its_diagonal():
    phi = jnp.eye(C)
    move = jax.jit(pair_policy.move)
    for _ in range(15):
        phi = move(phi, jnp.array([[0, 2, 0], [2, 2, 1], [0, 1, 0]]), 0.1)
    np.testing.assert_array_equal(phi, [[1, 1, -1], [1, 1, 0], [-1, 0, 1]])


@jax.jit
def plain_step(theta, phi, batch, validation):
    """By hand: a student step, and the predictions on a validation batch after it."""
    inner = inner_objective(toy.student, toy.task, bilinear(num_classes=C))
    (_, stats), grads = jax.value_and_grad(inner, has_aux=True)(theta.params, theta.batch_stats, phi, batch)
    updates, optimizer_state = SGD.update(grads, theta.optimizer_state, theta.params)
    theta = type(theta)(optax.apply_updates(theta.params, updates), stats, optimizer_state)
    return theta, jax.nn.softmax(toy.student.apply(theta.variables, validation.inputs, True)[0])


def reference(state, phi, batches, discount=0.9):
    """A window in plain steps: the student, M and C of validation batches."""
    theta, wrong, costs, counts = state.student, [], np.zeros((C, C)), np.zeros(C)
    for k in range(K):
        train, validation = part((batches.train, batches.validation), k)
        theta, p = plain_step(theta, phi, part(train, 0), validation)
        p, y = np.asarray(p), np.asarray(validation.targets)
        wrong.append(np.mean(p.argmax(-1) != y))
        for row, label in zip(p, y, strict=True):
            costs[label] -= np.log(row)
            counts[label] += 1
    weights = [discount ** (K - 1 - k) for k in range(K)]
    return theta, np.dot(weights, wrong) / np.sum(weights), costs / counts[:, None]


def test_two_rounds_against_plain_steps(x64):
    """The first observes and moves nothing; the second moves Phi by what was drawn and stores what it saw."""
    method, state = build()
    run = jax.jit(method.round)
    phi = {"phi": jnp.eye(C), "bias": jnp.zeros(C)}
    theta, before, costs = reference(state, phi, batches_of(0))
    first, metrics = run(state, batches_of(0))
    chex.assert_trees_all_close(first.student, theta, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_equal((first.loss, first.teacher), (phi, state.teacher))
    np.testing.assert_allclose(first.carried["history"], np.tile(costs, (4, 1, 1)), rtol=1e-9)
    np.testing.assert_allclose(metrics["window_metric"], before, rtol=1e-12)
    assert metrics["reward"] == 0 and first.carried["replay"].stored == 0 and first.optimizer_state[0].count == 0

    second, metrics = run(first, batches_of(1))
    moved = second.loss["phi"] - phi["phi"]
    steps = np.round(np.asarray(moved) / 0.1)
    np.testing.assert_allclose(moved, 0.1 * steps, atol=1e-12)
    assert set(steps[OFF]) <= {-1, 0, 1} and np.any(steps[OFF] != 0) and np.all(np.diag(moved) == 0)
    theta, after, costs = reference(first, second.loss, batches_of(1))
    chex.assert_trees_all_close(second.student, theta, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(second.carried["history"][-1], costs, rtol=1e-9)
    np.testing.assert_array_equal(second.carried["history"][:-1], first.carried["history"][1:])
    assert metrics["reward"] == np.sign(before - after) != 0
    kept = part(second.carried["replay"].experience, 0)
    np.testing.assert_array_equal(kept.actions, steps[OFF] + 1)  # all six pairs, in order
    seen = pair_policy.pair_features(first.carried["history"], phi["phi"], jnp.array(K / 30))
    np.testing.assert_allclose(kept.features, seen[OFF], rtol=1e-12)
    assert kept.reward == metrics["reward"] and second.carried["replay"].stored == 1
    np.testing.assert_allclose(second.carried["baseline"], 0.1 * metrics["reward"])
    gradient = GRADIENT(first.teacher, jax.tree.map(lambda x: x[None], kept), jnp.array(0.0))
    update, _ = optax.adam(1e-3).update(gradient, first.optimizer_state, first.teacher)
    chex.assert_trees_all_close(second.teacher, optax.apply_updates(first.teacher, update), rtol=1e-9, atol=1e-12)
    assert {x.dtype for x in jax.tree.leaves(second) if x.dtype.kind == "f"} == {np.dtype("float64")}


def echo(shares):
    """Validation batches of which given shares are right, for a student whose outputs are its inputs."""
    targets = jnp.zeros((len(shares), 4), int)
    rows = jnp.stack([jnp.where(jnp.arange(4) < 4 * share, 0, 1) for share in shares])
    return Batch(5 * jax.nn.one_hot(rows, C), targets)


def test_reward_is_plus_one_where_the_error_falls():
    student = Student(
        lambda key, inputs: {"params": jnp.zeros(()), "batch_stats": {}},
        lambda variables, inputs, train: (inputs + variables["params"], {}),
    )
    method, state = build(student)
    run = jax.jit(method.round)
    train = Batch(jnp.ones((K, 1, 2, C)), jnp.zeros((K, 1, 2), int))
    rewards, at = [], []
    # The last step of a window counts most; the middle one is worth discount of it.
    for shares in ((0.5, 0.5, 0.5), (0.5, 0.5, 0.75), (0.75, 0.5, 0.5), (0.75, 0.5, 0.5), (1, 1, 1)):
        state, metrics = run(state, RoundBatches(train, echo(shares), jnp.array(False)))
        rewards.append(float(metrics["reward"]))
        at.append(float(metrics["window_metric"]))
    assert rewards == [0, 1, -1, 0, 1]
    np.testing.assert_allclose(at[1], (0.81 * 0.5 + 0.9 * 0.5 + 0.25) / 2.71, rtol=1e-6)
    np.testing.assert_allclose(state.carried["baseline"], 0.9 * (0.9 * (0.9 * 0.1 - 0.1)) + 0.1, atol=1e-6)
    # Classes 1 and 2 were never seen: they keep what is known of a student that guesses.
    np.testing.assert_allclose(state.carried["history"][:, 1:], np.log(C), rtol=1e-6)
    assert not np.allclose(state.carried["history"][:, 0], np.log(C))


def test_children_are_separate_runs_under_a_frozen_policy(x64):
    """Three at once, greedy, against each alone: its student, Phi and history; and nothing is learned or stored."""
    method, state = build(children=3, learn=False, beta=0.2)
    alone, single = build(learn=False, beta=0.2)
    chex.assert_trees_all_equal(single.student, state.student)
    run, run_alone = jax.jit(method.round), jax.jit(alone.round)
    starts = [single] + [single._replace(student=part(state.carried["others"].student, c)) for c in (0, 1)]
    for r in range(3):
        state, _ = run(state, batches_of(r))
        starts = [run_alone(one, batches_of(r))[0] for one in starts]
    others = state.carried["others"]
    for c in (0, 1):
        theirs = starts[c + 1]
        expected = (theirs.student, theirs.loss, theirs.carried["history"], theirs.carried["metric"])
        chex.assert_trees_all_close(tuple(part(others, c)), expected, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close((state.student, state.loss), (starts[0].student, starts[0].loss), rtol=1e-9, atol=1e-12)
    kernels = [np.asarray(s.student.params["hidden"]["kernel"]) for s in starts]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2 < np.abs(kernels[1] - kernels[2]).max()
    assert np.any(np.asarray(state.loss["phi"])[OFF]) and state.carried["replay"] == ()
    chex.assert_trees_all_equal(state.teacher, single.teacher)


@pytest.fixture(scope="module")
def learning():
    """Two children and what they learned in four rounds."""
    method, state = build(children=2)
    run = jax.jit(method.round)
    for r in range(4):
        state, _ = run(state, batches_of(r))
    return run, state


def test_learning_children_resume_and_share_one_policy(learning):
    """Each episode of both is stored, the same state gives the same round, and draws depend on the round."""
    run, state = learning
    again, _ = run(jax.tree.map(lambda x: jnp.array(np.array(x)), state), batches_of(4))
    further, metrics = run(state, batches_of(4))
    chex.assert_trees_all_equal(again, further)
    assert further.carried["replay"].stored == 8  # the first round only observes
    assert metrics["policy_gradient_norm"] > 0 and 0 < metrics["policy_entropy"] <= np.log(3)
    assert optax.tree.norm(optax.tree.sub(further.teacher, state.teacher)) > 1e-4
    assert all(np.all(flag) for flag in jax.tree.leaves(metrics["finite"]))
    other, _ = run(state._replace(carried=state.carried | {"rounds": state.carried["rounds"] + 1}), batches_of(4))
    assert np.any(other.loss["phi"] != further.loss["phi"])
    spoiled, _ = run(state._replace(carried=state.carried | {"baseline": jnp.array(5.0)}), batches_of(4))
    assert np.any(spoiled.teacher[0].kernel != further.teacher[0].kernel)
    phis = np.concatenate([further.loss["phi"][None], further.carried["others"].loss["phi"]])
    assert np.any(phis[0] != phis[1]) and np.abs(phis).max() <= 1


def test_a_policy_of_three_classes_teaches_four(learning):
    """The transfer protocol: the most probable action for every pair, whatever C; the teacher stays."""
    policy = learning[1].teacher
    student = Student(
        lambda key, inputs: {"params": jnp.eye(5, 4), "batch_stats": {}},
        lambda variables, inputs, train: (inputs @ variables["params"], {}),
    )
    method, state = build(student, moved=pairs_of_classes(4), learn=False)
    state, run = state._replace(teacher=policy), jax.jit(method.round)
    state, _ = run(state, batches_of(0))
    after, metrics = run(state, batches_of(1))
    features = pair_policy.pair_features(state.carried["history"], state.loss["phi"], jnp.array(K / 30))
    moves = 0.1 * (jnp.argmax(pair_policy.action_logits(policy, features), -1) - 1) * ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(after.loss["phi"], jnp.eye(4) + moves, atol=1e-6)
    assert np.any(moves)
    chex.assert_trees_all_equal((after.teacher, after.optimizer_state), (policy, state.optimizer_state))
    assert metrics["policy_gradient_norm"] == 0


def test_split_over_an_axis_and_seeds_side_by_side(x64):
    """Batches in two parts, against the whole ones for the first of two seeds; each with two children."""
    split, state = build(toy.from_linen(toy.Network(axis_name="devices")), children=2, axis_name="devices")
    whole, _ = build(children=2)
    states = jax.tree.map(lambda *x: np.stack(x), state, jax.jit(whole.init)(jax.random.key(1), np.zeros((2, 5))))
    axes = RoundBatches(Batch(0, 0), Batch(0, 0), None)
    run = jax.jit(jax.vmap(split.round, in_axes=(None, axes), axis_name="devices"))
    plain = jax.jit(jax.vmap(whole.round, in_axes=(0, None)))
    for r in range(3):
        parts = run(state, halves(batches_of(r)))
        states, metrics = plain(states, batches_of(r))
        one, other, seed = part(parts, 0), part(parts, 1), part((states, metrics), 0)
        chex.assert_trees_all_close(one, other, rtol=1e-10, atol=1e-12)
        chex.assert_trees_all_close(one, seed, rtol=1e-10, atol=1e-12)
        state, _ = one
    assert np.any(state.carried["replay"].experience.reward) and state.carried["replay"].stored == 4
    assert np.any(states.loss["phi"][0] != states.loss["phi"][1])


def test_bad_arguments_are_refused():
    for knob, value in (("children", 0), ("window", 0), ("replay", 1)):
        with pytest.raises(ValueError, match=f"{knob} is {value}, expected at least"):
            build(**({"children": 2} | {knob: value}))
    with pytest.raises(ValueError, match="num_classes is 1, expected at least"):
        pairs_of_classes(1)
    method, state = build()
    long = RoundBatches(toy.batch(0, K, 2, 6), toy.batch(1, K, 8), jnp.array(False))
    with pytest.raises(ValueError, match="a stage has 2 training batches"):
        jax.eval_shape(method.round, state, long)
