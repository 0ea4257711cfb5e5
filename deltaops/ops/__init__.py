"""One op per place of a model that a delta binds to."""

from deltaops.reference.quantized import QuantizedWeight

from .attention import attention
from .bottleneck import bottleneck
from .cross_entropy import cross_entropy
from .decompositions import decompositions
from .delta_linear import Branch, delta_linear, explain
from .delta_linear_group import Layer, delta_linear_group
from .dora_norm import dora_norm
from .flops import flop_formulas
from .gated import gated
from .norm_bias import norm_bias
from .prefix_attention import prefix_attention
from .prompt_embedding import prompt_embedding
from .quantized_linear import quantized_linear
from .rotary import rotary

__all__ = [
    "Branch",
    "Layer",
    "QuantizedWeight",
    "attention",
    "bottleneck",
    "cross_entropy",
    "decompositions",
    "delta_linear",
    "delta_linear_group",
    "dora_norm",
    "explain",
    "flop_formulas",
    "gated",
    "norm_bias",
    "prefix_attention",
    "prompt_embedding",
    "quantized_linear",
    "rotary",
]
