"""`experiments.tune` and `experiments.ablations` as a user meets them."""

import dataclasses
import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest
from launching import SMALL, launch

from experiments import _settings, ablations, tune
from l2t_jax.data import hold_out
from l2t_jax.losses.dln import dln
from l2t_jax.methods.parts import build_teacher_optimizer, dln_arguments
from l2t_jax.presets import PRESETS, Preset
from l2t_jax.runs.config import Config, Options, UsageError
from l2t_jax.runs.setting import build_optimizer, build_setting
from l2t_jax.tasks import load

TUNE = (*SMALL[1:], "--rounds=30", "--method=cross_entropy", "--seeds=2")
pytestmark = pytest.mark.usefixtures("small_lstm")


def records(workdir):
    return {path.stem: json.loads(path.read_text()) for path in (workdir / "records").iterdir()}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tune") / "run"
    assert launch(tune, *TUNE, "--grid=student_lr=0.1,1e-6;student_schedule=cosine", f"--workdir={workdir}") == 0
    return workdir


def test_a_grid_is_judged_on_held_out_training_examples(tuned):
    found = records(tuned)
    assert set(found) == {
        f"digits_mlp_lstm_cross_entropy_student_lr={lr}_student_schedule=cosine" for lr in ("0.1", "1e-06")
    }
    record = found["digits_mlp_lstm_cross_entropy_student_lr=0.1_student_schedule=cosine"]
    assert record["config"]["held_out"] == 0.2 and record["config"]["settings"]["student_lr"] == 0.1
    digits = load("digits")
    assert record["config"]["dataset_sha256"] == hold_out(digits, 0.2, strata=digits.train["labels"]).sha256
    rows = (tuned / "table.md").read_text().splitlines()[2:]
    assert rows[0] == "| data | method | student_lr | held-out accuracy, % |"  # only what differs
    assert rows[2].startswith("| digits, mlp | cross_entropy | 0.1 | ")  # the best first: the other learns nothing


