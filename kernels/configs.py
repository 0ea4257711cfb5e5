"""Launch parameters: a small fixed table per kernel, chosen from shapes, strides and dtypes alone.

Nothing is tuned while a program runs, so a call under graph capture behaves like any other and the
same shapes, strides and dtypes give the same bits. The tests compile the calls that
tests/kernels/ahead.py, rows_ahead.py and linears_ahead.py list ahead of time, most rows of the
tables but not each with every rank, norm and bias, and hold them to no spills and to the shared
memory of their architecture; for GPUs with 99 KB (sm_89) the largest tiles are. By hand
tests/kernels/every_variant.py compiles all the rest: benchmarks/results/triton-variants.md says of
which sources it was. The numbers are starting points from counts of registers and shared memory,
but where a comment says that they were measured: medians of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import triton
from torch import Tensor

from . import precision


@dataclass(frozen=True)
class Gemm:
    """Tiles of a GEMM: ``rows`` × ``cols`` outputs, ``inner`` of the contraction at a time,
    ``rank`` lanes of a branch at a time; ``group`` rows of tiles share L2."""

    rows: int
    cols: int
    inner: int
    rank: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Skinny:
    """Tiles of a pass over a tall matrix: ``rows`` × ``cols`` of it at a time, ``rank`` lanes."""

    rows: int
    cols: int
    rank: int
    warps: int
    stages: int


WIDE_ARCHITECTURES = (80, 90, 100)
"""NVIDIA's data-centre GPUs: at least 163 KB of shared memory a block. Its others have 99 KB, and
AMD's 64 KB, with warps of 64 lanes."""


def is_narrow(capability: int) -> bool:
    """Whether this is one of NVIDIA's GPUs with 99 KB."""
    return not precision.AMD and capability not in WIDE_ARCHITECTURES


def is_older(capability: int) -> bool:
    """Whether this is one of NVIDIA's GPUs before Hopper. What differs there is what does not
    spill, found by compiling (tests/kernels/every_variant.py)."""
    return not precision.AMD and capability < 90


# By the rows of the output: the first table whose bound is not below M. Tiles of fewer than 64 rows
# cannot use Hopper's wgmma and need not: at such M the weight's bytes are the limit.
_GEMM_WGMMA = (
    (16, Gemm(16, 64, 128, 16, 1, 4, 4)),
    (64, Gemm(64, 64, 128, 16, 1, 4, 3)),
    (512, Gemm(64, 128, 64, 16, 8, 4, 4)),
    (None, Gemm(128, 256, 64, 16, 8, 8, 3)),
)
_GEMM_AMPERE = (
    (16, Gemm(16, 64, 128, 16, 1, 4, 4)),
    (64, Gemm(64, 64, 128, 16, 1, 4, 3)),
    (512, Gemm(64, 128, 64, 16, 8, 4, 4)),
    (None, Gemm(128, 128, 64, 16, 8, 8, 3)),
)
_GEMM_NARROW = (
    (16, Gemm(16, 64, 64, 16, 1, 4, 4)),
    (None, Gemm(128, 128, 32, 16, 8, 8, 3)),
)
_GEMM_AMD = (
    (16, Gemm(16, 64, 128, 16, 1, 4, 2)),
    (64, Gemm(64, 64, 128, 16, 1, 4, 2)),
    (512, Gemm(64, 128, 64, 16, 8, 4, 2)),
    (None, Gemm(128, 128, 64, 16, 8, 4, 2)),
)
_GEMM_FLOAT = (
    (16, Gemm(16, 64, 32, 16, 1, 4, 2)),
    (None, Gemm(64, 32, 32, 16, 8, 4, 2)),
)
# Its other calls: with several branches, or a rank that ends within a block, four warps spill.
_GEMM_FLOAT_CROWDED = (
    (16, Gemm(16, 64, 32, 16, 1, 4, 2)),
    (None, Gemm(64, 32, 32, 16, 8, 8, 2)),
)
# Of at most 16 rows on Blackwell, where four warps spill.
_FEW_ROWS_FLOAT_BLACKWELL = Gemm(16, 64, 32, 16, 1, 8, 2)
# Rows that cannot be read in 16-byte pieces need an address for each element, and branches beside
# each other a second accumulator: only small tiles leave registers for that.
_GEMM_CROWDED = (
    (16, Gemm(16, 64, 64, 16, 1, 4, 3)),
    (None, Gemm(64, 64, 32, 16, 8, 4, 3)),
)
# A half model with fp32 adapters: each rank product is three of TF32, and larger tiles spill.
_GEMM_MIXED = (
    (16, Gemm(16, 64, 64, 16, 1, 4, 3)),
    (None, Gemm(64, 64, 64, 16, 8, 4, 3)),
)
# Its calls that are not plain, before Hopper.
_GEMM_MIXED_CROWDED = (
    _GEMM_MIXED[0],
    (None, Gemm(64, 64, 64, 16, 8, 8, 3)),
)


