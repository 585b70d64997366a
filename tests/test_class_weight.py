"""How much an example counts: weights of classes and of examples, in every loss and error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_own_data import TABLE, C, N, X, Y, said_in_a_line

from l2t_jax.losses import LOSSES
from l2t_jax.methods import UNWEIGHTED
from l2t_jax.runs.api import train
from l2t_jax.students import mlp
from l2t_jax.tasks import TASKS
from l2t_jax.tasks.own import from_arrays, with_class_weight
from l2t_jax.unroll import inner_objective


def test_balanced_classes_count_alike():
    labels = np.array([0] * 20 + [1] * 8 + [2] * 2)
    data = with_class_weight(from_arrays(TABLE, labels, test=(TABLE, labels)), "balanced")
    by_class = [data.train["weight"][labels == c].sum() for c in range(3)]
    np.testing.assert_allclose(by_class, 10, rtol=1e-6)
    batch = TASKS["classification"].build(data).gather(data.train, np.array([0, 25]), None)
    np.testing.assert_allclose(batch.weight, [0.5, 1.25])
    named = with_class_weight(from_arrays(TABLE, Y, test=(TABLE, Y), weight=np.full(N, 2)), "1,0,3")
    np.testing.assert_allclose(named.train["weight"], 2 * np.array([1, 0, 3])[Y])


def test_a_weight_of_zero_is_as_if_the_example_were_not_there():
    """Training on all, half of them of weight zero, moves a student as the other half alone."""
    task = TASKS["classification"].build(from_arrays(TABLE, Y, test=(TABLE, Y)))
    student, loss = mlp(num_classes=C, width=4), LOSSES["cross_entropy"]()
    variables = student.init(jax.random.key(0), jnp.zeros((2, 6)))
    inner = inner_objective(student, task, loss)
    weighted = from_arrays(TABLE, Y, test=(TABLE, Y), weight=np.arange(N) < 15)
    gather = TASKS["classification"].build(weighted).gather
    half = {leaf: weighted.train[leaf][:15] for leaf in ("inputs", "labels")}
    slopes = [
        jax.grad(lambda p, b=batch: inner(p, {}, {}, b)[0])(variables["params"])
        for batch in (
            gather(weighted.train, np.arange(N), None),
            task.gather(half, np.arange(15), None),
        )
    ]
    for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [*UNWEIGHTED, "cross_entropy", "l2t_dln", "meta_weight_net", "slf", "ala"])
def test_weights_reach_a_method_or_are_refused(method, tmp_path):
    """A round with weights gives another student than one without; what would lose them says so."""
    few = {"rounds": 1, "seeds": 1, "memory": "save", "unroll_length": 2, "batch_size": 8, "validation_batch_size": 8}
    plain = from_arrays(TABLE, Y, test=(TABLE, Y))
    heavy = with_class_weight(plain, "5,1,0.1")
    if method in UNWEIGHTED:
        with pytest.raises(ValueError, match=f"--method={method} takes no weights of examples"):
            train(method, heavy, workdir=tmp_path / "a", teacher="adam", **few)
        return
    few |= {"teacher": "adam", "student_knobs": {"width": 4}}
    results = [train(method, data, workdir=tmp_path / name, **few) for name, data in (("a", plain), ("b", heavy))]
    students = [result.states[0].student for result in results]
    leaves = zip(*(jax.tree.leaves(student.params) for student in students), strict=True)
    assert any(np.any(a != b) for a, b in leaves)


@pytest.mark.parametrize(
    ("weight", "line"),
    [
        (np.ones(3), r"weights are float64 \[3\]: expected a number for each of 30"),
        (np.array(["x"] * N), "weights are <U1"),
        (-np.ones(N), "weights are none: expected float32"),
        (np.full(N, np.nan), "weights are none"),
        (np.zeros(N), "not all 0"),
    ],
)
def test_bad_weights(weight, line):
    said_in_a_line(lambda: from_arrays(X, Y, test=(X, Y), weight=weight), line)


@pytest.mark.parametrize("weight", ["x", "1,2", "1,2,x", "0,0,0", "-1,1,1", "nan,1,1", "inf,1,1", ""])
def test_bad_class_weights(weight):
    said_in_a_line(
        lambda: with_class_weight(from_arrays(X, Y, test=(X, Y)), weight), "class_weight=.* is none: give balanced"
    )
