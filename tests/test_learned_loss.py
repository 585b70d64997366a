"""What the page docs/learned_loss.md reads of a run without the library gives the library's numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import blocks_of

from l2t_jax.losses import build_loss
from l2t_jax.runs.records import save_arrays, write_json

PAGE = (Path(__file__).parents[1] / "docs" / "learned_loss.md").read_text()
NUMPY, TORCH = blocks_of(PAGE)
FORMS = [
    {"form": form, "squash": squash, "reduction": reduction, "residual": residual, "compress": compress}
    for form, squash, reduction, residual, compress in (
        ("released", "softmax", "mean", True, 10.0),
        ("paper", "sigmoid", "mean", False, 0.0),
        ("released", "log_softmax", "sum", True, 0.5),
        ("paper", "identity", "mean_pairs", False, 2.0),
    )
]


@pytest.fixture(params=FORMS, ids=lambda knobs: "-".join(map(str, knobs.values())))
def case(request, tmp_path):
    """A loss as a run leaves it, random, and its values."""
    loss = build_loss("dln", 5, **request.param)
    params = jax.tree.map(lambda x: x + 0.1, loss.init(jax.random.key(1)))
    save_arrays(tmp_path / "l2t_dln_seed_0.npz", {"loss": params})
    write_json(tmp_path / "about.json", {"losses": {"l2t_dln": {"name": "dln", "knobs": request.param}}})
    random = np.random.default_rng(0)
    outputs, targets = 4 * random.normal(size=(20, 5)).astype(np.float32), random.integers(0, 5, 20)
    return tmp_path, outputs, targets, loss, params


def test_numpy(case):
    folder, outputs, targets, loss, params = case
    names = {}
    exec(NUMPY, names)
    found = names["read_loss"](str(folder))(outputs, targets)
    np.testing.assert_allclose(found, loss.apply(params, outputs, jnp.asarray(targets)), rtol=2e-4, atol=1e-4)
    assert json.loads((folder / "about.json").read_text())


def test_pytorch_and_its_derivative(case):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install l2t_jax[bench]")
    folder, outputs, targets, loss, params = case
    names = {}
    exec(NUMPY + TORCH, names)
    z = torch.tensor(outputs, requires_grad=True)
    values = names["torch_loss"](str(folder))(z, torch.tensor(targets))
    np.testing.assert_allclose(values.detach(), loss.apply(params, outputs, jnp.asarray(targets)), rtol=2e-4, atol=1e-4)
    values.sum().backward()
    slope = jax.grad(lambda o: loss.apply(params, o, jnp.asarray(targets)).sum())(jnp.asarray(outputs))
    np.testing.assert_allclose(z.grad, slope, rtol=2e-3, atol=1e-4)
