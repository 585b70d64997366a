"""Translation: padding, the hypergradient, beam search, subwords and files, BLEU, and runs from the command."""

import builtins
import dataclasses
import itertools
import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from subprocess import run as execute

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from launching import failing_disk, launch
from sacrebleu import corpus_bleu

from experiments import translation
from experiments._command import start
from l2t_jax.data import DataError, hold_out
from l2t_jax.data.order import Plan
from l2t_jax.data.subwords import BEGIN, END, PAD, Subwords, train_subwords
from l2t_jax.data.text import made_pairs, read_pairs
from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import build_loss
from l2t_jax.methods.parts import MANY_CLASSES
from l2t_jax.optimizers import adam, inverse_sqrt, sgd
from l2t_jax.presets import PRESETS
from l2t_jax.runs import finals
from l2t_jax.runs.config import Config, Options, UsageError
from l2t_jax.runs.setting import build_setting
from l2t_jax.students import STUDENTS, translators
from l2t_jax.students.translators import lstm, transformer
from l2t_jax.tasks import TASKS, evaluate, settings_for
from l2t_jax.tasks import translation as task_module
from l2t_jax.tasks.beam import beam_search
from l2t_jax.tasks.translation import bleu, encode, tokens
from l2t_jax.types import Batch, RoundBatches, Stepwise, Student
from l2t_jax.unroll import init_state, inner_objective, outer_objective

ROOT = Path(__file__).parents[1]
V = 9
TINY = {
    "lstm": partial(lstm, 1, width=4, dropout=0.0),
    "transformer": partial(transformer, width=4, hidden=6, heads=2, layers=2, dropout=0.0),
}


def few(data_dir=None, download=False):
    return task_module._dataset("made_up", made_pairs(60, 7), 60, 32)


TASK = task_module.translation(encode(few()))


def ids(rng, *shape, length, least=2):
    """Random ids with END and padding: another length in each row."""
    found = rng.integers(END + 1, V, (*shape, length))
    ends = rng.integers(least, length, shape)[..., None]
    place = np.arange(length)
    return jnp.asarray(np.where(place < ends, found, np.where(place == ends, END, PAD)), jnp.int32)


def some(rng, *shape, source=5, target=6):
    data = {"source": ids(rng, *shape, length=source), "target": ids(rng, *shape, length=target)}
    return TASK.gather(data, jnp.arange(shape[0]), None)


# Tokens


def test_a_target_is_read_shifted_and_padding_is_read_as_padding():
    data = {"source": jnp.array([[5, END]]), "target": jnp.array([[6, 7, END, PAD, PAD]])}
    (source, before), target, *_ = TASK.gather(data, jnp.array([[0]]), None)
    assert source.tolist() == [[[5, END]]] and target.tolist() == [[[6, 7, END, PAD, PAD]]]
    assert before.tolist() == [[[BEGIN, 6, 7, PAD, PAD]]]


