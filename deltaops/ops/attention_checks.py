"""What every attention holds its queries, keys, values, mask and scale to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaops.errors import ConfigError, DtypeError, ShapeError

from .paths import check_device


def checked_scale(op: str, scale: float | None, q: Tensor) -> float:
    """``scale``, or the usual one where it is None.

    Raises: ConfigError.
    """
    if scale is None:
        return float(q.shape[3] ** -0.5)
    if not math.isfinite(scale):
        raise ConfigError(f"{op}: scale must be finite, got {scale}.")
    return float(scale)  # of a whole number a kernel would be compiled anew for each


def check_heads(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> None:
    """Raise ShapeError, DtypeError or DeviceError unless these are an attention's."""
    if q.dim() != 4 or q.shape[3] < 1:
        raise ShapeError(f"{op}: q must be [B, H, Lq, D] with D ≥ 1, got {list(q.shape)}.")
    b, h, l_q, d = q.shape
    if k.dim() != 4 or k.shape[0] != b or k.shape[3] != d:
        raise ShapeError(
            f"{op}: k must be [B, Hkv, Lk, D], here [{b}, Hkv, Lk, {d}], got "
            f"{list(k.shape)}. Are q and k of the same batch and heads of the same width?"
        )
    h_kv, l_kv = k.shape[1:3]
    if h_kv < 1 or h % h_kv:
        raise ShapeError(
            f"{op}: the heads of q must be a multiple of those of k, got {h} and {h_kv}. "
            "Each head of k serves as many heads of q as the others do."
        )
    if v.shape != k.shape:
        raise ShapeError(f"{op}: v must be {list(k.shape)}, as k is, got {list(v.shape)}.")
    if causal and l_q != l_kv:
        raise ShapeError(
            f"{op}: causal wants as many queries as keys, got {l_q} and {l_kv}: which keys "
            "come before a query is not told by their numbers. Pass a mask instead."
        )
    if not q.is_floating_point():
        raise DtypeError(f"{op}: q must be floating point, got {q.dtype}. Convert it.")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise DtypeError(
                f"{op}: {name} must be {q.dtype}, as q is, got {t.dtype}. Convert one of them."
            )
        check_device(op, name, t, q, of="q")
    if mask is not None:
        _check_mask(op, mask, (b, h, l_q, l_kv))
        check_device(op, "mask", mask, q, of="q")


def _check_mask(op: str, mask: Tensor, full: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool:
        raise DtypeError(
            f"{op}: mask must be torch.bool, True where a query sees a key, got {mask.dtype}. "
            "Add a mask of numbers to the scores in torch."
        )
    fits = mask.dim() == 4 and all(
        [size in (1, whole) for size, whole in zip(mask.shape, full, strict=True)]
    )
    if not fits:
        names = ", ".join(f"{whole} or 1" for whole in full)
        raise ShapeError(
            f"{op}: mask must be [B, H, Lq, Lk], here [{names}], got {list(mask.shape)}."
        )
