"""Run methods over seeds and keep everything in a run directory: what every experiment shares."""

import dataclasses
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from l2t_jax.data.noise import wrong_share
from l2t_jax.methods import TAUGHT
from l2t_jax.runs import trained_teachers
from l2t_jax.runs.checkpoints import Checkpoints
from l2t_jax.runs.growth import growth_of
from l2t_jax.runs.hooks import Hooks, told_by
from l2t_jax.runs.observing import Observer
from l2t_jax.runs.parallel import Program, is_leader, leader_first
from l2t_jax.runs.progress import RunProgress, logged
from l2t_jax.runs.records import RunDirectory, open_run, save_arrays
from l2t_jax.runs.reporting import Outcomes, reason, report
from l2t_jax.runs.setting import FRESH, TRANSFER, Entry, Setting, first_state
from l2t_jax.runs.streaming import Buckets, Stream
from l2t_jax.runs.training import Run, compile_rounds, train
from l2t_jax.tasks.reading import held
from l2t_jax.types import MethodState, PyTree, Student, Task

OBSERVATIONS = 40  # moments of a run at which examples with wrong labels are looked at, beside its start


class Stop:
    """A wish to stop, said by SIGINT or SIGTERM: the rounds under way are finished and saved; said twice, at once."""

    def __init__(self, report: Callable[[str], None]) -> None:
        """Take what shows a line."""
        self._report = report
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether it was said."""
        return self._asked

    def __enter__(self) -> "Stop":
        """Listen."""
        if threading.current_thread() is threading.main_thread():  # Python lets no other listen
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._report(f"{signal.Signals(number).name}: finishing and saving these rounds; once more stops at once")


# looks at a state: (seed, rounds done, state) -> a row of observations.jsonl
Instrument = Callable[[int, int, PyTree], dict[str, float]]


class Leader(NamedTuple):
    """What the leader keeps of a run and whom it tells; other processes have none."""

    directory: RunDirectory
    hooks: Hooks


def watch_labels(setting: Setting, entry: Entry) -> Instrument | None:
    """What is made of wrong labels, where there are any."""
    return Observer(setting, entry.method) if "true" in setting.dataset.train else None


def run_entries(
    setting: Setting,
    entries: list[Entry],
    *,
    alone: bool = True,
    instruments: Callable[[Setting, Entry], Instrument | None] = watch_labels,
) -> int:
    """`train_entries`, for a command. Returns the exit code: 0, or 1 where any seed of any entry stopped early."""
    outcomes, _ = train_entries(setting, entries, alone=alone, instruments=instruments)
    return int(any(reason(outcome) for outcome in outcomes.values()))


def train_entries(
    setting: Setting,
    entries: list[Entry],
    *,
    alone: bool = True,
    quiet: bool = False,
    table: bool = True,
    instruments: Callable[[Setting, Entry], Instrument | None] = watch_labels,
) -> tuple[Outcomes, dict[str, Any]]:
    """Train every entry for every seed, evaluate on the test set once, write the records, print progress and the table.

    summary.json is a record that stands for itself: results, and what config.json holds.

    Args:
      setting, entries: of `build_setting`.
      alone: False where this is a cell of a table, which has plots and tables of its own.
      quiet: nothing is printed.
      table: False where the caller shows the results.
      instruments: what looks at the states of an entry while it is trained.
    Returns:
      how each seed of each entry ended, and what summary.json holds ({} in a process that is not the leader).
    Raises:
      StoppedError: SIGINT or SIGTERM was received; all that was computed is saved.
    """
    config, options = setting.config, setting.options
    taught = _taught_elsewhere(setting, entries)
    record = dataclasses.asdict(config) | {
        "rounds": setting.parts.plan.rounds,
        "dataset_sha256": setting.dataset.sha256,
        "meta": setting.dataset.meta,
        "wrong_labels": wrong_share(setting.dataset),
        **_counts(setting),
        **_of_classes(setting),
        "taught_by": {
            f"{name}, seed {seed}": trained_teachers.digest(options.teacher_from or "", name, seed)
            for name, seed in taught
        },
    }
    grow = growth_of(setting, entries)
    rounds = {(entry.name, seed): setting.rounds_of(entry) for entry in entries for seed in config.seeds}
    at_once = min(setting.layout.runs, len(config.seeds))
    progress = RunProgress(rounds, at_once=at_once, quiet=quiet or not is_leader())

    def begin() -> Leader:
        told = told_by(options)  # first, as nothing is left of a run that is refused
        directory = open_run(options.workdir, record, options.resume, options.command, grow)
        return Leader(directory, Hooks(told, directory, warnings.warn if quiet else progress.line))

    leader = leader_first(begin)
    if leader is not None:
        for name, content in getattr(setting.dataset.info, "files", {}).items():
            (leader.directory.path / name).write_bytes(content)
    outcomes: Outcomes = {}
    with progress, logged(progress.line), Stop(progress.line) as stop:
        progress.line(f"{config.dataset}, {config.student}, preset {config.preset}; files go to {options.workdir}")
        if leader is not None and leader.directory.news:
            progress.line(f"going on with what is there: {', '.join(leader.directory.news)}")
        for part, counts in _counts(setting).get("counts", {}).items():
            progress.line(f"{part}: {', '.join(f'{count} {why}' for why, count in counts.items())}".replace("_", " "))
        for classes in _of_classes(setting).values():
            progress.line(f"training examples of each class: {', '.join(map(str, classes))}")
        for entry in entries:
            watched = instruments(setting, entry) if leader is not None else None
            outcomes |= _train_entry(setting, entry, leader, progress, taught, outcomes, stop, watched)
    if leader is None:
        return outcomes, {}
    # What was added to a run stands where it would in one that began so.
    place = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in rounds))}
    order = {seed: i for i, seed in enumerate(config.seeds)}
    for rows in (leader.directory.metrics, leader.directory.observations):
        rows.sort(lambda row: (place[row["method"]], order[row["seed"]], row["round"]))
    summary = report(setting, entries, outcomes, leader.directory, alone=alone, quiet=quiet or not table)
    leader.hooks.end()
    return outcomes, summary


def _of_classes(setting: Setting) -> dict[str, list[int]]:
    """How many training examples each class has, the clean ones not counted, where they were made rare."""
    if setting.config.imbalance == 1:
        return {}
    dataset = setting.dataset
    labels = dataset.train.get("true", dataset.train["labels"])[: dataset.examples - dataset.meta]
    return {"examples_of_class": np.bincount(labels, minlength=dataset.info.num_classes).tolist()}


def _counts(setting: Setting) -> dict[str, dict[str, dict[str, int]]]:
    """What the reader of a data set left out or changed, where it says so: {"counts": part -> why -> how often}."""
    counts = getattr(setting.dataset.info, "counts", {})
    told = {part: {why: n for why, n in of.items() if n} for part, of in counts.items()}
    told = {part: of for part, of in told.items() if of}
    return {"counts": told} if told else {}


def _train_entry(
    setting: Setting,
    entry: Entry,
    leader: Leader | None,
    progress: RunProgress,
    taught: dict[tuple[str, int], PyTree],
    earlier: Outcomes,
    stop: Stop,
    instrument: Instrument | None,
) -> Outcomes:
    """Train one entry for every seed; an outcome is a string where the run could not even begin."""
    program = compile_rounds(entry.method, setting.parts.task, setting.layout)
    task, student, examples = setting.parts.task, setting.parts.student, setting.dataset.train
    data = _data(task, student, examples, program)
    plan = dataclasses.replace(setting.parts.plan.of(entry.method.stages), rounds=setting.rounds_of(entry))
    outcomes: Outcomes = {}
    ready = []
    for seed in setting.config.seeds:
        teacher = entry.teacher_of and (entry.teacher_of, seed)
        if teacher and teacher not in taught:
            online = earlier[teacher]
            if isinstance(online, str) or reason(online):
                outcomes[(entry.name, seed)] = f"there is no trained teacher, since {entry.teacher_of} stopped early"
                progress.end(entry.name, seed)
                continue
            taught[teacher] = online.state.teacher
        ready.append((seed, taught[teacher] if teacher else None))
    try:
        for first in range(0, len(ready), setting.layout.runs):
            members = ready[first : first + setting.layout.runs]
            runs = [
                _run(setting, entry, seed, _initial(setting, entry, seed, teacher), leader, progress, instrument)
                for seed, teacher in members
            ]
            trained = train(runs, plan, program, data, stop)
            for run, outcome in zip(runs, trained, strict=True):
                if run.checkpoints is not None:
                    run.checkpoints.close()
                if leader is not None and entry.name in TAUGHT and outcome.failure is None:
                    trained_teachers.save(leader.directory.path, entry.name, run.seed, outcome.state.teacher)
                if outcome.failure is not None:
                    progress.line(
                        f"{run.name}, seed {run.seed} stopped at {outcome.failure}; its last good checkpoint is kept"
                    )
                    progress.end(run.name, run.seed)
                outcomes[(run.name, run.seed)] = outcome
    finally:
        if isinstance(data, (Stream, Buckets)):
            data.close()
    return outcomes


def _data(task: Task, student: Student, examples: PyTree, program: Program) -> Any:
    """The training examples as `train` takes them."""
    if task.read or task.lengths:
        return (Stream if task.read else Buckets)(task, student, examples, program)
    return program.data(held(student, examples))


def _taught_elsewhere(setting: Setting, entries: list[Entry]) -> dict[tuple[str, int], PyTree]:
    """The teachers of --teacher_from, by method and seed."""
    source = setting.options.teacher_from
    found: dict[tuple[str, int], PyTree] = {}
    if source is None:
        return found
    trained_teachers.check(source, setting.config)
    for entry in entries:
        if entry.teacher_of is not None:
            state = jax.eval_shape(entry.method.init, jax.random.key(0), setting.inputs)
            for seed in setting.config.seeds:
                found[(entry.teacher_of, seed)] = trained_teachers.load(source, entry.teacher_of, seed, state.teacher)
    return found


def _initial(setting: Setting, entry: Entry, seed: int, teacher: PyTree | None) -> MethodState:
    """The state at round 0, with the trained teacher where one is taken over."""
    stream = FRESH if entry.teacher_of is None else TRANSFER
    state = first_state(entry.method, seed, setting.inputs, stream)
    return state if teacher is None else state._replace(teacher=teacher)


def _run(
    setting: Setting,
    entry: Entry,
    seed: int,
    state: MethodState,
    leader: Leader | None,
    progress: RunProgress,
    instrument: Instrument | None,
) -> Run:
    """One run and where it is kept: nowhere in a process that is not the leader."""
    name, rounds, life = entry.name, setting.rounds_of(entry), setting.parts.plan.rounds
    # As in Figure 3: start, 20 %, 50 %, end; of several lives those of the last.
    moments = {0, *(rounds - life + done for done in (life // 5, life // 2, life))}
    observed = {round(rounds * i / OBSERVATIONS) for i in range(OBSERVATIONS + 1)} if instrument else set()
    directory = leader and leader.directory

    def snapshot(done: int, state: MethodState) -> None:
        if directory is None:
            return
        if done in moments and jax.tree.leaves(state.loss):
            folder = directory.snapshots_dir / name / f"seed_{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            save_arrays(folder / f"round_{done:06d}.npz", state.loss)
        if instrument and done in observed:
            row = {"method": name, "seed": seed, "round": done, **instrument(seed, done, state)}
            directory.observations.append([row])

    def write(rows: list[dict[str, Any]]) -> None:
        if leader is not None:
            leader.directory.metrics.append(rows)
            leader.hooks.rows(rows)

    def forget(done: int) -> None:
        if leader is None:
            return
        mine = lambda row: (row["method"], row["seed"]) == (name, seed)  # noqa: E731
        leader.directory.metrics.truncate(lambda row: not mine(row) or row["round"] < done)
        # A row of metrics is of the round with its number, an observation of the state after so many.
        leader.directory.observations.truncate(lambda row: not mine(row) or (done > 0 and row["round"] <= done))
        for path in (leader.directory.snapshots_dir / name / f"seed_{seed}").glob("round_*.npz"):
            if int(path.stem.removeprefix("round_")) > done:
                path.unlink()
        if done < rounds:  # else a run that goes on for longer would show the teacher of a shorter one
            trained_teachers.path_of(leader.directory.path, name, seed).unlink(missing_ok=True)
        leader.hooks.catch_up(name, seed)

    def show(done: int, row: dict[str, Any] | None) -> None:
        progress.update(name, seed, done, None if row is None else row["validation_error"])

    return Run(
        name=name,
        seed=seed,
        state=state,
        checkpoints=Checkpoints(directory.checkpoints_dir(name, seed)) if directory is not None else None,
        write=write,
        forget=forget,
        snapshot=snapshot,
        snapshot_rounds=tuple(sorted(moments | observed)),
        progress=show,
        report=progress.line,
        checkpoint_seconds=setting.options.checkpoint_seconds,
        frozen=entry.teacher_of is not None,
    )
