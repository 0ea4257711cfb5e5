"""Modules that hold a place's parameters; surgery swaps them in by ``__class__``.

``conv1d`` and ``peft_linear`` import transformers and peft, so they are not imported here.
"""

from .block import Block, GatedMlpBlock, RmsNormBlock, activation_of
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
from .rotary_block import NAME as ROTARY
from .rotary_block import RotaryBlock
from .sharing import APART, sharing

__all__ = [
    "APART",
    "ROTARY",
    "UNFROZEN",
    "Block",
    "Factor",
    "FrozenLinear",
    "GatedMlpBlock",
    "LinearPlace",
    "LoraLinear",
    "LoraPlace",
    "LoraSettings",
    "RmsNormBlock",
    "RotaryBlock",
    "activation_of",
    "become",
    "features",
    "frozen_class",
    "is_conv1d",
    "lora_class",
    "plain_linear",
    "sharing",
    "start_values",
    "unbecome",
]
