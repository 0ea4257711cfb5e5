"""The CUDA library's GEMMs, the plan ``cuda`` of :mod:`planner`: hand-written, for Hopper.

They take what the persistent kernels take, of Hopper alone; see csrc/cuda/hopper/gemm.h. S and dS
are rounded to the model's dtype by a kernel of torch. How fast they are no GPU has said: no table
that ships names them, so they run only where ``deltaops tune-kernels`` found them fastest.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deltaops.reference.philox import drop_threshold

from . import core

HOPPER = "90a"
"""As the library names the architecture of its products: no other runs them."""
ABI_VERSION = 3
"""DELTAOPS_CUDA_ABI_VERSION of csrc/include/deltaops_cuda.h."""
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
"""deltaops_dtype of csrc/include/deltaops.h."""

Product = tuple[Tensor, Tensor, float]
"""left [M, L], right [N, L], and the dropout whose mask and scale it gets."""


def native() -> ModuleType | str:
    """The compiled module ``deltaops._cuda``, or why it cannot be used, in words."""
    try:
        module = importlib.import_module("deltaops._cuda")
    except ImportError as error:
        return (
            f"deltaops._cuda could not be imported ({error}); "
            "reinstall deltaops with nvcc on the PATH and DELTAOPS_CUDA=1"
        )
    if (found := module.abi_version()) != ABI_VERSION:
        return (
            f"deltaops._cuda is of another build (version {found} of its C ABI, not "
            f"{ABI_VERSION}); reinstall deltaops"
        )
    return module


def state() -> str:
    """What is built and when it is used, in words."""
    module = native()
    if isinstance(module, str):
        return module
    built = f"built for sm_{module.archs().replace(';', ', sm_')}"
    if missing := _missing(module):
        return f"{built}; {missing}"
    return f"{built}; its products for Hopper run where `deltaops tune-kernels` found them fastest"


def _missing(module: ModuleType) -> str | None:
    if HOPPER in module.archs().split(";"):
        return None
    return f"without sm_{HOPPER} it has no products for Hopper; set DELTAOPS_CUDA_ARCHS and rebuild"


def runs_on(device: torch.device | str) -> bool:
    """Whether the products run there: on a Hopper, of which a library for it was built."""
    if core.standing_in_for() is not None:
        return False
    found = torch.device(device)
    if found.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(found) == (9, 0) and _compiled()


@cache
def _compiled() -> bool:
    module = native()
    return not isinstance(module, str) and _missing(module) is None


def outputs(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor
) -> None:
    """Write ``y [M, N] = x Wᵀ + S Bᵀ + bias``; S ``[M, R]`` in fp32."""
    _gemm(y, bias, [(x, weight, 0.0), (s.to(x.dtype), b, 0.0)], None)


def grad_input(
    grad_x: Tensor,
    grad_y: Tensor,
    weight: Tensor,
    grad_s: Tensor,
    a: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Write ``grad_x [M, K] = dy W + mask ⊙ (dS A)``; dS ``[M, R]`` in fp32."""
    narrow = grad_s.to(grad_y.dtype)
    _gemm(grad_x, None, [(grad_y, weight.t(), 0.0), (narrow, a.t(), dropout)], seed)


def _gemm(out: Tensor, bias: Tensor | None, products: list[Product], seed: Tensor | None) -> None:
    module, (device, stream) = native(), _place(out)
    assert not isinstance(module, str)  # planned for where it is there
    terms = [
        (_view(left), _view(right), drop_threshold(dropout)) for left, right, dropout in products
    ]
    wanted = (_view(out), None if bias is None else _view(bias.unsqueeze(0)), terms)
    pointer = 0 if seed is None else seed.data_ptr()
    module.hopper_gemm(device, DTYPES[out.dtype], [wanted], pointer, stream)


def _place(t: Tensor) -> tuple[int, int]:
    """Number and current stream of its GPU."""
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def _view(t: Tensor) -> tuple[Any, ...]:
    return (t.data_ptr(), *t.shape, *t.stride())
