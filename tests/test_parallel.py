"""Any number of seeds, devices and processes gives the numbers of one."""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from launching import execute
from parallel_cases import CASES

from l2t_jax.memory import MEMORY_MODES
from l2t_jax.runs import parallel
from l2t_jax.runs.parallel import ONE, Layout, LostError, ParallelError, check, keys_of, layout_of, start

HERE = Path(__file__).parent
TOLERANCE = 1e-12


def computed(of, flags):
    """What parallel_cases.py computes on 4 simulated devices, in float64."""
    command = [sys.executable, str(HERE / "parallel_cases.py"), of]
    done = execute(command, check=True, cwd=HERE.parent, env=os.environ | {"XLA_FLAGS": flags})
    found = json.loads(done.stdout)
    assert found["device_count"] == 4
    return found


@pytest.fixture(scope="module")
def batches():
    return computed("batches", os.environ["XLA_FLAGS"])


@pytest.fixture(scope="module")
def seeds():
    # On devices of their own, with the emitters that users have: the older ones round differently in such a program.
    return computed("seeds", os.environ["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", ""))


@pytest.mark.parametrize(("memory", "devices"), CASES)
def test_devices_give_the_numbers_of_one(batches, memory, devices):
    """Students, batch statistics, momentum, DLN, teacher and their gradients, after two rounds with augmentation."""
    differences = batches["agree"][f"{memory}, {devices} devices"]
    assert len(differences) == 8 and max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_shard_map_that_checks_what_varies(batches, memory):
    """BatchNorm over two devices and momentum, where phi and state are marked as varying."""
    assert batches["marked"][memory] < TOLERANCE


def test_seeds_side_by_side_on_divided_batches(batches):
    assert max(batches["together"].values()) < TOLERANCE, batches["together"]


def test_runs_of_unequal_length_side_by_side_on_devices_stop_each_on_its_own(batches):
    assert max(batches["unequal"]) < TOLERANCE and batches["unequal"][2] == 0, batches["unequal"]


@pytest.mark.versions
@pytest.mark.parametrize(("how", "tolerance"), [("batches", TOLERANCE), ("seeds", 0)], ids=["vmap", "devices"])
def test_seeds_give_the_numbers_of_single_runs(how, tolerance, request):
    """Side by side up to rounding; on devices exactly, since each device runs the program of a single seed."""
    differences = [max(seed.values()) for seed in request.getfixturevalue(how)["seeds"]]
    assert len(differences) == 3 and max(differences) <= tolerance, differences


@pytest.mark.parametrize(
    ("canary", "wrong"),
    [
        ("psum of the hypergradient", "hypergradient"),
        ("no mean of the hypergradient", "hypergradient"),
        ("psum of the student's gradient", "student"),
        ("no mean of the student's gradient", "student"),
    ],
)
def test_a_wrong_mean_is_seen(batches, canary, wrong):
    """The comparisons above would see each of the mistakes that the rule of means forbids."""
    assert batches["canaries"][canary][wrong] > 1e-3, batches["canaries"][canary]


@pytest.mark.versions
def test_keys_do_not_depend_on_the_devices():
    key, indices = jax.random.key(3), np.zeros((2, 6), int)
    whole = keys_of(key, indices, None)
    parts = jax.vmap(lambda x: keys_of(key, x, "d"), in_axes=1, out_axes=1, axis_name="d")(indices.reshape(2, 3, 2))
    np.testing.assert_array_equal(jax.random.key_data(parts.reshape(2, 6)), jax.random.key_data(whole))
    assert len(np.unique(jax.random.key_data(whole).reshape(-1, 2), axis=0)) == 12


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        ((5, 1, "batch", None), Layout(1, 1, "batch")),  # a CPU runs seeds one after another
        ((5, 1, "batch", 3), Layout(3, 1, "batch")),
        ((2, 1, "batch", 3), Layout(2, 1, "batch")),
        ((5, 4, "batch", None), Layout(1, 4, "batch")),
        ((5, 4, "seeds", None), Layout(1, 4, "seeds")),
        ((5, 4, "seeds", 9), Layout(2, 4, "seeds")),
        ((2, 4, "seeds", None), Layout(1, 2, "seeds")),
    ],
)
def test_layout(arguments, layout):
    assert layout_of(*arguments) == layout


def test_accelerators_run_all_seeds_at_once(monkeypatch):
    monkeypatch.setattr(parallel.jax, "default_backend", lambda: "gpu")
    assert layout_of(5, 1, "batch", None).runs == layout_of(5, 5, "seeds", None).runs == 5
    assert layout_of(5, 2, "seeds", None) == Layout(3, 2, "seeds")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(1, 3), "3 devices were asked for, and there are 2"),
        (Layout(1, 2), "batch_size=25 does not divide over 2 devices: give 24 or 26"),
    ],
)
def test_what_cannot_be_divided_is_refused(layout, message, monkeypatch):
    monkeypatch.setattr(parallel.jax, "device_count", lambda: 2)
    with pytest.raises(ParallelError, match=message):
        check(layout, batch_size=25, validation_batch_size=100)
    check(Layout(1, 2, "seeds"), batch_size=25)
    check(ONE, batch_size=25)
    check(Layout(1, 2), batch_size=24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "here:1"), "go together"),
        ((1, None, 2, 0), "go together"),
        ((1, "auto", 2, 0), "go together"),
        ((2, "here:1", 2, 2), "give 0 to 1"),
        ((3, "here:1", 2, 0), "cannot be shared evenly"),
    ],
)
def test_processes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ParallelError, match=message):
        start(*arguments)
    with pytest.raises(ParallelError, match="choose one of batch, seeds"):
        Layout(shard="sedes")
    with pytest.raises(ParallelError, match="at least 1"):
        Layout(devices=0)


@pytest.mark.versions
def test_one_process_is_its_own_leader():
    assert parallel.is_leader() and parallel.from_leader(3) == 3 and parallel.leader_first(lambda: 4) == 4
    assert parallel.anywhere(True) and not parallel.anywhere(False)
    with pytest.raises(ZeroDivisionError):
        parallel.leader_first(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo"), True),
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), True),  # while it is compiled
        (ValueError("shapes do not match"), False),
    ],
)
def test_a_lost_connection_is_told_from_other_errors(error, told, monkeypatch):
    def fail():
        with parallel._together():
            raise error

    with pytest.raises(type(error)):  # a single process has lost nobody
        fail()
    monkeypatch.setattr(parallel.jax, "process_count", lambda: 2)
    with pytest.raises(LostError if told else ValueError, match="has ended" if told else "shapes"):
        fail()


def test_thousands_of_simulated_devices_are_refused():
    """In a process of its own, where they could still be made; XLA would die of them."""
    command = [sys.executable, "-m", "experiments.classification", "--devices=10000", "--batch_size=10000"]
    done = execute(command, cwd=HERE.parent)
    assert done.returncode == 2 and done.stderr == "error: 10000 devices were asked for, and there are 64.\n"
