"""The dropout mask, made again wherever it is needed     (Philox4x32-7: Salmon et al. 2011)

    keep(m, k) = draw(k, m, stream) >= threshold

The normative text is csrc/include/philox.h: one Philox call gives the eight 16-bit draws of
columns 8g … 8g+7 of a row, from counter (g, m mod 2³², m div 2³², stream) and the 64-bit seed.
No memory traffic: about 7 integer instructions an element, against 2 bytes of x read.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

DRAWS = 1 << 16


def drop_threshold(p: float) -> int:
    """The number of the 65536 draws that drop an element."""
    return round(p * DRAWS)


def keep_scale(threshold: int) -> float:
    """What kept elements are multiplied by; 0 where everything is dropped."""
    return 0.0 if threshold >= DRAWS else DRAWS / (DRAWS - threshold)


def each_threshold(thresholds: Sequence[int]) -> tuple[float, ...]:
    """For a kernel that takes a tuple of them. Whole numbers in a tuple are specialised whatever
    do_not_specialize says: a kernel would be compiled again for a p whose threshold 16 divides."""
    return tuple(map(float, thresholds))


@triton.jit
def keep_mask(seed, row, first_col, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] of int1 for the rows ``row`` and the columns from ``first_col``,
    a multiple of 8. Groups lie along columns, so a thread keeps the eight draws of one call.
    ``threshold`` is a whole number, of whichever type."""
    group = (first_col // 8 + tl.arange(0, COLS // 8))[None, :].to(tl.uint32)
    wide = row.to(tl.int64)
    low = wide.to(tl.uint32)[:, None]  # keeps the low word
    high = (wide >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, group, low, high, stream, 7)
    # join appends an axis of two: [..., i, j] is word 2i + j, and then [..., h] its half h
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, [ROWS, COLS // 2])
    draws = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, COLS])
    return draws.to(tl.int32) >= tl.cast(threshold, tl.int32)


@triton.jit(do_not_specialize=["stream", "threshold"])
def _dropout_mask_kernel(
    keep, seed, M, K, stream, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    col = first + tl.arange(0, BLOCK_K)
    mask = keep_mask(tl.load(seed), row, first, stream, threshold, BLOCK_M, BLOCK_K)
    inside = (row[:, None] < M) & (col[None, :] < K)
    tl.store(keep + row[:, None] * K + col[None, :], mask.to(tl.uint8), mask=inside)


def dropout_mask(rows: int, cols: int, seed: Tensor, stream: int, threshold: int) -> Tensor:
    """The mask ``[rows, cols]`` as uint8, for tests: the op itself never stores it."""
    keep = torch.empty((rows, cols), dtype=torch.uint8, device=seed.device)
    grid = (triton.cdiv(rows, 16), triton.cdiv(cols, 64))
    _dropout_mask_kernel[grid](keep, seed, rows, cols, stream, threshold, BLOCK_M=16, BLOCK_K=64)
    return keep
