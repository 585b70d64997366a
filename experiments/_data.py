"""The data that a config describes: loaded, a part held out, labels made wrong."""

from experiments._config import Config, Options
from experiments._noise import with_config
from l2t_jax import data
from l2t_jax.data import Dataset


def prepare(config: Config, options: Options) -> Dataset:
    """Load a config's data set.

    Raises:
      DataError: it is not there, or cannot be divided or corrupted as asked.
    """
    dataset = data.load(config.dataset, options.data_dir, options.download)
    return with_config(data.hold_out(dataset, config.held_out), config)
