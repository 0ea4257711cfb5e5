"""The CPU ops in JAX, as ``deltaops.jax``: under jit, grad, vmap, scan and remat.

    import deltaops.jax as dj

    layer = dj.pack_weight(weight)                        # once, for a frozen weight
    y = dj.delta_linear(x, layer, bias, [dj.Branch(a, b, scaling=2.0)])

float32 and bfloat16, through XLA's foreign functions. Their module, ``deltaops._xla``, is built
where jaxlib is installed beside deltaops; ``deltaops._xla_cuda``, where nvcc is too, so far has
``dropout``, ``dropout_mask`` and LoRA in bfloat16.
"""

from .adapters import bottleneck, norm_bias
from .draws import dropout, dropout_mask
from .elementwise import cross_entropy, gated
from .group import Layer, delta_linear_group
from .heads import attention, prefix_attention, rotary
from .linear import Branch, PackedWeight, delta_linear, pack_weight
from .peft import load_lora, save_lora

__all__ = [
    "Branch",
    "Layer",
    "PackedWeight",
    "attention",
    "bottleneck",
    "cross_entropy",
    "delta_linear",
    "delta_linear_group",
    "dropout",
    "dropout_mask",
    "gated",
    "load_lora",
    "norm_bias",
    "pack_weight",
    "prefix_attention",
    "rotary",
    "save_lora",
]
