"""``rotary``, ``attention`` and ``prefix_attention`` for JAX on the CPU."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deltaops.bindings.settings import attention_scale, check_heads, threads
from deltaops.errors import ShapeError

from .autodiff import Op, Operands, apply
from .ffi import Array, check, ffi_call, like

TRAINED = ("q", "k", "v", "prefix_k", "prefix_v")


class Attention(NamedTuple):
    """What is static of a call."""

    scale: float
    causal: bool
    num_threads: int
    bias_from: int = -1
    """The first key that a bias is added to, of prefix and sequence; −1: there is none."""

    def attributes(self, operands: Operands) -> dict[str, Any]:
        """As both handlers take them."""
        return {
            "prefixed": "prefix_k" in operands,
            "masked": "mask" in operands,
            "bias_from": np.int64(self.bias_from),
            "scale": np.float32(self.scale),
            "causal": self.causal,
            "num_threads": np.int32(self.num_threads),
        }


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    num_threads: int | None = None,
) -> Array:
    """Softmax attention; the scores are never kept.

    Args:
        q: ``[B, H, Lq, D]`` float32 or bfloat16.
        k: ``[B, Hkv, Lk, D]``; H / Hkv neighbouring heads of queries share one.
        v: as ``k``.
        mask: bool ``[B or 1, H or 1, Lq or 1, Lk or 1]``: True where a query sees a key.
        causal: query i sees keys 0 … i; Lq = Lk.
        scale: of the scores; None: 1 / √D.
        num_threads: None: all processors.
    Returns: ``[B, H, Lq, D]`` in the dtype of ``q``; zeros for a query that sees no key.
    Raises: DtypeError, ShapeError, ConfigError; what JAX raises for a platform other than the CPU.
    Gradients: q, k and v; first order, reverse mode.
    Source: Vaswani et al. 2017 (arXiv 1706.03762); computed as by Dao et al. 2022 (arXiv
        2205.14135).
    """
    op = "attention"
    operands = _operands(op, q, k, v, None, mask, causal)
    return apply(ATTENTION, _settings(op, operands, causal, scale, num_threads), operands)


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
    bias: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Softmax attention with trained keys and values before the sequence's own.

    Args:
        q, k, v, mask, causal, scale, num_threads: as of :func:`attention`.
        prefix_k: ``[Hkv, P, D]``, which every query sees and the batch shares.
        prefix_v: as ``prefix_k``.
        bias: frozen, added to the scores, float32 or bfloat16: ``[B or 1, H or 1, Lq or 1, …]``
            with Lk columns (or 1) for the sequence's own keys, or P + Lk for those of the prefix
            too.
    Returns: ``[B, H, Lq, D]`` in the dtype of ``q``.
    Raises: DtypeError, ShapeError, ConfigError, GradientError; what JAX raises for a platform other
        than the CPU.
    Gradients: q, k, v and both of the prefix; first order, reverse mode.
    Source: Li and Liang 2021 (arXiv 2101.00190).
    """
    op = "prefix_attention"
    operands = _operands(op, q, k, v, (prefix_k, prefix_v), mask, causal)
    settings = _settings(op, operands, causal, scale, num_threads)
    if bias is not None:
        start = operands["prefix_k"].shape[1]
        bias = check(op, "bias", bias, (None,) * 4)
        full = (*operands["q"].shape[:3], operands["k"].shape[2])
        *lead, columns = bias.shape
        fits = all(n in (1, all_) for n, all_ in zip(lead, full, strict=False))
        if not fits or columns not in (1, full[3], start + full[3]):
            raise ShapeError(
                f"{op}: bias must be {list(full)}, or 1 in any axis, or with {start + full[3]} "
                f"columns for the prefix too; got {list(bias.shape)}."
            )
        operands["bias"] = bias.astype(jnp.float32)
        whole = columns == start + full[3]
        settings = settings._replace(bias_from=0 if whole else start)
    return apply(PREFIX_ATTENTION, settings, operands)


def _operands(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    prefix: tuple[Array, Array] | None,
    mask: Array | None,
    causal: bool,
) -> Operands:
    """Checked, by name."""
    q = check(op, "q", q, (None,) * 4)
    batch, heads, length, d = q.shape
    k = check(op, "k", k, (batch, None, None, d), q.dtype)
    check_heads(op, q.shape, k.shape, causal)
    operands = {"q": q, "k": k, "v": check(op, "v", v, k.shape, q.dtype)}
    if prefix is not None:
        first = check(op, "prefix_k", prefix[0], (k.shape[1], None, d))
        second = check(op, "prefix_v", prefix[1], first.shape, first.dtype)
        operands |= {"prefix_k": first, "prefix_v": second}
    if mask is not None:
        mask = check(op, "mask", mask, (None,) * 4, jnp.bool_)
        full = (batch, heads, length, k.shape[2])
        if any(size not in (1, all_) for size, all_ in zip(mask.shape, full, strict=True)):
            raise ShapeError(
                f"{op}: mask must be {list(full)}, or 1 in any axis; got {list(mask.shape)}."
            )
        operands["mask"] = mask
    return operands


