"""A norm with a frozen or trainable bias (BitFit), as one op; or the gain alone, (IA)³'s.

    y = (x − mean) · rstd · gamma + bias          LayerNorm; RMSNorm has mean = 0
    y = x · gamma + bias                          without a norm

Two ways in, as :mod:`deltaops.ops.delta_linear` has them: an ``autograd.Function`` for eager calls,
the registered op ``deltaops::norm_bias`` for everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.dispatch import select
from deltaops.errors import ConfigError, DtypeError, ShapeError
from deltaops.reference import norm_bias as reference

from .foresee import Readers, foresee
from .norm_bias_autograd import NormBiasFunction, call_of, run_forward
from .paths import check_device, needs_grad, takes_bypass, transformed


def norm_bias(
    x: Tensor,
    gamma: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str | None = "layer",
    eps: float = 1e-5,
    readers: Readers | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Normalize the last dimension, scale it by ``gamma`` and add ``bias``.

    Args:
        x: activations ``[..., K]``, floating point.
        gamma: ``[K]`` or None (1); may be trainable.
        bias: ``[K]`` or None (0), dtype of ``gamma``; may be trainable. Both may be wider than x.
        norm: "layer" (torch's LayerNorm), "rms" (its RMSNorm, with a bias) or None: x as it is.
        eps: added to the variance.
        readers: gives the layers that will read the result, as :class:`deltaops.ops.Layer`; asked,
            and their S made in the same pass, only where a backend was measured to be faster so.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
        strict: with "auto", raise instead of ending in eager torch.
    Returns: ``[..., K]`` in the dtype of ``x``, under autocast too: sums are float32 anyway.
    Raises: ShapeError, DtypeError, DeviceError, ConfigError, NoBackendError.
    Gradients: ``x``, ``gamma`` and ``bias``; first order. Beyond x, 8 bytes a row are kept; without
        a norm none, and x itself only for the gradient of ``gamma``.
    Source: Ba et al. 2016 (arXiv 1607.06450); Ben Zaken et al. 2021 (arXiv 2106.10199); Liu et al.
        2022 (arXiv 2205.05638).
    """
    _check(x, gamma, bias, norm)
    norm = norm or "none"
    eps = float(eps)
    if transformed("norm_bias", backend, strict):
        flat = x.reshape(-1, x.shape[-1])
        return reference.forward(flat, gamma, bias, eps, norm)[0].reshape(x.shape)
    if takes_bypass(x, gamma, bias):
        call = call_of(x, gamma, bias, norm)
        runner = select(call, backend, strict)
        ahead = None
        if bias is None:
            ahead = foresee(x, readers, call, runner, backend, strict)
        if needs_grad(x, gamma, bias):
            y: Tensor = NormBiasFunction.apply(x, gamma, bias, eps, norm, runner, ahead)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
        else:
            y, _ = run_forward(x, gamma, bias, eps, norm, runner, ahead)
        if ahead is not None:
            ahead.leave(y)
        return y
    if strict:
        backend = select(call_of(x, gamma, bias, norm), backend, strict).name
    out, _ = torch.ops.deltaops.norm_bias(x, gamma, bias, eps, norm, backend)
    return out  # type: ignore[no-any-return]  # torch.ops has no types


def _check(x: Tensor, gamma: Tensor | None, bias: Tensor | None, norm: str | None) -> None:
    if norm is not None and norm not in reference.NORMS:
        raise ConfigError(f"norm_bias: norm must be 'layer', 'rms' or None, got {norm!r}.")
    if x.dim() == 0 or x.shape[-1] < 1:
        raise ShapeError(f"norm_bias: x must be [..., K] with K ≥ 1, got {list(x.shape)}.")
    if not x.is_floating_point():
        raise DtypeError(f"norm_bias: x must be floating point, got {x.dtype}. Convert it.")
    k = x.shape[-1]
    for name, t in (("gamma", gamma), ("bias", bias)):
        if t is None:
            continue
        if t.shape != (k,):
            raise ShapeError(
                f"norm_bias: {name} must be [{k}] (K from x), got {list(t.shape)}. "
                "Only the last dimension is normalized."
            )
        if not t.is_floating_point():
            raise DtypeError(f"norm_bias: {name} must be floating point, got {t.dtype}.")
        check_device("norm_bias", name, t, x)
    if gamma is not None and bias is not None and gamma.dtype != bias.dtype:
        raise DtypeError(
            f"norm_bias: gamma and bias must share a dtype, got {gamma.dtype} and {bias.dtype}. "
            "Convert one of them."
        )