FEW_COLUMNS = 8192
"""Outputs up to which tiles of 64 columns leave some of 132 multiprocessors without one."""
_FEW_ROWS = Gemm(16, 32, 256, 16, 1, 4, 4)
"""Of at most 16 rows and so few columns. On an H200 one row of bfloat16 takes 12.8 µs by W
[4096,4096] (16.2 with 64 columns, 128 of the contraction at a time) and 33.9 by [4096,14336]
(47.1); by more columns, W [14336,4096], it would take 42.9 (32.7)."""


def is_aligned(*tensors: Tensor) -> bool:
    """Whether Triton can read these in 16-byte pieces: it knows of a number that it divides by 16,
    or that it is 1, and of nothing else. Rows may be any number: they only end a mask."""
    return all(n == 1 or n % 16 == 0 for t in tensors for n in (*t.stride(), t.shape[-1]))


def is_plain(x: Tensor, weight: Tensor, ranks: Sequence[int]) -> bool:
    """Whether a GEMM needs no registers beyond the usual: one branch at most, of a rank that ends
    with a block of lanes or fits in one, and aligned operands."""
    usual = len(ranks) <= 1 and all(r <= 16 or r % 16 == 0 for r in ranks)
    return usual and is_aligned(x, weight)


def gemm(
    m: int,
    n: int,
    dtype: torch.dtype,
    capability: int,
    wide: bool,
    plain: bool,
    masked: bool = False,
) -> Gemm:
    """The configuration of the two-segment GEMMs for M rows and N columns of the output; capability
    as in 90 for sm_90; ``wide`` where the rank terms work in fp32; ``plain`` as :func:`is_plain`
    finds the call; ``masked`` where a mask may be made beside the product: in tiles of 256 columns
    it would spill, and those of few rows were measured without."""
    table: tuple[tuple[int | None, Gemm], ...]
    if dtype == torch.float32:
        if m <= 16 and capability == 100:
            return _FEW_ROWS_FLOAT_BLACKWELL
        table = _GEMM_FLOAT if plain or precision.AMD else _GEMM_FLOAT_CROWDED
    elif wide:
        crowded = not plain and is_older(capability)
        table = _GEMM_MIXED_CROWDED if crowded else _GEMM_MIXED
    elif not plain:
        table = _GEMM_CROWDED
    elif precision.AMD:
        table = _GEMM_AMD
    elif capability >= 90 and capability in WIDE_ARCHITECTURES and not masked:
        if m <= 16 and n <= FEW_COLUMNS:
            return _FEW_ROWS
        table = _GEMM_WGMMA
    elif capability in WIDE_ARCHITECTURES:
        table = _GEMM_AMPERE
    else:
        table = _GEMM_NARROW
    return next(config for bound, config in table if bound is None or m <= bound)


@dataclass(frozen=True)
class Decode:
    """Tiles of :mod:`decode`: ``cols`` columns of y, ``inner`` of the contraction at a time; S from
    sums over so many ``parts`` of K, made beside, or, where 0, within each program."""

    cols: int
    inner: int
    warps: int
    stages: int
    parts: int


