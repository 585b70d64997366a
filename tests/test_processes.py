"""Several processes are one run: the same numbers, the files written once, and an end that is told."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launching import launch

from experiments import classification
from l2t_jax.runs.records import Metrics

ROOT = Path(__file__).parents[1]
FLAGS = ["--rounds=4", "--unroll_length=2", "--width=8", "--seeds=1,", "--batch_size=16", "--validation_batch_size=32"]
FLAGS += ["--teacher=adam"]  # compiled sooner than the LSTM, of which parallel_cases.py has a stand-in


def command(workdir, *flags):
    return [sys.executable, "-m", "experiments.classification", *FLAGS, f"--workdir={workdir}", *flags]


def together(workdir, count, *flags):
    """Start so many processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = (*flags, f"--coordinator=localhost:{port}", f"--num_processes={count}")
    return [
        subprocess.Popen(
            command(workdir, *shared, f"--process_id={i}"),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def end(processes):
    return [(*process.communicate(timeout=240), process.returncode) for process in processes]


def metrics(workdir):
    """What was measured, by method and round."""
    rows = Metrics.read(workdir / "metrics.jsonl")
    return {
        (row["method"], row["round"]): (row["validation_error"], row.get("hypergradient_norm", 0.0)) for row in rows
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert launch(classification, *FLAGS, f"--workdir={workdir}") == 0
    return metrics(workdir)


def assert_close(found, reference):
    assert found.keys() == reference.keys()
    for key, values in reference.items():
        np.testing.assert_allclose(found[key], values, rtol=2e-4, err_msg=str(key))


def test_two_processes_give_the_numbers_of_one_and_resume_on_one(alone, tmp_path):
    workdir = tmp_path / "run"
    outputs = end(together(workdir, 2, "--devices=4"))
    assert [code for *_, code in outputs] == [0, 0], outputs
    assert_close(metrics(workdir), alone)
    assert len(Metrics.read(workdir / "metrics.jsonl")) == len(alone)
    assert "Files:" in outputs[0][0] and "Files:" not in outputs[1][0] and "round" not in outputs[1][1]
    summary = (workdir / "summary.json").read_bytes()
    again = subprocess.run(command(workdir, "--resume", "--devices=2"), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(summary)["methods"].keys() == json.loads((workdir / "summary.json").read_text())["methods"].keys()
    assert_close(metrics(workdir), alone)


def test_a_directory_in_use_ends_all_processes(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text("{}\n")
    first, second = end(together(workdir, 2, "--devices=2"))
    assert first[2] == 2 and "choose another --workdir" in first[1]
    assert second[2] == 2 and "process 0 stopped; its message says why" in second[1]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run(tmp_path, lost):
    workdir = tmp_path / "run"
    processes = together(
        workdir, 2, "--devices=2", "--rounds=100000", "--checkpoint_seconds=0", "--method=cross_entropy"
    )
    deadline = time.monotonic() + 120
    while not (workdir / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.05)
    processes[lost].kill()
    begin = time.monotonic()
    other = processes[1 - lost]
    said = other.communicate(timeout=120)[1]
    assert other.returncode != 0 and time.monotonic() - begin < 30, said
    if lost == 0 and other.returncode != 1:  # the coordinator is gone too, and JAX may end the process before we can
        assert "another task died" in said
        return
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "another process of this run has ended" in line and f"--workdir={workdir} --resume" in line
