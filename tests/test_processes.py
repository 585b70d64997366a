"""Several processes are one run: the same numbers, the files written once, and an end that is told."""

import json
import os
import socket
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from launching import Child, execute, finished, until

from l2t_jax.runs.records import Metrics

ROOT = Path(__file__).parents[1]
FLAGS = ["--rounds=4", "--unroll_length=2", "--width=8", "--seeds=1,", "--batch_size=16", "--validation_batch_size=32"]
# Traced and compiled sooner than the LSTM, of which parallel_cases.py has a stand-in, and than "auto".
FLAGS += ["--teacher=adam", "--memory=save"]
# It takes less time with rare collections and no pictures.
CODE = """import gc; gc.set_threshold(50_000, 10, 10)
from l2t_jax.runs import reporting; reporting.draw = lambda *_: None
from experiments import _command, classification; _command.start(classification.main)"""


def command(workdir, *flags):
    return [sys.executable, "-c", CODE, *FLAGS, f"--workdir={workdir}", *flags]


@contextmanager
def together(workdir, count, *flags):
    """So many processes of one run, started."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = (*flags, f"--coordinator=localhost:{port}", f"--num_processes={count}")
    commands = [command(workdir, *shared, f"--process_id={i}") for i in range(count)]
    with ExitStack() as stack:
        yield [stack.enter_context(Child(command, cwd=ROOT)) for command in commands]


def metrics(workdir):
    """What was measured, by method and round."""
    rows = Metrics.read(workdir / "metrics.jsonl")
    return {
        (row["method"], row["round"]): (row["validation_error"], row.get("hypergradient_norm", 0.0)) for row in rows
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    execute(command(workdir), check=True, cwd=ROOT)
    return metrics(workdir)


def assert_close(found, reference):
    assert found.keys() == reference.keys()
    for key, values in reference.items():
        np.testing.assert_allclose(found[key], values, rtol=2e-4, err_msg=str(key))


def test_two_processes_give_the_numbers_of_one_and_resume_on_one(alone, tmp_path, monkeypatch):
    workdir, given = tmp_path / "run", tmp_path / "given.txt"
    (tmp_path / "mine_of_two.py").write_text(
        f"def on_row(row):\n    open({str(given)!r}, 'a').write(row['method'] + str(row['round']) + '\\n')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # Each reads its part of every batch.
    with together(workdir, 2, "--devices=4", "--stream", "--on_row=mine_of_two:on_row") as processes:
        outputs = finished(*processes)
    assert [code for *_, code in outputs] == [0, 0], outputs
    assert_close(metrics(workdir), alone)
    assert len(Metrics.read(workdir / "metrics.jsonl")) == len(alone)
    assert given.read_text().split() == [f"{method}{number}" for method, number in alone]  # told by one of them
    assert "Files:" in outputs[0][0] and "Files:" not in outputs[1][0] and "round" not in outputs[1][1]
    summary = (workdir / "summary.json").read_bytes()
    execute(command(workdir, "--resume", "--devices=2"), check=True, cwd=ROOT)
    assert json.loads(summary)["methods"].keys() == json.loads((workdir / "summary.json").read_text())["methods"].keys()
    assert_close(metrics(workdir), alone)


def test_two_processes_go_on_for_longer(tmp_path):
    """With a second seed; as one process that was asked for all of it at once."""
    flags = ("--preset=residual", "--method=l2t_dln")
    execute(command(tmp_path / "whole", *flags, "--seeds=0,1"), check=True, cwd=ROOT)
    for more in (("--rounds=2",), ("--seeds=0,1", "--resume")):
        with together(tmp_path / "run", 2, "--devices=2", *flags, "--seeds=1,", *more) as processes:
            outputs = finished(*processes)
        assert [code for *_, code in outputs] == [0, 0], outputs
    assert "going on with what is there: 4 rounds in place of 2, new seeds 0" in outputs[0][1]
    assert_close(metrics(tmp_path / "run"), metrics(tmp_path / "whole"))
    rows = [Metrics.read(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")]
    at = [[(row["method"], row["seed"], row["round"]) for row in found] for found in rows]
    assert at[0] == at[1]


SEEDS = ("--preset=residual", "--method=meta_weight_net", "--shard=seeds", "--seeds=3")


@pytest.fixture(scope="module")
def seeds_alone(tmp_path_factory):
    """Three seeds on four devices, of which one idles, in one process."""
    workdir = tmp_path_factory.mktemp("seeds") / "run"
    execute(command(workdir, *SEEDS, "--devices=4"), check=True, cwd=ROOT)
    return workdir


def assert_same(workdir, other):
    """Bit for bit, what was measured, wherever it ran; and the scores."""
    rows = [sorted(Metrics.read(path / "metrics.jsonl"), key=str) for path in (workdir, other)]
    methods = [json.loads((path / "summary.json").read_text())["methods"] for path in (workdir, other)]
    assert rows[0] == rows[1] and len(rows[0]) == 3 * 4
    assert [method["score"] for method in methods[0].values()] == [method["score"] for method in methods[1].values()]


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["held", "streamed"])
def test_seeds_over_two_processes(seeds_alone, tmp_path, stream):
    with together(tmp_path / "run", 2, *SEEDS, *stream, "--devices=4") as processes:
        outputs = finished(*processes)
    assert [code for *_, code in outputs] == [0, 0], outputs
    assert "Files:" in outputs[0][0] and "Files:" not in outputs[1][0] and "round" not in outputs[1][1]
    assert_same(tmp_path / "run", seeds_alone)


def test_seeds_over_four_processes_go_on_over_two(seeds_alone, tmp_path):
    for count, more in ((4, ("--rounds=2",)), (2, ("--resume",))):
        with together(tmp_path / "run", count, *SEEDS, f"--devices={count}", *more) as processes:
            outputs = finished(*processes)
        assert [code for *_, code in outputs] == [0] * count, outputs
    assert_same(tmp_path / "run", seeds_alone)


def test_a_cluster_says_who_is_who(seeds_alone, tmp_path):
    """The command of the page, as Slurm starts it: the same in each of two tasks, which differ by their environment."""
    of_job = {"SLURM_JOB_ID": str(20_000 + os.getpid() % 10_000), "SLURM_STEP_NODELIST": "localhost"}
    of_job |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    with ExitStack() as stack:
        line = command(tmp_path / "run", *SEEDS, "--devices=4", "--coordinator=auto")
        processes = [
            stack.enter_context(
                Child(line, cwd=ROOT, env=os.environ | of_job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
            )
            for i in range(2)
        ]
        outputs = finished(*processes)
    assert [code for *_, code in outputs] == [0, 0], outputs
    assert_same(tmp_path / "run", seeds_alone)


@pytest.mark.versions
def test_a_directory_in_use_ends_all_processes(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text("{}\n")
    with together(workdir, 2, "--devices=2") as processes:
        first, second = finished(*processes)
    assert first[2] == 2 and "choose another --workdir" in first[1]
    assert second[2] == 2 and "process 0 stopped; its message says why" in second[1]


@pytest.mark.parametrize("platform", ["nonsense", "cuda"])  # of the latter JAX says nothing where it is not installed
def test_no_device_is_one_line(tmp_path, monkeypatch, platform):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    done = execute(command(tmp_path / "run"), cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: no device starts with JAX_PLATFORMS={platform} (")


@pytest.mark.parametrize(("lost", "shard"), [(0, "batch"), (1, "batch"), (1, "seeds")])
def test_a_lost_process_ends_the_run(tmp_path, lost, shard):
    workdir = tmp_path / "run"
    flags = ["--devices=2", "--rounds=100000", "--checkpoint_seconds=0", "--method=cross_entropy"]
    flags += [f"--shard={shard}", "--seeds=2"]
    with together(workdir, 2, *flags) as processes:
        assert until((workdir / "metrics.jsonl").exists, *processes), [child.said for child in processes]
        processes[lost].process.kill()
        # It sees that at once, and not by JAX's heartbeat, after 100 seconds.
        ((_, said, code),) = finished(processes[1 - lost], quiet=60)
    assert code != 0, said
    if lost == 0 and code != 1:  # the coordinator is gone too, and JAX may end the process before we can
        assert "another task died" in said
        return
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "another process of this run has ended" in line and f"--workdir={workdir} --resume" in line
