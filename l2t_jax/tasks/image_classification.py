"""Image classification: cross entropy as the outer error, accuracy as the metric.

Legend: B batch, C classes, n examples, H and W height and width in pixels, c channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.data import Dataset
from l2t_jax.losses import check_classes
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.types import Array, Batch, Key, PyTree, Task

_PADDING = 4  # pixels on each side before the random crop


def image_classification(dataset: Dataset) -> Task:
    """Build the task of a data set.

    error(z, y) = -log softmax(z)_y and accuracy = [argmax z = y], for each example;
    an input is (pixel - mean) / std, per channel.

    Args:
      dataset: gives mean, std (raw pixel units) and whether to augment; its images are not kept.

    Returns:
      A task whose `gather(data, indices, keys)` reads {"images": uint8 [n, H, W, c], "labels": int32 [n]} (and, where
      the labels were corrupted, "true": int32 [n]) at indices of any shape [...] into a batch of inputs
      [..., H, W, c] float32, targets [...] int32 and, if given, true targets [...]. With
      keys [...], and where the data set asks for it, every image is cropped and flipped at random, as in He et
      al. 2016. Its error and metrics raise a ValueError where outputs and targets are none of classes
      (`losses.check_classes`).
    """
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)

    def gather(data: PyTree, indices: Array, keys: Key | None) -> Batch:
        images = data["images"][indices]  # [..., H, W, c]
        if keys is not None and dataset.augment:
            images = crop_and_flip(images, keys)
        true = data["true"][indices] if "true" in data else ()
        return Batch((images.astype(jnp.float32) - mean) / std, data["labels"][indices], true=true)

    return Task(cross_entropy, _metrics, gather)


def _metrics(outputs: Array, targets: Array) -> dict[str, Array]:
    check_classes(outputs, targets)
    return {"accuracy": (outputs.argmax(-1) == targets).astype(outputs.dtype)}


def crop_and_flip(images: Array, keys: Key) -> Array:
    """Pad each image by 4 pixels, crop it back at a random place, and mirror every second one on average.

    Args:
      images: [..., H, W, c], raw pixels.
      keys: [...], one for each image, so that how a batch is divided over devices changes nothing.

    Returns:
      Images of the same shape and dtype.

    Source: He et al. 2016, section 4.2. Whether the padding is black or the mean colour is not stated: raw
    pixels of 0 here, before normalisation, as in torchvision's RandomCrop.
    """
    shape = images.shape[-3:]  # H, W, c

    def one(image: Array, key: Key) -> Array:
        corner_key, flip_key = jax.random.split(key)
        row, column = jax.random.randint(corner_key, (2,), 0, 2 * _PADDING + 1)
        padded = jnp.pad(image, ((_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))
        cropped = jax.lax.dynamic_slice(padded, (row, column, 0), shape)
        return jnp.where(jax.random.bernoulli(flip_key), cropped[:, ::-1], cropped)

    return jax.vmap(one)(images.reshape(-1, *shape), keys.reshape(-1)).reshape(images.shape)