DECODED = 16, 64
"""The most rows and ranks: those of one tile, the smallest that tensor cores multiply, and of an S
that each program keeps in registers."""
DECODE_PARTS = 4
"""Sums that S comes from. On an H200 y and S take 0 to 3 % longer than the frozen layer with 16
ranks, 5 to 10 % with 64, where 8 parts take 6 to 13 % longer than these and 16 parts 5 to 21 %."""


def decode(
    n: int, k: int, rank: int, dtype: torch.dtype, capability: int, plain: bool, across: bool
) -> Decode:
    """y and S of at most 16 rows; ``plain`` where A is aligned too, ``across`` where the columns of
    the weight lie side by side: its tiles have to be turned. But on sm_90, where the fastest
    of an H200 in bfloat16 are taken, S is made within if A's bytes, which then come for each tile
    of columns, are at most half of the tile's own."""
    lanes = rank_lanes(rank, False)
    if dtype == torch.float32:
        tiles = Decode(64, 32, 4, 2, 0)
    elif not plain:
        tiles = Decode(64, 64, 8, 3, 0)
    elif precision.AMD:
        tiles = Decode(64, 128, 4, 2, 0)
    elif is_narrow(capability):
        tiles = Decode(64, 64, 4, 4, 0)
    elif n <= FEW_COLUMNS:
        few, deep = lanes <= 16, k > FEW_COLUMNS
        if (few and not deep) or (across and not few):
            tiles = Decode(32, 256, 4, 4, 0)
        else:
            tiles = Decode(32, 512, 4, 3 if few or not deep else 4, 0)
    else:
        tiles = Decode(64, 128, 4, 4, 0)
    within = 2 * lanes <= tiles.cols and not (plain and capability == 90)
    return tiles if within else replace(tiles, parts=DECODE_PARTS)


def decode_parts(dtype: torch.dtype, plain: bool) -> Skinny:
    """The sums of S that are made beside; 16 rows."""
    if dtype == torch.float32 or not plain:
        return for_amd(Skinny(16, 32 if dtype == torch.float32 else 64, 16, 4, 3))
    return for_amd(Skinny(16, 128, 16, 4, 4))


def overlaps(capability: int) -> bool:
    """Whether a kernel may begin before the one whose results it waits for ends: NVIDIA's from
    Hopper on (programmatic dependent launch)."""
    return not precision.AMD and capability >= 90


def grad_input(m: int, dtype: torch.dtype, capability: int, wide: bool, plain: bool) -> Gemm:
    """As :func:`gemm`, of dx: any number of columns, and perhaps a mask."""
    return gemm(m, 0, dtype, capability, wide, plain, masked=True)


@dataclass(frozen=True)
class Persistent:
    """Tiles of a GEMM whose programs stay: as :class:`Gemm`; stored in ``parts`` by columns;
    ``specialise``: some warps only load, others only multiply, where Triton 3.6 can (Blackwell)."""

    rows: int
    cols: int
    inner: int
    group: int
    warps: int
    stages: int
    parts: int
    specialise: bool


PERSISTENT = (90, 100)
"""Compute capabilities with tensor descriptors (TMA) and the shared memory of these tiles."""
PERSISTENT_ROWS = 256
"""Least M: of fewer rows the weight's bytes are the limit, and these tiles would be half empty."""


def persistent(m: int, capability: int, masked: bool) -> Persistent:
    """The persistent GEMMs; ``masked`` where a mask is made beside the accumulator, for which
    tiles of 256 columns leave no registers."""
    if masked or m <= 1024:
        return Persistent(128, 128, 64, 8, 8, 4, 1, False)
    return Persistent(128, 256, 64, 8, 8, 3, 2, capability >= 100)


BESIDE = (90,)
"""Those of them where dA goes beside dx: on Blackwell these tiles spill."""


