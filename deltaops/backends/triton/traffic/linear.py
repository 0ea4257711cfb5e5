"""Entries of the kernels of ``delta_linear``: alone, in groups, with DoRA, on quantised weights."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from .tally import Traffic, cdiv, entry


@entry("_forward_kernel")
def _forward(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = cdiv(a.M, a.BLOCK_M), cdiv(a.N, a.BLOCK_N)
    steps = 0
    if a.HAS_BASE:
        t.load(a.x, a.M * a.K, a.M * a.K * across)
        t.load(a.weight, a.N * a.K, a.N * a.K * down)
        t.dots(down * across * cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_N, a.BLOCK_K)
    for rank, up in zip(a.RANKS, a.b, strict=True):
        t.load(a.s, a.M * rank, a.M * rank * across)
        t.load(up, a.N * rank, a.N * rank * down)
        steps += cdiv(rank, a.BLOCK_R)
    t.dots(down * across * steps, a.BLOCK_M, a.BLOCK_N, a.BLOCK_R)
    if a.HAS_BIAS:
        t.load(a.bias, a.N, a.N * down)
    t.store(a.y, a.M * a.N)


@entry("_decode_kernel")
def _decode(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    (across,) = grid
    steps = across * cdiv(a.K, a.BLOCK_K)
    t.load(a.x, a.M * a.K, a.M * a.K * across)
    t.load(a.weight, a.N * a.K, a.N * a.K)
    t.dots(steps, a.BLOCK_M, a.BLOCK_N, a.BLOCK_K)
    if a.PARTS:
        t.load(a.parts, a.PARTS * a.M * a.R, a.PARTS * a.M * a.R * across)
    else:
        t.load(a.a, a.R * a.K, a.R * a.K * across)
        t.dots(steps, a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)
    t.load(a.b, a.N * a.R, a.N * a.R)
    t.dots(across, a.BLOCK_M, a.BLOCK_N, a.BLOCK_R)
    if a.HAS_BIAS:
        t.load(a.bias, a.N, a.N)
    t.store(a.s, a.M * a.R)
    t.store(a.y, a.M * a.N)


@entry("_decode_parts_kernel")
def _decode_parts(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    lanes, parts = grid
    t.load(a.x, a.M * a.K, a.M * a.K * lanes)
    t.load(a.a, a.R * a.K, a.R * a.K)
    t.store(a.parts, a.M * a.R * parts)
    t.dots(lanes * cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


@entry("_persistent_forward_kernel")
def _persistent_forward(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    _persistent(a.x, a.weight, a.s, a.b, a.y, (a.M, a.N, a.K, a.R),
                (a.BLOCK_M, a.BLOCK_N, a.BLOCK_K), t)  # fmt: skip
    if a.HAS_BIAS:
        t.load(a.bias, a.N, a.N * cdiv(a.M, a.BLOCK_M))


@entry("_persistent_grad_input_kernel")
def _persistent_grad_input(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    _persistent(a.grad_y, a.weight, a.grad_s, a.a, a.grad_x, (a.M, a.K, a.N, a.R),
                (a.BLOCK_M, a.BLOCK_K, a.BLOCK_N), t)  # fmt: skip
    if a.DROPOUT:
        t.load(a.seed, 1, grid[0])


def _persistent(
    left: Any, right: Any, side: Any, factor: Any, out: Any,
    lengths: tuple[int, int, int, int], block: tuple[int, int, int], t: Traffic,
) -> None:  # fmt: skip
    """Of tensor descriptors: what lies outside a matrix is not asked for."""
    rows, cols, inner, rank = lengths
    down, across = cdiv(rows, block[0]), cdiv(cols, block[1])
    for first, second, length in ((left, right, inner), (side, factor, rank)):
        t.load(first.base, rows * length, rows * length * across)
        t.load(second.base, cols * length, cols * length * down)
        t.dots(down * across * cdiv(length, block[2]), *block)
    t.store(out.base, rows * cols)


@entry("_beside_kernel")
def _beside(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    blocks = cdiv(a.K, a.BLOCK_K)
    t.load(a.x.base, a.M * a.K, a.M * a.K)
    t.load(a.grad_s, a.M * a.R, a.M * a.R * blocks)
    t.store(a.grad_a, a.K * a.R)
    t.dots(blocks * cdiv(a.M, a.BLOCK_M), a.BLOCK_K, a.BLOCK_R, a.BLOCK_M)


@entry("_project_kernel")
def _project(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across, parts = grid
    t.load(a.x, a.M * a.K, a.M * a.K * across)
    t.load(a.a, a.R * a.K, a.R * a.K * down)
    if a.DROPOUT:
        t.load(a.seed, 1, math.prod(grid))
    if a.ROUTED:
        t.load(a.adapter, a.M, a.M * across * parts)
    t.store(a.s, a.M * a.R * parts)
    t.dots(down * across * cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


@entry("_drop_and_project_kernel")
def _drop_and_project(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = grid
    t.load(a.x, a.M * a.K, a.M * a.K * across)
    t.load(a.a, a.R * a.K, a.R * a.K * down)
    t.load(a.seed, 1, math.prod(grid))
    for made in (a.dropped, a.keep):
        t.store(made, a.M * a.K)
    t.store(a.s, a.M * a.R)
    t.dots(down * across * cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


@entry("_stored_grad_input_kernel")
def _stored_grad_input(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = cdiv(a.M, a.BLOCK_M), cdiv(a.K, a.BLOCK_K)
    t.load(a.keep, a.M * a.K, a.M * a.K)
    for left, right, length, block in (
        (a.grad_s, a.a, a.R, a.BLOCK_R), (a.grad_y, a.weight, a.N, a.BLOCK_N),
    ):  # fmt: skip
        t.load(left, a.M * length, a.M * length * across)
        t.load(right, a.K * length, a.K * length * down)
        t.dots(down * across * cdiv(length, block), a.BLOCK_M, a.BLOCK_K, block)
    t.store(a.grad_x, a.M * a.K)


@entry("_grad_up_kernel")
def _grad_up(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    across, lanes, parts = grid
    steps = across * lanes * cdiv(a.M, a.BLOCK_M)
    t.load(a.grad_y, a.M * a.N, a.M * a.N * lanes)
    if a.WANT_S:
        t.load(a.b, a.N * a.R, a.N * a.R * parts)
        t.store(a.grad_s, a.M * a.R * across)
        if a.ROUTED:
            t.load(a.adapter, a.M, a.M * across * lanes)
        t.dots(steps, a.BLOCK_M, a.BLOCK_R, a.BLOCK_N)
    if a.WANT_B:
        t.load(a.s, a.M * a.R, a.M * a.R * across)
        t.store(a.grad_b, a.N * a.R * parts)
        t.dots(steps, a.BLOCK_N, a.BLOCK_R, a.BLOCK_M)
    if a.WANT_BIAS:
        t.store(a.grad_bias, a.N * parts)


@entry("_grad_down_kernel")
def _grad_down(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    across, lanes, parts = grid
    t.load(a.x, a.M * a.K, a.M * a.K * lanes)
    t.load(a.grad_s, a.M * a.R, a.M * a.R * across)
    if a.DROPOUT:
        t.load(a.seed, 1, math.prod(grid))
    t.store(a.grad_a, a.R * a.K * parts)
    t.dots(across * lanes * cdiv(a.M, a.BLOCK_M), a.BLOCK_R, a.BLOCK_K, a.BLOCK_M)


@entry("_project_group_kernel")
def _project_group(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, parts = grid
    steps = down * cdiv(a.K, a.BLOCK_K)
    t.load(a.x, a.M * a.K, a.M * a.K)
    for rank, lanes, factor in zip(a.RANKS, a.LANES, a.a, strict=True):
        t.load(factor, rank * a.K, rank * a.K * down)
        t.dots(steps, a.BLOCK_M, lanes, a.BLOCK_K)
    _masks(a, math.prod(grid), t)
    t.store(a.s, a.M * sum(a.RANKS) * parts)


@entry("_grad_down_group_kernel")
def _grad_down_group(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    across, parts = grid
    steps = across * cdiv(a.M, a.BLOCK_M)
    t.load(a.x, a.M * a.K, a.M * a.K)
    for rank, lanes, factor in zip(a.RANKS, a.LANES, a.grad_a, strict=True):
        t.load(a.grad_s, a.M * rank, a.M * rank * across)
        t.store(factor, rank * a.K * parts)
        t.dots(steps, lanes, a.BLOCK_K, a.BLOCK_M)
    _masks(a, math.prod(grid), t)


@entry("_grad_input_kernel")
def _grad_input(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = cdiv(a.M, a.BLOCK_M), cdiv(a.K, a.BLOCK_K)
    _downs(a, down, across, t)
    if a.HAS_BASE:
        for dy, weight, n in zip(a.grad_y, a.weight, a.N, strict=True):
            t.load(dy, a.M * n, a.M * n * across)
            t.load(weight, n * a.K, n * a.K * down)
            t.dots(down * across * cdiv(n, a.BLOCK_N), a.BLOCK_M, a.BLOCK_K, a.BLOCK_N)
    t.store(a.grad_x, a.M * a.K)


def _downs(a: SimpleNamespace, down: int, across: int, t: Traffic) -> None:
    """The rank part of dx, of so many tiles."""
    for rank, factor in zip(a.RANKS, a.a, strict=True):
        t.load(a.grad_s, a.M * rank, a.M * rank * across)
        t.load(factor, a.K * rank, a.K * rank * down)
        t.dots(down * across * cdiv(rank, a.BLOCK_R), a.BLOCK_M, a.BLOCK_K, a.BLOCK_R)
    _masks(a, down * across, t)


@entry("_hidden_kernel")
def _hidden(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    count = a.M * a.R
    t.load(a.h, count, count)
    if a.HAS_BIAS:
        t.load(a.bias, a.R, a.R * grid[0])
        if a.ROUTED:
            t.load(a.adapter, a.M, a.M * grid[1])
        t.store(a.h, count)
    t.store(a.u, count)


@entry("_hidden_grad_kernel")
def _hidden_grad(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    count = a.M * a.R
    for tensor in (a.h, a.grad_u):
        t.load(tensor, count, count)
    for tensor in (a.grad_u, *([a.u] if a.WANT_U else [])):
        t.store(tensor, count)


@entry("_row_norms_kernel")
def _row_norms(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, lanes, parts = grid
    t.load(a.weight, a.N * a.K, a.N * a.K * lanes)
    t.load(a.a, a.R * a.K, a.R * a.K * down)
    t.load(a.b, a.N * a.R, a.N * a.R * parts)
    t.store(a.sums, a.N * lanes * parts)
    t.dots(down * lanes * cdiv(a.K, a.BLOCK_K), a.BLOCK_N, a.BLOCK_R, a.BLOCK_K)


@entry("_row_norms_finish_kernel")
def _row_norms_finish(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    steps = cdiv(a.R, a.BLOCK_R)
    t.load(a.sums, a.N * a.parts, a.N * a.parts)
    t.load(a.b, a.N * a.R, a.N * a.R * (steps + 1))
    t.load(a.gram, a.R * a.R, a.R * a.R * grid[0])
    t.store(a.norms, a.N)
    t.dots(grid[0] * steps * steps, a.BLOCK_N, a.BLOCK_R, a.BLOCK_R)


@entry("_dequantize_kernel")
def _dequantize(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    t.load(a.codes, a.codes.numel(), a.count)
    t.load(a.scales, a.scales.numel(), a.count)
    if a.NF4:
        t.load(a.table, 16, grid[0] * a.BLOCK_SIZE)
    t.store(a.weight, a.count)


@entry("_forward_quantized_kernel")
def _forward_quantized(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across, steps = cdiv(a.M, a.BLOCK_M), cdiv(a.N, a.BLOCK_N), cdiv(a.K, a.BLOCK_K)
    t.load(a.x, a.M * a.K, a.M * a.K * across)
    t.load(a.codes, a.codes.numel(), a.codes.numel() * down)
    t.load(a.scales, a.scales.numel(), a.N * steps * down)
    if a.NF4:
        t.load(a.table, 16, down * across * steps * a.BLOCK_N * a.BLOCK_K)
    t.dots(down * across * steps, a.BLOCK_M, a.BLOCK_N, a.BLOCK_K)
    for rank, up in zip(a.RANKS, a.b, strict=True):
        t.load(a.s, a.M * rank, a.M * rank * across)
        t.load(up, a.N * rank, a.N * rank * down)
        t.dots(down * across * cdiv(rank, a.BLOCK_R), a.BLOCK_M, a.BLOCK_N, a.BLOCK_R)
    if a.HAS_BIAS:
        t.load(a.bias, a.N, a.N * down)
    t.store(a.y, a.M * a.N)


@entry("_grad_input_quantized_kernel")
def _grad_input_quantized(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across, steps = cdiv(a.M, a.BLOCK_M), cdiv(a.K, a.BLOCK_K), cdiv(a.N, a.BLOCK_N)
    _downs(a, down, across, t)
    t.load(a.grad_y, a.M * a.N, a.M * a.N * across)
    t.load(a.codes, a.codes.numel(), a.codes.numel() * down)
    t.load(a.scales, a.scales.numel(), a.N * across * down)
    if a.NF4:
        t.load(a.table, 16, down * across * steps * a.BLOCK_N * a.BLOCK_K)
    t.dots(down * across * steps, a.BLOCK_M, a.BLOCK_K, a.BLOCK_N)
    t.store(a.grad_x, a.M * a.K)


def _masks(a: SimpleNamespace, programs: int, t: Traffic) -> None:
    """The seed of each branch with dropout, read so often."""
    for seed, masked in zip(a.seed, a.DROPOUT, strict=True):
        if masked:
            t.load(seed, 1, programs)


@entry("_sum_partials_kernel")
def _sum_partials(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    t.load(a.partials, a.parts * a.count, a.parts * a.count)
    t.store(a.out, a.count)
