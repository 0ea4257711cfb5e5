"""``gated`` and ``cross_entropy`` for JAX on the CPU."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deltaops.bindings.settings import code, threads
from deltaops.native import ACTIVATIONS, REDUCTIONS

from .autodiff import Op, Operands, apply
from .ffi import Array, as_rows, check, ffi_call, like


class Gated(NamedTuple):
    """What is static of a call."""

    activation: int
    num_threads: int

    def attributes(self) -> dict[str, Any]:
        """As both handlers take them."""
        return {
            "activation": np.int32(self.activation),
            "num_threads": np.int32(self.num_threads),
        }


def gated(
    gate: Array, up: Array, *, activation: str = "silu", num_threads: int | None = None
) -> Array:
    """``act(gate) · up``, the product in the middle of a gated MLP.

    Args:
        gate: ``[…, K]`` float32 or bfloat16.
        up: shape and dtype of ``gate``.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "identity".
        num_threads: None: all processors.
    Returns: ``[…, K]`` in the dtype of ``gate``.
    Raises: DtypeError, ShapeError, ConfigError; what JAX raises for a platform other than the CPU.
    Gradients: both; first order, reverse mode.
    Source: Shazeer 2020 (arXiv 2002.05202).
    """
    op = "gated"
    gate = as_rows(op, "gate", gate)
    up = check(op, "up", up, gate.shape, gate.dtype)
    flat = (math.prod(gate.shape[:-1]), gate.shape[-1])
    settings = Gated(code(op, "activation", ACTIVATIONS, activation), threads(num_threads))
    operands = {"gate": gate.reshape(flat), "up": up.reshape(flat)}
    return apply(GATED, settings, operands).reshape(gate.shape)


def gated_forward(settings: Gated, operands: Operands, keep: bool) -> tuple[Array, Operands]:
    """y ``[M, K]``; nothing more is kept."""
    gate = operands["gate"]
    (y,) = ffi_call(
        "gated_forward",
        [like(gate.shape, gate.dtype)],
        [gate, operands["up"]],
        **settings.attributes(),
    )
    return y, {}


def gated_backward(
    settings: Gated, operands: Operands, grad_y: Array, wanted: tuple[str, ...]
) -> Operands:
    """The gradients of ``wanted``."""
    names = [name for name in ("gate", "up") if name in wanted]
    found = ffi_call(
        "gated_backward",
        [like(grad_y.shape, grad_y.dtype) for _ in names],
        [grad_y, operands["gate"], *([operands["up"]] if "gate" in names else [])],
        wanted=np.array([name in names for name in ("gate", "up")], np.int32),
        **settings.attributes(),
    )
    return dict(zip(names, found, strict=True))


def _gated_saved(
    settings: Gated, there: Collection[str], wanted: tuple[str, ...]
) -> Collection[str]:
    return ["gate", "up"] if "gate" in wanted else ["gate"]


GATED = Op("gated", gated_forward, gated_backward, _gated_saved, frozenset())


class CrossEntropy(NamedTuple):
    """What is static of a call."""

    ignore_index: int
    reduction: int
    num_threads: int

    def attributes(self) -> dict[str, Any]:
        """As both handlers take them."""
        return {
            "ignore_index": np.int64(self.ignore_index),
            "reduction": np.int32(self.reduction),
            "num_threads": np.int32(self.num_threads),
        }


def cross_entropy(
    logits: Array,
    target: Array,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_threads: int | None = None,
) -> Array:
    """The loss of rows of logits, each against one class; no probability is kept.

    Args:
        logits: ``[M, V]`` float32 or bfloat16.
        target: int32 or int64 ``[M]``: classes, or ``ignore_index``.
        ignore_index: of rows that do not count.
        reduction: "mean" over the rows that count (NaN where none does), or "sum".
        num_threads: None: all processors.
    Returns: a scalar, float32.
    Raises: DtypeError, ShapeError, ConfigError; at run time what JAX raises, with the row, for a
        target that is no class, and for a platform other than the CPU.
    Gradients: ``logits``; first order, reverse mode.
    """
    op = "cross_entropy"
    logits = check(op, "logits", logits, (None, None))
    target = check(op, "target", target, logits.shape[:1], (jnp.int32, jnp.int64))
    mode = code(op, "reduction", REDUCTIONS, reduction)
    settings = CrossEntropy(int(ignore_index), mode, threads(num_threads))
    return apply(CROSS_ENTROPY, settings, {"logits": logits, "target": target})


def cross_entropy_forward(
    settings: CrossEntropy, operands: Operands, keep: bool
) -> tuple[Array, Operands]:
    """The loss and state ``[M, 2]``."""
    logits = operands["logits"]
    loss, state = ffi_call(
        "cross_entropy_forward",
        [like((), jnp.float32), like((logits.shape[0], 2), jnp.float32)],
        [logits, operands["target"]],
        **settings.attributes(),
    )
    return loss, {"state": state} if keep else {}


def cross_entropy_backward(
    settings: CrossEntropy, operands: Operands, grad_y: Array, wanted: tuple[str, ...]
) -> Operands:
    """The gradient of the logits."""
    logits = operands["logits"]
    (grad,) = ffi_call(
        "cross_entropy_backward",
        [like(logits.shape, logits.dtype)],
        [grad_y, logits, operands["target"], operands["state"]],
        **settings.attributes(),
    )
    return {"logits": grad}


def _cross_entropy_saved(
    settings: CrossEntropy, there: Collection[str], wanted: tuple[str, ...]
) -> Collection[str]:
    return there


CROSS_ENTROPY = Op(
    "cross_entropy",
    cross_entropy_forward,
    cross_entropy_backward,
    _cross_entropy_saved,
    frozenset({"target"}),
)
