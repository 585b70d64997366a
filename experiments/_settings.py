"""Rows of the preset's sheet and knobs by name: what --set, the flags of rows and the grids of `tune` say of a run."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from absl import flags

from l2t_jax import inputs
from l2t_jax.knobs import knobs_of, read_knob
from l2t_jax.losses.dln import INPUTS, REDUCTION, SQUASH
from l2t_jax.losses.embeddings import SIGNALS
from l2t_jax.methods import KNOBS
from l2t_jax.methods.l2t_dln import ACCEPT, RESET, STAGES
from l2t_jax.methods.parts import SCHEDULES
from l2t_jax.optimizers import STUDENT_OPTIMIZERS
from l2t_jax.presets import Preset
from l2t_jax.runs.config import Config, UsageError
from l2t_jax.teachers import TEACHERS

CHOICES: dict[str, Iterable[str]] = {  # settings that are one of several names
    "student_optimizer": STUDENT_OPTIMIZERS,
    "student_schedule": SCHEDULES,
    "teacher_schedule": SCHEDULES,
    "second_stage": STAGES,
    "reset_hidden": RESET,
    "accept": ACCEPT,
    "dln_form": INPUTS,
    "squash": SQUASH,
    "reduction": REDUCTION,
    "base": ("none", *(name for name in TEACHERS if name != "lstm")),
}


def known(flag: str, name: str, names: Iterable[str]) -> str:
    """Check a name, and raise a UsageError that lists the known ones where it is not one of them."""
    inputs.known(f"--{flag}={name}", name, names, UsageError)
    return name


def parse_settings(flag: str, text: str) -> dict[str, Any]:
    """Read `NAME=VALUE,NAME.KNOB=VALUE`: fields of a `Preset`, and knobs of losses and methods.

    Raises:
      UsageError: a name is unknown or given twice, or a value is not of its kind.
    """
    fields = [field.name for field in dataclasses.fields(Preset)]
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or name in found:
            raise UsageError(f"--{flag}: {part!r} must be NAME=VALUE, each name once: e.g. odd=true.")
        if "." in name:
            found[name] = _parse_knob(flag, name, value)
        else:
            found[name] = parse_value(flag, known(flag, name, fields), value)
    return found


def with_settings(config: Config, given: dict[str, Any]) -> Config:
    """A config with other settings and knobs, of `parse_settings`.

    Raises:
      UsageError: a value is out of range, or a knob is of a method that is not run.
    """
    knobs = {name: value for name, value in given.items() if "." in name}
    for name in knobs:
        if (of := name.partition(".")[0]) in STUDENT_OPTIMIZERS:
            if of != given.get("student_optimizer", config.settings.student_optimizer):
                raise UsageError(f"--set={name}=... is of {of}: add --student_optimizer={of}.")
        elif of not in (*config.methods, config.task_knobs.get("loss")):
            where = "--loss" if of in SIGNALS else "--method"
            raise UsageError(f"--set={name}=... is of {of}, which {where} does not name: add it there.")
    rows = {name: value for name, value in given.items() if "." not in name}
    settings = checked(dataclasses.replace(config.settings, **rows))
    return dataclasses.replace(config, settings=settings, knobs=config.knobs | knobs)


def _parse_knob(flag: str, name: str, text: str) -> Any:
    """Read the value of a knob of a loss or a method, NAME.KNOB."""
    of, _, knob = name.partition(".")
    builders = {name: build for name, build in {**STUDENT_OPTIMIZERS, **KNOBS}.items() if knobs_of(build)}
    has = knobs_of(builders[known(flag, of, builders)])
    known(f"{flag}={of}", knob, has)
    try:
        return read_knob(has[knob], text)
    except ValueError as error:
        raise UsageError(f"--{flag}: {name}={text} {error}.") from None


def parse_value(flag: str, name: str, text: str) -> Any:
    """Read the value of a field of `Preset`, by the kind of its default."""
    default: Any = getattr(Preset(), name)
    words: dict[str, Any] = {"true": True, "false": False} if isinstance(default, bool) else {}
    words |= {"none": None} if name == "preprocess" else {}
    if text.lower() in words:
        return words[text.lower()]
    try:
        if words and isinstance(default, bool):
            raise ValueError
        return type(default)(text)
    except ValueError:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise UsageError(f"--{flag}: {name}={text} must be {kind}.") from None


def checked(settings: Preset) -> Preset:
    """Settings whose values are all in range.

    Raises:
      UsageError: one is not.
    """
    for name, names in CHOICES.items():
        known(name if name in flags.FLAGS else f"set={name}", getattr(settings, name), names)
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", settings.units):
        raise UsageError(f"--set: units={settings.units} must be the units of each layer but the last: e.g. 20-20.")
    if settings.update_sign not in (-1, 1):
        raise UsageError(f"--set: update_sign={settings.update_sign} must be 1 or -1.")
    for name in ("epochs", "unroll_length", "batch_size", "validation_batch_size"):
        if getattr(settings, name) < 1:
            raise UsageError(f"--{name}={getattr(settings, name)} must be at least 1.")
    if not 0 <= settings.student_clip < float("inf"):
        raise UsageError(f"--set: student_clip={settings.student_clip} must be a norm, or 0 for none.")
    if not 0 <= settings.compress < float("inf"):
        raise UsageError(f"--set: compress={settings.compress} must be a positive number, or 0 for none.")
    if settings.preprocess is not None and not 0 < settings.preprocess < float("inf"):
        raise UsageError(f"--set: preprocess={settings.preprocess} must be a positive number, or none.")
    if settings.window < 0:
        raise UsageError(f"--set: window={settings.window} must be a number of rounds, or 0 to clear no memory.")
    for name in ("lives", "teach_every"):
        if getattr(settings, name) < 1:
            raise UsageError(f"--set: {name}={getattr(settings, name)} must be at least 1.")
    if not 0 < settings.validation_ratio < 1:
        raise UsageError(f"--validation_ratio={settings.validation_ratio} must lie between 0 and 1, both excluded.")
    for name in ("student_lr", "dln_lr", "teacher_lr"):
        value: Any = getattr(settings, name)
        if not 0 < value < float("inf"):
            raise UsageError(f"--{name}={value} must be a positive, finite number.")
    return settings
