"""Two rounds of L2T-DLN against the numbers that the authors' released program gave for the same problem.

How they were made, and the formulas below: tests/anchors/README.md. Everything is float64. They agree to rounding, so
the tolerances are far below what any change of the algorithm does.
"""

from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.flatten_util import ravel_pytree

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses.dln import HIDDEN, Layer, dln
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods.l2t_dln import STAGES, l2t_dln
from l2t_jax.students.mlp import mlp
from l2t_jax.teachers.coordinate_lstm import UNITS, Cell, coordinate_lstm
from l2t_jax.types import Batch, MethodState, RoundBatches, Teacher
from l2t_jax.unroll import init_state, inner_objective, outer_objective

ANCHOR = dict(np.load(Path(__file__).parent / "anchors" / "released_round.npz"))
ANCHOR["train_loss"] = ANCHOR["training_losses"][:, 1].mean(-1)  # of the steps of pass two, as the method reports it
ROUNDS = 2
STUDENT, LOSS, SGD = mlp(num_classes=4, width=5), dln(form="released"), optax.sgd(0.1)
LAYERS = ("hidden", "output")
FIRST, SECOND = 0, 1  # the passes of a round

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("x64")]


def dln_weights():
    """The DLN's layers l = 1..5: a sin(l + i + 2j + ij / 2), i over inputs and j over outputs."""
    sizes = (4, *HIDDEN, 1)
    layers = []
    for depth, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        i, j = np.arange(inputs)[:, None], np.arange(outputs)
        layers.append(Layer((1 if depth == 5 else 0.5) * np.sin(depth + i + 2 * j + i * j / 2), ()))
    return tuple(layers)


def lstm_weights():
    """The LSTM's layers l = 1..4: sines and cosines of l, the gate row r and the column c or k."""
    cells = []
    for depth, (inputs, units) in enumerate(zip((2, *UNITS[:-1]), UNITS, strict=True), start=1):
        r, c, k = np.arange(4 * units), np.arange(inputs)[:, None], np.arange(units)[:, None]
        a = 1 if depth == 4 else 0.25
        kernels = a * np.sin(depth + r + c / 2 + r * c / 4), a * np.cos(depth + r - k / 2 + r * k / 8)
        cells.append(Cell(*kernels, 0.1 * np.sin(depth + r), 0.1 * np.cos(depth + 2 * r)))
    return tuple(cells)


def watched(teacher):
    """The teacher, with two things to read from a round's state.

    Its memory also holds the hypergradient it was given, that of the first pass. Its parameters also hold zeros that
    are added to the update: their gradient is the hypergradient of the second pass.
    """

    def update(tau, memory, hypergradient, phi):
        change, lstm_memory = teacher.update(tau["lstm"], memory["lstm"], hypergradient, phi)
        return optax.tree.add(change, tau["zeros"]), {"lstm": lstm_memory, "first": hypergradient}

    return Teacher(teacher.init, lambda phi: {"lstm": teacher.hidden(phi), "first": phi}, update)


# Adam for the LSTM; and before it a transformation that keeps the gradient it sees, so that a test can read it.
KEEP = optax.GradientTransformation(lambda tau: jax.tree.map(jnp.zeros_like, tau), lambda d, kept, tau: (d, d))
ADAM = optax.chain(
    KEEP, optax.partition({"lstm": optax.adam(1e-3), "zeros": optax.set_to_zero()}, {"lstm": "lstm", "zeros": "zeros"})
)


def start(teacher):
    """The state before the first round."""
    params = {layer: {name: ANCHOR[f"start_{layer}_{name}"] for name in ("kernel", "bias")} for layer in LAYERS}
    phi = dln_weights()
    tau = {"lstm": lstm_weights(), "zeros": jax.tree.map(np.zeros_like, phi)}
    params, phi, tau = jax.tree.map(jnp.array, (params, phi, tau))
    return MethodState(init_state({"params": params}, SGD), phi, tau, teacher.hidden(phi), ADAM.init(tau))


def data(round, stages=1):
    """The batches of a round; two stages are given the same ones."""
    batch_of = lambda part: Batch(  # noqa: E731
        *(jnp.array(np.stack(stages * [ANCHOR[f"{part}_{leaf}"][round]])) for leaf in ("inputs", "targets"))
    )
    return RoundBatches(batch_of("train"), batch_of("validation"), jnp.array(False))


