"""A prompt before the embeddings of tokens     (Lester et al. 2021, §2)

    y = [p₁ … p_P  E[t₁] … E[t_T]],    dp = Σ_b dy_b[:P]

    prompt [P,D]  ids [B,T] int  table E [V,D]  y [B,P+T,D]; the sum in fp32, in the order of b

One gather writes y: no embeddings of tokens alone, and no copy of them behind the prompt. A token
that is not in the table gives a row of NaN: nothing is read beyond it.
Traffic: y once, a row of the table for each token, the prompt once for each sequence (from L2);
backward: of dy the positions of the prompt, and dp.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import load_tile, store_tile


@triton.jit
def _prompt_kernel(
    prompt,
    ids,
    table,
    y,
    P,
    T,
    D,
    V,
    p_row,
    p_col,
    i_row,
    i_col,
    t_row,
    t_col,
    y_batch,
    y_row,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(P + T, BLOCK_L)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    before = load_tile(prompt, row, col, p_row, p_col, P, D).to(y.dtype.element_ty)
    place = (row - P).to(tl.int64)
    is_token = (place >= 0) & (place < T)
    token = tl.load(ids + b * i_row + place * i_col, mask=is_token, other=0).to(tl.int64)
    known = is_token & (token >= 0) & (token < V)
    offset = token[:, None] * t_row + col.to(tl.int64)[None, :] * t_col
    inside = known[:, None] & (col[None, :] < D)
    behind = tl.load(table + offset, mask=inside, other=float("nan"))
    value = tl.where((row < P)[:, None], before, behind)
    store_tile(y + b * y_batch, row, col, y_row, 1, P + T, D, value)


@triton.jit
def _prompt_grad_kernel(
    grad_y,
    grad_prompt,
    B,
    P,
    D,
    gy_batch,
    gy_row,
    gy_col,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    source = grad_y
    for _ in range(0, B):
        total += load_tile(source, row, col, gy_row, gy_col, P, D).to(tl.float32)
        source += gy_batch  # a pointer moves in 64 bits
    store_tile(grad_prompt, row, col, D, 1, P, D, total)


def prompt_embedding(prompt: Tensor, ids: Tensor, table: Tensor, y: Tensor) -> None:
    """Write ``y [B, P + T, D]``, whose rows are of adjacent elements."""
    (length, d), (batch, tokens) = prompt.shape, ids.shape
    config = configs.prompt(d)
    tiles = triton.cdiv(length + tokens, config.rows)
    _prompt_kernel[(batch * tiles, triton.cdiv(d, config.cols))](
        prompt,
        ids,
        table,
        y,
        length,
        tokens,
        d,
        table.shape[0],
        *prompt.stride(),
        *ids.stride(),
        *table.stride(),
        *y.stride()[:2],
        BLOCK_L=config.rows,
        BLOCK_D=config.cols,
        num_warps=config.warps,
    )


def prompt_embedding_grad(grad_y: Tensor, grad_prompt: Tensor) -> None:
    """Write ``grad_prompt [P, D]`` (contiguous) for grad_y ``[B, ≥ P, D]``."""
    length, d = grad_prompt.shape
    config = configs.prompt_grad(d)
    _prompt_grad_kernel[(triton.cdiv(length, config.rows), triton.cdiv(d, config.cols))](
        grad_y,
        grad_prompt,
        grad_y.shape[0],
        length,
        d,
        *grad_y.stride(),
        BLOCK_L=config.rows,
        BLOCK_D=config.cols,
        num_warps=config.warps,
    )
