"""What the persistent GEMMs share: their walk over tiles, their operands, their epilogue.

    out = left right + side factor      one axis of contraction, its first segment the frozen one

One program a multiprocessor stays and takes every P-th tile, of P programs, in the order of
:func:`tiles.grouped_tile`, so that each tile is computed once and by whom does not change its bits.
Operands come through tensor descriptors (TMA: Hopper and later): no address arithmetic in
registers, zeros outside a matrix, and the loads of the next tile under the epilogue of this one
where the compiler flattens the walk. A step beyond the frozen segment reads through the other two
descriptors of the same block shapes, so that both segments are one pipelined loop: the rank
segment is therefore in the model's dtype, and padded to whole blocks of the contraction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import INTERPRETED
from .configs import Persistent


@triton.jit
def store_in_parts(out, row, col, acc, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """Round a tile once and store it by columns in PARTS (1 or 2), so that shared memory holds only
    a part of it and has room for one more stage of operands."""
    if PARTS == 1:
        out.store([row, col], acc.to(out.dtype))
    else:
        halves = tl.permute(tl.reshape(acc, (ROWS, 2, COLS // 2)), (0, 2, 1))
        low, high = tl.split(halves)
        out.store([row, col], low.to(out.dtype))
        out.store([row, col + COLS // 2], high.to(out.dtype))


def described(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Of ``matrix``, read or written in blocks of rows × cols."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, cols])


def is_describable(*matrices: Tensor) -> bool:
    """Whether the copy engine takes these: rows of a half type that lie side by side, start at
    multiples of 16 bytes and do not overlap; not empty."""
    return all(
        t.dtype in (torch.float16, torch.bfloat16)
        and t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in matrices
    )


def programs(tiles: int, multiprocessors: int) -> int:
    """How many stay; three in the interpreter, so that each takes several tiles there too."""
    return min(tiles, 3 if INTERPRETED else multiprocessors)


def launch_options(config: Persistent) -> dict[str, int]:
    """What a launch takes beside its arguments."""
    return {"num_warps": config.warps, "num_stages": config.stages}
