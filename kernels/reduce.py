"""Sum of partial results in a fixed order: out[r, c] = Σ_p partials[p, r, c]

partials [P, rows, cols] fp32, contiguous; out [rows, cols] with any strides and dtype.
Each element is added up by one lane from p = 0 to P-1, so the same bits come out every run;
atomics would not give that. Traffic: 4·P·rows·cols bytes read, one rounding at the store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs

BLOCK = 1024

Postponed = list[tuple[Tensor, Tensor]]
"""Arguments of :func:`sum_partials`, to be called later."""


@triton.jit
def _sum_partials_kernel(
    partials, out, parts, count, cols, out_row, out_col, BLOCK_SIZE: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = index < count
    source = partials + index
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    for _ in range(0, parts):
        total += tl.load(source, mask=inside, other=0.0)
        source += count  # a pointer moves in 64 bits; part * count might not
    offset = (index // cols) * out_row + (index % cols) * out_col
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)


def sum_partials(partials: Tensor, out: Tensor) -> None:
    """``out [rows, cols] = partials [P, rows, cols].sum(0)``, in the order of p."""
    parts, rows, cols = partials.shape
    _sum_partials_kernel[(triton.cdiv(rows * cols, BLOCK),)](
        partials,
        out,
        parts,
        rows * cols,
        cols,
        out.stride(0),
        out.stride(1),
        BLOCK_SIZE=BLOCK,
        **configs.all_registers(),
    )


def partials_or(out: Tensor, parts: int) -> Tensor:
    """Where ``parts`` programs write: fp32 ``[parts, rows, cols]``, or ``out`` itself for one."""
    if parts == 1:
        return out.unsqueeze(0)
    return torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)
