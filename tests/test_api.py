"""Training from Python and from a path: what a run returns, what it leaves, and that one call is not another's."""

import csv
import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from launching import launch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import l2t_jax
from experiments import classification, noisy_labels
from l2t_jax import from_arrays, train
from l2t_jax.losses import LOSSES, make_loss
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.runs import finals, reporting, training
from l2t_jax.runs.records import Metrics, WorkdirError
from l2t_jax.students import mlp
from l2t_jax.teachers import TEACHERS

pytestmark = pytest.mark.usefixtures("small_lstm", "no_pictures")
DIGITS, LABELS = load_digits(return_X_y=True)
NAMES = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
FEW = {"student_knobs": {"width": 16}, "memory": "save", "unroll_length": 3, "rounds": 5, "seeds": 2}
FLAGS = ("--width=16", "--memory=save", "--unroll_length=3", "--rounds=5", "--seeds=2")


def wrong_labels(share=0.4):
    random = np.random.default_rng(0)
    return np.where(random.random(len(LABELS)) < share, random.integers(0, 10, len(LABELS)), LABELS)


def noisy_digits():
    train_part, clean, test = slice(300), slice(1200, 1400), slice(1400, None)
    return from_arrays(
        DIGITS[train_part],
        NAMES[wrong_labels()[train_part]],
        test=(DIGITS[test], NAMES[LABELS[test]]),
        clean=(DIGITS[clean], NAMES[LABELS[clean]]),
        true=NAMES[LABELS[train_part]],
        name="mine",
    )


@pytest.fixture(scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "draw", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def taught(tmp_path_factory, small_lstm, no_pictures):
    return train("l2t_dln", noisy_digits(), workdir=tmp_path_factory.mktemp("api") / "run", **FEW)


def test_the_four_lines(taught):
    assert len(taught.scores) == 2 and taught.score == np.mean(taught.scores)
    x = DIGITS[1400:1500]
    chances = taught.probabilities(x)
    assert chances.shape == (100, 10)
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(taught.predict(x), np.array(sorted(NAMES))[chances.argmax(1)])
    whole = taught.predict(DIGITS[1400:]) == NAMES[LABELS[1400:]]
    assert abs(whole.mean() - taught.score) < 0.15  # one student of the mean probabilities is not the mean of students
    outputs, targets = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10)), jnp.float32), jnp.array([1, 2, 3, 4])
    assert taught.loss(outputs, targets).shape == (4,)
    assert set(taught.summary["methods"]) == {"l2t_dln", "l2t_dln_transfer"}


def test_one_seed_predicts_what_its_score_says(tmp_path):
    result = train("cross_entropy", noisy_digits(), workdir=tmp_path / "r", **FEW | {"seeds": [4]})
    assert result.score == pytest.approx(np.mean(result.predict(DIGITS[1400:]) == NAMES[LABELS[1400:]]))


def test_predictions_are_called_as_labels_are(tmp_path):
    data = from_arrays(DIGITS[:300], LABELS[:300] + 1, test=(DIGITS[300:400], LABELS[300:400] + 1))
    result = train("cross_entropy", data, workdir=tmp_path / "r", **FEW | {"seeds": 1, "rounds": 20})
    assert (
        result.score == pytest.approx(np.mean(result.predict(DIGITS[300:400]) == LABELS[300:400] + 1)) and result.score
    )


def test_a_row_for_each_example(taught):
    found = taught.examples
    np.testing.assert_array_equal(found.index, np.arange(300))
    assert found.given.shape == found.trust.shape == found.pull.shape == (300,)
    np.testing.assert_array_equal(np.array(sorted(NAMES))[found.true], NAMES[LABELS[:300]])
    assert np.all(found.trust <= found.confidence + 1e-6) and np.all(found.confidence <= 1)
    assert found.pull.mean() == pytest.approx(1, rel=1e-3)
    np.testing.assert_array_equal(np.argsort(found.trust, kind="stable")[:30], found.suspicious(0.1))
    rows = list(csv.DictReader((taught.directory / "examples.csv").open()))
    mine = [row for row in rows if row["method"] == "l2t_dln"]
    assert len(rows) == 600 and [int(row["index"]) for row in mine] == list(found.index[found.suspicious(1.0)])
    for row in mine[:20]:
        place = int(row["index"])
        assert row["true"] == NAMES[LABELS[place]] and row["right"] == str(row["true"] == row["label"]).lower()
    wrong = found.true != found.given
    among = taught.summary["methods"]["l2t_dln"]["suspects"]
    assert among["precision"] == np.mean(wrong[found.suspicious(among["share"])]) > wrong.mean()


