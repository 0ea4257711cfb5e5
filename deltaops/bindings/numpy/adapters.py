"""``bottleneck`` and ``norm_bias`` and their gradients, on arrays.

Parameters are contiguous, float32 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from deltaops.bindings.settings import code as word
from deltaops.bindings.settings import threads
from deltaops.errors import ConfigError
from deltaops.native import ACTIVATIONS, NORMS

from .arrays import (
    Array,
    address,
    call,
    check,
    code,
    core,
    gradients,
    optional,
    output,
    parameter,
    stride,
)


def bottleneck_forward(
    x: Array,
    down: Array,
    up: Array,
    down_bias: Array | None = None,
    up_bias: Array | None = None,
    *,
    residual: Array | str | None = "x",
    scaling: float = 1.0,
    activation: str = "relu",
    norm: str = "none",
    gamma: Array | None = None,
    beta: Array | None = None,
    eps: float = 1e-5,
    num_threads: int | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array, Array]:
    """``y = residual + scaling · φ(norm(x) Downᵀ + down_bias) Upᵀ + up_bias``.

    Args:
        x: ``[M, K]`` float32 or bfloat16; rows may lie apart.
        down: ``[R, K]``.
        up: ``[K, R]``.
        down_bias: ``[R]`` or None.
        up_bias: ``[K]`` or None; not scaled.
        residual: "x" adds x itself, an array ``[M, K]`` adds that, None adds nothing.
        scaling: dimensionless.
        activation: φ: "identity", "relu", "gelu" (by erf), "gelu_tanh" or "silu".
        norm: "none", "layer" or "rms".
        gamma: ``[K]`` or None (1), with a norm only.
        beta: ``[K]`` or None (0), with a norm only.
        eps: added to the norm's variance.
        num_threads: None: all processors.
        out: y, h and stats, contiguous, any of them None.
    Returns: y ``[M, K]`` in the dtype of ``x``; h ``[M, R]`` and stats ``[M, 2]`` (``[0, 2]``
        without a norm) float32, for the backward pass.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "bottleneck"
    x = check(op, "x", x, (None, None), strided=True)
    (m, k), own = x.shape, isinstance(residual, str)
    if own and residual != "x":
        raise ConfigError(f"{op}: residual must be 'x', an array or None, got {residual!r}.")
    added = x if own else residual
    if added is not None:
        added = check(op, "residual", added, (m, k), x, strided=True)
    gamma, beta, down, down_bias, up, up_bias = parameters = _bottleneck_parameters(
        op, k, gamma, beta, down, down_bias, up, up_bias
    )
    rank, normed = down.shape[0], norm != "none"
    given = out or (None, None, None)
    y = output(op, "out", given[0], (m, k), x.dtype)
    h = output(op, "out", given[1], (m, rank), np.float32)
    stats = output(op, "out", given[2], (m if normed else 0, 2), np.float32)
    call(
        core().bottleneck_forward,
        code(x),
        m,
        k,
        rank,
        address(x),
        stride(x),
        address(added),
        stride(added),
        *[parameter(p) for p in parameters],
        address(y),
        address(h),
        address(stats) if normed else 0,
        scaling,
        eps,
        word(op, "activation", ACTIVATIONS, activation),
        word(op, "norm", NORMS, norm),
        threads(num_threads),
    )
    return y, h, stats


