"""A sequential adapter after a sub-layer, as one op.

    y = residual + scaling · φ(norm(x) Downᵀ + down_bias) Upᵀ + up_bias

Two ways in, as :mod:`deltaops.ops.delta_linear` has them: an ``autograd.Function`` for eager calls,
the registered op ``deltaops::bottleneck`` for everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.dispatch import select
from deltaops.errors import ConfigError, DtypeError, ShapeError
from deltaops.reference import bottleneck as reference
from deltaops.reference.activation import ACTIVATIONS
from deltaops.reference.norm_bias import NORMS

from .bottleneck_autograd import BottleneckFunction, Forward, call_of, run_forward
from .paths import check_device, needs_grad, takes_bypass, transformed


def bottleneck(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    residual: Tensor | str | None = "x",
    scaling: float = 1.0,
    activation: str = "relu",
    norm: str | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Apply a bottleneck adapter and add its residual.

    Args:
        x: activations ``[..., K]``, floating point.
        down: ``[R, K]``.
        up: ``[K, R]``.
        down_bias: ``[R]`` or None.
        up_bias: ``[K]`` or None; not scaled. These four share a dtype, which may be wider than
            that of ``x``.
        residual: "x" adds x itself, a tensor ``[..., K]`` adds that, None adds nothing.
        scaling: dimensionless, of the branch.
        activation: φ: "identity", "relu", "gelu" (by erf), "gelu_tanh" or "silu".
        norm: None, or "layer" or "rms" for a norm of x before ``down``.
        gamma: ``[K]`` or None (1), with a norm only.
        beta: ``[K]`` or None (0), dtype of ``gamma``, with a norm only.
        eps: added to the norm's variance.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
        strict: with "auto", raise instead of ending in eager torch.
    Returns: ``[..., K]`` in the dtype of ``x`` (under autocast, in autocast's dtype).
    Raises: ShapeError, DtypeError, DeviceError, ConfigError, NoBackendError.
    Gradients: every tensor; first order. Beyond x, 4·R bytes a row are kept, and 8 with a norm.
    Source: Houlsby et al. 2019 (arXiv 1902.00751); Pfeiffer et al. 2021 (arXiv 2005.00247).
    """
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device):
        target = torch.get_autocast_dtype(device)
        if x.dtype != torch.float64 and x.is_floating_point():
            x, down, up = x.to(target), down.to(target), up.to(target)
            down_bias = None if down_bias is None else down_bias.to(target)
            up_bias = None if up_bias is None else up_bias.to(target)
            residual = residual.to(target) if isinstance(residual, Tensor) else residual
    own = isinstance(residual, str)
    if isinstance(residual, str):
        if residual != "x":
            raise ConfigError(
                f"bottleneck: residual must be 'x', a tensor or None, got {residual!r}."
            )
        residual = None
    tensors = {
        "residual": residual, "gamma": gamma, "beta": beta, "down": down,
        "down_bias": down_bias, "up": up, "up_bias": up_bias,
    }  # fmt: skip
    _check(x, tensors, activation, norm)
    given = Forward(
        x,
        residual,
        gamma,
        beta,
        down,
        down_bias,
        up,
        up_bias,
        float(scaling),
        float(eps),
        activation,
        norm or "none",
        own,
    )
    if transformed("bottleneck", backend, strict):
        flat = x.reshape(-1, x.shape[-1])
        added = flat if own else None if residual is None else residual.reshape(flat.shape)
        return reference.forward(flat, added, *given[2:-1])[0].reshape(x.shape)
    if takes_bypass(x, *tensors.values()):
        runner = select(call_of(given), backend, strict)
        if needs_grad(x, *tensors.values()):
            y: Tensor = BottleneckFunction.apply(runner, *given)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
            return y
        return run_forward(runner, given)[0]
    if strict:
        backend = select(call_of(given), backend, strict).name
    with torch.autocast(device, enabled=False):
        out, _, _ = torch.ops.deltaops.bottleneck(*given, backend)
    return out  # type: ignore[no-any-return]  # torch.ops has no types


def _check(x: Tensor, tensors: dict[str, Tensor | None], activation: str, norm: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"bottleneck: activation must be one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}. Check the spelling."
        )
    if norm is not None and norm not in NORMS:
        raise ConfigError(f"bottleneck: norm must be 'layer', 'rms' or None, got {norm!r}.")
    if norm is None and (tensors["gamma"] is not None or tensors["beta"] is not None):
        raise ConfigError(
            "bottleneck: gamma and beta belong to a norm, and norm is None. Pass norm='layer'."
        )
    down = tensors["down"]
    assert down is not None
    if x.dim() == 0 or x.shape[-1] < 1:
        raise ShapeError(f"bottleneck: x must be [..., K] with K ≥ 1, got {list(x.shape)}.")
    if not x.is_floating_point():
        raise DtypeError(f"bottleneck: x must be floating point, got {x.dtype}. Convert it.")
    k = x.shape[-1]
    if down.dim() != 2 or down.shape[1] != k or down.shape[0] < 1:
        raise ShapeError(
            f"bottleneck: down must be [R, {k}] with R ≥ 1 (K from x), got {list(down.shape)}. "
            "Did you swap down and up?"
        )
    rank = down.shape[0]
    shapes = {
        "residual": tuple(x.shape), "gamma": (k,), "beta": (k,), "down": (rank, k),
        "down_bias": (rank,), "up": (k, rank), "up_bias": (k,),
    }  # fmt: skip
    dtypes = {
        "residual": x.dtype, "down_bias": down.dtype, "up": down.dtype, "up_bias": down.dtype
    }  # fmt: skip
    if tensors["gamma"] is not None:
        dtypes["beta"] = tensors["gamma"].dtype
    for name, t in tensors.items():
        if t is None:
            continue
        if t.shape != shapes[name]:
            raise ShapeError(
                f"bottleneck: {name} must be {list(shapes[name])} (K from x, R from down), "
                f"got {list(t.shape)}."
            )
        if not t.is_floating_point() or t.dtype != dtypes.get(name, t.dtype):
            like = {"residual": "x", "beta": "gamma"}.get(name, "down")
            raise DtypeError(
                f"bottleneck: {name} must have the floating dtype of {like}, "
                f"{dtypes.get(name, 'float32')}, got {t.dtype}. Convert one of them."
            )
        check_device("bottleneck", name, t, x)