def beside(rank: int) -> Skinny:
    """dA beside a persistent dx: more than half of a multiprocessor's shared memory. On an H200
    four warps take 14 % less time than eight for 16 lanes, 3 % less for 64; elsewhere they spill.
    """
    lanes = max(16, triton.next_power_of_2(rank))
    return Skinny(64, 256 if lanes <= 64 else 128, lanes, 4 if lanes in (16, 64) else 8, 4)


Tiles = TypeVar("Tiles", bound="Skinny | Attend")


def for_amd(tiles: Tiles) -> Tiles:
    """The same tiles with what AMD's GPUs have room for: four warps there are 256 lanes, of which
    each has twice the registers that it has among eight, and shared memory holds two stages."""
    if not precision.AMD:
        return tiles
    return replace(tiles, warps=min(4, tiles.warps), stages=min(2, tiles.stages))


def rank_lanes(rank: int, wide: bool, most: int = 128) -> int:
    """Lanes of a skinny pass: the rank as a power of two from 16 (the least that tensor cores
    contract) to ``most``, or to 16 in fp32, where more would spill; higher ranks take several
    programs."""
    return max(16, min(16 if wide else most, triton.next_power_of_2(rank)))


def project(
    m: int, rank: int, wide: bool, aligned: bool, across: bool = False, masked: bool = False
) -> Skinny:
    """S = drop(x) Aᵀ; also dS = dy B where it goes apart from dB, for which A lies ``across``. Of
    8192 rows, on an H200, tiles of 64 rows take 23.8 µs of 64 lanes and of 32 27.4, across 23.7 and
    39.7; of 16 lanes 20.9 and 19.7, of three branches of 16 23.4 and 31.5, which have the tiles
    that each has alone. Beside a mask 32 rows take 31.2 and 64 33.9."""
    lanes = rank_lanes(rank, wide, 128 if aligned else 16)
    half = aligned and not wide
    tall = half and m > 512 and lanes <= 64 and not masked
    rows = 16 if m <= 16 else 64 if tall else 32
    stages = 5 if half and lanes <= 32 and not (tall or masked) else 3
    return for_amd(Skinny(rows, 64 if wide else 128, lanes, 4, stages))


def grad_up(
    rank: int, wide: bool, aligned: bool, of_s: bool = True, capability: int = 90
) -> Skinny:
    """The pass over dy: dS, dB, db. A program keeps [cols, rank] of dB and of B in registers, so
    that 128 lanes would spill. The warps, and columns and stages of what is not aligned, are those
    that do not spill, found by compiling (tests/kernels/every_variant.py); without dS (``of_s``)
    others than with it. Warps and stages, which alone hang on ``capability``, change no bits."""
    lanes = rank_lanes(rank, wide, 64 if aligned else 16)
    eight = lanes > 32 if of_s else lanes == 32
    gathered = not aligned and (wide or is_older(capability))  # an address for each element
    warps = 8 if eight or gathered else 4
    few = lanes == 16 and aligned and not wide  # on an H200 31.1 µs, with 128 columns 38.9
    cols = 256 if few else 128 if not wide else 64 if aligned else 32
    # dB alone of 64 lanes: on an H200 25.9 µs, by three stages 28.8
    alone = lanes == 64 and not of_s and not wide
    stages = 2 if not aligned or (alone and capability == 100) else 5 if alone else 3
    return for_amd(Skinny(32, cols, lanes, warps, stages))


def grad_down(rank: int, wide: bool, masked: bool = False) -> Skinny:
    """dA = dSᵀ drop(x). A program keeps [rank, cols] of dA in registers. On an H200 tiles of
    32 × 128 take 32.4 µs of 32 lanes, 43.6 of 64 and 84.5 of 128, those of 64 × 64 48.4, 84.7 and
    151; of 16 lanes with a mask 36.1 and 42.6. Where four warps spill on another, there are eight.
    """
    lanes = rank_lanes(rank, wide, 64 if precision.AMD else 128)
    if wide:
        return for_amd(Skinny(32, 64, lanes, 4, 3))
    eight = lanes > 64 or (lanes == 64 and masked)
    return for_amd(Skinny(32, 128, lanes, 8 if eight else 4, 2 if lanes >= 64 else 3))


