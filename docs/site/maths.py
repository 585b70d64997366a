"""Equations of docstrings, which are indented there, are shown as they are written."""

import re
from typing import Any

import griffe

LEAD = re.compile(r"(Args|Returns|Raises|Source): (?=\S)")  # on the line itself
SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields|Examples?):\s*$")


class Maths(griffe.Extension):
    """Put what is indented, outside of a list of arguments, in a block of code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of what was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring with its indented lines between fences."""
    lines: list[str] = []
    section = inside = False
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section = bool(SECTION.match(line))
        code = line.startswith("  ") and not section
        if code != inside and (line or not inside):
            lines += ["", "```text"] if code else ["```", ""]
            inside = code
        if LEAD.match(line):
            lines += ["", LEAD.sub(r"**\1:** ", line)]
        else:
            lines.append(line[2:] if code else line)
    return "\n".join([*lines, "```"] if inside else lines)
