"""L2T-DLN's round: which steps see which DLN, what stays constant in Eq. 8, what each protocol keeps."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from l2t_jax.hypergradient import hypergradient
from l2t_jax.methods.common import merge_rounds, on_validation, over_lives
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2t_dln import STAGES, l2t_dln
from l2t_jax.teachers import TEACHERS
from l2t_jax.teachers.coordinate_lstm import coordinate_lstm
from l2t_jax.types import Batch, Loss, Method, MethodState, RoundBatches, Student, Task, Teacher
from l2t_jax.unroll import inner_objective, outer_objective, plain_gradient, student_step, unroll

pytestmark = pytest.mark.usefixtures("small_lstm")
GAMMA, N = 0.05, 3
SGD = optax.sgd(0.1, momentum=0.9)


def batches_of(round, stages):
    return RoundBatches(
        train=toy.batch(10 * round, stages, N, 6),
        validation=toy.batch(10 * round + 1, stages, 7),
        first_of_epoch=jnp.array(False),
    )


def build(second_stage, teacher_optimizer=toy.READ_GRADIENT, teacher=None, **knobs):
    teacher = coordinate_lstm(GAMMA) if teacher is None else teacher
    knobs = {"second_stage": second_stage, "memory": "save"} | knobs  # auto would trace each mode to choose one
    method = l2t_dln(toy.student, toy.task, toy.small_loss(), teacher, SGD, teacher_optimizer, **knobs)
    return method, method.init(jax.random.key(0), jnp.zeros((2, 5)))


def reference(second_stage, tau, state, flow):
    """Two rounds as one function of tau; in the second, derivatives flow through Eq. 8's constants where flow is 1."""
    stages = STAGES[second_stage]
    inner, outer = inner_objective(toy.student, toy.task, toy.small_loss()), outer_objective(toy.student, toy.task)
    step, teacher = student_step(plain_gradient(inner), SGD), coordinate_lstm(GAMMA)
    differentiate = hypergradient(inner, outer, SGD, memory="save")

    def one_round(round, phi, h, theta, constant):
        b = batches_of(round, stages)
        data = [jax.tree.map(lambda x, s=s: x[s], (b.train, b.validation)) for s in (0, -1)]
        first = differentiate(phi, theta, *data[0])
        d = constant("input", first.gradient)
        update, h = teacher.update(tau, constant("h", h), d, phi)
        new_phi = optax.apply_updates(constant("phi", phi), update)
        start = constant("theta", first.state if second_stage == "continue" else theta)
        end, _ = unroll(step, start, new_phi, data[1][0])
        return new_phi, h, end, outer(end.params, end.batch_stats, data[1][1])[0]

    phi, h, theta, _ = one_round(0, state.loss, state.carried, state.student, lambda name, x: x)
    stop = jax.lax.stop_gradient
    gate = lambda name, x: jax.tree.map(lambda x: flow[name] * x + (1 - flow[name]) * stop(x), x)  # noqa: E731
    return one_round(1, phi, h, theta, gate)[-1]


@pytest.mark.parametrize("second_stage", ["continue"])  # the other is compared with the VJP below
def test_teacher_gradient_has_exactly_the_constants_of_eq_8(second_stage, x64):
    method, state = build(second_stage)
    stages, run = STAGES[second_stage], jax.jit(method.round)
    tau = state.teacher
    after, _ = run(state, batches_of(0, stages))
    after, _ = run(after, batches_of(1, stages))
    ours = after.optimizer_state
    constants = dict.fromkeys(("input", "h", "phi", "theta"), 0.0)
    gradient = jax.jit(jax.grad(lambda tau, flow: reference(second_stage, tau, state, flow)))
    assert optax.tree.norm(ours) > 1e-6
    chex.assert_trees_all_close(ours, gradient(tau, constants), rtol=1e-8, atol=1e-14)
    for dropped in constants:
        flowing = gradient(tau, constants | {dropped: 1.0})
        difference = optax.tree.norm(optax.tree.sub(flowing, ours)) / optax.tree.norm(ours)
        assert difference > 1e-6, f"differentiating through {dropped} should change the teacher gradient"


