"""``prefix_attention`` for JAX on the CPU."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deltaops.bindings.settings import threads
from deltaops.errors import ShapeError

from .autodiff import Op, Operands, apply
from .ffi import Array, check, ffi_call, like

OP = "prefix_attention"
TRAINED = ("q", "k", "v", "prefix_k", "prefix_v")


class Settings(NamedTuple):
    """What is static of a call."""

    scale: float
    causal: bool
    num_threads: int

    def attributes(self, operands: Operands) -> dict[str, Any]:
        """As both handlers take them."""
        return {
            "masked": "mask" in operands,
            "scale": np.float32(self.scale),
            "causal": self.causal,
            "num_threads": np.int32(self.num_threads),
        }


def prefix_attention(
    q: Array,
    k: Array,
    v: Array,
    prefix_k: Array,
    prefix_v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    num_threads: int | None = None,
) -> Array:
    """Softmax attention with trained keys and values before the sequence's own.

    Args:
        q: ``[B, H, Lq, D]`` float32 or bfloat16.
        k: ``[B, Hkv, Lk, D]``; H / Hkv neighbouring heads of queries share one.
        v: as ``k``.
        prefix_k: ``[Hkv, P, D]``, which every query sees and the batch shares.
        prefix_v: as ``prefix_k``.
        mask: bool ``[B or 1, H or 1, Lq or 1, Lk or 1]``: True where a query sees a key.
        causal: query i sees keys 0 … i; Lq = Lk.
        scale: of the scores; None: 1 / √D.
        num_threads: None: all processors.
    Returns: ``[B, H, Lq, D]`` in the dtype of ``q``.
    Raises: DtypeError, ShapeError, ConfigError; what JAX raises for a platform other than the CPU.
    Gradients: q, k, v and both of the prefix; first order, reverse mode.
    Source: Li and Liang 2021 (arXiv 2101.00190).
    """
    q = check(OP, "q", q, (None,) * 4)
    batch, heads, length, d = q.shape
    k = check(OP, "k", k, (batch, None, None, d), q.dtype)
    if k.shape[1] < 1 or heads % k.shape[1]:
        raise ShapeError(
            f"{OP}: q must have a multiple of the heads of k, got {heads} and {k.shape[1]}. Heads "
            "of keys are shared by equally many heads of queries."
        )
    if causal and length != k.shape[2]:
        raise ShapeError(
            f"{OP}: causal needs as many queries as keys, got {length} and {k.shape[2]}. Pass a "
            "mask that says which query sees which key."
        )
    prefix_k = check(OP, "prefix_k", prefix_k, (k.shape[1], None, d))
    operands = {
        "q": q,
        "k": k,
        "v": check(OP, "v", v, k.shape, q.dtype),
        "prefix_k": prefix_k,
        "prefix_v": check(OP, "prefix_v", prefix_v, prefix_k.shape, prefix_k.dtype),
    }
    if mask is not None:
        mask = check(OP, "mask", mask, (None,) * 4, jnp.bool_)
        full = (batch, heads, length, k.shape[2])
        if any(size not in (1, all_) for size, all_ in zip(mask.shape, full, strict=True)):
            raise ShapeError(
                f"{OP}: mask must be {list(full)}, or 1 in any axis; got {list(mask.shape)}."
            )
        operands["mask"] = mask
    scale = d**-0.5 if scale is None else float(scale)
    return apply(PREFIX_ATTENTION, Settings(scale, bool(causal), threads(num_threads)), operands)


def forward(settings: Settings, operands: Operands, keep: bool) -> tuple[Array, Operands]:
    """y ``[B, H, Lq, D]`` and lse ``[B, H, Lq]``."""
    q = operands["q"]
    y, lse = ffi_call(
        "prefix_attention_forward",
        [like(q.shape, q.dtype), like(q.shape[:3], jnp.float32)],
        [operands[name] for name in (*TRAINED, "mask") if name in operands],
        **settings.attributes(operands),
    )
    return y, {"y": y, "lse": lse} if keep else {}


def backward(
    settings: Settings, operands: Operands, grad_y: Array, wanted: tuple[str, ...]
) -> Operands:
    """The gradients of ``wanted``."""
    names = [name for name in TRAINED if name in wanted]
    given = [operands[name] for name in (*TRAINED, "mask") if name in operands]
    grads = ffi_call(
        "prefix_attention_backward",
        [like(operands[name].shape, operands[name].dtype) for name in names],
        [*given, grad_y, operands["y"], operands["lse"]],
        wanted=np.array([name in names for name in TRAINED], np.int32),
        **settings.attributes(operands),
    )
    return dict(zip(names, grads, strict=True))


def _saved(settings: Settings, there: Collection[str], wanted: tuple[str, ...]) -> Collection[str]:
    return there


PREFIX_ATTENTION = Op(OP, forward, backward, _saved, frozenset({"mask"}))
