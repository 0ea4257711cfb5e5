"""The sm_80 launchers of deltaops_cuda.h, called on the emulated grid."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import emulated
from .emulated import Matrix


class Product(ctypes.Structure):
    """deltaops_cuda_product."""

    _fields_ = (
        ("left", Matrix),
        ("right", Matrix),
        ("drop_threshold", ctypes.c_uint32),
        ("branch_stream", ctypes.c_uint32),
    )


class GemmArgs(ctypes.Structure):
    """deltaops_cuda_gemm_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("products", ctypes.POINTER(Product)),
        ("num_products", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("bias", Matrix),
        ("out", Matrix),
        ("seed", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


class Term(NamedTuple):
    """``mask * (left rightᵀ)``."""

    left: Tensor
    right: Tensor
    threshold: int = 0
    stream: int = 0


def gemm(
    lib: ctypes.CDLL, terms: Sequence[Term], bias: Tensor | None, out: Tensor, seed: Tensor | None
) -> int:
    """The status."""
    products = [
        Product(emulated.view(t.left), emulated.view(t.right), t.threshold, t.stream) for t in terms
    ]
    args = GemmArgs(
        ctypes.sizeof(GemmArgs),
        0,
        (Product * len(products))(*products),
        len(products),
        0,
        emulated.view(bias),
        emulated.view(out),
        None if seed is None else seed.data_ptr(),
        None,
    )
    return int(lib.deltaops_cuda_ampere_gemm(ctypes.byref(args)))


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)
