"""Students in bfloat16: what is rounded, what is not, and how far the hypergradient is off."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from launching import launch
from test_students import images, variables_of

from benchmarks import precision
from experiments import classification
from l2t_jax.runs.records import Metrics, read_record
from l2t_jax.students import STUDENTS
from l2t_jax.students.precision import in_bfloat16
from l2t_jax.types import Head, Student

SMALL = {"mlp": {"width": 8}, "lenet": {}, "resnet8": {"width": 4}, "densenet": {"depth": 10, "dropout": 0.3}}


PRODUCTS = {"mlp": 2, "lenet": 5, "resnet8": 8, "densenet": 10}  # layers with weights


def products(jaxpr):
    """Its matrix products and convolutions, and those of all that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated", "conv2d"):
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("name", SMALL)
def test_layers_compute_in_half_and_all_that_is_kept_is_full(name):
    student = STUDENTS[name](num_classes=3, **SMALL[name])
    half, x = in_bfloat16(student), images(shape=(4, 16, 16, 1))
    variables, keys = variables_of(student.init, x), jax.random.split(jax.random.key(0), 4)
    drawn = (keys,) if student.draws else ()

    def both(variables, x):
        return half.apply(variables, x, True, *drawn)

    outputs, stats = both(variables, x)
    assert dtypes((outputs, stats)) == {"float32"}
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    found = list(products(jax.make_jaxpr(both)(variables, x).jaxpr))
    assert len(found) == PRODUCTS[name] and all({v.aval.dtype.name for v in e.invars} == {"bfloat16"} for e in found)
    full = student.apply(variables, x, True, *drawn)
    for found, exact in zip(jax.tree.leaves((outputs, stats)), jax.tree.leaves(full), strict=True):
        apart = np.abs(found - exact).max() / np.abs(exact).max()
        assert apart < 0.1
    assert np.abs(outputs - full[0]).max() > 1e-5  # it does round


def test_the_last_layer_is_given_in_full():
    student, x = STUDENTS["mlp"](num_classes=3, width=8), images(shape=(4, 5, 5, 1))
    variables = variables_of(student.init, x)
    head, _ = in_bfloat16(student).head(variables, x, True)
    assert isinstance(head, Head) and dtypes(head) == {"float32"}
    np.testing.assert_array_equal(head.kernel, variables["params"]["output"]["kernel"].astype(jnp.bfloat16))


def test_ids_and_keys_are_left_alone():
    seen = []
    spy = Student(toy.batch, lambda variables, inputs, train: (seen.append(inputs) or jnp.ones((2, 3)), {}))
    inputs = {"ids": jnp.arange(2), "floats": jnp.ones(2)}
    in_bfloat16(spy).apply({"params": {"w": jnp.ones(2)}, "batch_stats": {}}, inputs, True)
    assert {name: x.dtype.name for name, x in seen[0].items()} == {"ids": "int32", "floats": "bfloat16"}


def test_the_hypergradient_points_where_it_does_in_full():
    row = precision.compare("w3", 5, repeats=1)
    assert 1e-4 < row["error"] < 0.15 and row["cosine"] > 0.99
    assert precision.table_of([row]).row_count == 1


def test_a_run_in_half_learns_as_well(tmp_path):
    arguments = ("--dataset=digits", "--method=l2t_dln", "--preset=cheap", "--rounds=20", "--seeds=1", "--width=32")
    scores, errors = {}, {}
    for dtype in ("float32", "bfloat16"):
        where = tmp_path / dtype
        assert launch(classification, *arguments, f"--compute_dtype={dtype}", f"--workdir={where}") == 0
        record = read_record(where / "summary.json")
        assert record["config"]["compute_dtype"] == dtype
        scores[dtype] = record["methods"]["l2t_dln"]["score"]["mean"]
        errors[dtype] = [row["validation_error"] for row in Metrics.read(where / "metrics.jsonl")]
    np.testing.assert_allclose(errors["bfloat16"][0], errors["float32"][0], rtol=0.02)
    assert errors["bfloat16"] != errors["float32"] and abs(scores["float32"] - scores["bfloat16"]) < 0.03


@pytest.mark.results
def test_the_page_has_the_rows_of_the_record():
    root = Path(__file__).parents[1]
    record = read_record(root / "benchmarks" / "results" / "precision_cpu.json")
    page = (root / "docs" / "hypergradient.md").read_text()
    assert len(record["rows"]) == 9
    for row in record["rows"]:
        times, sizes = (f"{row[name][1] / row[name][0]:.2f}" for name in ("seconds", "bytes"))
        told = (row["describe"], row["length"], f"{100 * row['error']:.1f} %", f"{row['cosine']:.4f}", times, sizes)
        assert f"| {' | '.join(map(str, told))} |" in page


@pytest.mark.parametrize(
    ("flag", "told"), [("--workloads=w9", "'w9' is not one of w1, w2, w3, wide"), ("--lengths=0", "at least 1")]
)
def test_a_benchmark_that_cannot_be_is_told(flag, told, capsys):
    with pytest.raises(SystemExit) as stop:
        precision.main(["precision", "--workloads=w3", flag])
    assert stop.value.code == 2 and told in capsys.readouterr().err