def test_what_weighs_examples_tells_wrong_labels_apart(tmp_path):
    result = train("meta_weight_net", noisy_digits(), workdir=tmp_path / "r", **FEW | {"rounds": 40, "seeds": 1})
    found = result.examples
    wrong = found.true != found.given
    assert roc_auc_score(wrong, -found.trust) > 0.9
    with pytest.raises(ValueError, match="meta_weight_net has no loss by itself: it weighs examples"):
        _ = result.loss


def test_what_was_learned_is_left_without_a_need_to_know_the_run(taught):
    folder = taught.directory / "final"
    about = json.loads((folder / "about.json").read_text())
    assert about["student"] == {"name": "mlp", "knobs": {"width": 16}, "outputs": 10}
    assert about["classes"] == sorted(NAMES) and about["inputs"]["shape"] == [64]
    arrays = finals.load(folder, "l2t_dln", 0)
    params = arrays["student"]["params"]
    x = (DIGITS[:50] - about["inputs"]["mean"]) / about["inputs"]["std"]  # by hand, without the library
    hidden = np.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    outputs = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    state = taught.states[0].student
    expected, _ = taught.setting.parts.student.apply(state.variables, jnp.asarray(x, jnp.float32), False)
    np.testing.assert_allclose(outputs, expected, rtol=1e-3, atol=1e-4)
    assert about["losses"]["l2t_dln"]["name"] == "dln" and arrays["loss"]["0"]["kernel"].shape == (4, 40)
    assert jax.tree.leaves(arrays["teacher"])


def test_objects_in_place_of_names(tmp_path):
    def losses_of(params, outputs, targets):
        return jnp.exp(params["scale"]) * optax.softmax_cross_entropy_with_integer_labels(outputs, targets)

    loss = make_loss(losses_of, lambda key: {"scale": jnp.array(0.0)})
    given = {"student": mlp(num_classes=10, width=8), "loss": loss, "teacher": TEACHERS["adam"](0.1)}
    few = {name: value for name, value in FEW.items() if name != "student_knobs"} | {"seeds": 1}
    result = train("l2t_dln", noisy_digits(), optimizer=optax.sgd(0.2), workdir=tmp_path / "a", **given, **few)
    scale = result.states[0].loss["scale"]
    assert scale != 0 and result.summary["student"] == "own"
    z, y = jnp.zeros((2, 10)), jnp.array([0, 1])
    np.testing.assert_allclose(result.loss(z, y), np.exp(scale) * np.log(10), rtol=1e-6)

    def method(parts, learn):
        return fixed_loss(parts.student, parts.task, LOSSES["mae"](), parts.optimizer, stages=parts.plan.stages)

    own = train(method, noisy_digits(), workdir=tmp_path / "b", **FEW | {"seeds": 1})
    named = train("mae", noisy_digits(), workdir=tmp_path / "c", **FEW | {"seeds": 1})
    assert own.score == named.score


def test_a_run_goes_on_and_a_changed_set_is_refused(taught):
    again = train("l2t_dln", noisy_digits(), workdir=taught.directory, resume=True, **FEW)
    assert again.scores == taught.scores
    data = noisy_digits()
    changed = dataclasses.replace(data, train={**data.train, "inputs": data.train["inputs"] + 1})
    with pytest.raises(WorkdirError, match="dataset_sha256"):
        train("l2t_dln", changed, workdir=taught.directory, resume=True, **FEW)


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupted_call_says_how_to_go_on_and_loses_nothing(tmp_path, monkeypatch, times):
    """One SIGINT saves the rounds under way, a second one stops at once; both leave what the same call goes on from."""
    monkeypatch.setattr(training, "MOST_ROUNDS", 1)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    append, given = Metrics.append, {**FEW, "seeds": 1, "workdir": tmp_path / "r", "quiet": True}

    def interrupting(self, rows):
        append(self, rows)
        if rows[0]["round"] == 2 and "validation_error" in rows[0]:  # no observation
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "append", interrupting)
        with pytest.raises(KeyboardInterrupt) as stop:
            train("cross_entropy", noisy_digits(), **given)
    line = f"train was stopped; go on by the same call with workdir={str(tmp_path / 'r')!r}, resume=True."
    assert str(stop.value) == line and stop.value.__suppress_context__
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = [path.name for path in (tmp_path / "r/checkpoints/cross_entropy/seed_0").glob("[0-9]*")]
    assert saved == (["3"] if times == 1 else [])
    again = train("cross_entropy", noisy_digits(), resume=True, **given)
    whole = train("cross_entropy", noisy_digits(), **given | {"workdir": tmp_path / "whole"})
    assert Metrics.read(tmp_path / "r/metrics.jsonl") == Metrics.read(tmp_path / "whole/metrics.jsonl")
    for one, other in zip(jax.tree.leaves(again.states), jax.tree.leaves(whole.states), strict=True):
        np.testing.assert_array_equal(one, other)


