"""l2t_jax: learned loss functions by learning to teach, in JAX."""

__version__ = "0.1.0"
