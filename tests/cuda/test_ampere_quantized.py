"""The sm_80 products of few rows and a quantised weight against float64: int8 and NF4."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from deltaops.reference import quantized
from deltaops.reference.quantized import QuantizedWeight

from . import ampere, emulated
from .ampere import Quantized, Term, random
from .emulated import Bordered

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
N = 21
"""Of two blocks, the second with five columns."""


def weight_of(kind: str, k: int, block: int = 64) -> QuantizedWeight:
    wide = random(N, k, dtype=F32, seed=1)
    wide[3] = 0.0  # its scale is 0
    return quantized.quantize_nf4(wide, block) if kind == "nf4" else quantized.quantize_int8(wide)


def given(t: Tensor, pad: int = 0) -> Tensor:
    """``t`` amid NaN, and known to the grid."""
    kept = Bordered(t, pad)
    kept.allow()
    return kept.t


def among(codes: Tensor, shift: int) -> Tensor:
    """The bytes on 16, and ``shift`` beyond."""
    room = torch.full((codes.numel() + 64,), 0x7F, dtype=torch.uint8)
    start = -room.data_ptr() % 16 + shift
    found = room[start : start + codes.numel()]
    found.copy_(codes.flatten().view(torch.uint8))
    emulated.library().deltaops_emulation_allow(
        ctypes.c_void_p(found.data_ptr()), ctypes.c_uint64(found.numel())
    )
    return found


def check(
    m: int, weight: QuantizedWeight, dtype: torch.dtype, *, rank: int = 0, bias: bool = False,
    pad: int = 0, shift: int = 0, order: int = emulated.ASCENDING,
) -> Tensor:  # fmt: skip
    """Runs and compares; the output."""
    n, k = weight.shape
    x, s, b = (random(*shape, dtype=dtype, seed=2) for shape in ((m, k), (m, rank), (n, rank)))
    add = random(1, n, dtype=dtype, seed=3) if bias else None
    out = Bordered.empty(m, n, dtype, 3)
    with emulated.grid(order) as lib:
        terms = [Term(given(s, pad), given(b, pad))] if rank else []
        codes = among(weight.codes, shift)
        scales = given(weight.scales.unsqueeze(0))
        described = Quantized.of(weight._replace(scales=scales), codes)
        status = ampere.quantized_gemv(lib, given(x, pad), described, terms, add, out.t)
    assert status == 0, emulated.error()
    assert out.intact()
    dense = quantized.dequantize(weight, dtype)  # rounded, whatever reads it
    expected = x.double() @ dense.double().T + s.double() @ b.double().T
    expected += 0.0 if add is None else add.double()
    bound = expected.abs() * torch.finfo(dtype).eps + 2e-5 * expected.abs().max()
    assert bool(((out.t.double() - expected).abs() <= bound).all())
    return out.t.clone()


KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])


@KINDS
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("m", "rank"), [(1, 0), (5, 16), (16, 3)])
def test_codes_in_words(kind: str, dtype: torch.dtype, m: int, rank: int) -> None:
    """Several steps a warp, and a last one that is none: 96 elements of 64 or 128."""
    check(m, weight_of(kind, 1120), dtype, rank=rank, bias=m == 5, pad=8)


@KINDS
@pytest.mark.parametrize(("k", "block"), [(1, 64), (33, 64), (70, 7), (96, 48), (129, 1)])
def test_rows_and_blocks_that_begin_anywhere(kind: str, k: int, block: int) -> None:
    check(3, weight_of(kind, k, block), BF16, rank=2, bias=True)


@KINDS
def test_codes_and_x_that_lie_anywhere(kind: str) -> None:
    weight = weight_of(kind, 256)
    assert torch.equal(check(2, weight, F16, shift=5), check(2, weight, F16, pad=3))


def test_each_value_of_nf4_to_the_bit() -> None:
    weight = QuantizedWeight(
        torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 2, dtype=torch.uint8),
        torch.tensor([1.0]), (1, 32), "nf4", 32,
    )  # fmt: skip
    for i in (*range(16), 31):
        x = torch.zeros(1, 32, dtype=F16)
        x[0, i] = 1.0
        out = torch.empty(1, 1, dtype=F16)
        with emulated.grid() as lib:
            described = Quantized.of(weight, weight.codes)
            assert ampere.quantized_gemv(lib, x, described, [], None, out) == 0, emulated.error()
        assert out.item() == torch.tensor(quantized.NF4[i % 16], dtype=F16).item()


@KINDS
def test_every_order_of_threads_gives_the_same_bits(kind: str) -> None:
    first, *others = (check(2, weight_of(kind, 192), BF16, pad=8, order=i) for i in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_empty() -> None:
    out = torch.full((2, N), 3.0, dtype=BF16)
    with emulated.grid() as lib:
        weight = weight_of("int8", 16)
        some = Quantized.of(weight, weight.codes)
        no_rows = torch.empty(0, 16, dtype=BF16)
        assert ampere.quantized_gemv(lib, no_rows, some, [], None, out[:0]) == 0, emulated.error()
        none = Quantized.of(weight_of("nf4", 0), torch.empty(0))  # sums of nothing
        assert ampere.quantized_gemv(lib, out[:, :0], none, [], None, out) == 0, emulated.error()
    assert not out.any()


def test_refusals() -> None:
    weight = weight_of("nf4", 32)
    out, x = torch.full((2, N), 3.0, dtype=BF16), random(2, 32, dtype=BF16)
    s, b, seed = random(2, 8, dtype=BF16), random(N, 8, dtype=BF16), torch.tensor([1])

    def says(
        x: Tensor = x, out: Tensor = out, term: Term | None = None, **changed: int | None
    ) -> str:
        described = Quantized.of(weight, weight.codes)
        for name, value in changed.items():
            setattr(described, name, value)
        terms = [] if term is None else [term]
        with emulated.grid() as lib:
            assert ampere.quantized_gemv(lib, x, described, terms, None, out, seed) != 0
        return emulated.error()

    assert "kind must be int8 (1) or NF4 (2), got 3" in says(kind=3)
    assert "weight must be [21, 32], got [20, 32]" in says(rows=20)
    assert "must have codes and scales" in says(scales=None)
    assert "block must be at least 1" in says(block=0)
    assert "x must be [2, 32] of dtype 1" in says(x=x.half())
    wide = torch.empty(17, N, dtype=BF16)
    assert "at most 16 rows, got 17" in says(x=random(17, 32, dtype=BF16), out=wide)
    assert "takes no masks, and product 0" in says(term=Term(s, b, 9))
    assert "must have col_stride 1" in says(term=Term(s, b.T.contiguous().T))
    assert bool((out == 3.0).all())
