"""Students: the networks that are taught."""

from collections.abc import Callable
from functools import partial

from l2t_jax.students.densenet import densenet
from l2t_jax.students.layers import from_linen
from l2t_jax.students.lenet import lenet
from l2t_jax.students.mlp import mlp
from l2t_jax.students.modules import from_equinox, from_haiku, from_nnx
from l2t_jax.students.nasnet import nasnet, nasnet_mobile
from l2t_jax.students.pspnet import pspnet, pspnet_small
from l2t_jax.students.residual import imagenet_resnet
from l2t_jax.students.resnet import resnet
from l2t_jax.students.translators import lstm, lstm_small, transformer, transformer_small
from l2t_jax.students.wide_resnet import wide_resnet
from l2t_jax.students.yolov3 import yolov3, yolov3_tiny
from l2t_jax.types import Student

STUDENTS: dict[str, Callable[..., Student]] = {
    "mlp": mlp,
    "lenet": lenet,
    "resnet8": partial(resnet, 8),
    "resnet20": partial(resnet, 20),
    "resnet32": partial(resnet, 32),
    "resnet18": partial(imagenet_resnet, 18),
    "resnet50": partial(imagenet_resnet, 50),
    "wide_resnet": wide_resnet,
    "densenet": densenet,
    "nasnet": nasnet,
    "nasnet_mobile": nasnet_mobile,
    "pspnet_small": pspnet_small,
    "pspnet50": partial(pspnet, 50),
    "pspnet101": partial(pspnet, 101),
    "yolov3": yolov3,
    "yolov3_tiny": yolov3_tiny,
    "lstm_small": lstm_small,
    "lstm1": partial(lstm, 1),
    "lstm2": partial(lstm, 2),
    "transformer_small": transformer_small,
    "transformer": transformer,
}

__all__ = [
    "STUDENTS",
    "densenet",
    "from_equinox",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "imagenet_resnet",
    "lenet",
    "lstm",
    "lstm_small",
    "mlp",
    "nasnet",
    "nasnet_mobile",
    "pspnet",
    "pspnet_small",
    "resnet",
    "transformer",
    "transformer_small",
    "wide_resnet",
    "yolov3",
    "yolov3_tiny",
]