def group_lanes(wide: bool) -> int:
    """Lanes of all branches that one program of a group has: an accumulator for each."""
    return 64 if precision.AMD or wide else 128


def project_group(m: int, rank: int, lanes: int, wide: bool, masked: bool) -> Skinny:
    """S of several branches: the tiles of x that one of this ``rank`` has alone; ``lanes`` of all.
    Four stages of 64 ranks would be 13 % faster on an H200, and too large for others. The rest is
    what does not spill, found by compiling; so below."""
    alone = project(m, rank, wide, True, masked=masked)
    crowded = masked and lanes > 64
    stages = 1 if crowded else 2 if alone.rows == 16 or wide else 3
    eight = crowded or (masked and wide)
    return for_amd(replace(alone, warps=8 if eight else 4, stages=stages))


def grad_input_group(
    m: int, dtype: torch.dtype, capability: int, wide: bool, plain: bool, masked: bool
) -> Gemm:
    """dx of several layers; a mask of its own for a branch needs an accumulator of its own."""
    config = grad_input(m, dtype, capability, wide, plain and not masked)
    if masked and wide:
        return replace(config, cols=min(config.cols, 32), warps=4, stages=min(config.stages, 2))
    if wide and dtype != torch.float32:
        stages = 1 if is_older(capability) else min(config.stages, 2)
        return replace(config, warps=4 if precision.AMD else 8, stages=stages)
    if m <= 16 and capability == 100 and dtype != torch.float32:
        return replace(config, warps=8)
    return config


def grad_down_group(rank: int, lanes: int, wide: bool, masked: bool, capability: int) -> Skinny:
    """dA of several branches, of which each makes the mask of x again: the tiles that one of this
    ``rank`` has alone; ``lanes`` of all. Three of 16 ranks take 40.1 µs on an H200, by eight warps
    49.8."""
    alone = grad_down(rank, wide)
    crowded = lanes > 64 and is_older(capability)
    if masked and lanes > 32:
        return for_amd(replace(alone, warps=8, stages=1 if crowded and lanes == 128 else 2))
    if wide and lanes > 32:
        return for_amd(replace(alone, stages=1))
    if crowded:
        return replace(alone, warps=8)
    return for_amd(alone)


def row_norms(rank: int, wide: bool, aligned: bool, capability: int) -> Skinny:
    """DoRA's pass over W: W Aᵀ, and the squares beside it. A may be float32 beside a half W, of
    whose widest block 99 KB have no room for two."""
    tiles = project(32, rank, wide, aligned)
    if precision.AMD:
        return replace(tiles, rank=min(tiles.rank, 64))
    return replace(tiles, stages=2) if tiles.rank > 64 and is_narrow(capability) else tiles


def row_norms_finish() -> Skinny:
    """What is added to that pass's sums; float32 products."""
    return Skinny(16, 0, 16, 4, 2)


FEW_ROWS = 1024
"""Rows up to which a product makes numbers of a quantised weight's codes itself: 16 tiles of them,
each of which makes all. The design page's bound, not a measurement."""

DEQUANTIZE = 1024
"""Elements of a quantised weight that a program writes."""


CODES = 64
"""Columns of W that a product reads at a time, at most: the usual block of NF4."""


def quantized(m: int, dtype: torch.dtype) -> Gemm:
    """The GEMM that reads codes."""
    if dtype == torch.float32:
        few = m <= 16
        return Gemm(16 if few else 64, 32, 32, 16, 8, 4 if few or precision.AMD else 8, 2)
    few = m <= 16
    return Gemm(16 if few else 64, 64, CODES, 16, 8, 4 if few or precision.AMD else 8, 2)


