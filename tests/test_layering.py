"""Imports go one way: each room may only import rooms below it, and some libraries have a single door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # lowest first; rooms of one layer do not import each other, except within a package
    {"types", "presets"},
    {"convolution", "inputs"},
    {"optimizers"},
    {"losses", "students"},
    {"teachers"},
    {"data"},
    {"unroll"},
    {"tasks"},
    {"second_order"},
    {"memory"},
    {"hypergradient"},
    {"methods"},
    {"analysis"},
    {"runs"},
)
DOORS = {
    "orbax": ("checkpoints.py",),
    "matplotlib": ("plots.py",),
    "tensorflow_datasets": ("sets.py",),
    "rich": ("progress.py", "reporting.py"),
}
FILES = sorted((ROOT / "l2t_jax").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"l2t_jax.{a.name}" for a in node.names] if node.module == "l2t_jax" else [node.module])


def level(room):
    found = [depth for depth, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{room} is in no layer: give it a place in LAYERS"
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


def test_library_does_not_import_slow_packages():
    """What only some users need is imported when it is needed."""
    import subprocess
    import sys

    code = (
        "import sys, l2t_jax.methods, l2t_jax.data; print([m for m in ('tensorflow_datasets', 'matplotlib', 'orbax')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
