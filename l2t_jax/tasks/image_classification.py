"""Image classification: cross entropy as the outer error, accuracy as the metric.

Legend: B batch, C classes, n examples, H and W height and width in pixels, c channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.data import Dataset
from l2t_jax.types import Array, Batch, Key, PyTree, Task

_PADDING = 4  # pixels on each side before the random crop


def image_classification(dataset: Dataset) -> Task:
    """Build the task of a data set.

    error(z, y) = -log softmax(z)_y and accuracy = [argmax z = y], for each example;
    an input is (pixel - mean) / std, per channel.

    Args:
      dataset: gives mean, std (raw pixel units) and whether to augment; its images are not kept.

    Returns:
      A task whose `gather(data, indices, key)` reads {"images": uint8 [n, H, W, c], "labels": int32 [n]} at
      indices of any shape [...] into a batch of inputs [..., H, W, c] float32 and targets [...] int32. With a
      key, and where the data set asks for it, every image is cropped and flipped at random, as in He et al.
      2016.
    """
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)

    def gather(data: PyTree, indices: Array, key: Key | None) -> Batch:
        images = data["images"][indices]  # [..., H, W, c]
        if key is not None and dataset.augment:
            images = crop_and_flip(images, key)
        return Batch((images.astype(jnp.float32) - mean) / std, data["labels"][indices])

    return Task(optax.softmax_cross_entropy_with_integer_labels, _metrics, gather)


def _metrics(outputs: Array, targets: Array) -> dict[str, Array]:
    return {"accuracy": (outputs.argmax(-1) == targets).astype(outputs.dtype)}


def crop_and_flip(images: Array, key: Key) -> Array:
    """Pad each image by 4 pixels, crop it back at a random place, and mirror every second one on average.

    Args:
      images: [..., H, W, c], raw pixels.
      key: decides the place and the mirroring of every image, independently.

    Returns:
      Images of the same shape and dtype.

    Source: He et al. 2016, section 4.2. Whether the padding is black or the mean colour is not stated: raw
    pixels of 0 here, before normalisation, as in torchvision's RandomCrop.
    """
    flat = images.reshape(-1, *images.shape[-3:])  # [b, H, W, c]
    corner_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (len(flat), 2), 0, 2 * _PADDING + 1)
    flips = jax.random.bernoulli(flip_key, shape=(len(flat), 1, 1, 1))
    padded = jnp.pad(flat, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), flat.shape[1:])

    cropped = jax.vmap(crop)(padded, corners)
    return jnp.where(flips, cropped[:, :, ::-1], cropped).reshape(images.shape)
