"""The CPU ops on NumPy arrays, as ``deltaops.numpy``: forward and backward, nothing copied.

    import deltaops.numpy as dn

    layer = dn.PackedWeight(weight)                       # once, for a frozen weight
    y, s = dn.delta_linear_forward(x, layer, bias, [dn.Branch(a, b, scaling=2.0)])
    grads = dn.delta_linear_backward(grad_y, x, layer, s, [dn.Branch(a, b, scaling=2.0)])
    grads["a.0"], grads["b.0"], grads["x"]

float32, or the bfloat16 of ml_dtypes. Arrays that the native core cannot use as they lie are
refused (:class:`deltaops.errors.LayoutError`), outputs go to ``out`` where that is given, the
interpreter's lock is free meanwhile, and calls from several threads are safe. torch takes no part,
though ``import deltaops`` loads it.
"""

from .adapters import (
    bottleneck_backward,
    bottleneck_forward,
    norm_bias_backward,
    norm_bias_forward,
)
from .elementwise import cross_entropy_backward, cross_entropy_forward, gated, gated_backward
from .group import Layer, delta_linear_group_backward, delta_linear_group_forward
from .heads import attention_backward, attention_forward, rotary
from .linear import Branch, delta_linear, delta_linear_backward, delta_linear_forward
from .packed import PackedWeight

__all__ = [
    "Branch",
    "Layer",
    "PackedWeight",
    "attention_backward",
    "attention_forward",
    "bottleneck_backward",
    "bottleneck_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "delta_linear",
    "delta_linear_backward",
    "delta_linear_forward",
    "delta_linear_group_backward",
    "delta_linear_group_forward",
    "gated",
    "gated_backward",
    "norm_bias_backward",
    "norm_bias_forward",
    "rotary",
]
