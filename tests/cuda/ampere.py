"""The sm_80 launchers of deltaops_cuda.h, called on the emulated grid."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaops.reference.quantized import QuantizedWeight

from . import emulated
from .emulated import Bordered, Matrix


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
        ("multiprocessors", ctypes.c_int32),
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


def gemm_args(
    terms: Sequence[Term], bias: Tensor | None, out: Tensor, seed: Tensor | None
) -> GemmArgs:
    """The call; it keeps no tensor alive."""
    products = [
        Product(emulated.view(t.left), emulated.view(t.right), t.threshold, t.stream) for t in terms
    ]
    return GemmArgs(
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


def gemm(
    lib: ctypes.CDLL, terms: Sequence[Term], bias: Tensor | None, out: Tensor, seed: Tensor | None
) -> int:
    """The status."""
    return int(lib.deltaops_cuda_ampere_gemm(ctypes.byref(gemm_args(terms, bias, out, seed))))


class Quantized(ctypes.Structure):
    """deltaops_cuda_quantized."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )

    @classmethod
    def of(cls, weight: QuantizedWeight, codes: Tensor) -> Quantized:
        """``weight``, whose codes lie in ``codes``."""
        kind = 2 if weight.kind == "nf4" else 1
        return cls(codes.data_ptr(), weight.scales.data_ptr(), *weight.shape, weight.block, kind, 0)


class QuantizedArgs(ctypes.Structure):
    """deltaops_cuda_quantized_gemv_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("x", Matrix),
        ("weight", Quantized),
        ("rest", GemmArgs),
    )


def quantized_gemv(
    lib: ctypes.CDLL, x: Tensor, weight: Quantized, terms: Sequence[Term], bias: Tensor | None,
    out: Tensor, seed: Tensor | None = None,
) -> int:  # fmt: skip
    """The status."""
    rest = gemm_args(terms, bias, out, seed)
    args = QuantizedArgs(ctypes.sizeof(QuantizedArgs), 0, emulated.view(x), weight, rest)
    return int(lib.deltaops_cuda_ampere_quantized_gemv(ctypes.byref(args)))


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


class ProjectArgs(ctypes.Structure):
    """deltaops_cuda_project_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("x", Matrix),
        ("a", Matrix),
        ("s", Matrix),
        ("s_narrow", Matrix),
        ("scaling", ctypes.c_float),
        ("drop_threshold", ctypes.c_uint32),
        ("branch_stream", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("seed", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
    )


class GradUpArgs(ctypes.Structure):
    """deltaops_cuda_grad_up_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("grad_y", Matrix),
        ("b", Matrix),
        ("s_narrow", Matrix),
        ("grad_s", Matrix),
        ("grad_s_narrow", Matrix),
        ("grad_b", Matrix),
        ("grad_bias", Matrix),
        ("scaling", ctypes.c_float),
        ("reserved", ctypes.c_uint32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
    )


class GradDownArgs(ctypes.Structure):
    """deltaops_cuda_grad_down_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("grad_s_narrow", Matrix),
        ("x", Matrix),
        ("grad_a", Matrix),
        ("drop_threshold", ctypes.c_uint32),
        ("branch_stream", ctypes.c_uint32),
        ("seed", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
    )


ARGS: dict[str, type[ctypes.Structure]] = {
    "project": ProjectArgs,
    "grad_up": GradUpArgs,
    "grad_down": GradDownArgs,
}


def workspace(lib: ctypes.CDLL, name: str, *shape: int) -> Bordered:
    """What the pass asks for (M, columns, R), NaN all over."""
    ask = getattr(lib, f"deltaops_cuda_{name}_workspace")
    ask.restype = ctypes.c_uint64
    return Bordered.empty(1, int(ask(*map(ctypes.c_int64, shape))) // 4, torch.float32)


def run_pass(
    lib: ctypes.CDLL, name: str, space: Bordered, given: dict[str, Tensor | int | float | None]
) -> int:
    """The status; tensors are matrices, but for the seed."""
    args = ARGS[name]()
    for field, value in given.items():
        if field == "seed":
            args.seed = value.data_ptr() if isinstance(value, Tensor) else None
        else:
            as_matrix = isinstance(value, Tensor) or value is None
            setattr(args, field, emulated.view(value) if as_matrix else value)  # type: ignore[arg-type]
    args.struct_size = ctypes.sizeof(args)
    args.workspace, args.workspace_bytes = space.t.data_ptr(), space.t.numel() * 4
    return int(getattr(lib, f"deltaops_cuda_{name}")(ctypes.byref(args)))


class Branch(ctypes.Structure):
    """deltaops_cuda_branch."""

    _fields_ = (
        ("a", Matrix),
        ("s", Matrix),
        ("s_narrow", Matrix),
        ("scaling", ctypes.c_float),
        ("drop_threshold", ctypes.c_uint32),
        ("branch_stream", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("seed", ctypes.c_void_p),
    )


class RmsNormArgs(ctypes.Structure):
    """deltaops_cuda_rms_norm_project_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("x", Matrix),
        ("gamma", Matrix),
        ("y", Matrix),
        ("rstd", Matrix),
        ("eps", ctypes.c_float),
        ("num_branches", ctypes.c_int32),
        ("branches", ctypes.POINTER(Branch)),
        ("stream", ctypes.c_void_p),
    )


class SwiGluArgs(ctypes.Structure):
    """deltaops_cuda_swiglu_project_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("gate", Matrix),
        ("up", Matrix),
        ("y", Matrix),
        ("num_branches", ctypes.c_int32),
        ("reserved", ctypes.c_uint32),
        ("branches", ctypes.POINTER(Branch)),
        ("stream", ctypes.c_void_p),
    )


def produce(
    lib: ctypes.CDLL, kind: str, rows: dict[str, Tensor], branches: Sequence[Branch], eps: float
) -> int:
    """The status of ``kind``, "rms_norm" or "swiglu"; eps is the former's."""
    views = {name: emulated.view(t) for name, t in rows.items()}
    return produce_views(lib, kind, views, branches, eps)


def produce_views(
    lib: ctypes.CDLL, kind: str, views: dict[str, Matrix], branches: Sequence[Branch], eps: float
) -> int:
    """The same of matrices that are described already."""
    args = RmsNormArgs() if kind == "rms_norm" else SwiGluArgs()
    for name, matrix in views.items():
        setattr(args, name, matrix)
    if isinstance(args, RmsNormArgs):
        args.eps = eps
    args.struct_size, args.num_branches = ctypes.sizeof(args), len(branches)
    args.branches = (Branch * len(branches))(*branches)
    return int(getattr(lib, f"deltaops_cuda_{kind}_project")(ctypes.byref(args)))
