"""A run that goes on as more than it was is the run that was begun so: more rounds, more seeds, more methods."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from launching import failing_disk, launch
from test_experiments import last_checkpoints, numbers

from experiments import _flags, classification, noisy_labels
from l2t_jax import train
from l2t_jax.methods import build_method, knobs_read, method_names
from l2t_jax.methods.parts import Parts
from l2t_jax.runs import checkpoints, growth, records, reporting, setting, training
from l2t_jax.runs.records import Metrics, WorkdirError, load_arrays
from l2t_jax.tasks import load
from l2t_jax.types import RoundBatches

pytestmark = pytest.mark.usefixtures("small_lstm")
SMALL = ("--unroll_length=2", "--width=8", "--checkpoint_seconds=0", "--memory=save")
SMALL += ("--preset=residual",)  # whose schedules are constant
SHORT, LONG = "--rounds=5", "--rounds=9"  # an epoch of the digits has 7


def run(workdir, *flags, module=classification, code=0, pictures=False):
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr(reporting, "draw", lambda *_: None)
        assert launch(module, *SMALL, *flags, f"--workdir={workdir}") == code


def assert_same(workdir, whole):
    """All that decides a result or is one, bit for bit."""
    assert numbers(workdir) == numbers(whole)
    assert last_checkpoints(workdir) == last_checkpoints(whole)
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for folder in ("final", "teachers"):
        names = {path.name for path in (whole / folder).glob("*.npz")}
        assert {path.name for path in (workdir / folder).glob("*.npz")} == names
        for name in names:
            mine, its = load_arrays(workdir / folder / name), load_arrays(whole / folder / name)
            assert mine.keys() == its.keys() and all(np.array_equal(mine[k], its[k]) for k in its), name


@pytest.fixture(scope="module")
def written():
    """The rows that were written, by (method, seed): of each the rounds in the order in which they were computed."""
    rounds, append = {}, Metrics.append

    def noting(self, rows):
        append(self, rows)
        for row in rows if self.path.name == "metrics.jsonl" else ():
            rounds.setdefault((row["method"], row["seed"]), []).append(row["round"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "append", noting)
        yield rounds


@pytest.fixture
def computed(written):
    written.clear()
    return written


METHOD = "--method=l2t_dln,focal"
# Parts divided anew in every epoch; a clean part that stays apart.
KINDS = {"epochs": (classification, ()), "clean part": (noisy_labels, ("--noise_ratio=0.4",))}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory, written):
    """The module and its flags; a run that was short, and one that was long from the start."""
    module, flags = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    for name, rounds in (("short", SHORT), ("long", LONG)):
        run(root / name, *flags, METHOD, "--seeds=2", rounds, module=module)
    return module, (*flags, METHOD, "--seeds=2"), root


def test_a_longer_run_is_one_that_was_longer(kind, tmp_path, computed, capsys):
    module, flags, root = kind
    shutil.copytree(root / "short", tmp_path / "run")
    run(tmp_path / "run", *flags, LONG, "--resume", module=module)
    assert_same(tmp_path / "run", root / "long")
    said = capsys.readouterr().err
    assert "going on with what is there: 9 rounds in place of 5" in said
    assert "l2t_dln_transfer, seed 1 begins anew: the teacher that it takes over has learned more" in said
    goes_on, anew = list(range(5, 9)), list(range(9))
    rounds = {"l2t_dln": goes_on, "l2t_dln_transfer": anew, "focal": goes_on}
    assert computed == {(name, seed): of for name, of in rounds.items() for seed in (0, 1)}
    before, after = (json.loads((at / "config.json").read_text()) for at in (root / "short", tmp_path / "run"))
    assert after["config"] == json.loads((root / "long" / "config.json").read_text())["config"]
    assert [after[name] for name in ("environment", "command")] == [before[n] for n in ("environment", "command")]
    assert [resumed["was"] for resumed in after["resumed"]] == [{"rounds": 5}]
    # A picture is of one run: of the first student that the frozen teacher had, nothing is left.
    snapshots = {path.name for path in (tmp_path / "run/snapshots/l2t_dln_transfer/seed_0").iterdir()}
    assert snapshots == {path.name for path in (root / "long/snapshots/l2t_dln_transfer/seed_0").iterdir()}
    run(tmp_path / "run", *flags, LONG, "--resume", module=module)  # and again there is nothing to do
    assert_same(tmp_path / "run", root / "long")


@pytest.fixture(scope="module")
def brief(tmp_path_factory, written):
    """The directory of a run that was short, and of one that was long from the start, of L2T-DLN alone."""
    root = tmp_path_factory.mktemp("brief")
    for name, rounds in (("short", "--rounds=2"), ("long", "--rounds=4")):
        run(root / name, "--method=l2t_dln", "--seeds=1", rounds)
    return root


@pytest.mark.parametrize("part", ["l2t_dln", "l2t_dln_transfer"])
def test_an_interrupted_run_goes_on_for_longer(brief, tmp_path, part, monkeypatch):
    """Interrupted in the shorter run, and then in the longer one, in the same row of the table."""
    monkeypatch.setattr(training, "_wanted", lambda durations: 1)
    flags = ("--method=l2t_dln", "--seeds=1")
    for resume, rounds, last in (((), "--rounds=2", 0), (("--resume",), "--rounds=4", 2)):
        with failing_disk(lambda _, rows, last=last: (rows[-1]["method"], rows[-1]["round"]) == (part, last)):
            run(tmp_path / "run", *flags, rounds, *resume, code=1)
        # A teacher that has not learned to the end is not there to be taken.
        assert (tmp_path / "run/teachers/l2t_dln_seed_0.npz").exists() == (part != "l2t_dln")
    run(tmp_path / "run", *flags, "--rounds=4", "--resume")
    assert_same(tmp_path / "run", brief / "long")


# What is written between the run of 2 rounds and the last line of the longer one: where, and the how-manieth time.
WRITES = {
    "config": (records, "write_json", 1),
    "rows of metrics": (Metrics, "truncate", 1),
    "teacher": (setting.Path, "unlink", 1),
    "checkpoint of transfer": (checkpoints.shutil, "rmtree", 1),
    "last checkpoint of transfer": (checkpoints.shutil, "rmtree", 2),
    "rows of transfer": (Metrics, "truncate", 3),
    "observations of transfer": (Metrics, "truncate", 4),
    "order of rows": (Metrics, "sort", 1),
}


@pytest.mark.parametrize("what", WRITES)
def test_killed_after_any_write_the_same_command_goes_on(brief, tmp_path, what):
    shutil.copytree(brief / "short", tmp_path / "run")
    (place, name, nth), calls = WRITES[what], []
    real = getattr(place, name)

    def killed(*arguments, **given):
        real(*arguments, **given)
        calls.append(arguments)
        if len(calls) == nth:
            raise KeyboardInterrupt

    flags = ("--method=l2t_dln", "--seeds=1", "--rounds=4", "--resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, killed)
        run(tmp_path / "run", *flags, code=130)
    if what == "teacher":  # that of 2 rounds is no longer there, nor yet that of 4
        assert not list((tmp_path / "run/teachers").iterdir())
    run(tmp_path / "run", *flags)
    assert_same(tmp_path / "run", brief / "long")


def test_a_teacher_that_does_not_learn_needs_no_new_student(tmp_path, computed):
    """Adam has no parameters: the frozen one is the same however long the other was trained."""
    flags = ("--method=l2t_dln", "--teacher=adam", "--seeds=1", "--teacher_schedule=cosine")
    for name, rounds in (("run", "--rounds=2"), ("whole", "--rounds=4"), ("run", "--rounds=4")):
        computed.clear()
        run(tmp_path / name, *flags, rounds, "--resume")
    assert computed == {("l2t_dln", 0): [2, 3], ("l2t_dln_transfer", 0): [2, 3]}
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_seeds_and_methods_are_added(tmp_path, computed):
    """In front, between and behind: what is there stays, the rest is computed, and the order is that of the flags."""
    noise = ("--noise_ratio=0.4", "--rounds=2")
    less, more = ("--method=l2t_dln", "--seeds=4,1"), ("--method=focal,l2t_dln,mae", "--seeds=0,1,4")
    run(tmp_path / "whole", *noise, *more, "--set=focal.gamma=1", module=noisy_labels, pictures=True)
    run(tmp_path / "run", *noise, *less, module=noisy_labels)
    kept = {path: path.read_bytes() for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file()}
    computed.clear()
    run(tmp_path / "run", *noise, *more, "--set=focal.gamma=1", "--resume", module=noisy_labels, pictures=True)
    assert_same(tmp_path / "run", tmp_path / "whole")
    for name in ("observations.jsonl", "examples.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert list(numbers(tmp_path / "run")["methods"]) == ["focal", "l2t_dln", "l2t_dln_transfer", "mae"]
    taught = {(name, 0) for name in ("l2t_dln", "l2t_dln_transfer")}
    assert computed.keys() == taught | {(name, seed) for name in ("focal", "mae") for seed in (0, 1, 4)}
    assert {path: path.read_bytes() for path in kept} == kept
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert [resumed["was"] for resumed in record["resumed"]] == [{"methods": ["l2t_dln"], "seeds": [4, 1]}]
    pictures = [
        {path.name: path.read_bytes() for path in (tmp_path / at / "plots").iterdir()} for at in ("run", "whole")
    ]
    assert pictures[0] == pictures[1] and "surfaces_l2t_dln_seed_0.png" in pictures[0]


def test_all_at_once_and_by_epochs(tmp_path, computed):
    """A seed that was short and one that is new go on together; --epochs says how long a run is as --rounds does."""
    run(tmp_path / "whole", "--method=focal", "--rounds=14", "--seeds=2")
    run(tmp_path / "run", "--method=focal", "--rounds=3", "--seeds=1")
    computed.clear()
    run(tmp_path / "run", "--method=focal", "--epochs=2", "--seeds=2", "--resume")
    assert computed == {("focal", 0): list(range(3, 14)), ("focal", 1): list(range(14))}
    run(tmp_path / "run", "--method=focal", "--rounds=14", "--seeds=2", "--resume")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_student_that_fails_in_the_longer_part_leaves_nothing_of_the_shorter(tmp_path, monkeypatch):
    run(tmp_path / "run", "--method=l2t_dln", "--rounds=2", "--seeds=1")
    assert list((tmp_path / "run/final").glob("*.npz")) and list((tmp_path / "run/teachers").glob("*.npz"))
    real = training._rows

    def rows(run, plan, done, metrics, count):
        found, failure = real(run, plan, done, metrics, count)
        return found, training.Failure(done, "student", "w") if done >= 2 else failure

    monkeypatch.setattr(training, "_rows", rows)
    run(tmp_path / "run", "--method=l2t_dln", "--rounds=4", "--seeds=1", "--resume", code=1)
    assert not list((tmp_path / "run/final").glob("*.npz")) and not list((tmp_path / "run/teachers").glob("*.npz"))


def test_from_python(tmp_path):
    given = {"student_knobs": {"width": 8}, "preset": "residual", "unroll_length": 2, "memory": "save"}
    whole = train("focal", "digits", rounds=4, seeds=2, workdir=tmp_path / "whole", **given)
    train("focal", "digits", rounds=2, seeds=1, workdir=tmp_path / "run", **given)
    with pytest.raises(WorkdirError, match=r"\(asked: 4 rounds in place of 2, new seeds 1\): pass --resume"):
        train("focal", "digits", rounds=4, seeds=2, workdir=tmp_path / "run", **given)
    longer = train("focal", "digits", rounds=4, seeds=2, workdir=tmp_path / "run", resume=True, **given)
    assert longer.scores == whole.scores and longer.summary["config"]["rounds"] == 4
    for mine, its in zip(*(jax.tree.leaves([s.student for s in r.states]) for r in (longer, whole)), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_a_run_of_before_a_choice_was_there_goes_on(tmp_path, computed):
    """As it was then, it is what the default is now."""
    run(tmp_path, "--method=mae", SHORT, "--seeds=1")
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("compute_dtype", "micro_batches", "knobs"):
        del config["config"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    computed.clear()
    run(tmp_path, "--method=mae", SHORT, "--seeds=1", "--resume")
    assert computed == {}
    assert launch(classification, *SMALL, "--method=mae", SHORT, "--seeds=1", f"--workdir={tmp_path}") == 2


# What is refused


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("there") / "run"
    run(workdir, "--method=focal,mae", "--rounds=2", "--seeds=4,", "--set=focal.gamma=1")
    return workdir


ASKED = {
    "--rounds=1": "holds a run of 2 rounds, which cannot be made shorter: give --rounds=2, or choose another --workdir",
    "--seeds=3,5": "holds seeds 4, of which none can be left out: give --seeds=4,3,5, or choose another --workdir.",
    "--method=focal,cross_entropy": "holds methods focal, mae, of which none can be left out: give "
    "--method=focal,mae,cross_entropy, or choose another --workdir.",
    "--method=mae --set=": "holds methods focal, mae, of which none can be left out: give --method=focal,mae, or",
    "--set=focal.gamma=3": "holds another run (knobs.focal.gamma: there 1.0, asked 3.0): choose another --workdir.",
    "--student_lr=0.5 --rounds=4": "holds another run (settings.student_lr: there 0.1, asked 0.5): choose another",
    "--student_lr=0.5 --rounds=1": "holds another run (settings.student_lr: there 0.1, asked 0.5): choose another",
}


@pytest.mark.parametrize("flags", ASKED)
def test_what_a_run_cannot_become_is_one_line(there, flags, capsys):
    before = (there / "config.json").read_bytes()
    given = (*SMALL, "--method=focal,mae", "--rounds=2", "--seeds=4,", "--set=focal.gamma=1")
    assert launch(classification, *given, *flags.split(), f"--workdir={there}", "--resume") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {there} ") and said.count("\n") == 1 and ASKED[flags] in said
    assert (there / "config.json").read_bytes() == before


def test_a_schedule_is_refused_with_what_to_do(tmp_path, capsys):
    flags = ("--unroll_length=2", "--width=8", "--memory=save", "--method=mae", "--seeds=1", f"--workdir={tmp_path}")
    assert launch(classification, *flags, "--rounds=2") == 0
    capsys.readouterr()
    assert launch(classification, *flags, "--rounds=3", "--resume") == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} holds a run of 2 rounds, and its length decides student_schedule=cosine: start anew in "
        "another --workdir with --rounds=3; one with --set=student_schedule=constant may go on for longer.\n"
    )
    assert launch(classification, *flags, "--rounds=2", "--seeds=2", "--resume") == 0  # which no schedule forbids


def built(rounds, *flags):
    """The setting and the entries that flags describe, and the config that the record of such a run has."""
    with flagsaver.flagsaver():
        _flags.parse_arguments(["classification.py", "--unroll_length=2", "--width=8", "--memory=save", *flags])
        _flags.FLAGS.rounds = rounds
        config, options = _flags.resolve("classification")
    found, entries = setting.build_setting(config, options, load("digits"))
    asked = json.loads(json.dumps(records._plain({**vars(config), "settings": vars(config.settings), "taught_by": {}})))
    return found, entries, asked


CASES = {  # flags -> what the length of the run decides
    "--set=student_schedule=constant,teacher_schedule=constant": None,
    "--preset=residual --method=l2t_dln,ml3,adalfl,meta_weight_net,cross_entropy": None,
    "--preset=residual --method=l2t_dln,mae --teacher=sgd --teacher_schedule=cosine": None,  # SGD learns nothing
    "--preset=stable": "student_schedule=cosine, teacher_schedule=cosine of l2t_dln: start anew in another --workdir "
    "with --rounds=9; one with --set=student_schedule=constant,teacher_schedule=constant may go on for longer.",
    "--preset=residual --teacher_schedule=inverse_sqrt": "teacher_schedule=inverse_sqrt of l2t_dln: start",
    "--preset=residual --set=lives=2": "the lives of l2t_dln: start anew in another --workdir with --rounds=9.",
    "--preset=residual --method=mae,early_stopped": "the last round of early_stopped: start",
    "--preset=residual --method=large_margin_softmax": "the schedule of large_margin_softmax: start",
    "--preset=residual --method=smooth_zero_one,mentornet": "the schedule of smooth_zero_one, the curriculum of mentor",
    "--preset=residual --method=slf,mentornet_data_driven": "the temperature of slf, the curriculum of mentornet_data",
    "--preset=residual --method=ala,l2t_dlf": "the feature t / T of ala, the feature t / T of l2t_dlf: start",
}


@pytest.mark.parametrize("flags", CASES)
def test_what_the_length_decides_is_told(flags):
    setting, entries, asked = built(9, *flags.split())
    for rounds in (5, 9):
        found = growth.growth_of(setting, entries)(asked | {"rounds": rounds}, asked)
        told = CASES[flags] if rounds == 5 else None
        assert (found.refusal is None) == (told is None) and (told or "") in (found.refusal or ""), found.refusal
        assert found.config == asked


def test_a_new_method_may_have_a_schedule():
    setting, entries, asked = built(9, "--preset=residual", "--method=mae,mentornet")
    found = growth.growth_of(setting, entries)(asked | {"rounds": 5, "methods": ["mae"]}, asked)
    assert found.refusal is None and found.news == ("9 rounds in place of 5", "new methods mentornet")


def program(method, rounds, *flags):
    """A round as it is traced: its program, and the arrays that this closes over."""
    setting, (entry, *_), _ = built(rounds, f"--method={method}", *flags)
    task, plan = setting.parts.task, setting.parts.plan.of(entry.method.stages)
    data = jax.tree.map(jax.numpy.asarray, setting.dataset.train)

    def one(state, train, validation, first):
        return entry.method.round(
            state, RoundBatches(*(task.gather(data, x, None) for x in (train, validation)), first)
        )

    state = jax.eval_shape(entry.method.init, jax.random.key(0), setting.inputs)
    traced = jax.make_jaxpr(one)(state, *plan.indices(0, 0), True)
    return re.sub("0x[0-9a-f]+", "", str(traced)), [np.asarray(x).tobytes() for x in traced.consts], entry.method


@pytest.mark.parametrize("method", method_names(view="rows"))
def test_only_what_says_so_depends_on_the_length(method):
    """The program of a round is the same whatever the length, or the method says why it is not."""
    *short, said = program(method, 5, "--preset=residual")
    *long, again = program(method, 9, "--preset=residual")
    assert said.of_length == again.of_length
    assert (short == long) == (said.of_length == "")


@pytest.mark.parametrize("flags", ["--teacher_schedule=cosine", "--set=lives=2", "--teacher_schedule=inverse_sqrt"])
def test_so_does_what_flags_make_of_the_teacher(flags):
    (*short, said), (*long, _) = (program("l2t_dln", rounds, "--preset=residual", flags) for rounds in (5, 99))
    assert short != long and said.of_length


@pytest.mark.parametrize("name", method_names(view="rows"))
def test_knobs_that_a_method_reads_are_known(name):
    """Else a knob that comes with a new method could change one that is there."""
    read = set()

    class Noting(Parts):
        def knobs_of(self, name):
            read.add(name)
            return super().knobs_of(name)

    parts = built(5, "--preset=residual")[0].parts._replace(loss="ml3")
    build_method(name, Noting(*parts))
    assert read <= knobs_read(name, parts)


def test_a_knob_of_a_new_method_that_another_reads_is_refused():
    setting, entries, asked = built(5, "--preset=residual", "--method=bilinear,l2t_dlf", "--set=l2t_dlf.rank=2")
    found = growth.growth_of(setting, entries)(asked | {"methods": ["bilinear"], "knobs": {}}, asked)
    assert found.config["knobs"] == {} != asked["knobs"]
    found = growth.growth_of(setting, entries)(asked | {"methods": ["mae"], "knobs": {}}, asked)
    assert found.config == asked | {"methods": asked["methods"]}


def test_teachers_of_another_run_are_added_with_their_seeds_only():
    _, entries, asked = built(5, "--preset=residual", "--method=l2t_dln", "--seeds=2")
    setting = built(5, "--preset=residual", "--method=l2t_dln", "--seeds=2")[0]
    taught = {"l2t_dln, seed 0": "a", "l2t_dln, seed 1": "b"}
    grow = growth.growth_of(setting, entries)
    one = asked | {"seeds": [0]}
    assert (
        grow(one | {"taught_by": {"l2t_dln, seed 0": "a"}}, asked | {"taught_by": taught}).config["taught_by"] == taught
    )
    # Here the first seed taught itself.
    assert grow(one, asked | {"taught_by": taught}).config["taught_by"] == {"l2t_dln, seed 1": "b"}


def test_a_config_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"rounds": 2}}')
    with pytest.raises(WorkdirError, match="holds another run") as error:
        train("mae", "digits", rounds=4, workdir=tmp_path, resume=True)
    assert "\n" not in str(error.value)
