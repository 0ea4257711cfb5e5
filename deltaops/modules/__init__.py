"""Modules that hold a place's parameters; surgery swaps them in by ``__class__``.

``conv1d`` and ``peft_linear`` import transformers and peft, so they are not imported here.
"""

from .factor import Factor, start_values
from .kinds import frozen_class, is_conv1d, lora_class
from .linear import FrozenLinear, LoraLinear
from .place import (
    UNFROZEN,
    LinearPlace,
    LoraPlace,
    LoraSettings,
    become,
    features,
    plain_linear,
    unbecome,
)

__all__ = [
    "UNFROZEN",
    "Factor",
    "FrozenLinear",
    "LinearPlace",
    "LoraLinear",
    "LoraPlace",
    "LoraSettings",
    "become",
    "features",
    "frozen_class",
    "is_conv1d",
    "lora_class",
    "plain_linear",
    "start_values",
    "unbecome",
]
