"""Delta methods, one file each; see :mod:`deltaops.methods.base` for what they all are."""

from .base import ALL_LINEAR, Delta, Promise
from .lora import LoRA

__all__ = ["ALL_LINEAR", "Delta", "LoRA", "Promise"]
