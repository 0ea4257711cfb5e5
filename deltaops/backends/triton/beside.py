"""The plan ``beside``: dA while dx is computed, on the multiprocessors that it leaves over.

Tiles of dx are computed in rounds, one a multiprocessor; the last round rarely needs all of them.
With as many fewer as cost no round more, the others read x meanwhile: a pass that takes no time of
its own. dS and dB come before, in one pass over dy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import branches, core

LEAST = 4
"""Multiprocessors that must be left over: fewer would read for longer than dx takes."""
MOST_RANK = 128
"""Of more a program has no registers for the sums of a block of columns."""


def left_over(tiles: int, multiprocessors: int) -> int:
    """Multiprocessors that are not needed to compute ``tiles`` in as many rounds."""
    rounds = -(-tiles // multiprocessors)
    return multiprocessors - -(-tiles // rounds)


def fits(m: int, k: int, rank: int, device: torch.device | str) -> bool:
    """Whether a persistent dx ``[M, K]`` leaves enough over."""
    return rank <= MOST_RANK and core.has_room_beside(device) and _spare(m, k, device) >= LEAST


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """dx, db where it is wanted, dA, and dB where that is; of one LoRA branch without dropout.

    Args:
        needs: of x, the bias, A and B.
    """
    grad_x, grad_s, grad_a = torch.empty_like(x), torch.empty_like(s), torch.empty_like(a)
    grad_b = torch.empty_like(b) if needs[3] else None
    grad_bias = grad_y.new_empty(grad_y.shape[1]) if needs[1] else None
    (m, k), device = x.shape, x.device
    precision = core.kernels("precision").rank_precision(x.dtype, [a])
    spare, capability = _spare(m, k, device), core.capability(x)
    with core.device_of(x):
        branches.pass_over_dy(
            grad_y, b, s, scaling=scaling, activation=branches.LINEAR, precision=precision,
            grad_s=grad_s, grad_b=grad_b, grad_bias=grad_bias,
        )  # fmt: skip
        with core.aside(device):
            core.kernels("beside").beside(grad_s, x, grad_a, programs=spare)
        try:
            core.kernels("persistent_grad_input").persistent_grad_input(
                grad_y, weight, grad_s, a, grad_x, dropout=0.0, seed=None,
                capability=capability, multiprocessors=core.multiprocessors(device) - spare,
            )  # fmt: skip
        finally:
            core.together(device)
    return [t for t in (grad_x, grad_bias, grad_a, grad_b) if t is not None]


def _spare(m: int, k: int, device: torch.device | str) -> int:
    config = core.kernels("configs").persistent(m, 90, masked=False)
    return left_over(-(-m // config.rows) * -(-k // config.cols), core.multiprocessors(device))
