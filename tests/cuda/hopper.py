"""The Hopper launcher of deltaops_cuda.h, called on the emulated grid."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaops.reference.philox import draws, keep_scale

from . import ampere, emulated
from .ampere import Branch, GemmArgs, Product, random
from .emulated import Bordered, Matrix

SEED = 2**40 + 12345
THRESHOLD = 13107
"""Of dropout, p = 0.2."""


@dataclass
class Term:
    """``mask * (left rightᵀ)``."""

    left: Bordered
    right: Bordered
    """As it lies: ``[N, L]``, or where its output is ``across``, ``[L, N]``."""
    threshold: int = 0
    stream: int = 0


@dataclass
class Output:
    """``bias`` plus the sum of ``terms``; all matrices amid NaN."""

    terms: list[Term]
    out: Bordered
    bias: Bordered | None = None
    across: bool = False
    seed: Tensor = field(default_factory=lambda: torch.tensor([SEED]))
    multiprocessors: int = 0

    def operands(self) -> list[Bordered]:
        found = [self.out, *(one for t in self.terms for one in (t.left, t.right))]
        return found if self.bias is None else [*found, self.bias]

    def rights(self) -> list[Tensor]:
        """``[N, L]`` of each term."""
        return [t.right.t.t() if self.across else t.right.t for t in self.terms]

    def wide(self) -> Tensor:
        """What it should be, in float64."""
        total = torch.zeros(self.out.t.shape, dtype=torch.float64, device=self.out.t.device)
        for term, right in zip(self.terms, self.rights(), strict=True):
            part = term.left.t.double() @ right.double().t()
            if term.threshold:
                kept = draws(*part.shape, self.seed, term.stream) >= term.threshold
                part = part * kept * keep_scale(term.threshold)
            total += part
        return total if self.bias is None else total + self.bias.t.double()

    def args(self) -> GemmArgs:
        products = [
            Product(emulated.view(t.left.t), emulated.view(right), t.threshold, t.stream)
            for t, right in zip(self.terms, self.rights(), strict=True)
        ]
        count = len(products)
        return GemmArgs(
            *(ctypes.sizeof(GemmArgs), 0, (Product * count)(*products), count),
            self.multiprocessors,
            *(emulated.view(None if self.bias is None else self.bias.t), emulated.view(self.out.t)),
            *(self.seed.data_ptr(), None),
        )


def matrix(rows: int, cols: int, dtype: torch.dtype, seed: int) -> Bordered:
    """Random, with rows on 16 bytes."""
    return Bordered(random(rows, cols, dtype=dtype, seed=seed), -cols % 8)


def forward(
    m: int, k: int, outputs: Sequence[int], ranks: Sequence[int], dtype: torch.dtype,
    bias: bool = True,
) -> list[Output]:  # fmt: skip
    """``x Wᵀ + S Bᵀ + bias`` of layers that share x; no branch where the rank is 0."""
    x = matrix(m, k, dtype, 1)
    found = []
    for i, (n, rank) in enumerate(zip(outputs, ranks, strict=True)):
        terms = [Term(x, matrix(n, k, dtype, 2 + i))] if k else []
        if rank:
            terms.append(Term(matrix(m, rank, dtype, 12 + i), matrix(n, rank, dtype, 22 + i)))
        out = Bordered.empty(m, n, dtype, -n % 8)
        found.append(Output(terms, out, matrix(1, n, dtype, 32 + i) if bias else None))
    return found


def gradient(
    m: int, k: int, outputs: Sequence[int], ranks: Sequence[int], dtype: torch.dtype,
    threshold: int = 0, stream: int = 0,
) -> Output:  # fmt: skip
    """The sum of ``dy W + mask * (dS A)`` of layers; the mask is of each."""
    terms = []
    for i, (n, rank) in enumerate(zip(outputs, ranks, strict=True)):
        terms.append(Term(matrix(m, n, dtype, 1 + i), matrix(n, k, dtype, 11 + i)))
        if rank:
            pair = matrix(m, rank, dtype, 21 + i), matrix(rank, k, dtype, 31 + i)
            terms.append(Term(*pair, threshold, stream))
    return Output(terms, Bordered.empty(m, k, dtype, -k % 8), across=True)


def call(outputs: Sequence[Output], **gpu: Any) -> int:
    """The status; primitives may touch the operands alone, and nothing around them changes.

    Args:
        gpu: as for :func:`emulated.grid`.
    """
    args = (GemmArgs * len(outputs))(*(one.args() for one in outputs))
    operands = [b for one in outputs for b in one.operands()]
    with emulated.grid(**({"capability": 90} | gpu)) as lib:
        for one in operands:
            one.allow()
        status = int(lib.deltaops_cuda_hopper_gemm(args, len(outputs)))
    assert all(one.intact() for one in operands)
    return status


class ProjectArgs(ctypes.Structure):
    """deltaops_cuda_hopper_project_gemm_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        *((name, Matrix) for name in ("x", "weight", "a", "b", "bias", "s", "s_narrow", "out")),
        ("scaling", ctypes.c_float),
        ("blocks", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
    )


