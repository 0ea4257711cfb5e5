"""Cross-entropy of rows of logits, each against one class

    loss = Σₘ (log Σᵥ exp(xₘᵥ) − xₘₜ),  t = targetₘ,  over the rows with t ≠ ignore_index

x [M,V]  target [M]  loss scalar. The mean divides by the number of those rows: NaN for none.
State [M,2] is what backward needs beside x: the maximum of each row and 1 / Σᵥ exp(xₘᵥ − maximum),
both 0 for an ignored row. bfloat16 and float16 are computed in float32, and so is the loss.
An ignored row is not looked at: NaN in it reaches neither the loss nor its gradient, which is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Loss and state are in float32 (float64 for float64)."""
    return torch.promote_types(dtype, torch.float32)


def check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Every target is a class or ``ignore_index``.

    Raises: ValueError with the first one that is neither.
    """
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"cross_entropy: target[{row}] must be a class from 0 to {classes - 1} or "
            f"ignore_index={ignore_index}, got {int(target[row])}. "
            "Are labels and logits of the same vocabulary?"
        )


def forward(logits: Tensor, target: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
    """``(loss, state [M, 2])``."""
    counted = target != ignore_index
    x = torch.where(counted[:, None], logits, 0).to(work_dtype(logits.dtype))
    maximum = x.amax(dim=1)
    total = torch.exp(x - maximum[:, None]).sum(dim=1)
    at_target = x.gather(1, torch.where(counted, target, 0)[:, None])[:, 0]
    losses = torch.where(counted, torch.log(total) - (at_target - maximum), 0)
    loss = losses.sum() / counted.sum() if mean else losses.sum()
    return loss, torch.where(counted[:, None], torch.stack([maximum, 1 / total], dim=1), 0)


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    state: Tensor,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """``grad_logits [M, V]`` in the dtype of ``logits``."""
    counted = target != ignore_index
    scale = grad_loss / counted.sum() if mean else grad_loss
    maximum, inverse = state[:, :1], state[:, 1:]
    probability = torch.exp(logits.to(work_dtype(logits.dtype)) - maximum) * inverse
    one_hot = torch.zeros_like(probability)
    one_hot.scatter_(1, torch.where(counted, target, 0)[:, None], 1.0)
    return torch.where(counted[:, None], (probability - one_hot) * scale, 0).to(logits.dtype)