def test_progress_is_told_unless_it_is_not_wanted(tmp_path, capsys):
    given = {**FEW, "seeds": 1, "rounds": 2}
    train("mae", noisy_digits(), workdir=tmp_path / "a", **given)
    said = capsys.readouterr()
    assert said.out == "" and f"files go to {tmp_path / 'a'}" in said.err
    assert "mae seed 0 (1 of 1): round 2/2" in said.err
    train("mae", noisy_digits(), workdir=tmp_path / "b", quiet=True, **given)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"method": "l2t"}, "method 'l2t' is unknown; choose one of .* Did you mean l2t_dln"),
        ({"student": "mpl"}, "student 'mpl' is unknown.*Did you mean mlp"),
        ({"student": "lenet"}, "student=lenet does not fit|is no knob of"),
        ({"teacher": "lsmt"}, "teacher 'lsmt' is unknown"),
        ({"preset": "x"}, "preset 'x' is unknown"),
        ({"memory": "x"}, "memory mode 'x' is unknown"),
        ({"loss": "x"}, "loss 'x' is unknown"),
        ({"task": "x"}, "task 'x' is unknown"),
        ({"seeds": []}, "are none: give a count"),
        ({"student_rate": 0.1}, "setting 'student_rate' is unknown"),
        ({"data": "/nowhere.npz"}, "is not there"),
        ({"data": "digts"}, "Did you mean digits"),
        ({"batch_size": 10_000}, "fewer than batch_size=10000"),
        ({"knobs": {"sgd.momenta": 0.9}}, "knob 'sgd.momenta' is unknown.*Did you mean sgd.momentum"),
        ({"knobs": {"focal.gamma": 0.9}}, "knob 'focal.gamma' is unknown"),
        ({"student_knobs": {"depth": 3}}, "depth=3 is no knob of"),
        ({"student_knobs": {"width": 0}}, "width=0 is not a positive integer"),
    ],
)
def test_bad_arguments_get_a_line(given, line, tmp_path):
    with pytest.raises(ValueError, match=line) as error:
        train(**{"method": "cross_entropy", "data": noisy_digits(), "workdir": tmp_path / "r", **FEW} | given)
    assert "\n" not in str(error.value)


def test_knobs_change_what_is_run(tmp_path):
    runs = {}
    for name, knobs in (("plain", {}), ("heavy", {"sgd.momentum": 0.9}), ("focal", {"focal.gamma": 5.0})):
        method = "focal" if name == "focal" else "cross_entropy"
        runs[name] = train(method, noisy_digits(), workdir=tmp_path / name, knobs=knobs, **FEW | {"seeds": 1})
    plain, heavy = (jax.tree.leaves(runs[name].states[0].student.params) for name in ("plain", "heavy"))
    assert any(np.any(a != b) for a, b in zip(plain, heavy, strict=True))
    z, y = jnp.array([[2.0, *[0.0] * 9]]), jnp.array([0])
    p = jax.nn.softmax(z)[0, 0]
    np.testing.assert_allclose(runs["focal"].loss(z, y)[0], -((1 - p) ** 5) * jnp.log(p), rtol=1e-5)


