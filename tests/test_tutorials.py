"""The tutorials run from the first cell to the last in a kernel; what each shows it asserts in its own cells."""

import ast
import json

import pytest
from kernel import ROOT, kernel

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
SECONDS = 60  # of processor time, that of the imports and of compiling included
# What the cells assert is theirs to say; that it is of this, and not nothing, is said here.
ASSERTED = {
    "hypergradient": ("result.gradient, hand", "result.gradient, differences", "found, hand", "found[-1], limit"),
    "teach_a_loss": ("L2T-DLN, online", "L2T-DLN, transfer", "memorised", "share"),
    "loss_and_method": ("robust.score", "learned.score", "floors"),
    "wrong_labels": ("found[0.05]", "found[0.1]", "examples.index", "without"),
    "pretrained_teacher": ("accuracy(params)", "the course", "by_numpy", "by_torch"),
}


def notebook(path):
    """A notebook, and the sources of its cells of code."""
    content = json.loads(path.read_text())
    return content, ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_there_is_one_of_each():
    assert [path.stem for path in TUTORIALS] == sorted(ASSERTED)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_it_is_stored_without_outputs(path):
    content, sources = notebook(path)
    assert content["metadata"]["kernelspec"]["name"] == "python3" and path.stat().st_size < 30_000
    for cell in content["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    checks = [
        ast.unparse(node)
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and "assert_allclose" in ast.unparse(node.func))
    ]
    for what in ASSERTED[path.stem]:
        assert any(what in check for check in checks), f"no cell asserts anything of {what}"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path):
    _, sources = notebook(path)
    with kernel(tmp_path) as run:
        for source in sources:
            ran = run(source)
            assert ran.status == "ok", f"{ran.error}\nin the cell\n{source}"
            assert ran.warned == "" and "\r" not in ran.printed
        spent = run("import time; print(time.process_time())")
    assert float(spent.printed) < SECONDS