def bottleneck_backward(
    grad_y: Array,
    x: Array | None,
    h: Array,
    stats: Array,
    down: Array,
    up: Array,
    down_bias: Array | None = None,
    up_bias: Array | None = None,
    *,
    residual_is_x: bool = True,
    scaling: float = 1.0,
    activation: str = "relu",
    norm: str = "none",
    gamma: Array | None = None,
    beta: Array | None = None,
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
    out: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients by name: "x", "gamma", "beta", "down", "down_bias", "up", "up_bias".

    The gradient of a residual that is not x is ``grad_y`` itself.

    Args:
        grad_y: ``[M, K]``; rows may lie apart.
        x: as in the forward pass; None where "down" and what lies past a norm are not wanted.
        h: what the forward pass returned.
        stats: so too.
        down, up, down_bias, up_bias, scaling, activation, norm, gamma, beta: as in the forward
            pass; the biases are not read, and say whether they have a gradient.
        residual_is_x: whether x was its own residual.
        wanted: names; None: those of all parameters that were given, and of x.
        num_threads: None: all processors.
        out: arrays for some of the gradients, by name.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "bottleneck"
    grad_y = check(op, "grad_y", grad_y, (None, None), strided=True)
    m, k = grad_y.shape
    if x is not None:
        x = check(op, "x", x, (m, k), grad_y, strided=True)
    named = dict(zip(
        ("gamma", "beta", "down", "down_bias", "up", "up_bias"),
        _bottleneck_parameters(op, k, gamma, beta, down, down_bias, up, up_bias),
        strict=True,
    ))  # fmt: skip
    rank, normed = down.shape[0], norm != "none"
    h = check(op, "h", h, (m, rank), "float32")
    stats = check(op, "stats", stats, (m if normed else 0, 2), "float32")
    known: dict[str, tuple[tuple[int, ...], Any]] = {
        "x": ((m, k), grad_y.dtype),
        **{name: (p.shape, p.dtype) for name, p in named.items() if p is not None},
    }
    found = gradients(op, known, wanted, out)
    call(
        core().bottleneck_backward,
        code(grad_y),
        m,
        k,
        rank,
        address(grad_y),
        stride(grad_y),
        address(x),
        stride(x),
        address(h),
        address(stats) if normed else 0,
        *[parameter(named[name]) for name in ("gamma", "beta", "down", "up")],
        address(found.get("x")),
        *[parameter(found.get(name)) for name in named],
        scaling,
        word(op, "activation", ACTIVATIONS, activation),
        word(op, "norm", NORMS, norm),
        residual_is_x,
        threads(num_threads),
    )
    return found


def _bottleneck_parameters(
    op: str,
    k: int,
    gamma: Array | None,
    beta: Array | None,
    down: Array,
    down_bias: Array | None,
    up: Array,
    up_bias: Array | None,
) -> tuple[Array | None, Array | None, Array, Array | None, Array, Array | None]:
    """As given, checked, in the core's order."""
    down = check(op, "down", down, (None, k))
    rank = down.shape[0]
    return (
        optional(op, "gamma", gamma, (k,)),
        optional(op, "beta", beta, (k,)),
        down,
        optional(op, "down_bias", down_bias, (rank,)),
        check(op, "up", up, (k, rank)),
        optional(op, "up_bias", up_bias, (k,)),
    )


def norm_bias_forward(
    x: Array,
    gamma: Array | None = None,
    bias: Array | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
    num_threads: int | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """``y = (x − mean) · rstd · gamma + bias``, LayerNorm or ("rms", mean 0) RMSNorm.

    Without a norm ``x · gamma + bias``: the gains of (IA)³.

    Args:
        x: ``[M, K]`` float32 or bfloat16; rows may lie apart.
        gamma: ``[K]`` or None: 1.
        bias: ``[K]`` or None: 0.
        norm: "layer", "rms" or "none".
        eps: added to the variance.
        num_threads: None: all processors.
        out: y and stats, contiguous, either of them None.
    Returns: y ``[M, K]`` in the dtype of ``x``; stats ``[M, 2]`` (``[0, 2]`` without a norm)
        float32, for the backward pass.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "norm_bias"
    x = check(op, "x", x, (None, None), strided=True)
    m, k = x.shape
    gamma, bias = optional(op, "gamma", gamma, (k,)), optional(op, "bias", bias, (k,))
    given = out or (None, None)
    y = output(op, "out", given[0], (m, k), x.dtype)
    normed = norm != "none"
    stats = output(op, "out", given[1], (m if normed else 0, 2), np.float32)
    call(
        core().norm_bias_forward,
        code(x),
        m,
        k,
        address(x),
        stride(x),
        parameter(gamma),
        parameter(bias),
        address(y),
        address(stats) if normed else 0,
        eps,
        word(op, "norm", NORMS, norm),
        threads(num_threads),
    )
    return y, stats


def norm_bias_backward(
    grad_y: Array,
    x: Array | None,
    stats: Array | None,
    gamma: Array | None = None,
    bias: Array | None = None,
    *,
    norm: str = "layer",
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
    out: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients by name: "x", "gamma", "bias".

    Args:
        grad_y: ``[M, K]``; rows may lie apart.
        x: as in the forward pass; None where "bias" alone is wanted, or without a norm no "gamma".
        stats: what the forward pass returned; None as x.
        gamma, bias, norm: as in the forward pass; the bias is not read, and says whether it has a
            gradient.
        wanted: names; None: those of all parameters that were given, and of x.
        num_threads: None: all processors.
        out: arrays for some of the gradients, by name.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "norm_bias"
    grad_y = check(op, "grad_y", grad_y, (None, None), strided=True)
    m, k = grad_y.shape
    if x is not None:
        x = check(op, "x", x, (m, k), grad_y, strided=True)
    normed = norm != "none"
    stats = optional(op, "stats", stats, (m if normed else 0, 2), "float32")
    gamma, bias = optional(op, "gamma", gamma, (k,)), optional(op, "bias", bias, (k,))
    known: dict[str, tuple[tuple[int, ...], Any]] = {
        "x": ((m, k), grad_y.dtype),
        **{n: (p.shape, p.dtype) for n, p in (("gamma", gamma), ("bias", bias)) if p is not None},
    }
    found = gradients(op, known, wanted, out)
    call(
        core().norm_bias_backward,
        code(grad_y),
        m,
        k,
        address(grad_y),
        stride(grad_y),
        address(x),
        stride(x),
        address(stats) if normed else 0,
        parameter(gamma),
        address(found.get("x")),
        parameter(found.get("gamma")),
        parameter(found.get("bias")),
        word(op, "norm", NORMS, norm),
        threads(num_threads),
    )
    return found