def test_a_done_combination_is_kept(tuned, monkeypatch):
    monkeypatch.setattr("l2t_jax.runs.cells.run_entries", None)
    assert launch(tune, *TUNE, f"--workdir={tuned}", "--grid=student_lr=0.1;student_schedule=cosine") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid=student_lr",), "'student_lr' must be NAME=VALUE,VALUE"),
        (("--grid=student_lr=0.1;student_lr=1",), "each name once"),
        (("--grid=rate=1",), "--grid=rate is unknown"),
        (("--grid=student_lr=fast",), "student_lr=fast must be a number"),
        (("--grid=student_lr=-1",), "student_lr=-1.0 must be a positive, finite number"),
        (("--held_out=0",), "would choose settings on the test set"),
        (("--labels=wrong",), "--labels=wrong: wrong is not there"),
        (("--teacher_from=x",), "is for single runs"),
        (("--noise=uniform",), "--noise is of wrong labels, and the labels are clean here"),
        (("--set=preprocess=-1",), "preprocess=-1.0 must be a positive number, or none"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments, message, tmp_path, capsys):
    assert launch(tune, *arguments, f"--workdir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_settings_by_name():
    found = _settings.parse_settings("set", "odd=true, preprocess=none,unroll_length=7,student_lr=1e-3,squash=softmax")
    expected = {"odd": True, "preprocess": None, "unroll_length": 7, "student_lr": 1e-3, "squash": "softmax"}
    assert found == expected and type(found["unroll_length"]) is int
    for text in ("odd=yes", "unroll_length=2.5", "preprocess=x", "odd", "odd=true,odd=false", "even=true"):
        with pytest.raises(UsageError, match="--set"):
            _settings.parse_settings("set", text)


@pytest.fixture(scope="module")
def unroll_lengths(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ablation") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablations.ABLATIONS, "5", ablations.ABLATIONS["5"]._replace(values=(1, 5)))
        arguments = (
            "--table=5",
            "--rounds=2",
            "--unroll_length=5",
            "--width=8",
            "--seeds=2",
            "--teacher=sgd",
            "--memory=save",
            "--preset=residual",  # of a constant rate: the cells share programs
        )
        assert launch(ablations, *arguments, f"--workdir={workdir}") == 0
    return workdir


def test_an_ablation_holds_rounds_equal_or_steps(unroll_lengths):
    found = records(unroll_lengths)
    steps = {name: record["methods"]["l2t_dln"]["student_steps"] for name, record in found.items()}
    assert steps == {
        "digits_mlp_unroll_length_1_equal_rounds": 2,
        "digits_mlp_unroll_length_5_equal_rounds": 10,
        "digits_mlp_unroll_length_1_equal_steps": 10,
        "digits_mlp_unroll_length_5_equal_steps": 10,
    }
    for record in found.values():
        assert set(record["methods"]) == {"l2t_dln", "l2t_dln_transfer", "cross_entropy"}
        assert record["methods"]["cross_entropy"]["student_steps"] == record["methods"]["l2t_dln"]["student_steps"]
    text = (unroll_lengths / "table.md").read_text()
    assert "## At equal rounds" in text and "## At equal steps" in text
    assert [line.split(" | ")[-1] for line in text.splitlines() if line.startswith("| 5 ")] == ["87.07 |"] * 2
    assert all((unroll_lengths / f"equal_{equal}.png").stat().st_size > 10_000 for equal in ("rounds", "steps"))


def test_an_option_is_changed_alone():
    config = Config("digits", "mlp", ("l2t_dln", "cross_entropy"), "stable", "lstm", 2, "auto", (0,), PRESETS["stable"])
    options = ablations.ABLATIONS["options"]
    cells = [ablations.varied(config, options, "rounds", value) for value in options.values]
    assert cells[0] == config
    for value, cell in zip(options.values[1:], cells[1:], strict=True):
        name, _, text = value.partition("=")
        settings = dataclasses.replace(config.settings, **{name: _settings.parse_value("set", name, text)})
        assert settings != config.settings and cell == dataclasses.replace(config, settings=settings)


def test_what_makes_teaching_cheaper_takes_the_same_student_steps():
    """A round is N student steps, of which every k-th are taught: fewer rounds where it is longer."""
    config = Config("digits", "mlp", ("l2t_dln",), "stable", "lstm", 140, "auto", (0,), PRESETS["stable"])
    cost = ablations.ABLATIONS["cost"]
    rounds = {value: ablations.varied(config, cost, "steps", value).rounds for value in cost.values}
    assert rounds["as it is"] == rounds["units=8"] == rounds["unroll_length=5,teach_every=5"] == 140
    assert (rounds["teach_every=5"], rounds["unroll_length=5"]) == (28, 700)
    seldom = ablations.varied(config, cost, "steps", "teach_every=5")
    setting, (online, frozen) = build_setting(seldom, Options(""), load("digits"))
    assert setting.parts.steps == 3500 and online.method.stages == frozen.method.stages == 5


def test_the_sheet_reaches_every_knob_of_the_dln():
    settings = Preset(squash="identity", reduction="sum", residual=True, compress=3.0, dln_form="paper")
    config = Config("digits", "mlp", ("l2t_dln",), "paper", "lstm", 2, "auto", (0,), settings)
    known = {"form": "paper", "squash": "identity", "reduction": "sum", "residual": True, "compress": 3.0}
    assert dln_arguments(config.settings) == known and set(known) == set(inspect.signature(dln).parameters)


def test_the_learning_rate_falls_and_long_gradients_are_clipped():
    """eta_t = eta (1 + cos(pi t / T)) / 2 over T = 4 steps; gradients of norm 10 become 1, shorter ones stay."""
    settings = Preset(student_lr=0.2, student_schedule="cosine", student_clip=1.0)
    optimizer = build_optimizer(settings, 4)
    gradient, short = jnp.array([6.0, -8.0]), jnp.array([0.03, 0.04])
    state, norms = optimizer.init(gradient), []
    for _ in range(4):
        update, state = optimizer.update(gradient, state)
        np.testing.assert_allclose(update / jnp.linalg.norm(update), -gradient / 10, rtol=1e-6)
        norms.append(jnp.linalg.norm(update))
    np.testing.assert_allclose(norms, 0.1 * (1 + np.cos(np.pi * np.arange(4) / 4)), rtol=1e-6)
    np.testing.assert_allclose(optimizer.update(short, optimizer.init(short))[0], -0.2 * short, rtol=1e-6)
    plain = build_optimizer(Preset(student_lr=0.2), 4)
    np.testing.assert_allclose(plain.update(gradient, plain.init(gradient))[0], -0.2 * gradient)


def test_the_teachers_learning_rate_falls_over_all_its_lives():
    """A constant gradient makes every step of Adam as long as its rate: 0.2 (1 + cos(pi r / R)) / 2, R = 2 x 3."""
    for schedule, factors in (("cosine", (1 + np.cos(np.pi * np.arange(6) / 6)) / 2), ("constant", np.ones(6))):
        optimizer = build_teacher_optimizer(Preset(teacher_lr=0.2, teacher_schedule=schedule, lives=3), 2)
        gradient, steps = jnp.array(3.0), []
        state = optimizer.init(gradient)
        for _ in range(6):
            update, state = optimizer.update(gradient, state)
            steps.append(-update)
        np.testing.assert_allclose(steps, 0.2 * factors, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--table is not given"),
        (("--table=7",), "--table=7 is unknown"),
        (("--table=5", "--method=slf"), "leave it out"),
        (("--table=4", "--labels=noisy"), "give --meta=0"),
    ],
)
def test_what_cannot_be_ablated_is_one_line(arguments, message, tmp_path, capsys):
    assert launch(ablations, *arguments, f"--workdir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
