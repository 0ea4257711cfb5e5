"""The non-linearities of adapters, and their slopes.

relu       max(h, 0)
gelu       h Φ(h),  Φ(h) = (1 + erf(h/√2)) / 2                  (Hendrycks and Gimpel 2016)
gelu_tanh  h (1 + tanh u) / 2,  u = √(2/π) (h + 0.044715 h³)    (the same, approximated)
silu       h σ(h)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

_VALUE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": torch.relu,
    "gelu": gelu,
    "gelu_tanh": lambda h: gelu(h, approximate="tanh"),
    "silu": silu,
}

ACTIVATIONS = tuple(_VALUE)
"""The names, as ``Branch.activation`` takes them."""


def activate(kind: str, h: Tensor) -> Tensor:
    """φ(h)."""
    return _VALUE[kind](h)


def activate_slope(kind: str, h: Tensor) -> Tensor:
    """φ'(h); that of relu is 0 at 0, and NaN stays visible as in torch (slope 1)."""
    return _SLOPE[kind](h)


def _gelu_slope(h: Tensor) -> Tensor:
    density = torch.exp(-h * h / 2) / math.sqrt(2 * math.pi)
    return (1 + torch.erf(h / math.sqrt(2))) / 2 + h * density


def _gelu_tanh_slope(h: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (h + 0.044715 * h**3))
    return (1 + t) / 2 + h * (1 - t * t) / 2 * c * (1 + 3 * 0.044715 * h * h)


def _silu_slope(h: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(h)
    return sigmoid * (1 + h * (1 - sigmoid))


_SLOPE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "relu": lambda h: torch.where(h <= 0, 0.0, 1.0).to(h.dtype),
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "silu": _silu_slope,
}
