"""Modules that hold a place's parameters; surgery swaps them in by ``__class__``.

``conv1d`` and ``peft_linear`` import transformers and peft, so they are not imported here.
"""

from .adapter import AdapterSettings, Bottleneck, near_zero
from .around import Relay
from .attention_block import AttentionBlock
from .attention_functions import stand_ins
from .block import Block, GatedMlpBlock, RmsNormBlock, activation_of
from .dora import nonzero, row_norms
from .embedding import (
    DeltaEmbedding,
    become_embedding,
    start_embedding,
    unbecome_embedding,
)
from .factor import Factor, start_values
from .kept import activate_copies, copies, follow, give_back, has_copies, train_copies, zeros_for
from .kinds import delta_class, frozen_class, is_conv1d
from .kronecker import KroneckerSum, start_rule, start_sum
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
from .prefix import add_prefix, remove_prefix, switch
from .program import Program, program_of
from .sharing import APART, sharing

__all__ = [
    "APART",
    "UNFROZEN",
    "AdapterSettings",
    "AttentionBlock",
    "BiasedNorm",
    "Block",
    "Bottleneck",
    "DeltaEmbedding",
    "DeltaLinear",
    "DeltaPlace",
    "Factor",
    "FrozenLinear",
    "GatedMlpBlock",
    "KroneckerSum",
    "LinearPlace",
    "LoraSettings",
    "Program",
    "Relay",
    "RmsNormBlock",
    "activate_copies",
    "activation_of",
    "add_prefix",
    "allow_bias",
    "become",
    "become_embedding",
    "copies",
    "delta_class",
    "disallow_bias",
    "features",
    "follow",
    "frozen_class",
    "give_back",
    "has_copies",
    "is_conv1d",
    "is_norm",
    "lacks_bias",
    "near_zero",
    "nonzero",
    "plain_linear",
    "program_of",
    "remove_prefix",
    "row_norms",
    "sharing",
    "stand_ins",
    "start_embedding",
    "start_rule",
    "start_sum",
    "start_values",
    "switch",
    "train_copies",
    "unbecome",
    "unbecome_embedding",
    "zeros_for",
]
