"""What a run that is there may become where it goes on: longer, with more seeds, with more methods.

Each (method, seed) is a run of its own: what others are beside it changes nothing of it. Data and random draws of a
round depend on seed and round alone, so a longer run begins with the shorter one, unless its length decides something.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from l2t_jax.methods import knobs_read
from l2t_jax.runs.config import complete
from l2t_jax.runs.records import Growth, unchanged
from l2t_jax.runs.setting import Entry, Setting

GROWS = ("rounds", "methods", "seeds")


class Bounds(NamedTuple):
    """What of a run decides how it may grow."""

    of_all: str  # what all methods share that depends on the planned length, "" where nothing does
    of_length: dict[str, str]  # method -> what of it does
    knobs: dict[str, set[str]]  # method -> whose knobs it reads


def growth_of(setting: Setting, entries: list[Entry]) -> Callable[[dict[str, Any], dict[str, Any]], Growth]:
    """How a run that is there may become this one: an argument of `open_run`."""
    of_length: dict[str, str] = {}
    for entry in entries:
        name = entry.teacher_of or entry.name
        of_length[name] = of_length.get(name) or entry.method.of_length
    knobs = {name: knobs_read(name, setting.parts) for name in setting.config.methods}
    return partial(grow, bounds=Bounds(setting.of_length, of_length, knobs))


def grow(there: dict[str, Any], asked: dict[str, Any], bounds: Bounds) -> Growth:
    """See `Growth`.

    Args:
      there: the config of a run, as `train_entries` writes it and JSON has it.
      asked: that of the run which it is to become.
      bounds: of the latter.
    """
    if not there.keys() >= {*GROWS, "settings", "taught_by"}:  # it is of something else
        return unchanged(there, asked)
    there = complete(there)
    config = {**there, **{name: asked[name] for name in GROWS}}
    was = {name: there[name] for name in GROWS if there[name] != asked[name]}
    # Of how long a run is `rounds` says all.
    config["settings"] = there["settings"] | {"epochs": asked["settings"]["epochs"]}
    new = [name for name in asked["methods"] if name not in there["methods"]]
    read = set().union(*(bounds.knobs.get(name, set()) for name in there["methods"]))
    of_new = {knob: value for knob, value in asked["knobs"].items() if knob.partition(".")[0] in set(new) - read}
    config["knobs"] = of_new | there["knobs"]
    old = {f"{name}, seed {seed}" for name in there["methods"] for seed in there["seeds"]}
    config["taught_by"] = {k: v for k, v in asked["taught_by"].items() if k not in old} | there["taught_by"]
    if refusal := _lost(there, asked):
        config |= {name: asked[name] for name in ("knobs", "taught_by")}  # what is lost has lost these too
    return Growth(config, was, refusal or _length(there, asked, bounds), _news(there, asked))


def _lost(there: dict[str, Any], asked: dict[str, Any]) -> str | None:
    """Why methods or seeds may not be left out."""
    for what, flag in (("methods", "method"), ("seeds", "seeds")):
        if set(there[what]) - set(asked[what]):
            both = [*there[what], *(name for name in asked[what] if name not in there[what])]
            return (
                f"holds {what} {_listed(there[what])}, of which none can be left out: give --{flag}={_flag(both)}, or "
                "choose another --workdir."
            )
    return None


def _length(there: dict[str, Any], asked: dict[str, Any], bounds: Bounds) -> str | None:
    """Why it may not be of another length."""
    before, rounds = there["rounds"], asked["rounds"]
    if rounds < before:
        return (
            f"holds a run of {before} rounds, which cannot be made shorter: give --rounds={before}, or choose another "
            "--workdir."
        )
    own = [f"{of} of {name}" for name in there["methods"] if (of := bounds.of_length.get(name))]
    decided = [of for of in (bounds.of_all, *own) if of]
    if rounds == before or not decided:
        return None
    schedules = [of.partition("=")[0] for of in decided if "_schedule=" in of]
    hint = f"; one with --set={','.join(f'{name}=constant' for name in schedules)} may go on for longer"
    return (
        f"holds a run of {before} rounds, and its length decides {_listed(decided)}: start anew in another --workdir "
        f"with --rounds={rounds}{hint if len(schedules) == len(decided) else ''}."
    )


def _news(there: dict[str, Any], asked: dict[str, Any]) -> tuple[str, ...]:
    news = [] if asked["rounds"] == there["rounds"] else [f"{asked['rounds']} rounds in place of {there['rounds']}"]
    for what in ("methods", "seeds"):
        if new := [name for name in asked[what] if name not in there[what]]:
            news.append(f"new {what} {_listed(new)}")
    return tuple(news)


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names))


def _flag(names: Sequence[Any]) -> str:
    """As a flag takes them: one seed needs its comma."""
    return ",".join(map(str, names)) + ("," if names == [names[0]] and isinstance(names[0], int) else "")
