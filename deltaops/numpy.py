"""The name of :mod:`deltaops.bindings.numpy` for users: ``import deltaops.numpy``."""

from .bindings.numpy import *  # noqa: F403
from .bindings.numpy import __all__ as __all__
