"""The non-linearities of adapters, and their slopes, on tiles of fp32

    relu max(h, 0)    gelu h Φ(h)    silu h σ(h)    gelu_tanh h σ(2u), u = √(2/π) (h + 0.044715 h³)

They are those of deltaops/reference/activation.py: (1 + tanh u) / 2 is σ(2u), and Triton has no
tanh of its own on every architecture. ``KIND`` is the name that the ops take.
"""

import triton
import triton.language as tl

_ROOT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)  # √(1/2)
_DENSITY: tl.constexpr = tl.constexpr(0.3989422804014327)  # 1/√(2π)
_TWICE: tl.constexpr = tl.constexpr(1.5957691216057308)  # 2 √(2/π)
_CUBE: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def activate(h, KIND: tl.constexpr):
    """φ(h)."""
    out = h
    if KIND == "relu":
        out = tl.where(h <= 0.0, 0.0, h)  # NaN stays visible, as in torch
    elif KIND == "gelu":
        out = h * (0.5 + 0.5 * tl.erf(h * _ROOT_HALF))
    elif KIND == "gelu_tanh":
        out = h * tl.sigmoid(_TWICE * (h + _CUBE * h * h * h))
    elif KIND == "silu":
        out = h * tl.sigmoid(h)
    return out


@triton.jit
def activate_slope(h, KIND: tl.constexpr):
    """φ'(h)."""
    out = tl.full(h.shape, 1.0, tl.float32)
    if KIND == "relu":
        out = tl.where(h <= 0.0, 0.0, 1.0)
    elif KIND == "gelu":
        out = 0.5 + 0.5 * tl.erf(h * _ROOT_HALF) + h * (_DENSITY * tl.exp(-0.5 * h * h))
    elif KIND == "gelu_tanh":
        v = _TWICE * (h + _CUBE * h * h * h)
        low = tl.exp(-tl.abs(v))
        high = 1.0 / (1.0 + low)
        gate = tl.where(v >= 0.0, high, low * high)
        bend = low * high * high  # σ(v) σ(-v): 1 - σ(v) would lose its digits
        # where the bend has gone to 0, h² may have gone to infinity
        steep = h * bend * _TWICE * (1.0 + 3.0 * _CUBE * h * h)
        out = gate + tl.where(bend == 0.0, 0.0, steep)
    elif KIND == "silu":
        gate = tl.sigmoid(h)
        out = gate + h * gate * (1.0 - gate)
    return out