@dataclass(frozen=True)
class Attend:
    """Tiles of attention: ``rows`` queries × ``cols`` keys at a time, all of a head's elements."""

    rows: int
    cols: int
    warps: int
    stages: int


def all_registers() -> dict[str, int]:
    """Options of a launch of up to eight warps: a thread may have all 255 registers. Left to itself
    NVIDIA's assembler stops at 168 to fit a third program beside two, and spills a few for that:
    in attention, sums of partial sums, and a sequential adapter in two launches."""
    return {} if precision.AMD else {"maxnreg": 255}


def registers(capability: int) -> dict[str, int]:
    """:func:`all_registers` for GPUs with 99 KB, whose assembler spills sooner; of the others, what
    was measured leaves it the choice."""
    return all_registers() if is_narrow(capability) else {}


PROGRAMS = 256
"""How many programs a skinny pass is split into: about two for each multiprocessor of an H100.
A constant, so that the order of summation, and with it the bits, hang on shapes, strides and dtypes
of what is read only: not on the GPU, and on the gradients that are wanted beside it only as far as
these have more matrices read."""


def split(length: int, block: int, programs: int, times: int = 1) -> tuple[int, int]:
    """Cut a contraction of ``length`` among ``times`` · PROGRAMS: (pieces, elements a piece).

    ``programs`` run without cutting; pieces are whole blocks, so none overlap.
    """
    blocks = max(1, triton.cdiv(length, block))  # of nothing, one piece, which is zero
    wanted = max(1, min(blocks, times * PROGRAMS // max(1, programs)))
    chunk = triton.cdiv(blocks, wanted) * block
    return max(1, triton.cdiv(length, chunk)), chunk


def reads_dy_twice(grad_y: Tensor, b: Tensor, wide: bool) -> bool:
    """Whether dS goes apart from dB (project.py), by the bytes that each way moves: a second
    reading of dy, or one partial sum of dS for each tile of columns, written and read."""
    (m, n), rank = grad_y.shape, b.shape[1]
    tiles = triton.cdiv(n, grad_up(rank, wide, is_aligned(grad_y, b)).cols)
    apart = project(m, rank, wide, is_aligned(grad_y, b.t()), True)
    lanes = triton.cdiv(rank, apart.rank)
    parts, _ = split(n, apart.cols, triton.cdiv(m, apart.rows) * lanes)

    def sums(pieces: int) -> int:
        return 8 * m * rank * pieces if pieces > 1 else 0

    return grad_y.element_size() * m * n * lanes + sums(parts) < sums(tiles)


OF_GRAD_DOWN = 2
"""``times`` of :func:`split` for dA: of x [8192,4096] and 16 lanes 22.7 µs on an H200, once 27.2;
with a mask 36.7 and 39.6; by tiles of 64 × 64."""


LEAST_ROWS = 8
"""Rows that a piece of a sum over rows has at least: fewer, and its partial sums outweigh them."""


@dataclass(frozen=True)
class Rows:
    """Tiles of a pass over rows: ``rows`` × ``cols`` at a time."""

    rows: int
    cols: int
    warps: int


def norm(k: int) -> Rows:
    """A norm, forward: whole rows where they fit."""
    lanes = min(8192, max(16, triton.next_power_of_2(k)))
    return Rows(max(1, 1024 // lanes), lanes, 8 if lanes > 2048 else 4)


def norm_grads(k: int) -> Rows:
    """A norm, backward; a program keeps dgamma and dbias of its columns in registers."""
    lanes = min(8192, max(16, triton.next_power_of_2(k)))
    return Rows(max(1, 1024 // lanes), lanes, 16 if lanes > 4096 else 8 if lanes > 1024 else 4)


def fold(k: int) -> Rows:
    """D = Down ⊙ gamma; a program has one row."""
    return Rows(1, min(1024, max(16, triton.next_power_of_2(k))), 4)


FEWEST = 64
"""Programs from which on a sequential adapter is not cut in two to keep a GPU busy: half of an
H100's multiprocessors have one, and a launch is saved."""


TALL = 4096
"""Rows beyond which a program of a sequential adapter takes 32 of them, not 16."""


def bottleneck(m: int, rank: int, wide: bool, aligned: bool) -> Skinny:
    """A sequential adapter, forward; a program keeps h of its rows in registers. Rows that cannot
    be read in 16-byte pieces need an address for each element, as in :func:`project`."""
    lanes = rank_lanes(rank, wide, 128 if aligned else 16)
    rows = 32 if aligned and m > TALL else 16
    if _in_one(m, rank, rows, lanes):
        cols = 64 if wide or not aligned or lanes > 16 else 128
        return for_amd(Skinny(rows, cols, lanes, 8 if lanes > 64 else 4, 3))
    # the second launch has an accumulator beside h
    cols = 64 if wide or not aligned else 128
    return for_amd(Skinny(16, cols, min(lanes, 64), 8 if wide else 4, 3))


def is_fused(m: int, rank: int, config: Skinny) -> bool:
    """Whether one program does all of a sequential adapter for its rows."""
    return _in_one(m, rank, config.rows, config.rank)


def _in_one(m: int, rank: int, rows: int, lanes: int) -> bool:
    return rank <= lanes and triton.cdiv(m, rows) >= FEWEST


def bottleneck_grad(m: int, rank: int, wide: bool, aligned: bool, capability: int = 90) -> Skinny:
    """Its backward pass over rows; a program keeps dh of its rows, and dy and x at a time."""
    config = bottleneck(m, rank, wide, aligned)
    crowded = wide and not aligned
    warps = config.warps
    if is_fused(m, rank, config):
        warps = 8 if config.rank > 32 else 4
        if is_older(capability):
            config = replace(config, stages=2)
    elif crowded:
        warps = 4
    return for_amd(replace(config, cols=min(config.cols, 32 if crowded else 64), warps=warps))


def bottleneck_down(rank: int, wide: bool, aligned: bool, capability: int) -> Skinny:
    """G and its sums, as :func:`grad_down`, but tiles of 64 rows: of 64 lanes, on an H200, 41.0 µs,
    of 32 rows 48.4. An address for each element of x is what four warps have no room for."""
    config = grad_down(rank, wide)
    if wide:
        return for_amd(config if aligned else replace(config, warps=8))
    if aligned and config.rank <= 64:
        return for_amd(replace(config, rows=64, stages=2 if is_older(capability) else 3))
    return for_amd(Skinny(64, 64, config.rank, 8, 3))


def bottleneck_finish() -> Skinny:
    """What comes of the partial sums of G."""
    return Skinny(0, 64, 16, 4, 1)


def hidden(rank: int) -> Rows:
    """What lies between the products of a parallel adapter, element by element."""
    return gated(rank)


def gated(k: int) -> Rows:
    """Activation and product, element by element."""
    lanes = min(1024, max(16, triton.next_power_of_2(k)))
    return Rows(max(1, 2048 // lanes), lanes, 4)


def prompt(d: int) -> Rows:
    """Rows gathered behind a prompt."""
    lanes = min(1024, max(16, triton.next_power_of_2(d)))
    return Rows(max(1, 2048 // lanes), lanes, 4)


def prompt_grad(d: int) -> Rows:
    """The sum over the batch: one row of the prompt and few columns, since there are few rows."""
    return Rows(1, min(256, max(64, triton.next_power_of_2(d))), 2)


@dataclass(frozen=True)
class Turn:
    """Tiles of a rotation: ``rows`` tokens × ``lanes`` of each half of a head, of ``heads`` heads
    one after the other, for which the angles are read once."""

    rows: int
    lanes: int
    heads: int
    warps: int


def rotary(h: int, d: int) -> Turn:
    """Rotary embedding of H heads of D elements."""
    lanes = max(16, triton.next_power_of_2(d // 2))
    return Turn(max(1, 1024 // lanes), lanes, min(h, 8), 4)
