"""A round without waste: traced once, many in a dispatch, nothing computed twice; and the benchmark of one."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from benchmarks import round as benchmark
from l2t_jax.data import Dataset
from l2t_jax.data.order import Plan
from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.methods.l2t_dln import STAGES, l2t_dln
from l2t_jax.runs import training
from l2t_jax.runs.checkpoints import Checkpoints
from l2t_jax.runs.training import Run, compile_rounds, some_rounds, train
from l2t_jax.students import STUDENTS
from l2t_jax.tasks.classification import Classes, classification
from l2t_jax.teachers import TEACHERS
from l2t_jax.types import Loss
from l2t_jax.unroll import inner_objective, outer_objective

N, B, V, EXAMPLES = 3, 4, 5, 60
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (EXAMPLES, 4, 4, 1), np.uint8), RNG.integers(0, 3, EXAMPLES, np.int32)
PART = {"inputs": IMAGES, "labels": LABELS}
DATASET = Dataset("made", PART, PART, Classes(3, (128.0,), (64.0,), augment=True))
SGD, ADAM = optax.sgd(0.1), optax.adam(1e-3)


class Counted:
    """A small setting of images, MLP, DLN and LSTM whose round says how often it is traced, and what it gathers."""

    def __init__(self, second_stage):
        self.task, self.student, self.loss = (
            classification(DATASET),
            STUDENTS["mlp"](num_classes=3, width=4),
            LOSSES["dln"](),
        )
        self.teacher = TEACHERS["lstm"](1e-3)
        method = l2t_dln(self.student, self.task, self.loss, self.teacher, SGD, ADAM, second_stage=second_stage)
        self.method, self.traces, self.gathered = method._replace(round=self.round), 0, []
        self.one_round = method.round
        self.execute = compile_rounds(self.method, self.task._replace(gather=self.gather)).call
        self.plan = Plan(50, N, B, V, 0.5, EXAMPLES, STAGES[second_stage])
        self.data = jax.device_put({"inputs": IMAGES, "labels": LABELS})

    def round(self, state, batches):
        self.traces += 1
        return self.one_round(state, batches)

    def gather(self, data, indices, keys):
        self.gathered.append(indices.shape)
        return self.task.gather(data, indices, keys)

    def inputs(self, seed, begin, count):
        """On the device, all that `execute` takes beside the state."""
        return self.data, jax.device_put(training._dispatch(seed, begin, count, self.plan))

    def state(self, seed):
        return self.method.init(jax.random.key(seed), jnp.zeros((2, 4, 4, 1)))


@pytest.mark.parametrize("second_stage", STAGES)
def test_dispatches_are_one_program_that_stays_on_the_device(second_stage):
    """Any number of rounds, any seed: one trace, one executable, no transfer, and the state in its own buffers."""
    setting = Counted(second_stage)
    for seed in (0, 1):
        state, done = setting.state(seed), 0
        for count in (1, 3, 2):
            inputs, old = setting.inputs(seed, done, count), state
            with jax.transfer_guard("disallow"):
                state, metrics, finished = setting.execute(state, *inputs)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
            assert finished == count and np.count_nonzero(metrics["validation_error"]) == count
            done += count
    assert setting.traces == 1 and setting.execute._cache_size() == 1
    assert setting.gathered == [(STAGES[second_stage], N, B), (STAGES[second_stage], V)]  # all that a round reads, once
    program = setting.execute.lower(state, *inputs).compile().as_text()
    assert not re.search(r"callback|infeed|outfeed| send\(| recv\(", program)  # what a guard does not see on a CPU


@pytest.mark.parametrize("second_stage", STAGES)
def test_nothing_is_computed_twice(second_stage):
    """The loops and products of a compiled round: those of two hypergradients, of the teacher, and the rounds' loop."""
    loss, teacher = LOSSES["dln"](), TEACHERS["lstm"](1e-3)
    method = l2t_dln(toy.student, toy.task, loss, teacher, SGD, ADAM, second_stage=second_stage, memory="mixed")
    state, phi = method.init(jax.random.key(0), jnp.zeros((2, 5))), loss.init(jax.random.key(1))
    plan = Plan(50, N, B, V, 0.5, EXAMPLES, STAGES[second_stage])
    execute = some_rounds(method, toy.task)
    rounds = count(execute, state, toy.batch(0, EXAMPLES), training._dispatch(0, 0, 3, plan))

    inner, outer = inner_objective(toy.student, toy.task, loss), outer_objective(toy.student, toy.task)
    one = count(
        hypergradient(inner, outer, SGD, memory="mixed"), phi, state.student, toy.batch(1, N, B), toy.batch(2, V)
    )

    def teach(tau, memory, d):
        update, pull, memory = jax.vjp(lambda tau: teacher.update(tau, memory, d, phi), tau, has_aux=True)
        return update, memory, pull(d)

    taught = count(teach, state.teacher, state.carried, phi)
    assert one["dot"] > 0 and taught["dot"] > 0
    assert rounds["dot"] <= 2 * one["dot"] + taught["dot"]
    assert rounds["while"] == 2 * one["while"] + taught["while"] + 1


