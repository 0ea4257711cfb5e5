"""``gated`` and ``cross_entropy`` and their gradients, on arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from deltaops.bindings.settings import code as word
from deltaops.bindings.settings import threads
from deltaops.native import ACTIVATIONS, REDUCTIONS

from .arrays import Array, address, call, check, code, core, gradients, output, stride


def gated(
    gate: Array,
    up: Array | None,
    *,
    activation: str = "silu",
    num_threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """``act(gate) · up``, the product in the middle of a gated MLP.

    Args:
        gate: ``[M, K]`` float32 or bfloat16; rows may lie apart.
        up: alike; None: the activation alone.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "identity".
        num_threads: None: all processors.
        out: ``[M, K]``, contiguous, or None.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "gated"
    gate = check(op, "gate", gate, (None, None), strided=True)
    if up is not None:
        up = check(op, "up", up, gate.shape, gate, strided=True)
    y = output(op, "out", out, gate.shape, gate.dtype)
    call(
        core().gated_forward,
        code(gate),
        *gate.shape,
        address(gate),
        stride(gate),
        address(up),
        stride(up),
        address(y),
        word(op, "activation", ACTIVATIONS, activation),
        threads(num_threads),
    )
    return y


def gated_backward(
    grad_y: Array,
    gate: Array,
    up: Array | None,
    *,
    activation: str = "silu",
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
    out: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients by name: "gate", "up".

    Args:
        grad_y: ``[M, K]``; rows may lie apart.
        gate: as in the forward pass.
        up: so too; it may be None as well where "gate" is not wanted.
        activation: as in the forward pass.
        wanted: names; None: both, of the activation alone that of "gate".
        num_threads: None: all processors.
        out: arrays for some of the gradients, by name.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "gated"
    grad_y = check(op, "grad_y", grad_y, (None, None), strided=True)
    gate = check(op, "gate", gate, grad_y.shape, grad_y, strided=True)
    if up is not None:
        up = check(op, "up", up, grad_y.shape, grad_y, strided=True)
    like = (grad_y.shape, grad_y.dtype)
    if up is None and wanted is None:
        wanted = ("gate",)
    found = gradients(op, {"gate": like, "up": like}, wanted, out)
    call(
        core().gated_backward,
        code(grad_y),
        *grad_y.shape,
        address(grad_y),
        stride(grad_y),
        address(gate),
        stride(gate),
        address(up),
        stride(up),
        address(found.get("gate")),
        address(found.get("up")),
        word(op, "activation", ACTIVATIONS, activation),
        threads(num_threads),
    )
    return found


def cross_entropy_forward(
    logits: Array,
    target: Array,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_threads: int | None = None,
    out: Array | None = None,
) -> tuple[float, Array]:
    """The loss of rows of logits, each against one class.

    Args:
        logits: ``[M, V]`` float32 or bfloat16; rows may lie apart.
        target: int64 ``[M]``: classes, or ``ignore_index``.
        ignore_index: of rows that do not count.
        reduction: "mean" over the rows that count (NaN where none does), or "sum".
        num_threads: None: all processors.
        out: for the state, contiguous, or None.
    Returns: the loss, rounded to float32; state ``[M, 2]`` float32, for the backward pass.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "cross_entropy"
    logits = check(op, "logits", logits, (None, None), strided=True)
    target = check(op, "target", target, (logits.shape[0],), "int64")
    state = output(op, "out", out, (logits.shape[0], 2), np.float32)
    loss: float = call(
        core().cross_entropy_forward,
        code(logits),
        *logits.shape,
        address(logits),
        stride(logits),
        address(target),
        ignore_index,
        bool(word(op, "reduction", REDUCTIONS, reduction)),
        address(state),
        threads(num_threads),
    )
    return loss, state


def cross_entropy_backward(
    logits: Array,
    target: Array,
    state: Array,
    *,
    grad_loss: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """The gradient of the logits ``[M, V]``, in their dtype.

    Args:
        logits: as in the forward pass.
        target: so too.
        state: what the forward pass returned.
        grad_loss: the gradient of the loss.
        ignore_index: as in the forward pass.
        reduction: so too.
        num_threads: None: all processors.
        out: ``[M, V]``, contiguous, or None.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "cross_entropy"
    logits = check(op, "logits", logits, (None, None), strided=True)
    target = check(op, "target", target, (logits.shape[0],), "int64")
    state = check(op, "state", state, (logits.shape[0], 2), "float32")
    grad = output(op, "out", out, logits.shape, logits.dtype)
    call(
        core().cross_entropy_backward,
        code(logits),
        *logits.shape,
        address(logits),
        stride(logits),
        address(target),
        ignore_index,
        bool(word(op, "reduction", REDUCTIONS, reduction)),
        address(state),
        float(grad_loss),
        address(grad),
        threads(num_threads),
    )
    return grad
