"""The benchmark runs, its rows say what they are, and a library that is absent, wrong or dying does not stop it."""

import contextlib
import io
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from flax import linen as nn
from launching import execute
from rich.console import Console

from benchmarks import hypergradient_cost, operations, peers, scaling, worker
from benchmarks import pixels as pixels_cost
from benchmarks.cost_report import TOLERANCE, exponents, plot, table_of
from benchmarks.hypergradient_cost import FLAGS, MODES, difference, measure
from benchmarks.workloads import WORKLOADS, images, problem
from l2t_jax import unroll
from l2t_jax.students import STUDENTS, from_linen
from l2t_jax.types import Segmented

ROOT = Path(__file__).parents[1]
THETA = 4 * 397_510 / 2**20  # MiB of the MLP's parameters
# Stands in for the Python of another library: its hypergradient is phi, its calls take 1, 2, ... seconds.
FAKE = """#!{python}
import json, sys
import numpy as np
options = dict(argument[2:].split("=", 1) for argument in sys.argv[3:])
arrays = np.load(options["arrays"])
np.savez(options["result"], **{{f"{{i}}/kernel": arrays[f"phi/{{i}}/kernel"] for i in range(5)}})
print(json.dumps({{"compile_seconds": 0.5, "libraries": "fake 1"}}), flush=True)
for number, _ in enumerate(sys.stdin):
    if number == {calls}:
        sys.exit("a warning\\nout of memory")
    print(json.dumps({{"seconds": number + 1.0, "resident_mib": 9.0 - number}}), flush=True)
"""


@pytest.fixture(autouse=True)
def restore_flags():
    saved = flagsaver.save_flag_values(FLAGS)
    yield
    flagsaver.restore_flag_values(saved, FLAGS)


@pytest.fixture
def fake(tmp_path):
    def write(calls):
        path = tmp_path / f"python{calls}"
        path.write_text(FAKE.format(python=sys.executable, calls=calls))
        path.chmod(0o755)
        return str(path)

    return write


def test_rows_of_a_measurement(fake):
    rows = measure("w3", 2, ["save", "mixed"], 3, ["torch create_graph"], fake(3))
    assert [row["program"] for row in rows] == ["plain steps", "save", "mixed", "torch create_graph"]
    plain, save, mixed, torch = rows
    for row in rows:
        assert (row["parameters"], row["unroll_length"], len(row["seconds_all"])) == (397_510, 2, 3)
        assert row.keys() == plain.keys() and row["seeds"] == 1 and row["auto_mode"] in MODES
        np.testing.assert_allclose(row["seconds"], np.median(row["seconds_all"]))
        np.testing.assert_allclose(row["ratio_to_plain"], row["seconds"] / plain["seconds"])
        np.testing.assert_allclose(row["ratio_to_torch"], row["seconds"] / 2)
    assert mixed["temporary_mib"] > 2 * THETA  # at least theta for each of the two steps
    np.testing.assert_allclose(mixed["predicted_mib"], 2 * THETA)
    assert plain["agreement"] is None and save["agreement"] == 0 < mixed["agreement"] < 1e-5
    assert (torch["seconds_all"], torch["resident_mib"], torch["libraries"]) == ([1, 2, 3], 9, "fake 1")
    assert torch["agreement"] > TOLERANCE and torch["temporary_mib"] is None
    output = io.StringIO()
    Console(file=output, width=120).print(table_of(rows))
    lines = {line.split("│")[3].strip(" *"): line for line in output.getvalue().splitlines() if line.startswith("│")}
    assert "disagrees" in lines["torch create_graph"] and "disagrees" not in lines["mixed"]
    assert [name for name, line in lines.items() if f"{name}*" in line] == [
        row["program"] for row in rows if row["program"] == row["auto_mode"]
    ]


def test_a_worker_that_dies_is_one_line_and_the_rest_goes_on(fake, capfd):
    for python, modes, words in ((fake(0), ["save"], "out of memory"), ("false", [], "no last words")):
        rows = measure("w3", 1, modes, 5, ["higher"], python, seconds=0.0)
        assert [row["program"] for row in rows] == ["plain steps", *modes]
        assert all(len(row["seconds_all"]) == 3 for row in rows)  # as many as there are before the budget counts
        assert capfd.readouterr().err == f"warning: w3, N = 1: higher ended with 1: {words}\n"