def count(function, *arguments):
    """How often an operation stands in the compiled program."""
    program = jax.jit(function).lower(*arguments).compile().as_text()
    return {operation: len(re.findall(rf" {operation}\(", program)) for operation in ("dot", "while")}


def test_a_run_its_resumption_and_other_seeds_share_one_program(tmp_path):
    """Also where the loss parameters begin as Python scalars, whose weak types a round does not give back."""
    loss = Loss(
        lambda key: {"temperature": jnp.array(1.0)},
        lambda params, outputs, targets: toy.task.error(outputs * params["temperature"], targets),
    )
    method = l2t_dln(toy.student, toy.task, loss, TEACHERS["adam"](0.01), SGD, ADAM)
    rows, traces = [], []
    program = compile_rounds(method._replace(round=lambda *a: traces.append(a) or method.round(*a)), toy.task)

    def run(seed, rounds):
        state = method.init(jax.random.key(seed), jnp.zeros((2, 5)))
        nothing = lambda *_: None  # noqa: E731
        folder = Checkpoints(tmp_path / str(seed))
        one = Run("toy", seed, state, folder, rows.extend, nothing, nothing, (), nothing, nothing, 0.0)
        train([one], Plan(rounds, N, B, V, 0.5, EXAMPLES, 2), program, toy.batch(0, EXAMPLES))
        folder.close()

    for seed, rounds in ((0, 4), (0, 6), (1, 3)):
        run(seed, rounds)
    assert [(row["seed"], row["round"]) for row in rows] == [(0, r) for r in range(6)] + [(1, r) for r in range(3)]
    assert len(traces) == program.call._cache_size() == 1


def test_benchmark_of_a_round(tmp_path, capsys):
    path = tmp_path / "record.json"
    benchmark.main(["round", "--workload=w3", "--unroll_length=1", "--rounds=1", "--repeats=2", f"--out={path}"])
    record = json.loads(path.read_text())
    assert set(record) == {"rows", "command", "environment"}
    rows = {row["program"]: row for row in record["rows"]}
    assert list(rows) == ["round", "hypergradient", "plain steps", "teacher", "data"]
    for row in rows.values():
        assert (row["workload"], row["unroll_length"], row["rounds"], len(row["seconds_all"])) == ("w3", 1, 1, 2)
        np.testing.assert_allclose(row["seconds"], np.median(row["seconds_all"]))
        np.testing.assert_allclose(row["ratio_to_plain"], row["seconds"] / (2 * rows["plain steps"]["seconds"]))
    assert rows["round"]["seconds"] > rows["hypergradient"]["seconds"]
    shown = capsys.readouterr().out
    assert all(program in shown for program in rows)


def test_benchmark_maps_rounds_over_seeds():
    """Each seed trains as it does alone, on data of its own out of the images that all share."""
    workload, teacher = "w3", TEACHERS["adam"](1e-3)
    alone, state, arguments, _ = benchmark._rounds(workload, teacher, 1, "restart", 1, 1, "mixed")
    together, states, several, _ = benchmark._rounds(workload, teacher, 1, "restart", 1, 2, "mixed")
    one = jax.jit(alone)(state, *arguments)[1]["validation_error"]
    both = jax.vmap(together, benchmark._axes(benchmark.ROUND, (states, *several)))(states, *several)
    np.testing.assert_allclose(both[1]["validation_error"][0], one, rtol=1e-5)
    assert abs(both[1]["validation_error"][1] - one) > 1e-3
    assert np.any(several[1].train[0] != several[1].train[1])


@pytest.mark.parametrize(
    "flag",
    ["--rounds=0", f"--rounds={training.MOST_ROUNDS + 1}", "--unroll_length=0", "--workload=w9", "--seeds=x", "w3"],
)
def test_bad_flags_of_the_benchmark_are_one_line(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["round", flag])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
