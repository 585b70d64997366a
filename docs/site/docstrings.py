"""Equations of docstrings, which are indented there, and fields of records are shown as they are written."""

import re
from typing import Any

import griffe

LEAD = re.compile(r"(Args|Returns|Raises|Source): (?=\S)")  # on the line itself
SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields|Examples?):\s*$")


class AsWritten(griffe.Extension):
    """Put what is indented, outside of a list of arguments, in a block of code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of what was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
            if isinstance(obj, griffe.Class) and (fields := fields_of(obj.source)):
                obj.docstring.value += f"\n\n```python\n{fields}\n```"


def fields_of(source: str) -> str:
    """The fields of a record, with what is said of them beside them."""
    body = re.sub(r'^    """.*?"""\n', "", source.partition(":\n")[2], count=1, flags=re.DOTALL | re.MULTILINE)
    lines = re.split(r"^    (?:@|def )", body, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    kept = [line[4:] for line in lines if re.match(r"    (\w+: |#)", line)]
    return "\n".join(kept) if any(not line.startswith("#") for line in kept) else ""


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
        elif SECTION.match(line):  # seen by the parser after an empty line
            lines += ["", line]
        else:
            lines.append(line[2:] if code else line)
    return "\n".join([*lines, "```"] if inside else lines)