@pytest.mark.parametrize("name", ["cross_entropy", "label_smoothing", "dln", "bilinear_low_rank"])
def test_padding_neither_counts_nor_leaks(name, x64):
    """The mean over tokens as written out; what padding gives may be NaN, and its derivative is zero."""
    rng = np.random.default_rng(0)
    batch = some(rng, 3)
    counted = np.asarray(batch.targets != PAD)
    assert len(set(counted.sum(1))) > 1 and not counted.all()
    logits = jnp.asarray(np.where(counted[..., None], rng.normal(size=(*counted.shape, V)), np.nan))
    loss = build_loss(name, V)
    phi = toy.to_x64(loss.init(jax.random.key(0)))
    given = Student(lambda key, inputs: {}, lambda variables, inputs, train: (variables["params"], {}))
    inner = inner_objective(given, TASK, loss)
    value, slope = jax.value_and_grad(lambda z: inner(z, {}, phi, batch)[0])(logits)
    each = loss.apply(phi, logits[counted], batch.targets[counted])
    np.testing.assert_allclose(value, np.mean(each), rtol=1e-12)
    assert np.all(slope[~counted] == 0) and np.all(np.isfinite(slope)) and np.any(slope)
    error, told = outer_objective(given, TASK)(logits, {}, batch)
    plain = -jax.nn.log_softmax(logits)[counted][np.arange(counted.sum()), batch.targets[counted]]
    np.testing.assert_allclose(error, np.mean(plain), rtol=1e-12)
    right = np.asarray(logits.argmax(-1) == batch.targets) & counted
    np.testing.assert_allclose(told["token_accuracy"], np.mean(right.sum(1) / counted.sum(1)), rtol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_students_do_not_see_padding_nor_what_comes_later(name, x64):
    student, rng = TINY[name](num_classes=V), np.random.default_rng(1)
    (source, before), *_ = some(rng, 3)
    variables = student.init(jax.random.key(0), (source, before))
    apply = jax.jit(lambda inputs: student.apply(variables, inputs, False)[0])
    outputs = apply((source, before))
    assert outputs.dtype == jnp.float64 and outputs.shape == (*before.shape, V)
    longer = jnp.pad(source, ((0, 0), (0, 3)), constant_values=PAD)
    np.testing.assert_allclose(apply((longer, before)), outputs, rtol=1e-9, atol=1e-12)
    later = apply((source, before.at[:, 3:].set(7)))
    np.testing.assert_allclose(later[:, :3], outputs[:, :3], rtol=1e-9, atol=1e-12)
    assert np.abs(later[:, 3:] - outputs[:, 3:]).max() > 1e-3
    assert np.abs(apply((source.at[:, 0].set(8), before)) - outputs).max() > 1e-6


@pytest.mark.parametrize("name", TINY)
def test_one_step_after_the_other_gives_what_the_whole_gives(name, x64):
    student, rng = TINY[name](num_classes=V), np.random.default_rng(2)
    (source, before), *_ = some(rng, 3)
    variables = student.init(jax.random.key(0), (source, before))
    whole, _ = student.apply(variables, (source, before), False)
    memory, cache = student.stepwise.begin(variables, source, before.shape[1])
    step = jax.jit(student.stepwise.step)
    for t in range(before.shape[1]):
        logits, cache = step(variables, memory, cache, before[:, t], jnp.int32(t))
        np.testing.assert_allclose(logits, whole[:, t], rtol=1e-9, atol=1e-12)


def test_sizes_are_those_of_the_papers():
    inputs = (jax.ShapeDtypeStruct((2, 5), jnp.int32),) * 2
    for vocabulary in (100, 331):
        variables = jax.eval_shape(transformer(num_classes=vocabulary).init, jax.random.key(0), inputs)
        count = sum(x.size for x in jax.tree.leaves(variables["params"]))
        assert count == 31_543_296 + 512 * 2 * vocabulary  # an embedding of each side


def test_dropout_is_drawn_in_training_alone():
    for build in (partial(lstm, 1, width=4), partial(transformer, width=4, hidden=4, heads=1, layers=1)):
        student = build(num_classes=V, dropout=0.5)
        inputs = some(np.random.default_rng(3), 2).inputs
        variables = student.init(jax.random.key(0), inputs)
        draw = lambda k: student.apply(variables, inputs, True, jax.random.split(jax.random.key(k), 2))[0]  # noqa: B023, E731
        plain, _ = student.apply(variables, inputs, False)
        assert student.draws and not np.allclose(draw(0), draw(1)) and not np.allclose(draw(0), plain)


@pytest.mark.parametrize(
    "build, places",
    [
        (partial(lstm, 2, width=4), range(7)),
        (partial(transformer, width=4, hidden=4, heads=1, layers=2), [0, 1, 2, 4, 5, 7, *range(8, 14)]),
    ],
)
def test_every_dropout_draws_for_itself(build, places, monkeypatch):
    """Both embeddings, and what each sublayer of each layer puts out; an encoder's layer has one sublayer less."""
    seen = []

    def noted(x, rate, keys, place):
        assert rate == 0.5 and keys is not None
        jax.debug.callback(lambda place: seen.append(int(place)), place)
        return x

    student, inputs = build(num_classes=V, dropout=0.5), some(np.random.default_rng(3), 2).inputs
    variables = student.init(jax.random.key(0), inputs)
    monkeypatch.setattr(translators, "dropout", noted)
    jax.block_until_ready(student.apply(variables, inputs, True, jax.random.split(jax.random.key(1), 2)))
    jax.effects_barrier()
    assert sorted(seen) == list(places)


# The hypergradient


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", TINY)
def test_the_hypergradient_is_that_of_differences(name, optimizer, x64):
    """Through N = 2 steps, in the modes save and mixed; a row of embeddings that no source has has a zero gradient."""
    rng = np.random.default_rng(4)
    student, train, validation = TINY[name](num_classes=V), some(rng, 2, 2), some(rng, 3)
    optimizer = sgd(0.1) if optimizer == "sgd" else adam(inverse_sqrt(0.02, 20))
    loss = build_loss("bilinear_low_rank", V, rank=2)
    phi = toy.to_x64(jax.tree.map(lambda x: x + 0.1, loss.init(jax.random.key(1))))
    state = init_state(student.init(jax.random.key(0), validation.inputs), optimizer)
    inner, outer = inner_objective(student, TASK, loss), outer_objective(student, TASK)
    grads, _ = jax.grad(inner, has_aux=True)(state.params, {}, phi, jax.tree.map(lambda x: x[0], train))
    assert not np.any(grads["source_embedding"]["embedding"][BEGIN])

    @jax.jit
    def error(phi):
        params, after = state.params, state.optimizer_state
        for i in range(2):
            grads, _ = jax.grad(inner, has_aux=True)(params, {}, phi, jax.tree.map(lambda x, i=i: x[i], train))
            updates, after = optimizer.update(grads, after, params)
            params = jax.tree.map(jnp.add, params, updates)
        return outer(params, {}, validation)[0]

    way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), phi)
    moved = lambda h: error(jax.tree.map(lambda p, d: p + h * d, phi, way))  # noqa: E731
    central = lambda h: (moved(h) - moved(-h)) / (2 * h)  # noqa: E731
    slope = (4 * central(1e-5) - central(2e-5)) / 3  # Adam turns sharply: without its h^2
    found = {}
    for mode in ("save", "mixed"):
        found[mode] = jax.jit(hypergradient(inner, outer, optimizer, memory=mode))(phi, state, train, validation)
        leaves = zip(jax.tree.leaves(found[mode].gradient), jax.tree.leaves(way), strict=True)
        np.testing.assert_allclose(sum(jnp.vdot(a, b) for a, b in leaves), slope, rtol=1e-5, atol=1e-10)
        np.testing.assert_allclose(found[mode].error, error(phi), rtol=1e-12)
    for a, b in zip(*(jax.tree.leaves(found[mode].gradient) for mode in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-13)


def test_the_rate_rises_and_falls():
    at = inverse_sqrt(0.1, 400)
    np.testing.assert_allclose([at(t) for t in (0, 19, 39, 159)], [0.1 / 40, 0.05, 0.1, 0.05], rtol=1e-6)
    assert inverse_sqrt(1.0, 10**9)(3999) == 1 and inverse_sqrt(1.0, 1)(0) == 1


# The low-rank loss


def test_the_low_rank_loss_is_the_bilinear_one(x64):
    rng, n = np.random.default_rng(5), 7
    outputs, targets = jnp.asarray(rng.normal(size=(n, V))), jnp.asarray(rng.integers(0, V, n))
    factors = {name: jnp.asarray(rng.normal(size=(V, 3))) for name in ("left", "right")}
    params = {"diagonal": jnp.asarray(rng.normal(size=V)), "bias": jnp.asarray(rng.normal(size=V)), **factors}
    phi = jnp.diag(params["diagonal"]) + params["left"] @ params["right"].T
    low, full = build_loss("bilinear_low_rank", V, rank=3), build_loss("bilinear", V)
    for move in (lambda f, x: f(x), lambda f, x: jax.grad(lambda x: jnp.sum(f(x) ** 2))(x)):
        ours = move(lambda x: low.apply(params, x, targets), outputs)
        np.testing.assert_allclose(
            ours, move(lambda x: full.apply({"phi": phi, "bias": params["bias"]}, x, targets), outputs), rtol=1e-9
        )
    identity = {"phi": jnp.eye(V), "bias": jnp.zeros(V)}
    low = build_loss("bilinear_low_rank", V)
    begun = toy.to_x64(low.init(jax.random.key(0)))
    np.testing.assert_allclose(low.apply(begun, outputs, targets), full.apply(identity, outputs, targets), rtol=1e-12)


# Beam search


def table_student(rng, classes=5, steps=3):
    """Chances that depend on the source's first id and on all that was written: a number for each history."""
    table = jnp.asarray(rng.normal(size=(classes, (classes + 1) ** (steps + 1), classes)) * 2)

    def begin(variables, source, steps):
        return source[:, 0], jnp.zeros(len(source), jnp.int32)

    def step(variables, first, history, written, t):
        history = jnp.where(t == 0, 0, history * classes + written + 1)
        return table[first, history % table.shape[1]], history

    return Student(None, None, stepwise=Stepwise(begin, step)), np.asarray(table)


def chances(table, first, sequence, classes=5):
    history, total = 0, 0.0
    for token in sequence:
        row = table[first, history % table.shape[1]]
        total += row[token] - np.log(np.exp(row).sum())
        history = history * classes + token + 1
    return total


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_sequences(penalty, x64):
    student, table = table_student(np.random.default_rng(6))
    source, free = jnp.array([[0], [1], [4]]), (1, 4)  # END is 3; PAD and BEGIN are never written
    found, scores = jax.jit(partial(beam_search, student, {}, beam=40, steps=3, penalty=penalty))(source=source)
    for first, ids, score in zip(source[:, 0], found, scores, strict=True):
        every = [(*start, END) for length in range(3) for start in itertools.product(free, repeat=length)]
        values = [chances(table, int(first), one) / len(one) ** penalty for one in every]
        best = every[int(np.argmax(values))]
        assert ids.tolist() == [*best, *[PAD] * (3 - len(best))]
        np.testing.assert_allclose(score, max(values), rtol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_one_beam_is_greedy_and_steps_are_the_whole(name, x64):
    student, rng = TINY[name](num_classes=V), np.random.default_rng(7)
    (source, before), *_ = some(rng, 4)
    variables = student.init(jax.random.key(2), (source, before))
    variables = jax.tree.map(lambda x: 4 * x, variables)  # decided
    found, _ = beam_search(student, variables, source, beam=1, steps=6)
    written = np.full((4, 7), PAD)
    written[:, 0] = BEGIN
    for t in range(6):
        logits = np.array(student.apply(variables, (source, jnp.asarray(written[:, :6])), False)[0][:, t])
        logits[:, [PAD, BEGIN]] = -np.inf
        over = (written[:, 1 : t + 1] == END).any(1)
        written[:, t + 1] = np.where(over, PAD, END if t == 5 else logits.argmax(-1))
    np.testing.assert_array_equal(found, written[:, 1:])
    short, _ = beam_search(student, variables, source, beam=3, steps=6, most=jnp.array([1, 2, 6, 6]))
    assert np.max((short != PAD).sum(1) - np.array([1, 2, 6, 6])) <= 0
    assert np.all((short == END).sum(1) == 1)
    whole = beam_search(student._replace(stepwise=None), variables, source, beam=3, steps=6)
    apart = beam_search(student, variables, source, beam=3, steps=6)
    np.testing.assert_array_equal(whole[0], apart[0])
    np.testing.assert_allclose(whole[1], apart[1], rtol=1e-9)


# Text


def test_the_language_has_a_rule_and_its_test_is_new():
    made = made_pairs(50, 20)
    text = lambda part: [(a.decode(), b.decode()) for a, b in zip(part["source"], part["target"], strict=True)]  # noqa: E731
    train, test = text(made.train), text(made.test)
    assert len(train) == 50 and len(test) == 20 and not {a for a, _ in train} & {a for a, _ in test}
    words = {"ta": "der", "un": "ein", "tir": "hund", "bak": "katze", "gor": "gross", "drav": "sieht"}
    known = [(a.split(), b.split()) for a, b in train + test if set(a.split()) <= set(words)]
    for source, target in [(a.split(), b.split()) for a, b in train + test]:
        assert len(source) == len(target) and target[-1] in ("sieht", "sucht", "findet", "liebt", "traegt")
    for source, target in known:
        assert sorted(words[w] for w in source) == sorted(target)
    assert made_pairs(50, 20).train["source"].tolist() == made.train["source"].tolist()


@pytest.mark.versions
def test_subwords_are_learned_again_alike_and_give_the_text_back():
    texts = ["der hund sieht", "ein kind liebt den hund", "straße über äpfel"] * 3
    model = train_subwords(texts, 60)
    assert model == train_subwords(texts, 60)
    subwords = Subwords(model)
    assert subwords.size == 60
    for text, found in zip(texts, subwords.encode(texts), strict=True):
        assert min(found) > END and subwords.decode([*found, END, 7, 7]) == text
    with pytest.raises(DataError, match="fewer than 5000 subwords: give a vocabulary of at most"):
        train_subwords(texts, 5000)
    with pytest.raises(DataError, match="more letters than the 8 subwords"):
        train_subwords(texts, 8)


def test_long_pairs_are_left_out_of_training_and_never_of_the_test_set():
    whole = encode(few())
    lengths = np.maximum(*((whole.train[side] != PAD).sum(1) for side in ("source", "target")))
    most = int(np.median(lengths))
    short = encode(few(), max_length=most)
    assert 0 < short.examples == (lengths <= most).sum() < 60
    assert short.info.counts["train"] == {f"pairs longer than {most} subwords left out": 60 - short.examples}
    assert max(short.train[side].shape[1] for side in ("source", "target")) == most
    for name in ("source", "target", "text", "reference"):
        np.testing.assert_array_equal(short.test[name], whole.test[name])
    assert all((row == END).sum() == 1 for row in short.train["target"])
    turned = encode(few(), reverse=True)
    assert turned.info.languages == whole.info.languages[::-1]
    assert sorted(map(bytes, turned.test["text"])) == sorted(map(bytes, whole.test["reference"]))
    assert np.all(np.diff((whole.test["source"] != PAD).sum(1)) >= 0)
    # Subwords are of what is trained on alone.
    assert encode(hold_out(few(), 0.25)).info.model != whole.info.model


@pytest.mark.versions
def test_bleu_is_that_of_sacrebleu():
    said, meant = ["der Hund sieht ein Kind.", "ein Haus"], ["Der Hund sieht das Kind.", "ein Haus"]
    found = bleu(said, meant)
    assert next(iter(found)) == "BLEU" and len(found) == 3
    (plain,) = (name for name in found if "tok:13a" in name)
    (lower,) = (name for name in found if "tok:none" in name)
    assert re.fullmatch(r"BLEU nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:\S+", plain)
    assert "case:lc" in lower
    assert found["BLEU"] == found[plain] == corpus_bleu(said, [meant]).score
    assert found[lower] == corpus_bleu(said, [meant], lowercase=True, tokenize="none", force=True).score > found[plain]


# Runs


def tiny(*, num_classes, width=8, dropout=0.2):
    return lstm(1, num_classes=num_classes, width=width, dropout=dropout)


NEW = ((STUDENTS, "tiny", tiny), (TASKS["translation"].datasets, "made_up", few))


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        for registry, name, entry in NEW:
            patch.setitem(registry, name, entry)
        yield


FEW = (
    *("--student=tiny", "--rounds=4", "--memory=save", "--teacher=sgd", "--seeds=1", "--checkpoint_seconds=0"),
    *("--unroll_length=2", "--batch_size=4", "--validation_batch_size=6", "--beam=2"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("translation") / "run"
    assert launch(translation, *FEW, "--method=l2t_dln,l2t_dlf,cross_entropy", f"--workdir={workdir}") == 0
    return workdir


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_a_run_leaves_its_scores_its_subwords_and_examples(run):
    found = summary(run)
    assert found["metric"] == {"name": "BLEU", "unit": "", "better": "higher"}
    names = ["l2t_dln", "l2t_dln_transfer", "l2t_dlf", "l2t_dlf_transfer", "cross_entropy"]
    assert list(found["methods"]) == names
    for method in found["methods"].values():
        scores = method["scores"]
        assert method["score"] == scores["BLEU"] and 0 <= method["score"]["mean"] <= 100
        assert sum("|tok:" in name for name in scores) == 2
        assert 0 <= scores["token accuracy"]["mean"] <= 1 and scores["cross entropy"]["mean"] > 0
    data = encode(few())
    assert (run / "subwords.model").read_bytes() == data.info.model
    assert found["config"]["dataset_sha256"] == data.sha256
    said = (run / "seen.txt").read_text()
    for name in ("text", "reference"):
        assert bytes(data.test[name][0]).rstrip(b"\0").decode() in said
    assert said.count("before: ") == said.count(" l2t_dln: ") == 4
    left = finals.load(run / "final", "l2t_dln", 0)["student"]
    score = evaluate(tiny(num_classes=60), left, data.test, task_module.translation(data, beam=2))
    ours = found["methods"]["l2t_dln"]["scores"]
    for name, value in score.items():
        np.testing.assert_allclose(value, ours[name]["mean"], rtol=1e-5)
    about = finals.read_about(run / "final")["losses"]
    assert about["l2t_dlf"] == {"name": "bilinear", "knobs": {}} and about["l2t_dln"]["name"] == "dln"


def test_it_resumes_bit_for_bit(run, tmp_path):
    workdir = tmp_path / "again"
    arguments = (*FEW, "--method=l2t_dln", f"--workdir={workdir}")
    with failing_disk(lambda calls, rows: calls in (2, 5)):
        assert launch(translation, *arguments) == 1
        assert [launch(translation, *arguments, "--resume") for _ in range(2)] == [1, 0]
    for name in ("l2t_dln", "l2t_dln_transfer"):
        assert summary(workdir)["methods"][name]["scores"] == summary(run)["methods"][name]["scores"]
        ours, theirs = (jax.tree.leaves(finals.load(one / "final", name, 0)) for one in (workdir, run))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_on_two_devices_and_side_by_side_the_numbers_are_the_same(run, tmp_path):
    """Each device has another number of subwords that count, and a mean is of all of them."""
    arguments = (*FEW, "--method=l2t_dlf", f"--workdir={tmp_path / 'two'}", "--devices=2")
    execute([sys.executable, __file__, *arguments], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    both = ("--method=l2t_dlf", "--seeds=2", "--seeds_at_once=2", f"--workdir={tmp_path / 'both'}")
    assert launch(translation, *FEW, *both) == 0
    for name in ("l2t_dlf", "l2t_dlf_transfer"):
        plain, *others = (
            finals.load(at / "final", name, 0)["student"] for at in (run, tmp_path / "two", tmp_path / "both")
        )
        for other in others:
            for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("meta", [False, True])
def test_rounds_share_out_what_they_read_by_length(meta):
    """In threes, and within an epoch: what they read is what they would have read."""
    lengths = np.random.default_rng(9).integers(1, 30, 60)
    plan = Plan(9, 2, 3, 4, 0.5, 60, 1, fixed_split=meta)
    alike = dataclasses.replace(plan, lengths=lengths, buckets=3)
    per = 10**9 if meta else plan.rounds_per_epoch
    assert per == 7 or meta
    overlaps = 0
    for first in (0, 3, 6, 9 if meta else 7):
        group = [r for r in range(first, first + 3) if r // per == first // per][: 1 if first == 6 and not meta else 3]
        for part in (0, 1):
            ours = [alike.indices(5, r)[part] for r in group]
            theirs = [plan.indices(5, r)[part] for r in group]
            assert [x.shape for x in ours] == [x.shape for x in theirs]
            assert sorted(np.ravel(ours).tolist()) == sorted(np.ravel(theirs).tolist())
            spans = sorted((lengths[x].min(), lengths[x].max()) for x in ours)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
            overlaps += len(group)
    two = dataclasses.replace(alike, stages=2, unroll_length=1, validation_batch_size=2).of(1)
    np.testing.assert_array_equal(two.indices(5, 1)[0].ravel(), alike.indices(5, 1)[0].ravel())
    assert overlaps > 15 and not np.array_equal(alike.indices(5, 0)[0], alike.indices(6, 0)[0])


def test_cutting_what_is_padding_changes_nothing(tmp_path, monkeypatch):
    """A run in buckets, stopped and gone on with, ends where one ends whose rounds have the same examples, uncut."""
    arguments = (*FEW, "--method=cross_entropy", "--buckets=2")
    taken = []
    cut = task_module._cut
    monkeypatch.setattr(task_module, "_cut", lambda examples, length: taken.append(length) or cut(examples, length))
    with failing_disk(lambda calls, rows: calls == 2):
        codes = [launch(translation, *arguments, f"--workdir={tmp_path}/cut", *r) for r in ((), ("--resume",))]
    assert codes == [1, 0] and len(set(taken)) > 1
    monkeypatch.setattr("l2t_jax.runs.streaming.STEP", 1000)
    assert launch(translation, *arguments, f"--workdir={tmp_path}/whole") == 0 and taken[-1] == 1000
    ours, theirs = (
        jax.tree.leaves(finals.load(tmp_path / name / "final", "cross_entropy", 0)) for name in ("cut", "whole")
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


REFUSED = {
    "ala": "it is of examples that are classified, and this task's rows are parts of them",
    "large_margin_softmax": "this loss reads 'head', and the task offers rows",
    "sum_of_terms": "this loss reads 'terms', and the task offers rows",
}


# Those with parts of their own that read rows; that losses do is shown for pixels.
OF_ROWS = ("slf", "meta_weight_net", "l2rw", "mentornet")


@pytest.mark.parametrize(
    ("name", "classes"),
    [*((name, "few") for name in (*OF_ROWS, *REFUSED)), *((name, "many") for name in ("l2t_dlf", "bilinear"))],
)
def test_methods_run_on_tokens_or_say_that_they_do_not(name, classes, monkeypatch):
    if classes == "many":
        monkeypatch.setattr("l2t_jax.methods.parts.MANY_CLASSES", 20)
    settings = settings_for(TASKS["translation"], PRESETS["stable"])
    settings = dataclasses.replace(settings, unroll_length=2, batch_size=4, validation_batch_size=3)
    config = Config(
        dataset="made_up", student="tiny", methods=(name,), preset="stable", teacher="sgd", rounds=1, memory="save",
        seeds=(0,), task="translation", settings=settings,
    )  # fmt: skip
    if name in REFUSED:
        with pytest.raises(UsageError, match=f"^--method={name}: {REFUSED[name]}"):
            build_setting(config, Options(workdir=""), few())
        return
    setting, entries = build_setting(config, Options(workdir=""), few())
    task, plan, method = setting.parts.task, setting.parts.plan.of(entries[0].method.stages), entries[0].method
    which, data = plan.indices(0, 0), jax.tree.map(jnp.asarray, setting.dataset.train)
    state = jax.eval_shape(method.init, jax.random.key(0), setting.inputs)

    def one_round(state):
        keys = [jax.random.split(jax.random.key(0), x.shape) for x in which]
        batches = (task.gather(data, jnp.asarray(x), k) for x, k in zip(which, keys, strict=True))
        return method.round(state, RoundBatches(*batches, jnp.array(True)))

    after, metrics = jax.eval_shape(one_round, state)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert {"validation_error", "validation_token_accuracy", "finite"} <= metrics.keys()
    if name == "l2t_dlf":
        assert ("left" in state.loss) == (classes == "many") and MANY_CLASSES >= 100


# What is refused


def refused(capsys, *arguments):
    """The one line that a command says."""
    capsys.readouterr()
    code = launch(translation, *FEW, "--method=cross_entropy", *arguments)
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "Traceback" not in said, said
    return last


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--vocabulary=5000",), r"--vocabulary=5000: .* fewer than 5000 subwords: give a vocabulary of at most \d+\."),
        (("--vocabulary=3",), "--vocabulary=3: .*give at least 5"),
        (("--max_length=1",), "--max_length=1"),
        (("--max_length=4",), "--max_length=4: no training pair of made_up is so short"),
        (("--beam=0",), "--beam=0"),
        (("--length_penalty=nan",), "--length_penalty=nan"),
        (("--student=lenet",), "Students of --task=translation are like transformer_small"),
        (("--student=transformer_small", "--heads=3"), "width=128 with heads=3"),
        (("--student=lstm1", "--dropout=1"), "dropout=1.0 is no probability"),
        (("--crop=97",), "--crop=97 is of classification | segmentation, not of --task=translation"),
        (("--labels=x.npy",), "--labels=x.npy: it is of classes of examples, and made_up has none."),
        (("--dataset=/nowhere/x",), "/nowhere/x is no folder"),
        (("--dataset=multi30k_de_en", "--data_dir=/nowhere"), "multi30k_de_en is not in /nowhere"),
    ],
)
def test_flags_that_are_refused(options, told, tmp_path, capsys):
    line = refused(capsys, *options, f"--workdir={tmp_path}/r")
    assert re.search(told, line), line


def aligned(folder, **changes):
    """A folder as fairseq's preparation leaves it, from German."""
    folder.mkdir(exist_ok=True)
    made = made_pairs(30, 5)
    for name, part in (("train", made.train), ("test", made.test)):
        for language, side in (("en", "target"), ("de", "source")):
            text = "".join(f"{line.decode()}\n" for line in part[side])
            (folder / f"{name}.{language}").write_text(changes.get(f"{name}_{language}", text))
    return folder


def test_a_folder_is_read(tmp_path):
    folder = aligned(tmp_path / "iwslt14.tokenized.de-en")
    found, made = read_pairs(folder), made_pairs(30, 5)
    assert found.languages == ("de", "en")
    for part in ("train", "test"):
        for side in ("source", "target"):
            assert getattr(found, part)[side].tolist() == getattr(made, part)[side].tolist()
    folder = aligned(tmp_path / "x.en-de", train_en="ein@@ es ta@@ ges\n" + "a\n" * 29)
    found = read_pairs(folder)
    assert found.languages == ("en", "de") and found.train["source"][0] == b"eines tages"
    (folder / "test.de").rename(folder / "valid.de")
    (folder / "test.en").rename(folder / "valid.en")
    assert len(read_pairs(folder).test["source"]) == 5


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "train.en").write_text("a\n\nb\n"), "train.en, line 2 is empty"),
        (lambda f: (f / "test.en").write_text("a\n"), "test.de has 5 lines and .*test.en 1: line i of one"),
        (lambda f: (f / "test.en").unlink(), "test.en is not there"),
        (lambda f: (f / "train.en").unlink(), "has train.de: expected two, one of each language"),
        (lambda f: [p.unlink() for p in f.glob("test.*")], r"has no train\.de and|has no test|no train|has no"),
        (lambda f: (f / "train.de").write_bytes(b"\xff\xfe\n" * 30), "train.de is not UTF-8"),
        (lambda f: (f / "test.de").write_text(""), "test.de holds no line"),
    ],
)
def test_folders_that_are_refused(spoil, told, tmp_path, capsys):
    folder = aligned(tmp_path / "pairs")
    spoil(folder)
    line = refused(capsys, f"--dataset={folder}", "--vocabulary=60", f"--workdir={tmp_path}/r")
    assert re.search(told, line), line


@pytest.mark.parametrize("missing", ["sentencepiece", "sacrebleu"])
def test_a_library_that_is_missing_is_named(missing, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert f"pip install {missing}" in refused(capsys, f"--workdir={tmp_path}/r")


def test_views_are_of_translators():
    with pytest.raises(ValueError, match="put out logits"):
        tokens(jnp.zeros((2, 3)), jnp.zeros((2, 4), jnp.int32))
    assert isinstance(some(np.random.default_rng(0), 2), Batch)


if __name__ == "__main__":
    for registry, name, entry in NEW:
        registry[name] = entry
    start(translation.main)