def _settings(
    op: str, operands: Operands, causal: bool, scale: float | None, num_threads: int | None
) -> Attention:
    own = attention_scale(op, scale, operands["q"].shape)
    return Attention(own, bool(causal), threads(num_threads))


def attention_forward(
    settings: Attention, operands: Operands, keep: bool
) -> tuple[Array, Operands]:
    """y ``[B, H, Lq, D]`` and lse ``[B, H, Lq]``."""
    q = operands["q"]
    y, lse = ffi_call(
        "attention_forward",
        [like(q.shape, q.dtype), like(q.shape[:3], jnp.float32)],
        [operands[name] for name in (*TRAINED, "mask", "bias") if name in operands],
        **settings.attributes(operands),
    )
    return y, {"y": y, "lse": lse} if keep else {}


def attention_backward(
    settings: Attention, operands: Operands, grad_y: Array, wanted: tuple[str, ...]
) -> Operands:
    """The gradients of ``wanted``."""
    names = [name for name in TRAINED if name in wanted]
    given = [operands[name] for name in (*TRAINED, "mask", "bias") if name in operands]
    grads = ffi_call(
        "attention_backward",
        [like(operands[name].shape, operands[name].dtype) for name in names],
        [*given, grad_y, operands["y"], operands["lse"]],
        wanted=np.array([name in names for name in TRAINED], np.int32),
        **settings.attributes(operands),
    )
    return dict(zip(names, grads, strict=True))


def _attention_saved(
    settings: Attention, there: Collection[str], wanted: tuple[str, ...]
) -> Collection[str]:
    return there


ATTENTION = Op(
    "attention",
    attention_forward,
    attention_backward,
    _attention_saved,
    frozenset({"mask", "bias"}),
)
PREFIX_ATTENTION = ATTENTION._replace(name="prefix_attention")


class Rotary(NamedTuple):
    """What is static of a call."""

    num_threads: int


def rotary(x: Array, cos: Array, sin: Array, *, num_threads: int | None = None) -> Array:
    """Rotary position embedding, D cut into halves as Llama has it.

    Args:
        x: ``[B, H, L, D]`` float32 or bfloat16, D even.
        cos: ``[B or 1, L, D]``, float32 or the dtype of ``x``; both halves are read.
        sin: shape and dtype of ``cos``.
        num_threads: None: all processors.
    Returns: ``[B, H, L, D]`` in the dtype of ``x``.
    Raises: DtypeError, ShapeError, ConfigError, GradientError; what JAX raises for a platform other
        than the CPU.
    Gradients: ``x`` alone; first order, reverse mode.
    Source: Su et al. 2021 (arXiv 2104.09864).
    """
    op = "rotary"
    x = check(op, "x", x, (None,) * 4)
    batch, _, length, d = x.shape
    if d < 2 or d % 2:
        raise ShapeError(f"{op}: x must be [B, H, L, D] with D even, got {list(x.shape)}.")
    cos = check(op, "cos", cos, (None, length, d), (jnp.float32, x.dtype))
    if cos.shape[0] not in (1, batch):
        raise ShapeError(
            f"{op}: cos must be [{batch} or 1, {length}, {d}], got {list(cos.shape)}. Are these "
            "the angles of the tokens of x?"
        )
    sin = check(op, "sin", sin, cos.shape, cos.dtype)
    return apply(ROTARY, Rotary(threads(num_threads)), {"x": x, "cos": cos, "sin": sin})


def _turn(settings: Rotary, x: Array, operands: Operands, backward: bool) -> Array:
    (y,) = ffi_call(
        "rotary",
        [like(x.shape, x.dtype)],
        [x, operands["cos"], operands["sin"]],
        backward=backward,
        num_threads=np.int32(settings.num_threads),
    )
    return y


def rotary_forward(settings: Rotary, operands: Operands, keep: bool) -> tuple[Array, Operands]:
    """y ``[B, H, L, D]``; nothing more is kept."""
    return _turn(settings, operands["x"], operands, False), {}


def rotary_backward(
    settings: Rotary, operands: Operands, grad_y: Array, wanted: tuple[str, ...]
) -> Operands:
    """The gradient of x: its heads turned back."""
    return {"x": _turn(settings, grad_y, operands, True)}


def _rotary_saved(
    settings: Rotary, there: Collection[str], wanted: tuple[str, ...]
) -> Collection[str]:
    return ["cos", "sin"]


ROTARY = Op("rotary", rotary_forward, rotary_backward, _rotary_saved, frozenset({"cos", "sin"}))
