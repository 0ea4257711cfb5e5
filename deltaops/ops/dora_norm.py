"""The lengths of an adapted weight's rows, as one op.

    norms = ‖W + s B A‖ of each row

No gradient goes through them (Liu et al. 2024, §4.3), so there is no backward op. Eager calls go
straight to a backend; the registered op ``deltaops::dora_norm`` is for everything else.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from deltaops.backends import Backend, DoraNormBackend, DoraNormCall
from deltaops.dispatch import select
from deltaops.errors import DtypeError, ShapeError
from deltaops.reference import dora_norm as reference

from .paths import check_device, no_autocast, takes_bypass, transformed
from .registered import register_constant


def dora_norm(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float = 1.0,
    *,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """The length of each row of ``W + s B A``, which is not formed.

    Args:
        weight: W ``[N, K]``, floating point; the product with A is taken in its dtype.
        a: ``[R, K]``, floating point.
        b: ``[N, R]``, dtype of ``a``.
        scaling: s, dimensionless; LoRA uses ``alpha / R``.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
        strict: with "auto", raise instead of ending in eager torch.
    Returns: ``[N]`` in float32 (float64 where one of the tensors is), under autocast too.
    Raises: ShapeError, DtypeError, DeviceError, NoBackendError.
    Gradients: none; the norms are constants to autograd, as in the paper.
    Source: Liu et al. 2024 (arXiv 2402.09353), eq. 5 and §4.3.
    """
    _check(weight, a, b)
    with torch.no_grad(), no_autocast(weight.device):
        if transformed("dora_norm", backend, strict):
            return reference.forward(weight, a, b, scaling)
        if takes_bypass(weight, a, b):
            return _run(weight, a, b, scaling, select(_call(weight, a), backend, strict))
        if strict:
            backend = select(_call(weight, a), backend, strict).name
        return torch.ops.deltaops.dora_norm(weight, a, b, scaling, backend)  # type: ignore[no-any-return]  # torch.ops has no types


def _check(weight: Tensor, a: Tensor, b: Tensor) -> None:
    if weight.dim() != 2:
        raise ShapeError(f"dora_norm: weight must be [N, K], got {list(weight.shape)}.")
    n, k = weight.shape
    if a.dim() != 2 or a.shape[1] != k or a.shape[0] < 1:
        raise ShapeError(
            f"dora_norm: a must be [R, {k}] with R ≥ 1 (K={k} from weight), got {list(a.shape)}. "
            "Did you swap a and b?"
        )
    if b.shape != (n, a.shape[0]):
        raise ShapeError(
            f"dora_norm: b must be [{n}, {a.shape[0]}] (N from weight, R from a), "
            f"got {list(b.shape)}. Did you swap a and b?"
        )
    for name, tensor in (("weight", weight), ("a", a)):
        if not tensor.is_floating_point():
            raise DtypeError(
                f"dora_norm: {name} must be floating point, got {tensor.dtype}. Convert it."
            )
    if b.dtype != a.dtype:
        raise DtypeError(
            f"dora_norm: a and b must share a dtype, got {a.dtype} and {b.dtype}. "
            "Convert one of them."
        )
    check_device("dora_norm", "a", a, weight, of="weight")
    check_device("dora_norm", "b", b, weight, of="weight")


def _call(weight: Tensor, a: Tensor) -> DoraNormCall:
    device = "cpu" if weight.is_cpu else weight.device.type
    n, k = weight.shape
    return DoraNormCall(device, weight.dtype, a.dtype, n, k, a.shape[0])


def _run(weight: Tensor, a: Tensor, b: Tensor, scaling: float, runner: Backend) -> Tensor:
    return cast(DoraNormBackend, runner).dora_norm(weight, a, b, scaling)


def _op(weight: Tensor, a: Tensor, b: Tensor, scaling: float, backend: str) -> Tensor:
    return _run(weight, a, b, scaling, select(_call(weight, a), backend))


def _fake(weight: Tensor, a: Tensor, b: Tensor, scaling: float, backend: str) -> Tensor:
    exact = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    return weight.new_empty(weight.shape[0], dtype=exact)


register_constant(
    "dora_norm(Tensor weight, Tensor a, Tensor b, float scaling, str backend) -> Tensor",
    run=_op,
    fake=_fake,
)
