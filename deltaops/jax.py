"""The name of :mod:`deltaops.bindings.jax` for users: ``import deltaops.jax``."""

from .bindings.jax import *  # noqa: F403
from .bindings.jax import __all__ as __all__