@pytest.mark.parametrize("second_stage", STAGES)
def test_teacher_gradient_is_gamma_times_the_vjp(second_stage, x64):
    """Eq. 8 written out: gamma (dg/dtau)^T times the hypergradient of the second stage."""
    method, state = build(second_stage)
    b = batches_of(0, STAGES[second_stage])
    after, _ = jax.jit(method.round)(state, b)
    inner, outer = inner_objective(toy.student, toy.task, toy.small_loss()), outer_objective(toy.student, toy.task)
    differentiate = hypergradient(inner, outer, SGD, memory="remat")
    data = [jax.tree.map(lambda x, s=s: x[s], (b.train, b.validation)) for s in (0, -1)]
    unit = coordinate_lstm(1.0)  # g itself

    @jax.jit
    def written_out(state, data):
        first = differentiate(state.loss, state.student, *data[0])
        g, pull = jax.vjp(lambda tau: unit.update(tau, state.carried, first.gradient, state.loss)[0], state.teacher)
        phi = jax.tree.map(lambda p, g: p + GAMMA * g, state.loss, g)
        second = differentiate(phi, first.state if second_stage == "continue" else state.student, *data[1])
        return phi, second, optax.tree.scale(GAMMA, pull(second.gradient)[0])

    phi, second, expected = written_out(state, data)
    chex.assert_trees_all_close(after.loss, phi, rtol=1e-12)
    chex.assert_trees_all_close(after.optimizer_state, expected, rtol=1e-9, atol=1e-15)
    # BatchNorm and momentum: stage two's only. The bias before BatchNorm has no gradient but rounding: hence atol.
    chex.assert_trees_all_close(after.student, second.state, rtol=1e-12, atol=1e-14)


def test_teacher_gradient_against_finite_differences(x64):
    method, state = build("restart")
    b = batches_of(0, 1)
    run = jax.jit(method.round)
    gradient = run(state, b)[0].optimizer_state
    direction = toy.to_x64(optax.tree.random_like(jax.random.key(3), state.teacher))
    error = lambda h: run(state._replace(teacher=optax.tree.add_scale(state.teacher, h, direction)), b)[1]  # noqa: E731
    difference = (error(1e-5)["validation_error"] - error(-1e-5)["validation_error"]) / 2e-5
    np.testing.assert_allclose(optax.tree.vdot(gradient, direction), difference, rtol=1e-6)


def tracing_problem(second_stage, rounds, teach_every=1):
    """A student that counts, segment by segment, under which DLN its steps were taken: trace[segment] += phi.

    phi is the number of the DLN, plus one so that phi^0 leaves a trace; the teacher turns phi^m into phi^{m+1}.
    """
    stages = teach_every * STAGES[second_stage]
    segments = rounds * stages
    student = Student(
        init=lambda key, inputs: {"params": jnp.zeros(segments), "batch_stats": {}},
        apply=lambda variables, inputs, train: (inputs @ variables["params"][:, None], {}),
    )
    loss = Loss(lambda key: jnp.array(1.0), lambda phi, outputs, targets: -phi * outputs[:, 0])
    teacher = Teacher(lambda key: jnp.array(0.0), lambda phi: (), lambda tau, h, d, phi: (1.0 + 0 * tau, h))
    task = Task(lambda outputs, targets: outputs[:, 0], lambda outputs, targets: {}, lambda *a: None)
    knobs = {"second_stage": second_stage, "teach_every": teach_every}
    method = l2t_dln(student, task, loss, teacher, optax.sgd(1.0), optax.sgd(0.0), **knobs)
    state, errors = method.init(jax.random.key(0), jnp.zeros((1, segments))), []
    for k in range(rounds):
        here = jnp.eye(segments)[k * stages + jnp.arange(stages)]  # [S, segments]
        train = Batch(jnp.tile(here[:, None, None], (1, N, 2, 1)), jnp.zeros((len(here), N, 2), int))
        validation = Batch(jnp.tile(here[:, None], (1, 2, 1)), jnp.zeros((len(here), 2), int))
        state, metrics = method.round(state, RoundBatches(train, validation, jnp.array(False)))
        errors.append((metrics["validation_error_stage_one"] / N - 1, metrics["validation_error"] / N - 1))
    return SimpleNamespace(dln=state.student.params / N - 1, errors=errors, method=method)