def test_several_seeds_at_once():
    one, two = problem("w3", 2), problem("w3", 2, seeds=2)
    for a, b in zip(jax.tree.leaves(one[3:]), jax.tree.leaves(two[3:]), strict=True):
        assert b.shape == (2, *a.shape)
    row = measure("w3", 2, ["mixed"], 1, seeds=2)[1]
    assert (row["seeds"], row["parameters"]) == (2, 397_510)
    np.testing.assert_allclose(row["predicted_mib"], 2 * 2 * THETA)


def test_record_and_plot(tmp_path, capsys, monkeypatch):
    path = tmp_path / "new" / "record.json"
    monkeypatch.setattr(worker, "lacking", lambda python: dict.fromkeys(worker.PROGRAMS))
    arguments = ["--workload=w3", "--unroll_lengths=1,6", "--mode=mixed", "--repeats=1", "--peers=naive"]
    hypergradient_cost.main(["hypergradient_cost", *arguments, f"--out={path}", "--plot"])
    assert capsys.readouterr().err.count("\n") <= 1  # it may say that the machine is busy
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record.keys() == {"rows", "exponents", "command", "environment", "load_before"}
    programs = [(row["unroll_length"], row["program"]) for row in record["rows"]]
    longest = hypergradient_cost.NAIVE_LONGEST
    assert (
        programs == [(1, "plain steps"), (1, "mixed"), (1, "naive"), (6, "plain steps"), (6, "mixed")] and longest < 6
    )
    naive = record["rows"][2]
    assert naive["agreement"] < 1e-5 and naive["temporary_mib"] > 0 and naive["libraries"] is None
    for row in record["rows"]:
        assert row["seconds"] > 0 and row["compile_seconds"] > 0 and row["first_seconds"] > 0
        assert row["student"] == WORKLOADS["w3"].describe and row["workload"] == "w3"
    picture = path.with_suffix(".png")
    picture.unlink()
    drawn = []
    monkeypatch.setattr(hypergradient_cost, "plot", lambda rows, path: drawn.append(rows) or plot(rows, path))
    hypergradient_cost.main(["hypergradient_cost", f"--replot={path},{path}"])
    assert picture.read_bytes().startswith(b"\x89PNG") and drawn == [record["rows"] * 2]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--unroll_lengths=0", "at least 1"),
        ("--unroll_lengths=x", "at least 1"),
        ("--unroll_lengths=", "at least 1"),
        ("--workload=w9", "w1|w2|w3|wide"),
        ("--mode=x", "linearize"),
        ("--repeats=0", "positive"),
        ("--peers=torch", "torch is unknown; known are torch steps"),
        ("--peers=higher", "pip install torch higher"),
        ("--peer_python=/no/python", "is no program"),
        ("--replot=/no/record.json", "/no/record.json"),
        ("--out=/proc/no/record.json", "--out"),
        ("w3", "flags look like"),
    ],
)
def test_bad_flags_are_one_line(flag, message, capsys, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(worker, "lacking", lambda python: {name: worker.missing(name) for name in worker.PROGRAMS})
    with pytest.raises(SystemExit) as stop:
        hypergradient_cost.main(["hypergradient_cost", flag])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_peers_to_compare_with(monkeypatch):
    lacks = {name: None if name in ("higher", "naive") else "pip install it" for name in worker.PROGRAMS}
    monkeypatch.setattr(worker, "lacking", lambda python: lacks)

    def chosen(*arguments):
        FLAGS(["hypergradient_cost", *arguments])
        return hypergradient_cost._peers("python")

    assert chosen() == ["higher", "naive"]
    assert chosen("--peers=naive") == ["naive"]
    assert chosen("--peers=") == []
    FLAGS["peers"].unparse()
    assert chosen("--seeds=2") == []


def test_worker_says_what_programs_lack():
    found = worker.lacking(sys.executable)
    assert found == {name: worker.missing(name) for name in worker.PROGRAMS} and found["naive"] is None
    with pytest.raises(worker.WorkerError, match="false does not run"):
        worker.lacking("false")


def test_worker_needs_no_jax():
    code = "import sys, benchmarks.worker; print([m for m in ('jax', 'l2t_jax', 'torch', 'absl') if m in sys.modules])"
    done = execute([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_worker_answers_each_line(monkeypatch):
    calls, trims, out = [], [], io.StringIO()
    timed = worker.timed
    monkeypatch.setattr(worker, "timed", lambda call, trim: trims.append(trim) or timed(call, trim))
    worker.serve(lambda: calls.append(time.sleep(0.02)), {"compile_seconds": 1.5}, io.StringIO("trim\n\n\n"), out)
    ready, *answers = map(json.loads, out.getvalue().splitlines())
    assert ready == {"compile_seconds": 1.5} and len(answers) == len(calls) == 3 and trims == [True, False, False]
    assert all(0.02 <= answer["seconds"] < 1 for answer in answers)


def test_resident_set_that_a_call_adds():
    if not worker._reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    found = [worker.timed(lambda size=size: np.ones(size * 2**17), trim=True)["resident_mib"] for size in (200, 0, 100)]
    np.testing.assert_allclose(found, [200, 0, 100], atol=20)


@pytest.mark.parametrize("name", ["w1", "w2"])
def test_naive_layers_are_laxs_own(name):
    workload = WORKLOADS[name]
    student, inputs = workload.student(None), images(workload, 4).inputs
    variables = student.init(jax.random.key(0), inputs)

    def apply(x):
        return student.apply(variables, x, True)[0]

    with worker.plain_layers():
        plain, outputs = str(jax.make_jaxpr(apply)(inputs)), jax.jit(lambda x: apply(x))(inputs)
    assert "conv_general_dilated" in plain and "conv2d" not in plain and ("reduce_window" in plain) == (name == "w2")
    assert "conv2d" in str(jax.make_jaxpr(lambda x: apply(x))(inputs))
    np.testing.assert_allclose(outputs, jax.jit(lambda x: apply(x))(inputs), atol=1e-4)


def test_fitted_exponents():
    def rows(program, lengths, temporary, resident):
        return [
            {
                "workload": "w1",
                "program": program,
                "unroll_length": n,
                "seconds": 0.3 * n**1.5,
                "temporary_mib": temporary and 10 + temporary * n,
                "resident_mib": resident and 10 + resident * n,
            }
            for n in lengths
        ]

    made_up = rows("mixed", (1, 5, 25), 2.5, 7) + rows("higher", (1, 5, 25), None, 3) + rows("naive", (1, 5), 1, 1)
    mixed, higher, unknown = exponents(made_up + rows("betty", (2, 3, 4), None, None))
    assert [fit["program"] for fit in (mixed, higher, unknown)] == ["mixed", "higher", "betty"]  # naive has two lengths
    np.testing.assert_allclose([fit["exponent"] for fit in (mixed, higher, unknown)], 1.5)
    np.testing.assert_allclose([mixed["mib_a_step"], higher["mib_a_step"]], [2.5, 3])
    assert unknown["mib_a_step"] is None and (mixed["memory"], higher["memory"]) == ("temporary_mib", "resident_mib")


def test_difference_is_relative_and_over_all_leaves():
    ours = {"0/kernel": np.array([3.0, 0.0]), "1/kernel": np.array([4.0])}
    theirs = {"1/kernel": np.array([4.5]), "0/kernel": np.array([3.0, 0.0])}
    np.testing.assert_allclose(difference(theirs, ours), 0.1)
    assert np.isnan(difference({**theirs, "1/kernel": np.array([np.nan])}, ours))


def test_torch_agrees():
    pytest.importorskip("torch")
    rows = measure("w3", 2, ["save"], 1, ["torch steps", "torch create_graph"])
    assert [row["program"] for row in rows[2:]] == ["torch steps", "torch create_graph"]
    assert all(row["agreement"] < 1e-4 and row["libraries"].startswith("torch ") for row in rows[2:])


def test_operations_finds_the_convolutions_of_a_step():
    """LeNet: both layers forward and their kernels, and no input gradient of the images.

    A step of a hypergradient is a gradient and then the tangent of one, which has each forward convolution again and
    two for the tangents of its operands, and two for those of each gradient; the images have no tangent, and nothing
    reads the input gradient below the second layer itself.
    """
    plain, both = operations.convolutions(problem("w2", 1))
    rows = [operations.measure(key, repeats=1) for key in plain]
    flops = {(row["what"], row["input"]): row["flops"] for row in rows}
    first, second = 2 * 25 * 28 * 28 * 5 * 5 * 6, 2 * 25 * 10 * 10 * 5 * 5 * 6 * 16
    assert flops == {
        ("forward", "32x32x1"): first,
        ("forward", "14x14x6"): second,
        ("input gradient", "14x14x6"): second,
        ("kernel gradient", "32x32x1"): first,
        ("kernel gradient", "14x14x6"): second,
    }
    assert set(plain.values()) == {1}
    assert list(both) == list(plain)
    counts = dict(zip(flops, both.values(), strict=True))
    assert counts == {
        ("forward", "32x32x1"): 3,
        ("forward", "14x14x6"): 4,
        ("input gradient", "14x14x6"): 3,
        ("kernel gradient", "32x32x1"): 2,
        ("kernel gradient", "14x14x6"): 3,
    }
    sums = operations.sums([{"seconds": 2.0, "flops": 10, "in_step": 3}], "in_step", floor=5.0)
    assert sums == {"convolution_seconds": 6.0, "convolution_floor_seconds": 6.0}


def test_scaling(tmp_path):
    """In a process of its own, since devices are simulated from the start of one; their numbers: test_parallel.py."""
    path = tmp_path / "record.json"
    flags = ["--devices=1,2", "--seeds=1", "--unroll_length=1", "--rounds=1", "--repeats=1", f"--out={path}"]
    # Traced and compiled sooner: a small student, SGD in place of the LSTM, a given memory mode.
    code = """import sys
from functools import partial
from benchmarks import scaling, workloads
from l2t_jax.students import STUDENTS
from l2t_jax.teachers import TEACHERS
student = STUDENTS["mlp"](num_classes=10, width=4)
workloads.WORKLOADS["w3"] = workloads.WORKLOADS["w3"]._replace(student=lambda _: student, shape=(4, 4, 1))
scaling.teaching = partial(scaling.teaching, teacher=TEACHERS["sgd"](1e-3), memory="save")
scaling.main(sys.argv)"""
    done = execute([sys.executable, "-c", code, *flags], check=True, cwd=ROOT)
    record = json.loads(path.read_text())
    assert set(record) == {"rows", "command", "environment"}
    labels = ["one", "batches over 2 devices", "2 seeds on 2 devices", "pmap of one"]
    assert [row["layout"] for row in record["rows"]] == labels and all(label in done.stdout for label in labels)
    one = record["rows"][0]
    for row, runs in zip(record["rows"], (1, 1, 2, 1), strict=True):
        assert row["runs"] == runs
        np.testing.assert_allclose(row["student_steps_a_second"], runs * 2 / row["seconds"])
        np.testing.assert_allclose(row["ratio_of_throughput"], runs * one["seconds"] / row["seconds"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--devices=0", "at least 1"), ("--seeds=x", "at least 1"), ("--devices=5", "do not divide over 5")],
)
def test_bad_flags_of_scaling_are_one_line(flag, message, capsys):
    with pytest.raises(SystemExit) as stop:
        scaling.main(["scaling", "--devices=1", "--seeds=1", flag])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_losses_over_pixels(tmp_path, capsys, monkeypatch):
    """Each in pieces and in one, of which that of the DLN takes several times the memory; MANY is what it was."""
    path, many = tmp_path / "new" / "record.json", 2**11
    monkeypatch.setattr(unroll, "MANY", many)
    monkeypatch.setattr(unroll, "PIECE", {"cpu": many})
    arguments = ["--what=loss", "--side=33", "--classes=3", "--repeats=1", f"--out={path}"]
    with pixels_flags():
        pixels_cost.main(["pixels", *arguments])
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record.keys() == {"rows", "command", "environment"} and str(path) in capsys.readouterr().out
    rows = {(row["loss"], row["in_pieces"], row["of"]): row for row in record["rows"]}
    assert rows.keys() == {
        (loss, pieces, of)
        for loss in ("cross_entropy", "dln")
        for pieces in (False, True)
        for of in ("gradient", "mixed")
    }
    assert all((row["side"], row["classes"], row["images"]) == (33, 3, 2) for row in record["rows"])
    assert all(row["what"] == "loss" and row["seconds"] > 0 for row in record["rows"])
    for of in ("gradient", "mixed"):
        whole, pieces = (rows["dln", apart, of]["temporaries_mib"] for apart in (False, True))
        assert whole > 3 * pieces > 0
    assert many == unroll.MANY


def test_rounds_over_pixels(tmp_path, monkeypatch):
    """L2T-DLN with its LSTM, and the task's fixed loss, of a student of 1x1 convolutions."""

    class Heads(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, x, train):
            heads = [nn.Dense(self.num_classes, name=name)(x) for name in ("output", "second")]
            return Segmented(*heads)

    monkeypatch.setitem(STUDENTS, "pspnet_dense", lambda *, num_classes: from_linen(Heads(num_classes)))
    path = tmp_path / "record.json"
    options = ["--what=rounds", "--students=pspnet_dense", "--side=17", "--classes=3", "--rounds=1", "--memory=save"]
    with pixels_flags():
        pixels_cost.main(["pixels", *options, f"--out={path}"])
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == ["l2t_dln", "cross_entropy"]
    for row in rows:
        assert (row["student"], row["parameters"], row["side"], row["memory"]) == ("pspnet_dense", 24, 17, "save")
        assert row["first_round_s"] > row["seconds"] > 0 and row["temporaries_mib"] > 0 and row["error"] > 0
    assert rows[0]["error"] == pytest.approx(rows[1]["error"], rel=1e-3)  # the DLN begins as cross entropy


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--what=x", "--what=x is unknown; choose any of loss, rounds"), ("--side=9", "side"), ("--repeats=0", "repeats")],
)
def test_bad_flags_of_pixels_are_one_line(flag, message, capsys):
    with pixels_flags(), pytest.raises(SystemExit) as stop:
        pixels_cost.main(["pixels", flag])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@contextlib.contextmanager
def pixels_flags():
    """Its flags, afterwards as they were."""
    saved = flagsaver.save_flag_values(pixels_cost.FLAGS)
    yield
    flagsaver.restore_flag_values(saved, pixels_cost.FLAGS)


@pytest.mark.results
def test_the_findings_are_what_the_records_say():
    """The tables of benchmarks/README.md, line by line."""
    folder = Path(__file__).parents[1] / "benchmarks"
    lines = (folder / "README.md").read_text().splitlines()

    def record(name):
        return json.loads((folder / "results" / f"hypergradient_cost_cpu_{name}.json").read_text())["rows"]

    def row(rows, workload, length, program):
        found = [r for r in rows if (r["workload"], r["unroll_length"], r["program"]) == (workload, length, program)]
        return found[0]

    rows, peers = record("w1") + record("long") + record("small"), record("peers")
    lengths = (1, 5, 10, 15, 25, 50, 75)
    for student, workload, auto in (("ResNet-8", "w1", "mixed"), ("LeNet", "w2", "mixed"), ("MLP", "w3", "save")):
        assert {r["auto_mode"] for r in rows if r["workload"] == workload} == {auto}

        def ratios(a, b, w=workload):
            return [row(rows, w, n, a)["seconds"] / row(rows, w, n, b)["seconds"] for n in lengths]

        memory = [row(rows, workload, n, auto)["temporary_mib"] for n in lengths]
        torch = [row(rows, workload, n, "torch create_graph")["resident_mib"] for n in lengths]
        for label, values in (
            ("plain steps / PyTorch's", ratios("plain steps", "torch steps")),
            (f"`auto` (`{auto}`) / create_graph", ratios(auto, "torch create_graph")),
            ("`auto` / own plain steps", ratios(auto, "plain steps")),
            ("`auto`, temporaries, MiB", memory),
            ("create_graph, resident set added, MiB", torch),
        ):
            cells = " | ".join(f"{value:.2f}" if value < 50 else f"{value:.0f}" for value in values)
            assert f"| {student}: {label} | {cells} |" in lines
        whole = row(peers, workload, 25, "torch create_graph")["seconds"]
        others = ("mixed", "save", "higher", "torchopt", "betty")
        cells = " | ".join(f"{row(peers, workload, 25, name)['seconds'] / whole:.2f}" for name in others)
        assert f"| {student} | {cells} |" in lines
    save = [
        row(rows, "w2", n, "save")["seconds"] / row(rows, "w2", n, "torch create_graph")["seconds"] for n in lengths
    ]
    assert f"| LeNet: `save` / create_graph | {' | '.join(f'{ratio:.2f}' for ratio in save)} |" in lines
    scaled = [
        {r["layout"]: r["ratio_of_throughput"] for r in json.loads((folder / "results" / name).read_text())["rows"]}
        for name in ("scaling_cpu.json", "scaling_w1_cpu.json")
    ]
    for label, layout in (
        ("one device, through pmap", "pmap of one"),
        ("batches over 2 devices", "batches over 2 devices"),
        ("batches over 4 devices", "batches over 4 devices"),
        ("2 seeds, vmap", "2 seeds, vmap"),
        ("4 seeds, vmap", "4 seeds, vmap"),
        ("2 seeds on 2 devices", "2 seeds on 2 devices"),
        ("4 seeds on 4 devices", "4 seeds on 4 devices"),
    ):
        cells = " | ".join(f"{ratios[layout]:.2f}" if layout in ratios else "-" for ratios in scaled)
        assert f"| {label} | {cells} |" in lines
