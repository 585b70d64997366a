"""Imports go one way: each room may only import rooms above it in the table of docs/structure.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "structure.md").read_text()
LAYERS = tuple(set(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\| \d+ \| ([^|]*) \|", PAGE, re.MULTILINE))
DOORS = {
    "equinox": ("modules.py",),
    "haiku": ("modules.py",),
    "orbax": ("checkpoints.py",),
    "pandas": ("frames.py",),
    "tensorboardX": ("hooks.py",),
    "matplotlib": ("plots.py", "image_panels.py"),
    "tensorflow_datasets": ("tfds.py",),
    "rich": ("progress.py", "reporting.py"),
    "IPython": ("progress.py",),
    "faster_coco_eval": ("boxes.py",),
    "sacrebleu": ("translation.py",),
    "safetensors": ("state_dicts.py",),
    "sentencepiece": ("subwords.py",),
    "torch": ("state_dicts.py",),
}
FILES = sorted((ROOT / "l2t_jax").rglob("*.py"))
MODULES = sorted((ROOT / "experiments").glob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module in ("l2t_jax", "experiments")
            yield from ([f"{node.module}.{a.name}" for a in node.names] if inside else [node.module])


def level(room):
    found = [depth for depth, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{room} is in no row: give it a place in docs/structure.md"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    room = path.relative_to(ROOT / "l2t_jax").parts[0].removesuffix(".py")
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("experiments", "benchmarks", "tests"), f"the library must not know {top}"
        if top == "l2t_jax" and rest and room != "__init__":
            other = rest.split(".")[0]
            assert other == room or level(other) < level(room), f"{room} must not import {other}"
        if top in DOORS:
            assert path.name in DOORS[top], f"only {DOORS[top]} may import {top}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_experiments_are_thin(path):
    """Modules import private ones and the library, and no module another but for what is named here."""
    shared = {"experiments._flags", "experiments._command", "experiments._settings"}
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("benchmarks", "tests", *DOORS), f"experiments must not import {top}"
        if top == "experiments" and rest:
            assert rest.startswith("_"), f"{path.name} must not import the experiment {rest}"
            if path.name.startswith("_"):
                assert {name} <= shared | {"experiments._noise"}, f"{path.name} must not import {name}"


def test_the_page_has_every_room_once():
    rooms = {path.relative_to(ROOT / "l2t_jax").parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    named = [room for rooms in LAYERS for room in rooms]
    assert sorted(named) == sorted(rooms)


def test_library_does_not_import_slow_packages():
    """What only some users need is imported when it is needed."""
    code = (
        "import sys, l2t_jax.methods, l2t_jax.data; print([m for m in ('tensorflow_datasets', 'matplotlib', 'orbax')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