def test_index_table_of_the_paper_preset():
    """K = 3: segment 0 under phi^0, segments 2k - 1 and 2k under phi^k, the last one under phi^K."""
    traced = tracing_problem("continue", 3)
    np.testing.assert_array_equal(traced.dln, [0, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(traced.errors, [(0, 1), (1, 2), (2, 3)])
    assert (traced.method.stages, traced.method.steps_per_round) == (2, 2)


def test_index_table_of_the_released_preset():
    """Pass 1 of round k runs under phi^k and is thrown away, pass 2 replays its batches under phi^{k+1} and is kept."""
    traced = tracing_problem("restart", 3)
    np.testing.assert_array_equal(traced.dln, [1, 2, 3])
    np.testing.assert_array_equal(traced.errors, [(0, 1), (1, 2), (2, 3)])
    assert (traced.method.stages, traced.method.steps_per_round) == (1, 1)


@pytest.mark.parametrize(
    "second_stage, dln, errors",
    [
        ("restart", [0, 0, 1, 1, 1, 2], [(0, 1), (1, 2)]),
        ("continue", [0] * 5 + [1] * 6 + [2], [(0, 1), (1, 2)]),
    ],
)
def test_index_table_of_a_teacher_that_teaches_every_third_time(second_stage, dln, errors):
    """The segments before the last S of a round run under the old DLN, and the hypergradient is of the last alone."""
    traced = tracing_problem(second_stage, 2, teach_every=3)
    np.testing.assert_array_equal(traced.dln, dln)
    np.testing.assert_array_equal(traced.errors, errors)
    assert traced.method.stages == traced.method.steps_per_round == len(dln) // 2


def test_steps_that_nothing_learns_from_are_plain_training(x64):
    """A round of teach_every=3 is two stages under phi, then the round that the same student would have had alone."""
    seldom, state = build("restart", optax.adam(1e-2), toy.teacher, teach_every=3)
    always, _ = build("restart", optax.adam(1e-2), toy.teacher)
    b, (state,) = batches_of(0, 3), toy.to_x64((state,))
    b = toy.to_x64(b)
    step = student_step(plain_gradient(inner_objective(toy.student, toy.task, toy.small_loss())), SGD)
    first = jax.tree.map(lambda x: x[:2].reshape(-1, *x.shape[2:]), b.train)
    student, _ = unroll(step, state.student, state.loss, first)
    last = lambda tree: jax.tree.map(lambda x: x[2:], tree)  # noqa: E731
    alone = b._replace(train=last(b.train), validation=last(b.validation))
    expected = jax.jit(always.round)(state._replace(student=student), alone)
    chex.assert_trees_all_close(jax.jit(seldom.round)(state, b), expected, rtol=1e-12)


@pytest.mark.parametrize("second_stage", STAGES)
def test_frozen_teacher_teaches_the_same_and_stays(second_stage):
    """The transfer protocol: the student and phi move as if tau could learn, tau and its Adam do not."""
    b = batches_of(0, STAGES[second_stage])
    learning, state = build(second_stage, optax.adam(1e-2), toy.teacher)
    frozen, _ = build(second_stage, optax.adam(1e-2), toy.teacher, learn=False)
    moved, _ = jax.jit(learning.round)(state, b)
    stayed, metrics = jax.jit(frozen.round)(state, b)
    chex.assert_trees_all_equal((stayed.teacher, stayed.optimizer_state), (state.teacher, state.optimizer_state))
    assert optax.tree.norm(optax.tree.sub(moved.teacher, state.teacher)) > 1e-3
    chex.assert_trees_all_close((stayed.student, stayed.loss), (moved.student, moved.loss), rtol=1e-5, atol=1e-6)
    assert metrics["hypergradient_norm_stage_two"] == 0 and metrics["teacher_gradient_norm"] == 0


def test_memory_is_reset_at_an_epoch_only_if_asked():
    for reset_hidden, forgets in (("epoch", True), ("never", False)):
        method, state = build("restart", teacher=toy.teacher, reset_hidden=reset_hidden, learn=False)
        run, b = jax.jit(method.round), batches_of(1, 1)
        state, _ = run(state, batches_of(0, 1))
        forgotten = state._replace(carried=jax.tree.map(jnp.zeros_like, state.carried))
        at_start, _ = run(state, b._replace(first_of_epoch=jnp.array(True)))
        within, _ = run(state, b)
        from_zero, _ = run(forgotten, b)
        same = lambda a, b: bool(jnp.allclose(a["scale"], b["scale"], rtol=0, atol=1e-7))  # noqa: E731
        assert same(at_start.loss, from_zero.loss) == forgets
        assert not same(within.loss, from_zero.loss)


def test_optax_teacher_descends_the_hypergradient():
    """One round with plain SGD as the teacher: phi' = phi - gamma d, and nothing for Eq. 8 to learn."""
    method, state = build("restart", teacher=TEACHERS["sgd"](GAMMA))
    after, metrics = jax.jit(method.round)(state, batches_of(0, 1))
    inner, outer = inner_objective(toy.student, toy.task, toy.small_loss()), outer_objective(toy.student, toy.task)
    one = jax.tree.map(lambda x: x[0], batches_of(0, 1)[:2])
    d = jax.jit(hypergradient(inner, outer, SGD, memory="save"))(state.loss, state.student, *one).gradient
    chex.assert_trees_all_close(after.loss, jax.tree.map(lambda p, g: p - GAMMA * g, state.loss, d), rtol=1e-5)
    assert after.teacher == {} and metrics["teacher_gradient_norm"] == 0


@pytest.mark.parametrize("stages", [1, 2])
def test_fixed_loss_takes_the_same_steps(stages):
    """The baseline on a method's batches: S N steps, in the order of the stages, from the same initial student."""
    loss = Loss(lambda key: {}, lambda params, outputs, targets: toy.task.error(outputs, targets))
    method = fixed_loss(toy.student, toy.task, loss, SGD, stages=stages)
    state = method.init(jax.random.key(0), jnp.zeros((2, 5)))
    _, taught = build("restart")
    chex.assert_trees_all_equal(state.student, taught.student)
    b = batches_of(0, stages)
    after, metrics = jax.jit(method.round)(state, b)
    step, student = student_step(plain_gradient(inner_objective(toy.student, toy.task, loss)), SGD), state.student
    for s in range(stages):
        for i in range(N):
            student, _ = step(student, {}, jax.tree.map(lambda x, s=s, i=i: x[s, i], b.train))
    chex.assert_trees_all_close(after.student, student, rtol=1e-5, atol=1e-6)
    assert method.steps_per_round == stages and set(metrics["finite"]) == {"student", "validation error"}


def test_unknown_choices_name_the_known_ones():
    for knob in ("second_stage", "reset_hidden"):
        with pytest.raises(ValueError, match=f"{knob} 'no' is unknown; choose one of"):
            build(**({"second_stage": "restart"} | {knob: "no"}))
    with pytest.raises(ValueError, match="give teach_every at least 1"):
        build("restart", teach_every=0)


def test_on_validation_is_training_on_the_meta_set():
    """The training batches do not matter, and the steps are those of plain training on the validation batches."""
    plain = fixed_loss(toy.student, toy.task, toy.small_loss(), SGD)
    state = plain.init(jax.random.key(0), jnp.zeros((2, 5)))
    meta = toy.batch(1, 3, 7)
    rounds = jnp.array(False)
    swapped = jax.jit(merge_rounds(on_validation(plain), 3).round)
    ours, _ = swapped(state, RoundBatches(toy.batch(0, 3, 1, 6), meta, rounds))
    other, _ = swapped(state, RoundBatches(toy.batch(2, 3, 1, 6), meta, rounds))
    chex.assert_trees_all_equal(ours, other)
    as_training = RoundBatches(jax.tree.map(lambda x: x[None], meta), toy.batch(3, 1, 7), rounds)
    chex.assert_trees_all_close(ours.student, jax.jit(plain.round)(state, as_training)[0].student, rtol=1e-6)


def test_several_rounds_as_one_are_those_rounds(x64):
    """Each with its own data, in order; metrics are means, and one round that fails is one that all fail."""
    method, start = build("restart", optax.identity(), TEACHERS["sgd"](GAMMA))
    start = toy.to_x64(start)
    train, validation = toy.to_x64((toy.batch(0, 3, 1, 6), toy.batch(1, 3, 7)))
    together = merge_rounds(method, 3)
    assert (together.stages, together.steps_per_round) == (3, 3)
    state, metrics = jax.jit(together.round)(start, RoundBatches(train, validation, jnp.array(True)))
    one, each = start, []
    for k in range(3):
        data = RoundBatches(*jax.tree.map(lambda x, k=k: x[k : k + 1], (train, validation)), jnp.array(k == 0))
        one, found = jax.jit(method.round)(one, data)
        each.append(found)
    chex.assert_trees_all_close(state, one, rtol=1e-12, atol=1e-14)
    for name in ("train_loss", "hypergradient_norm"):
        np.testing.assert_allclose(metrics[name], np.mean([found[name] for found in each]), rtol=1e-12)
    spoiled = train._replace(inputs=train.inputs.at[0].set(jnp.nan))
    _, metrics = jax.jit(together.round)(start, RoundBatches(spoiled, validation, jnp.array(True)))
    assert not all(jax.tree.leaves(metrics["finite"]))


def test_pull_is_the_slope_of_the_loss_in_use(x64):
    """Of each example by itself, with the DLN as it is and batch statistics in BatchNorm."""
    method, state = build("restart", optax.identity(), TEACHERS["sgd"](GAMMA))
    state = toy.to_x64(state)
    batch = toy.to_x64(toy.batch(0, 6))
    outputs, _ = toy.student.apply(state.student.variables, batch.inputs, True)
    alone = lambda z, y: toy.small_loss().apply(state.loss, z[None], y[None])[0]  # noqa: E731
    expected = jnp.linalg.norm(jax.vmap(jax.grad(alone))(outputs, batch.targets), axis=-1)
    chex.assert_trees_all_close(method.pull(state, batch, batch), expected, rtol=1e-12)
    assert jnp.min(expected) > 0


@pytest.mark.parametrize("learn", [True, False])
def test_an_update_that_hurts_is_not_taken(learn):
    """A teacher that climbs: phi stays, and the student is the one that phi taught. One that descends is followed."""
    teacher = Teacher(
        lambda key: {"rate": jnp.array(0.0)},
        lambda phi: {},
        lambda tau, h, d, phi: (jax.tree.map(lambda g: -tau["rate"] * g, d), h),
    )
    method, state = build("restart", teacher=teacher, accept="not_worse", learn=learn)
    free, _ = build("restart", teacher=teacher, learn=learn)
    careful, careless = jax.jit(method.round), jax.jit(free.round)
    for rate, hurts in ((-3.0, True), (0.3, False)):
        state, batches = state._replace(teacher={"rate": jnp.array(rate)}), batches_of(0, 1)
        (after, metrics), (other, wild) = careful(state, batches), careless(state, batches)
        assert (wild["validation_error"] > wild["validation_error_stage_one"]) == hurts  # or nothing is tested
        if not hurts:
            chex.assert_trees_all_close(after, other, rtol=1e-5, atol=1e-7)  # two programs, rounded differently
            continue
        chex.assert_trees_all_equal(after.loss, state.loss)
        assert metrics["validation_error"] == metrics["validation_error_stage_one"]
        assert metrics["dln_update_norm"] == 0
        step = student_step(plain_gradient(inner_objective(toy.student, toy.task, toy.small_loss())), SGD)
        plain, _ = unroll(step, state.student, state.loss, jax.tree.map(lambda x: x[0], batches.train))
        chex.assert_trees_all_close(after.student, plain, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(after.optimizer_state, other.optimizer_state, rtol=1e-5)  # it learns from it all


def test_accepting_needs_stages_on_the_same_batches():
    with pytest.raises(ValueError, match='use second_stage "restart"'):
        build("continue", accept="not_worse")


def test_a_teacher_of_many_lives():
    """Rounds 2 and 4 begin with fresh students, losses and memories, different ones; the teacher goes on."""

    def init(key, inputs):
        student, loss, teacher = jax.random.split(key, 3)
        draw = lambda key: jax.random.normal(key, inputs.shape)  # noqa: E731
        return MethodState(draw(student), draw(loss), draw(teacher), jnp.array(0.0), jnp.array(0.0))

    def round(state, batches):
        moved = jax.tree.map(lambda x: 0.5 * x + jnp.mean(batches.train.inputs), state)
        return moved, {"validation_error": jnp.sum(moved.student)}

    method = Method(init=init, round=round, stages=1, steps_per_round=1)
    many = over_lives(method, 2)
    key, inputs = jax.random.key(3), jnp.zeros((6, 5))
    state, alone = many.init(key, inputs), method.init(key, inputs)
    chex.assert_trees_all_equal(state._replace(carried=state.carried.carried), alone)
    one, other = jax.jit(many.round), jax.jit(method.round)
    students = []
    for r in range(5):
        if r in (2, 4):
            fresh = method.init(jax.random.fold_in(key, r), inputs)
            alone = fresh._replace(teacher=alone.teacher, optimizer_state=alone.optimizer_state)
            students.append(alone.student)
        state, metrics = one(state, batches_of(r, 1))
        alone, expected = other(alone, batches_of(r, 1))
        chex.assert_trees_all_close(state._replace(carried=state.carried.carried), alone, rtol=1e-6, atol=1e-7)
        chex.assert_trees_all_close(metrics["validation_error"], expected["validation_error"], rtol=1e-5)
        assert state.carried.rounds == r + 1
    assert jnp.linalg.norm(students[0] - students[1]) > 0.1
    with pytest.raises(ValueError, match="a life of 0 rounds"):
        over_lives(method, 0)
