"""``bottleneck`` and ``norm_bias`` for JAX on the CPU."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deltaops.bindings.settings import code, threads
from deltaops.errors import ConfigError
from deltaops.native import ACTIVATIONS, NORMS

from .autodiff import Op, Operands, apply
from .ffi import Array, as_rows, check, ffi_call, like

# as csrc/bindings/xla_adapters.cpp
X, RESIDUAL, GAMMA, BETA, DOWN_BIAS, UP_BIAS, STATE = 1, 2, 4, 8, 16, 32, 64
BITS = {
    "residual": RESIDUAL, "gamma": GAMMA, "beta": BETA, "down_bias": DOWN_BIAS, "up_bias": UP_BIAS,
}  # fmt: skip


def _present(operands: Operands, names: Collection[str], more: int) -> np.int32:
    return np.int32(more | sum(BITS[name] for name in names if name in operands))


class Bottleneck(NamedTuple):
    """What is static of a call."""

    residual_is_x: bool
    scaling: float
    eps: float
    activation: int
    norm: int
    num_threads: int

    def attributes(self) -> dict[str, Any]:
        """As both handlers take them."""
        return {
            "residual_is_x": self.residual_is_x,
            "scaling": np.float32(self.scaling),
            "activation": np.int32(self.activation),
            "norm": np.int32(self.norm),
            "num_threads": np.int32(self.num_threads),
        }


def bottleneck(
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
) -> Array:
    """``y = residual + scaling · φ(norm(x) Downᵀ + down_bias) Upᵀ + up_bias``.

    Args:
        x: ``[…, K]`` float32 or bfloat16.
        down: ``[R, K]``; parameters are float32 or bfloat16, each for itself.
        up: ``[K, R]``.
        down_bias: ``[R]`` or None.
        up_bias: ``[K]`` or None; not scaled.
        residual: "x" adds x itself, an array of its shape adds that, None adds nothing.
        scaling: dimensionless.
        activation: φ: "identity", "relu", "gelu" (by erf), "gelu_tanh" or "silu".
        norm: "none", "layer" or "rms".
        gamma: ``[K]`` or None (1), with a norm only.
        beta: ``[K]`` or None (0), with a norm only.
        eps: added to the norm's variance.
        num_threads: None: all processors.
    Returns: ``[…, K]`` in the dtype of ``x``.
    Raises: DtypeError, ShapeError, ConfigError; what JAX raises for a platform other than the CPU.
    Gradients: every array; first order, reverse mode.
    Source: Houlsby et al. 2019 (arXiv 1902.00751); Pfeiffer et al. 2021 (arXiv 2005.00247).
    """
    op = "bottleneck"
    x = as_rows(op, "x", x)
    own, (rows, k) = isinstance(residual, str), (math.prod(x.shape[:-1]), x.shape[-1])
    if own and residual != "x":
        raise ConfigError(f"{op}: residual must be 'x', an array or None, got {residual!r}.")
    down = check(op, "down", down, (None, k))
    rank = down.shape[0]
    operands = {"x": x.reshape(rows, k), "down": down, "up": check(op, "up", up, (k, rank))}
    if not own and residual is not None:
        operands["residual"] = check(op, "residual", residual, x.shape, x.dtype).reshape(rows, k)
    vectors = {"gamma": gamma, "beta": beta, "down_bias": down_bias, "up_bias": up_bias}
    for name, vector in vectors.items():
        if vector is not None:
            operands[name] = check(op, name, vector, (rank if name == "down_bias" else k,))
    if norm == "none" and (gamma is not None or beta is not None):
        raise ConfigError(f"{op}: gamma and beta must be None without a norm.")
    settings = Bottleneck(
        own,
        float(scaling),
        float(eps),
        code(op, "activation", ACTIVATIONS, activation),
        code(op, "norm", NORMS, norm),
        threads(num_threads),
    )
    return apply(BOTTLENECK, settings, operands).reshape(x.shape)


def bottleneck_forward(
    settings: Bottleneck, operands: Operands, keep: bool
) -> tuple[Array, Operands]:
    """y ``[M, K]``, and where ``keep`` says so h ``[M, R]`` and with a norm stats ``[M, 2]``."""
    x, rank = operands["x"], operands["down"].shape[0]
    kept = {}
    if keep:
        kept["h"] = like((x.shape[0], rank), jnp.float32)
        if settings.norm:
            kept["stats"] = like((x.shape[0], 2), jnp.float32)
    order = ("x", "residual", "gamma", "beta", "down", "down_bias", "up", "up_bias")
    y, *found = ffi_call(
        "bottleneck_forward",
        [like(x.shape, x.dtype), *kept.values()],
        [operands[name] for name in order if name in operands],
        present=_present(operands, BITS, STATE if keep else 0),
        eps=np.float32(settings.eps),
        **settings.attributes(),
    )
    return y, dict(zip(kept, found, strict=True))


def bottleneck_backward(
    settings: Bottleneck, operands: Operands, grad_y: Array, wanted: tuple[str, ...]
) -> Operands:
    """The gradients of ``wanted``."""
    known = ("x", "gamma", "beta", "down", "down_bias", "up", "up_bias")
    native = [name for name in known if name in wanted]
    found = {"residual": grad_y} if "residual" in wanted else {}
    if not native:
        return found
    order = ("x", "h", "stats", "gamma", "beta", "down", "up")
    of = operands | {"x": grad_y}  # which its gradient has shape and dtype of
    grads = ffi_call(
        "bottleneck_backward",
        [like(of[name].shape, of[name].dtype) for name in native],
        [grad_y, *[operands[name] for name in order if name in operands]],
        present=_present(operands, ("gamma", "beta"), X if "x" in operands else 0),
        wanted=np.array([name in native for name in known], np.int32),
        **settings.attributes(),
    )
    return found | dict(zip(native, grads, strict=True))


def _bottleneck_saved(
    settings: Bottleneck, there: Collection[str], wanted: tuple[str, ...]
) -> list[str]:
    names = ["gamma", "beta", "down", "down_bias", "up", "up_bias"]
    past_norm = settings.norm and {"x", "gamma", "beta"} & set(wanted)
    return [*names, "x"] if past_norm or "down" in wanted else names


BOTTLENECK = Op(
    "bottleneck", bottleneck_forward, bottleneck_backward, _bottleneck_saved, frozenset()
)


class NormBias(NamedTuple):
    """What is static of a call."""

    eps: float
    norm: int
    num_threads: int


def norm_bias(
    x: Array,
    gamma: Array | None = None,
    bias: Array | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
    num_threads: int | None = None,
) -> Array:
    """``y = (x − mean) · rstd · gamma + bias``, LayerNorm or ("rms", mean 0) RMSNorm.

    Without a norm ``x · gamma + bias``: the gains of (IA)³.

    Args:
        x: ``[…, K]`` float32 or bfloat16.
        gamma: ``[K]`` float32 or bfloat16, or None: 1.
        bias: ``[K]`` float32 or bfloat16, or None: 0.
        norm: "layer", "rms" or "none".
        eps: added to the variance.
        num_threads: None: all processors.
    Returns: ``[…, K]`` in the dtype of ``x``.
    Raises: DtypeError, ShapeError, ConfigError; what JAX raises for a platform other than the CPU.
    Gradients: every array; first order, reverse mode.
    """
    op = "norm_bias"
    x = as_rows(op, "x", x)
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    operands = {"x": x.reshape(rows, k)}
    for name, vector in (("gamma", gamma), ("bias", bias)):
        if vector is not None:
            operands[name] = check(op, name, vector, (k,))
    settings = NormBias(float(eps), code(op, "norm", NORMS, norm), threads(num_threads))
    return apply(NORM_BIAS, settings, operands).reshape(x.shape)


def norm_bias_forward(settings: NormBias, operands: Operands, keep: bool) -> tuple[Array, Operands]:
    """y ``[M, K]``, and with a norm, where ``keep`` says so, stats ``[M, 2]``."""
    x = operands["x"]
    keep = keep and settings.norm != 0
    state = [like((x.shape[0], 2), jnp.float32)] if keep else []
    bits = (GAMMA if "gamma" in operands else 0) | (BETA if "bias" in operands else 0)
    y, *stats = ffi_call(
        "norm_bias_forward",
        [like(x.shape, x.dtype), *state],
        [operands[name] for name in ("x", "gamma", "bias") if name in operands],
        present=np.int32(bits | (STATE if keep else 0)),
        eps=np.float32(settings.eps),
        norm=np.int32(settings.norm),
        num_threads=np.int32(settings.num_threads),
    )
    return y, {"stats": stats[0]} if keep else {}


def norm_bias_backward(
    settings: NormBias, operands: Operands, grad_y: Array, wanted: tuple[str, ...]
) -> Operands:
    """The gradients of ``wanted``."""
    known = ("x", "gamma", "bias")
    of = operands | {"x": grad_y}  # which its gradient has shape and dtype of
    order = ("x", "stats", "gamma")
    bits = (X if "x" in operands else 0) | (GAMMA if "gamma" in operands else 0)
    names = [name for name in known if name in wanted]
    grads = ffi_call(
        "norm_bias_backward",
        [like(of[name].shape, of[name].dtype) for name in names],
        [grad_y, *[operands[name] for name in order if name in operands]],
        present=np.int32(bits),
        norm=np.int32(settings.norm),
        wanted=np.array([name in names for name in known], np.int32),
        num_threads=np.int32(settings.num_threads),
    )
    return dict(zip(names, grads, strict=True))


def _norm_bias_saved(
    settings: NormBias, there: Collection[str], wanted: tuple[str, ...]
) -> list[str]:
    past_norm = settings.norm and "x" in wanted
    return ["gamma", "bias", *(["x"] if past_norm or "gamma" in wanted else [])]


NORM_BIAS = Op("norm_bias", norm_bias_forward, norm_bias_backward, _norm_bias_saved, frozenset())
