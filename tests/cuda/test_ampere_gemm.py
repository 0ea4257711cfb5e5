"""The sm_80 products against float64: ragged shapes, NaN around everything, masks, orders."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from deltaops.reference import philox

from . import ampere, emulated
from .ampere import Term, random
from .emulated import Bordered

BF16, F16 = torch.bfloat16, torch.float16
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])
M, N, K = 70, 130, 100


def wide(terms: list[Term], bias: Tensor | None) -> Tensor:
    """The sum in float64."""
    total = torch.zeros(terms[0].left.shape[0], terms[0].right.shape[0], dtype=torch.float64)
    for t in terms:
        term = t.left.double() @ t.right.double().T
        if t.threshold:
            drawn = philox.draws(*term.shape, SEED, t.stream)
            term = torch.where(drawn >= t.threshold, term * philox.keep_scale(t.threshold), 0.0)
        total += term
    return total if bias is None else total + bias.double()


def bordered(t: Tensor, pad: int, transposed: bool) -> Tensor:
    """``t`` amid NaN, and known to the grid; lying transposed where so asked."""
    kept = Bordered(t.T if transposed else t, pad)
    kept.allow()
    return kept.t.T if transposed else kept.t


def check(
    terms: list[Term],
    bias: Tensor | None,
    *,
    across: bool,
    pad: int = 0,
    order: int = emulated.ASCENDING,
) -> Tensor:
    """Runs and compares; the output."""
    m, n, dtype = terms[0].left.shape[0], terms[0].right.shape[0], terms[0].left.dtype
    with emulated.grid(order) as lib:
        given = [
            t._replace(left=bordered(t.left, pad, False), right=bordered(t.right, pad, across))
            for t in terms
        ]
        out = Bordered.empty(m, n, dtype, pad)
        status = ampere.gemm(lib, given, bias, out.t, SEED)
    assert status == 0, emulated.error()
    assert out.intact()
    expected = wide(terms, bias)
    # one rounding of the output, and sums in float32
    bound = expected.abs() * torch.finfo(dtype).eps + 1e-4
    assert bool(((out.t.double() - expected).abs() <= bound).all())
    return out.t.clone()


def layer(dtype: torch.dtype, rank: int, *, n: int = N) -> list[Term]:
    x, weight = random(M, K, dtype=dtype), random(n, K, dtype=dtype, seed=1)
    terms = [Term(x, weight)]
    if rank:
        s, b = random(M, rank, dtype=dtype, seed=2), random(n, rank, dtype=dtype, seed=3)
        terms.append(Term(s, b))
    return terms


RANKS = pytest.mark.parametrize(
    ("rank", "dtype"),
    [(1, F16), (8, BF16), (16, F16), (24, BF16), (64, F16)],
    ids=["1-f16", "8-bf16", "16-f16", "24-bf16", "64-f16"],
)


@pytest.mark.parametrize("pad", [0, 4], ids=["unaligned", "aligned"])
@RANKS
def test_forward(rank: int, dtype: torch.dtype, pad: int) -> None:
    # rows of 104 and of rank + 4 elements begin on 16 bytes where those are multiples of 8
    check(layer(dtype, rank), random(N, dtype=dtype, seed=4), across=False, pad=pad)


@RANKS
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_input(dtype: torch.dtype, rank: int, p: float) -> None:
    threshold = philox.drop_threshold(p)
    base, branch = layer(dtype, rank)
    check([branch._replace(threshold=threshold, stream=3), base], None, across=True, pad=6)


def test_masked_branches_have_masks_of_their_own() -> None:
    base, one = layer(BF16, 40)
    _, other = layer(BF16, 5)
    half = philox.drop_threshold(0.5)
    all_dropped = other._replace(threshold=65536, stream=1)
    terms = [base, one._replace(threshold=half), all_dropped, other._replace(threshold=half)]
    check(terms, None, across=True)


def test_the_mask_is_the_references_to_the_bit() -> None:
    ones = Term(torch.ones(M, 1, dtype=BF16), torch.ones(N, 1, dtype=BF16), 20000, 5)
    with emulated.grid() as lib:
        out = torch.empty(M, N, dtype=BF16)
        assert ampere.gemm(lib, [ones], None, out, SEED) == 0, emulated.error()
    assert torch.equal(out != 0, philox.draws(M, N, SEED, 5) >= 20000)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_every_order_of_threads_gives_the_same_bits(masked: bool) -> None:
    base, branch = layer(BF16, 48)
    terms = [base, branch._replace(threshold=30000 if masked else 0)]
    first, *others = (check(terms, None, across=True, order=order) for order in (0, 1, 2, 2))
    assert all(torch.equal(first, other) for other in others)


def test_many_tiles_each_once() -> None:
    x, weight = random(1100, 8, dtype=BF16), random(130, 8, dtype=BF16, seed=1)
    check([Term(x, weight)], None, across=False)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 300), (129, 1), (0, 5), (5, 0)])
def test_thin_and_empty(m: int, n: int) -> None:
    check([Term(random(m, 7, dtype=F16), random(n, 7, dtype=F16))], None, across=False)


@pytest.mark.parametrize("pad", [0, 4], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("m", [1, 5, 16])
@RANKS
def test_few_rows(rank: int, dtype: torch.dtype, m: int, pad: int) -> None:
    n, k = 20, 1228  # some warps have five steps, of which four go together, others four
    x, weight = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    s, b = random(m, rank, dtype=dtype, seed=2), random(n, rank, dtype=dtype, seed=3)
    check([Term(x, weight), Term(s, b)], random(n, dtype=dtype, seed=4), across=False, pad=pad)


def test_few_rows_give_the_same_bits_in_every_order() -> None:
    terms = [Term(random(7, 600, dtype=BF16), random(20, 600, dtype=BF16, seed=1))]
    first, *others = (check(terms, None, across=False, order=order) for order in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_no_product_leaves_the_bias() -> None:
    bias = random(N, dtype=F16)
    empty = Term(torch.empty(M, 0, dtype=F16), torch.empty(N, 0, dtype=F16))
    assert torch.equal(check([empty], bias, across=False), bias.expand(M, N))


def refused(terms: list[Term], out: Tensor, seed: Tensor | None = SEED) -> str:
    with emulated.grid() as lib:
        assert ampere.gemm(lib, terms, None, out, seed) != 0
    return emulated.error()


def test_refusals() -> None:
    out = torch.full((M, N), 3.0, dtype=BF16)
    base, branch = layer(BF16, 8)
    masked = branch._replace(threshold=9)
    assert "dtype must be bf16" in refused([base], out.float())
    assert "left of product 1 must be [70, 8] of dtype 1" in refused(
        [base, branch._replace(left=branch.left.half())], out
    )
    assert "right of product 0 must be [130, 100]" in refused(
        [base._replace(right=base.right[:, 1:])], out
    )
    assert "seed must point to" in refused([base, masked], out, None)
    assert "got 65537" in refused([base, masked._replace(threshold=65537)], out)
    assert "all have col_stride 1, or all row_stride 1" in refused(
        [base, branch._replace(right=branch.right.T.contiguous().T)], out
    )
    assert "with a mask" in refused([base, masked], out)
    assert "left of product 0 must have col_stride 1" in refused(
        [base._replace(left=base.left.T.contiguous().T)], out
    )
    assert "at most 8 masked" in refused(
        [branch._replace(right=branch.right.T.contiguous().T, threshold=9)] * 9, out
    )
    assert "0 to 16 products" in refused([base] * 17, out)
    args = ampere.gemm_args([base], None, out, SEED)
    args.multiprocessors = 2
    with emulated.grid() as lib:
        assert lib.deltaops_cuda_ampere_gemm(ctypes.byref(args)) != 0
    assert "runs on all multiprocessors, which 0 says, got 2" in emulated.error()
    assert bool((out == 3.0).all())
