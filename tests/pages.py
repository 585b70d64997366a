"""The examples of a page, run as a reader would paste them."""

import re

import pytest

from l2t_jax.runs import reporting


def blocks_of(text):
    """The examples of a page."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_page(page, folder, short, long):
    """What a reader has who ran a page in a folder, where it says `short` in place of `long`: its names, the folder."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(reporting, "draw", lambda *_: None)
        for block in blocks_of(page.read_text()):
            exec(compile(block.replace(long, short), page.name, "exec"), names)
    return names | {"folder": folder}