def rounds_of(*, update_sign=-1, second_stage="restart", memory="save", rounds=ROUNDS):
    """Run the method from the stored start: what each round shows, under the names of the file."""
    teacher = watched(coordinate_lstm(1e-3, update_sign=update_sign))
    method = l2t_dln(STUDENT, toy.task, LOSS, teacher, SGD, ADAM, second_stage=second_stage, memory=memory)
    state, run, shown = start(teacher), jax.jit(method.round), []
    for round in range(rounds):
        state, metrics = run(state, data(round, STAGES[second_stage]))
        _, unravel = ravel_pytree(state.loss)
        gradient = state.optimizer_state[0]
        shown.append(
            {
                ("validation_error", FIRST): metrics["validation_error_stage_one"],
                ("validation_error", SECOND): metrics["validation_error"],
                "train_loss": metrics["train_loss"],
                **student_of(state.student, SECOND),
                **summary("hypergradient_one", state.carried["first"]),
                **summary("hypergradient_two", gradient["zeros"]),
                **summary("loss_parameters", state.loss),
                **summary("teacher_output", unravel(state.carried["lstm"][-1].hidden[:, 0])),
                **summary("teacher_gradient", gradient["lstm"], every=97),
                **summary("teacher_parameters", state.teacher["lstm"], every=97),
            }
        )
    return shown


def student_of(state, of_pass):
    """The student's tensors after a pass."""
    return {
        (f"student_{layer}_{name}", of_pass): x for layer, leaves in state.params.items() for name, x in leaves.items()
    }


def summary(name, tree, every=7):
    """What is kept of many numbers: the norm of every tensor, its sum weighted by cos 0, cos 1, ..., some entries."""
    flat = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]
    return {
        f"{name}_norms": np.array([np.linalg.norm(x) for x in flat]),
        f"{name}_sums": np.array([x @ np.cos(np.arange(x.size)) for x in flat]),
        f"{name}_entries": np.concatenate([x[::every] for x in flat]),
    }


def stored(round, name):
    """What the released program gave; a name is one of the file, or (one of the file, pass)."""
    return ANCHOR[name[0]][round, name[1]] if isinstance(name, tuple) else ANCHOR[name][round]


def check(round, shown):
    for name, value in shown.items():
        expected = stored(round, name)
        # Entries far below the largest one are differences of larger numbers, and have only its absolute precision.
        atol = 1e-13 * np.abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=atol, err_msg=f"round {round}: {name}")


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_rounds_are_those_of_the_released_program(memory):
    """Errors, hypergradients, DLN, LSTM output, teacher gradient, Adam's steps and the student, two rounds on end."""
    for round, shown in enumerate(rounds_of(memory=memory)):
        check(round, shown)


def test_passes_are_those_of_the_released_program():
    """What a round does not show: the student that pass one throws away, and the training loss of every step."""
    inner, outer = inner_objective(STUDENT, toy.task, LOSS), outer_objective(STUDENT, toy.task)
    train, validation = jax.tree.map(lambda x: x[0], data(0)[:2])
    state = start(coordinate_lstm())
    first = jax.jit(hypergradient(inner, outer, SGD))(state.loss, state.student, train, validation)
    check(0, {("training_losses", FIRST): first.losses, **student_of(first.state, FIRST)})


@pytest.mark.parametrize("other", [{"update_sign": 1}, {"second_stage": "continue"}])
def test_the_choices_of_the_paper_give_other_numbers(other):
    """So the numbers tell the two algorithms apart: what either choice changes, it changes a lot."""
    (shown,) = rounds_of(**other, rounds=1)
    pass_one = ("validation_error", FIRST), "hypergradient_one_entries", "teacher_output_entries"
    check(0, {name: shown[name] for name in pass_one})
    for name in (("student_output_kernel", SECOND), "hypergradient_two_entries", "teacher_gradient_entries"):
        expected = stored(0, name)
        assert np.linalg.norm(shown[name] - expected) > 1e-3 * np.linalg.norm(expected), name
