"""Modules that hold a place's parameters; surgery swaps them in by ``__class__``.

``conv1d`` and ``peft_linear`` import transformers and peft, so they are not imported here.
"""

from .attention_block import AttentionBlock
from .attention_functions import stand_ins
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
from .prefix import add_prefix, remove_prefix, switch
from .program import Program, program_of
from .sharing import APART, sharing

__all__ = [
    "APART",
    "UNFROZEN",
    "AttentionBlock",
    "Block",
    "Factor",
    "FrozenLinear",
    "GatedMlpBlock",
    "LinearPlace",
    "LoraLinear",
    "LoraPlace",
    "LoraSettings",
    "Program",
    "RmsNormBlock",
    "activation_of",
    "add_prefix",
    "become",
    "features",
    "frozen_class",
    "is_conv1d",
    "lora_class",
    "plain_linear",
    "program_of",
    "remove_prefix",
    "sharing",
    "stand_ins",
    "start_values",
    "switch",
    "unbecome",
]