def test_a_call_leaves_nothing_for_the_next(taught, tmp_path):
    """The settings of one call are not those of another; the record says what was called."""
    result = train("cross_entropy", noisy_digits(), rounds=2, seeds=1, workdir=tmp_path / "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["config"]["student_knobs"] == {} and config["config"]["settings"]["unroll_length"] == 25
    assert config["command"].startswith("l2t_jax.train('cross_entropy', 'mine'")
    assert result.setting.config.seeds == (0,) and taught.setting.config.seeds == (0, 1)


def test_the_package_offers_these_names():
    assert {"train", "from_arrays", "from_folder", "from_npz", "from_csv", "Dataset"} <= set(l2t_jax.__all__)
    for name in l2t_jax.__all__:
        assert getattr(l2t_jax, name)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = l2t_jax.trian


# From the command line


@pytest.fixture
def files(tmp_path):
    x, y = DIGITS[:400].reshape(-1, 8, 8), LABELS[:400]
    np.savez(tmp_path / "mine.npz", x=x, y=y, x_test=DIGITS[400:500].reshape(-1, 8, 8), y_test=LABELS[400:500])
    given = wrong_labels()[:400]
    np.savez(tmp_path / "labels.npz", worse=given)
    np.save(tmp_path / "clean.npy", np.concatenate([np.flatnonzero((given == y) & (y == c))[:10] for c in range(10)]))
    return tmp_path


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_given_labels_stay_as_they_are(files):
    """No noise is added to labels that are given, whether some examples are known to be right or not."""
    given = (f"--dataset={files}/mine.npz", f"--labels={files}/labels.npz:worse", "--method=cross_entropy", *FLAGS)
    share = np.mean(wrong_labels()[:400] != LABELS[:400])
    assert launch(noisy_labels, *given, f"--workdir={files}/a") == 0
    found = summary_of(files / "a")["config"]
    assert found["noise"] is None and found["meta"] == 0 and found["wrong_labels"] == pytest.approx(share)
    assert (
        launch(noisy_labels, *given, f"--clean={files}/clean.npy", "--validation_batch_size=50", f"--workdir={files}/b")
        == 0
    )
    found = summary_of(files / "b")["config"]
    assert found["meta"] == 100 and found["wrong_labels"] == pytest.approx(share * 400 / 300)
    rows = list(csv.DictReader((files / "b" / "examples.csv").open()))
    assert len(rows) == 300 and not {int(row["index"]) for row in rows} & set(np.load(files / "clean.npy").tolist())
    assert launch(noisy_labels, *given, f"--workdir={files}/a", "--resume") == 0
    assert launch(noisy_labels, *given, "--clean=100", "--validation_batch_size=50", f"--workdir={files}/c") == 0
    assert summary_of(files / "c")["config"]["meta"] == 100


def test_own_data_are_not_corrupted_unless_that_is_asked_for(files):
    own = (f"--dataset={files}/mine.npz", "--method=cross_entropy", *FLAGS)
    assert launch(noisy_labels, *own, f"--workdir={files}/a") == 0
    assert summary_of(files / "a")["config"]["wrong_labels"] == 0
    assert (
        launch(noisy_labels, *own, "--noise=flip", "--meta=50", "--validation_batch_size=50", f"--workdir={files}/b")
        == 0
    )
    assert summary_of(files / "b")["config"]["wrong_labels"] > 0.3


@pytest.mark.parametrize(
    ("module", "arguments", "line"),
    [
        (
            noisy_labels,
            ("--labels={}/labels.npz:worse", "--noise=flip"),
            "--noise would make labels wrong that --labels gives",
        ),
        (noisy_labels, ("--labels={}/labels.npz:worse", "--noise_ratio=0.1"), "--noise_ratio would make labels wrong"),
        (noisy_labels, ("--labels=clean",), "labels are made wrong here"),
        (
            noisy_labels,
            ("--clean={}/clean.npy", "--noise=flip"),
            "100 clean examples are apart already",
        ),
        (classification, ("--labels=noisy",), "--labels=noisy is of tables"),
        (classification, ("--labels={}/none.npy",), "none.npy is not there"),
        (classification, ("--labels={}/labels.npz:better",), "holds worse: say which"),
        (classification, ("--clean={}/none.npy",), "none.npy is not there"),
        (classification, ("--clean=100",), "--clean=100: mine: true labels are not known: give a file"),
        (noisy_labels, ("--labels={}/labels.npz:worse", "--clean=0"), "--clean=0: mine: none would be clean"),
        (
            noisy_labels,
            ("--labels={}/labels.npz:worse", "--clean=9"),
            "--clean=9: a meta set of 9 must have",
        ),
        (classification, ("--dataset={}/none.npz",), "none.npz is not there"),
        (classification, ("--dataset={}/clean.npy",), "is none of a folder, an .npz and a .csv"),
    ],
)
def test_what_contradicts_itself_is_told(files, module, arguments, line, capsys):
    given = [argument.format(files) for argument in arguments]
    assert launch(module, f"--dataset={files}/mine.npz", *given, *FLAGS, f"--workdir={files}/r") == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
