"""The CPU ops in JAX, as ``deltaops.jax``: under jit, grad, vmap, scan and remat.

    import deltaops.jax as dj

    layer = dj.pack_weight(weight)                        # once, for a frozen weight
    y = dj.delta_linear(x, layer, bias, [dj.Branch(a, b, scaling=2.0)])

float32 and bfloat16, through XLA's foreign functions, on the CPU alone. Their module,
``deltaops._xla``, is built where jaxlib is installed beside deltaops.
"""

from .adapters import bottleneck, norm_bias
from .attention import prefix_attention
from .linear import Branch, PackedWeight, delta_linear, pack_weight
from .peft import load_lora, save_lora

__all__ = [
    "Branch",
    "PackedWeight",
    "bottleneck",
    "delta_linear",
    "load_lora",
    "norm_bias",
    "pack_weight",
    "prefix_attention",
    "save_lora",
]
