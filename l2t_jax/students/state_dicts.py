"""Weights from files: a PyTorch state dict becomes the variables of a linen module.

Legend: K kernel, I input and O output channels, G groups.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from l2t_jax.types import Array, PyTree

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTERS = "num_batches_tracked"  # of BatchNorm, which no forward pass reads
TOLD = 3  # names in a message
COLORS, SIDE = 3, 9  # channels of the images that weights are for; pixels a side of one that all maps are made of


def read_state_dict(path: str) -> dict[str, np.ndarray]:
    """Read the tensors of a file by their names.

    Args:
      path: a .safetensors file, or a .pth or .pt file of a state dict, by itself or under "state_dict". The latter are
        read by torch, and only as tensors: no code in them is run.

    Returns:
      {name: array}, floats as float32.

    Raises:
      ValueError: the file is missing, of another kind or damaged, or the library that reads it is not installed.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights={path}: expected a .safetensors, .pth or .pt file of a state dict.")
    if not file.is_file():
        raise ValueError(f"weights={path}: there is no such file.")
    read = _read_safetensors if file.suffix == ".safetensors" else _read_torch
    try:
        return {name: _float32(np.asarray(array)) for name, array in read(file).items()}
    except ModuleNotFoundError as error:
        cure = "pip install safetensors"
        if file.suffix != ".safetensors":
            cure = "pip install torch, or convert the file to .safetensors where torch is"
        raise ValueError(f"weights={path}: reading it needs {error.name}, which is not installed: {cure}.") from error
    except Exception as error:  # each library has its own kinds of them for a damaged file
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"weights={path}: not readable as a state dict ({told}): fetch the file anew.") from error


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(file))


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    import torch

    state = torch.load(file, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not (isinstance(state, dict) and all(isinstance(x, torch.Tensor) for x in state.values())):
        raise TypeError("it holds something else than tensors by name")
    return {name: (x.float() if x.is_floating_point() else x).numpy() for name, x in state.items()}


def _float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.kind in "biu" else array.astype(np.float32)


def variables_from(
    state: Mapping[str, np.ndarray],
    shapes: PyTree,
    layer: Callable[[tuple[str, ...]], str],
    *,
    unused: tuple[str, ...],
    told: str,
) -> PyTree:
    """Arrange the tensors of a state dict as the variables of a module.

    Kernels [O, I / G, K, K] become [K, K, I / G, O].

    Args:
      state: tensors by name.
      shapes: {"params", "batch_stats"} of the module, leaves with a shape.
      layer: a path of modules -> the layer's name there. "kernel", "scale", "bias", "mean" and "var" follow it as
        "weight", "weight", "bias", "running_mean" and "running_var".
      unused: beginnings of names that may be left over.
      told: what a message calls the file.

    Returns:
      The variables, NumPy.

    Raises:
      ValueError: tensors are missing, left over, or of other shapes; names them.
    """
    paths, structure = jax.tree.flatten_with_path(shapes)
    missing, misfit, found, used = [], [], [], set()
    for path, leaf in paths:
        keys = tuple(entry.key for entry in path)
        name = f"{layer(keys[1:-1])}.{LEAVES[keys[-1]]}"
        used.add(name)
        if name not in state:
            missing.append(name)
            continue
        array = np.asarray(state[name])
        kernel = keys[-1] == "kernel"
        expected = tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if kernel else tuple(leaf.shape)
        if array.shape != expected:
            misfit.append(f"{name} ({list(array.shape)} for {list(expected)})")
        found.append(array.transpose(2, 3, 1, 0) if kernel and array.ndim == 4 else array)
    over = [name for name in state if name not in used and not name.startswith(unused) and COUNTERS not in name]
    wrong = {"missing": missing, "left over": over, "of another shape": misfit}
    if any(wrong.values()):
        problems = "; ".join(f"{kind} {_some(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"{told} do not fit this network: {problems}. Give the state dict of the same architecture.")
    return jax.tree.unflatten(structure, found)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + more


def in_dtype(variables: PyTree, dtype: Any) -> PyTree:
    """The same variables in another precision."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), variables)


def load_maps(
    network: nn.Module,
    state: Mapping[str, np.ndarray],
    layer: Callable[[tuple[str, ...]], str],
    unused: tuple[str, ...],
    path: str,
) -> PyTree:
    """Fill a network from images [B, H, W, 3] to maps with weights.

    Args:
      network: a linen module with the call (images, train).
      state, layer, unused: see `variables_from`.
      path: the file, for messages.

    Returns:
      {"params", "batch_stats"}.

    Raises:
      ValueError: the weights do not fit.
    """
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, COLORS), jnp.float32)
    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, False), image)
    return variables_from(state, shapes, layer, unused=unused, told=f"weights={path}")


def require_colors(x: Array) -> None:
    """Check that images have the channels that weights are for.

    Raises:
      ValueError: they have others.
    """
    if jnp.shape(x)[-1:] != (COLORS,):
        raise ValueError(f"inputs are {list(jnp.shape(x))}: the weights are for images of {COLORS} channels.")
