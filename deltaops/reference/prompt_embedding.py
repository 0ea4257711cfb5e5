"""A prompt before the embeddings of tokens     (Lester et al. 2021, arXiv 2104.08691, §2)

    y = [p₁ … p_P  E[t₁] … E[t_T]],    dp = Σ_b dy_b[:P]

prompt [P,D]  ids [B,T]  table E [V,D]  y [B,P+T,D] in the dtype of the table. The sum goes over the
batch in its order, in float32 at least, and is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(prompt: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """``y [B, P + T, D]``."""
    tokens = torch.nn.functional.embedding(ids, table)
    before = prompt.to(table.dtype).expand(ids.shape[0], -1, -1)
    return torch.cat([before, tokens], 1)


def backward(grad_y: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """``grad_prompt [P, D]`` in ``dtype``, contiguous; ``length`` is P."""
    work = torch.promote_types(grad_y.dtype, torch.float32)
    total = grad_y.new_zeros((length, grad_y.shape[2]), dtype=work)
    for sequence in grad_y[:, :length]:
        total = total + sequence
    return total.to(dtype)
