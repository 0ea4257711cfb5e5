"""Modules that hold a place's parameters; surgery swaps them in by ``__class__``.

``conv1d`` and ``peft_linear`` import transformers and peft, so they are not imported here.
"""

from .adapter import AdapterSettings, Bottleneck, near_zero
from .around import Relay
from .attention_block import AttentionBlock
from .attention_functions import stand_ins
from .block import Block, GatedMlpBlock, RmsNormBlock, activation_of
from .dora import nonzero, row_norms
from .factor import Factor, start_values
from .kept import activate_copies, copies, follow, give_back, has_copies, train_copies, zeros_for
from .kinds import delta_class, frozen_class, is_conv1d
from .linear import DeltaLinear, FrozenLinear
from .norm import BiasedNorm, allow_bias, disallow_bias, is_norm, lacks_bias
from .place import (
    UNFROZEN,
    DeltaPlace,
    LinearPlace,
    LoraSettings,
    become,
    features,
    plain_linear,
    unbecome,
)
from .prefix import KEYS as PREFIX_KEYS
from .prefix import VALUES as PREFIX_VALUES
from .prefix import (
    activate_prefix,
    add_prefix,
    has_prefix,
    head_width,
    join_encoder,
    reads_prefix,
    remove_prefix,
    told_of_prefix,
)
from .prefix_encoder import PrefixEncoder, encode
from .prefix_positions import shift_positions
from .prefix_switch import activate_hooks, check_attention, drop_hooks, restore, switch
from .program import Program, program_of
from .sharing import APART, sharing

__all__ = [
    "APART",
    "PREFIX_KEYS",
    "PREFIX_VALUES",
    "UNFROZEN",
    "AdapterSettings",
    "AttentionBlock",
    "BiasedNorm",
    "Block",
    "Bottleneck",
    "DeltaLinear",
    "DeltaPlace",
    "Factor",
    "FrozenLinear",
    "GatedMlpBlock",
    "LinearPlace",
    "LoraSettings",
    "PrefixEncoder",
    "Program",
    "Relay",
    "RmsNormBlock",
    "activate_copies",
    "activate_hooks",
    "activate_prefix",
    "activation_of",
    "add_prefix",
    "allow_bias",
    "become",
    "check_attention",
    "copies",
    "delta_class",
    "disallow_bias",
    "drop_hooks",
    "encode",
    "features",
    "follow",
    "frozen_class",
    "give_back",
    "has_copies",
    "has_prefix",
    "head_width",
    "is_conv1d",
    "is_norm",
    "join_encoder",
    "lacks_bias",
    "near_zero",
    "nonzero",
    "plain_linear",
    "program_of",
    "reads_prefix",
    "remove_prefix",
    "restore",
    "row_norms",
    "sharing",
    "shift_positions",
    "stand_ins",
    "start_values",
    "switch",
    "told_of_prefix",
    "train_copies",
    "unbecome",
    "zeros_for",
]
