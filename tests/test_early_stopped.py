"""Early stopping: which student is kept, and that it is the one that a run is judged by; training on the clean ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import launch

from experiments import noisy_labels
from l2t_jax.methods.early_stopped import early_stopped
from l2t_jax.optimizers import sgd
from l2t_jax.types import Method, MethodState, RoundBatches
from l2t_jax.unroll import init_state


def walking():
    """A method whose student goes a step of 1 a round; its validation error at x is (x - target)^2."""

    def init(key, inputs):
        student = init_state({"params": {"x": jnp.zeros(())}, "batch_stats": {}}, sgd(0.1))
        return MethodState(student, {}, {}, {"steps": jnp.int32(0)}, {})

    def round(state, batches):
        x, steps = state.student.params["x"] + 1, state.carried["steps"] + 1
        state = state._replace(student=state.student._replace(params={"x": x}), carried={"steps": steps})
        return state, {"validation_error": (x - batches.validation) ** 2}

    return Method(init, round, stages=1, steps_per_round=1, pull=lambda state, *_: state.carried["steps"])


def walk(rounds, rounds_per_pass, targets):
    """Where the student is after each round, and the least error."""
    method = early_stopped(walking(), rounds=rounds, rounds_per_pass=rounds_per_pass)
    state, seen = method.init(jax.random.key(0), jnp.zeros(1)), []
    for target in targets:
        state, metrics = jax.jit(method.round)(state, RoundBatches((), jnp.float32(target), jnp.bool_(False)))
        seen.append((float(state.student.params["x"]), float(metrics["least_validation_error"])))
    assert method.pull(state, None, None) == len(targets)
    return seen


@pytest.mark.parametrize("rounds", [5, 6, 7])
def test_the_student_after_the_best_pass_is_the_last(rounds):
    """Passes of two rounds have the errors 2.5, 0.5 and 6.5; of a seventh round alone, which would be 0, none is."""
    targets = [3.0] * 6 + [7.0]
    seen = walk(rounds, 2, targets[:rounds])
    assert [x for x, _ in seen] == [*range(1, rounds), 4.0]
    np.testing.assert_allclose([least for _, least in seen][1:4], [2.5, 2.5, 0.5])
    assert seen[-1][1] == 0.5


def test_a_run_shorter_than_a_pass_is_judged_at_its_end():
    assert walk(2, 9, [0.0, 2.0])[-1] == (2.0, 0.5)


def test_no_pass():
    with pytest.raises(ValueError, match="rounds_per_pass=0: give at least 1"):
        early_stopped(walking(), rounds=3, rounds_per_pass=0)


def run(workdir, *flags):
    arguments = ["--noise_ratio=0.4", "--student_lr=0.3", "--seeds=1", *flags, f"--workdir={workdir}"]
    assert launch(noisy_labels, *arguments) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return json.loads((workdir / "summary.json").read_text())["methods"], rows


def test_a_run_trains_as_cross_entropy_does(tmp_path):
    flags = ("--method=early_stopped,cross_entropy", "--rounds=12", "--preset=stable", "--set=unroll_length=5")
    found, rows = run(tmp_path / "whole", *flags)
    mine, plain = ([row for row in rows if row["method"] == name] for name in ("early_stopped", "cross_entropy"))
    assert [row["train_loss"] for row in mine] == [row["train_loss"] for row in plain]
    least = [row["least_validation_error"] for row in mine if row["least_validation_error"] is not None]
    assert least == sorted(least, reverse=True) and len(set(least)) > 1
    assert found["early_stopped"]["student_steps"] == found["cross_entropy"]["student_steps"] == 60


def test_clean_examples_may_be_trained_on(tmp_path, capsys):
    """They are 100 of 1437 of the digits here, and have right labels."""
    apart, _ = run(tmp_path / "apart", "--method=cross_entropy", "--rounds=4")
    beside, _ = run(tmp_path / "beside", "--method=cross_entropy", "--rounds=4", "--train_on_clean")
    assert apart["cross_entropy"]["score"] != beside["cross_entropy"]["score"]
    assert "trained on the clean ones too" in capsys.readouterr().out
    arguments = ["--meta=0", "--train_on_clean", "--rounds=2", f"--workdir={tmp_path / 'none'}"]
    assert launch(noisy_labels, *arguments) == 2
    assert "--train_on_clean: no examples are known to be clean" in capsys.readouterr().err
