"""Delta methods, one file each; see :mod:`deltaops.methods.base` for what they all are."""

from .adapter import Adapter
from .base import Binding, Delta, Promise, Site
from .bitfit import BitFit
from .ia3 import IA3
from .ln_tuning import LNTuning
from .lora import LoRA
from .parallel_adapter import ParallelAdapter
from .prefix import Prefix
from .targets import ALL_LINEAR

__all__ = [
    "ALL_LINEAR",
    "IA3",
    "METHODS",
    "Adapter",
    "Binding",
    "BitFit",
    "Delta",
    "LNTuning",
    "LoRA",
    "ParallelAdapter",
    "Prefix",
    "Promise",
    "Site",
]

_ALL: tuple[type[Delta], ...] = (LoRA, Adapter, ParallelAdapter, BitFit, IA3, LNTuning, Prefix)

METHODS: dict[str, type[Delta]] = {method.kind: method for method in _ALL}
"""By the name that files and the command line use."""
