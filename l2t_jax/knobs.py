"""The knobs of a builder, read from its signature: what of a student, a loss or a method can be set by name."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# What a run gives by itself.
GIVEN = ("axis_name", "at_once", "check_gradient", "curriculum", "learn", "memory", "num_classes", "reduction")


class Knob(NamedTuple):
    """A keyword of a builder that has a default."""

    default: Any
    text: str  # what the builder's docstring says of it


def knobs_of(build: Callable[..., Any]) -> dict[str, Knob]:
    """The knobs of a builder: its keywords with a number, a name or nothing as default, but those a run gives."""
    build = getattr(build, "func", build)  # of a partial
    keywords = [p for p in inspect.signature(build).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    simple = [p for p in keywords if p.name not in GIVEN and isinstance(p.default, (bool, int, float, str))]
    return {p.name: Knob(p.default, _text(build, p.name)) for p in simple}


def knobs_for(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of knobs by "NAME.KNOB" those of one name: keywords of its builder."""
    return {key.partition(".")[2]: value for key, value in given.items() if key.partition(".")[0] == name}


def read_knob(knob: Knob, text: str) -> Any:
    """A knob's value from text, by the kind of its default.

    Raises:
      ValueError: it is of another kind; the message says of which it must be.
    """
    if isinstance(knob.default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("must be true or false")
        return text.lower() == "true"
    try:
        return type(knob.default)(text)
    except ValueError:
        raise ValueError("must be a whole number" if isinstance(knob.default, int) else "must be a number") from None


def _text(build: Callable[..., Any], name: str) -> str:
    """What follows `name:` among the arguments of a docstring, on one line, up to its first full stop or semicolon."""
    found = re.search(
        rf"^ +{name}: (.*?)(?=\n\n|\n +\w+(?:, \w+)*: |\Z)", build.__doc__ or "", re.DOTALL | re.MULTILINE
    )
    return "" if found is None else re.split(r"[;.](?:\s|$)", " ".join(found[1].split()))[0]
