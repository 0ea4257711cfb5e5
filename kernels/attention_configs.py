"""Launch parameters of attention and of a prefix's part of it: as configs.py, of which they are."""

from __future__ import annotations

import triton

from . import precision
from .configs import Attend, for_amd, is_narrow, is_older


def head_lanes(d: int) -> int:
    """Lanes for the elements of a head: a power of two from 16."""
    return max(16, triton.next_power_of_2(d))


def attention(d: int, wide: bool, aligned: bool, masked: bool, capability: int) -> Attend:
    """The forward pass; ``wide`` where products with the prefix work in fp32. An address for each
    element of a row, or of a mask, is what the largest tiles leave no registers for."""
    lanes = head_lanes(d)
    if wide:
        if precision.AMD:
            # Triton 3.6 fails on AMD where 32 rows are shared by several warps
            # (github.com/triton-lang/triton/pull/10666)
            return for_amd(Attend(64, 32, 4, 2))
        if lanes <= 64:
            return Attend(32, 32, 8, 1)
        return Attend(32, 32, 4, 2) if aligned else Attend(16, 16, 4, 1)
    if lanes > 128:
        if precision.AMD or (aligned and not masked):
            return for_amd(Attend(64, 32, 8, 2))
        return Attend(32, 16, 4, 1)
    if lanes > 64 and masked and is_older(capability):
        return Attend(32, 32, 8, 2)
    roomy = lanes <= 64 and aligned and not masked and not is_narrow(capability)
    return for_amd(Attend(128, 64, 4, 3) if roomy else Attend(64, 32, 8, 3))


def grad_query(d: int, wide: bool, aligned: bool, masked: bool, capability: int) -> Attend:
    """dQ and δ. Masks, and rows that cannot be read in 16-byte pieces, need an address for each
    element, and the widest heads in 99 KB leave no room for a second stage."""
    lanes = head_lanes(d)
    if wide:
        if lanes <= 64:
            return for_amd(Attend(32, 32, 8, 1))
        if aligned:
            return for_amd(Attend(16, 32, 4, 1))
        # by compiling: each spills a few bytes on the GPUs of another
        if capability in (90, 100):
            return Attend(16, 32, 8, 1)
        return for_amd(Attend(16, 16, 8, 2) if is_narrow(capability) else Attend(16, 16, 4, 1))
    if lanes < 64 and aligned and not masked:
        return for_amd(Attend(64, 64, 4, 2))
    stages = 1 if lanes > 128 and is_narrow(capability) else 2
    crowded = not aligned or (masked and lanes > 128)
    if crowded and lanes > 128 and is_older(capability):
        return Attend(32, 16, 8, 1)
    return for_amd(Attend(32 if crowded and not precision.AMD else 64, 32, 8, stages))


def grad_keys(d: int, wide: bool, masked: bool = False, capability: int = 90) -> Attend:
    """dK and dV; a program keeps both for ``cols`` keys in registers. Those of a prefix are never
    masked, and cut alike on all GPUs."""
    lanes = head_lanes(d)
    if masked and not wide and lanes > 128 and is_older(capability):
        return Attend(32, 16, 8, 1)
    if wide:
        if lanes == 32:  # eight warps spill on sm_90
            return for_amd(Attend(16, 32, 4, 1))
        return for_amd(Attend(32, 32, 8, 1) if lanes <= 64 else Attend(16, 32, 8, 1))
    if lanes > 128:
        return for_amd(Attend(32, 32, 8, 1))
    return for_amd(Attend(32, 32, 4, 2) if lanes <= 64 else Attend(32, 32, 8, 2))


def prefix_lanes(prefix: int, most: int) -> int:
    """Keys of a prefix at a time: all of them, as a power of two from 16, up to ``most``."""
    return max(16, min(most, triton.next_power_of_2(prefix)))


def merge_prefix(d: int, prefix: int, wide: bool, aligned: bool) -> Attend:
    """A prefix merged into an attention without it, forward. Memory is the limit: a program has
    few products, and beside the accumulator a tile of the other keys' y."""
    lanes = head_lanes(d)
    if wide:
        rows = 16 if lanes > 64 else 32
        return for_amd(Attend(rows, prefix_lanes(prefix, 32 if aligned else 16), 4, 1))
    rows = 16 if not aligned else 32 if lanes > 128 else 64
    most = 32 if aligned or lanes <= 128 else 16
    return for_amd(Attend(rows, prefix_lanes(prefix, most), 4, 2))


def prefix_grads(d: int, prefix: int, wide: bool, aligned: bool) -> tuple[Attend, bool]:
    """Its backward pass, and whether a program has the whole prefix at a time: it keeps dPk and dPv
    in registers then. On an H200 one stage takes 68 µs where two, which leave an SM room for fewer
    programs, take 128 (2 × 2048 tokens, 32 heads of 128 elements, a prefix of 32). With a float32
    prefix, heads of 72, 88, 104 or 120 elements spill up to 24 bytes."""
    lanes = head_lanes(d)
    if wide or lanes > 128:
        most = 32 if lanes <= 64 else 16
        whole = prefix <= most and (aligned or lanes != 128)
        parts = 32 if aligned or lanes <= 128 else 16
        cols = prefix_lanes(prefix, most) if whole else parts
        return for_amd(Attend(16, cols, 8 if lanes > 64 else 4, 1)), whole
    most = 64 if lanes <= 64 else 32
    rows, warps = (32, 4) if aligned else (16, 8)
    return for_amd(Attend(rows, prefix_lanes(prefix, most), warps, 1)), prefix <= most


SUMMED = 128
"""Elements of a prefix's gradient that a program adds up."""