def flags_of(m: int, device: str = "cpu") -> Tensor:
    """The workspace for M rows, not cleared."""
    return torch.full((-(-m // 128),), -1, dtype=torch.int32, device=device)


def project_args(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, s: Tensor | None,
    narrow: Tensor, out: Tensor, scaling: float, blocks: int, flags: Tensor, stream: int | None,
) -> ProjectArgs:  # fmt: skip
    """The call; it keeps no tensor alive."""
    views = map(emulated.view, (x, weight, a, b, bias, s, narrow, out))
    return ProjectArgs(
        *(ctypes.sizeof(ProjectArgs), 0, *views, scaling, blocks),
        *(flags.data_ptr(), 4 * flags.numel(), stream),
    )


class Module:
    """As much of ``deltaops._cuda`` as the plan calls, on the emulated grid."""

    @staticmethod
    def archs() -> str:
        return "90a"

    @staticmethod
    def hopper_gemm(
        device: int, dtype: int, outputs: Any, seed: int, stream: int, multiprocessors: int
    ) -> None:
        found = [_args(device, dtype, output, seed, stream) for output in outputs]
        for one in found:
            one.multiprocessors = multiprocessors
        with emulated.grid(capability=90) as lib:
            status = lib.deltaops_cuda_hopper_gemm((GemmArgs * len(found))(*found), len(found))
        if status:
            raise RuntimeError(emulated.error())

    @staticmethod
    def hopper_project_gemm_workspace(m: int) -> int:
        size = emulated.library().deltaops_cuda_hopper_project_gemm_workspace
        size.restype = ctypes.c_uint64
        return int(size(ctypes.c_int64(m)))

    @staticmethod
    def hopper_project_gemm(
        device: int, dtype: int, layer: Any, s: Any, narrow: Any, out: Any, scaling: float,
        blocks: int, workspace: int, size: int, stream: int,
    ) -> None:  # fmt: skip
        views = [Matrix() if t is None else Matrix(*t, dtype, 0) for t in layer]
        given = [*views, Matrix(*s, 0, 0), Matrix(*narrow, dtype, 0), Matrix(*out, dtype, 0)]
        args = ProjectArgs(
            ctypes.sizeof(ProjectArgs), device, *given, scaling, blocks, workspace, size, stream
        )
        with emulated.grid(capability=90, multiprocessors=8) as lib:
            status = lib.deltaops_cuda_hopper_project_gemm(ctypes.byref(args))
        if status:
            raise RuntimeError(emulated.error())

    @staticmethod
    def rms_norm_project(
        device: int, dtype: int, x: Any, gamma: Any, y: Any, rstd: Any, eps: float,
        branches: Any, stream: int,
    ) -> None:  # fmt: skip
        rows = {"x": x, "gamma": gamma, "y": y}
        _produce("rms_norm", dtype, rows, {"rstd": rstd}, branches, eps)

    @staticmethod
    def swiglu_project(
        device: int, dtype: int, gate: Any, up: Any, y: Any, branches: Any, stream: int
    ) -> None:
        _produce("swiglu", dtype, {"gate": gate, "up": up, "y": y}, {}, branches, 0.0)

    @staticmethod
    def ampere_gemm(device: int, dtype: int, output: Any, seed: int, stream: int) -> None:
        with emulated.grid() as lib:
            args = _args(device, dtype, output, seed, stream)
            status = lib.deltaops_cuda_ampere_gemm(ctypes.byref(args))
        if status:
            raise RuntimeError(emulated.error())


def _produce(kind: str, dtype: int, rows: Any, statistics: Any, branches: Any, eps: float) -> None:
    """One of the producers of :mod:`.ampere`, whose matrices are described already."""
    found = [
        Branch(
            *(Matrix(*a, dtype, 0), Matrix(*s, 0, 0), Matrix(), scaling, threshold, number, 0),
            seed or None,
        )
        for a, s, scaling, threshold, number, seed in branches
    ]
    views = {name: Matrix() if t is None else Matrix(*t, dtype, 0) for name, t in rows.items()}
    views |= {name: Matrix(*t, 0, 0) for name, t in statistics.items()}
    with emulated.grid() as lib:
        status = ampere.produce_views(lib, kind, views, found, eps)
    if status:
        raise RuntimeError(emulated.error())


def _args(device: int, dtype: int, output: Any, seed: int, stream: int) -> GemmArgs:
    def view(t: Any) -> Matrix:
        return Matrix() if t is None else Matrix(*t, dtype, 0)

    out, bias, terms = output
    products = [Product(view(left), view(right), drop, 0) for left, right, drop in terms]
    return GemmArgs(
        *(ctypes.sizeof(GemmArgs), device, (Product * len(products))(*products), len(products)),
        *(0, view(bias), view(out), seed, stream),
    )
