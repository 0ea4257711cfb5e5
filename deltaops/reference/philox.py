"""The dropout mask, made from counters: Philox4x32-7 (Salmon et al. 2011).

``csrc/include/philox.h`` is the normative text; this is the same stream in int64 torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF

DRAWS = 1 << 16
"""A draw is 16 bits, so a probability is a multiple of 1/65536."""


def drop_threshold(p: float) -> int:
    """``p`` as a number of the 65536 draws: an element is dropped when its draw is below it."""
    return round(p * DRAWS)


def keep_scale(threshold: int) -> float:
    """What kept elements are multiplied by, so that the expectation is unchanged."""
    return 0.0 if threshold >= DRAWS else DRAWS / (DRAWS - threshold)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of 32-bit words, within int64."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)  # both below 2^48
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64 tensors) for each counter; ``seed`` is one int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _LOW32, (k1 + WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def draws(rows: int, columns: int, seed: Tensor, stream: int) -> Tensor:
    """The 16-bit draws of elements ``[rows, columns]``, int64."""
    device = seed.device
    group = torch.arange((columns + 7) // 8, device=device)[None, :]
    row = torch.arange(rows, device=device)[:, None]
    c0, c1 = group.expand(rows, -1), (row & _LOW32).expand(-1, group.shape[1])
    c2, c3 = (row >> 32).expand_as(c1), torch.full_like(c1, stream)
    words = torch.stack(philox((c0, c1, c2, c3), seed.reshape(())), dim=-1)  # [rows, groups, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # low half first
    return halves.reshape(rows, 8 * group.shape[1])[:, :columns]


def dropout_scale(x: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor | None:
    """The factor ``[M, K]`` (0 or the keep scale) that dropout multiplies ``x [M, K]`` by.

    None where ``p`` rounds to no dropout at all. Needs ``seed``, an int64 of one element.
    """
    threshold = drop_threshold(p)
    if threshold == 0:
        return None
    if seed is None:
        raise ValueError(f"dropout {p} needs a seed")
    kept = draws(x.shape[0], x.shape[1], seed, stream) >= threshold
    return kept.to(x.dtype) * keep_scale(threshold)
