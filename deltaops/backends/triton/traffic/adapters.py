"""Entries of the kernels of ``bottleneck`` and ``norm_bias``."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from .tally import AT_ONCE, L2, Traffic, cdiv, entry


@entry("_fold_kernel")
def _fold(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    rank = grid[0]
    t.load(a.down, rank * a.K, rank * a.K)
    for vector, there in ((a.gamma, a.HAS_GAMMA), (a.beta, a.HAS_BETA)):
        if there:
            t.load(vector, a.K, rank * a.K)
    if a.HAS_BIAS:
        t.load(a.down_bias, rank, rank)
    t.store(a.folded, rank * a.K)
    t.store(a.tilt, rank)
    t.store(a.shift, rank)


def _missed(a: SimpleNamespace, *matrices: Tensor) -> int:
    """Elements of one of ``matrices`` [M, K] that the second walk over them all reads from memory:
    none, or all of them where what is walked over at once is more than L2 holds."""
    rows = min(a.M, AT_ONCE * a.BLOCK_M)
    walked = rows * a.K * sum(t.element_size() for t in matrices)
    return a.M * a.K if walked > L2 else 0


@entry("_bottleneck_kernel")
def _bottleneck(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    tiles = grid[0]
    guess = a.M * min(a.K, a.BLOCK_K) if a.PIVOT else 0
    t.load(a.x, a.M * a.K, a.M * a.K + guess)
    t.load(a.down, a.R * a.K, a.R * a.K * tiles)
    _inner_vectors(a, tiles, t)
    t.store(a.h, a.M * a.R)
    if a.NORM != "none":
        t.store(a.stats, 2 * a.M)
    _written(a, tiles, t, _missed(a, a.x) if a.residual is a.x else a.M * a.K)
    t.dots(2 * tiles * cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


@entry("_bottleneck_inner_kernel")
def _bottleneck_inner(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, lanes, parts = grid
    guess = 0
    if a.PIVOT and a.NORM == "none":
        t.load(a.stats, a.M, a.M * lanes * parts)
    elif a.PIVOT:
        guess = a.M * min(a.K, a.BLOCK_K) * lanes * parts
    t.load(a.x, a.M * a.K, a.M * a.K * lanes + guess)
    t.load(a.matrix, a.R * a.K, a.R * a.K * down)
    t.store(a.partials, a.M * a.R * parts)
    if a.NORM != "none":
        t.store(a.moments, 3 * a.M * parts)
    t.dots(down * lanes * cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


@entry("_bottleneck_outer_kernel")
def _bottleneck_outer(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = grid
    t.load(a.partials, a.M * a.R * a.parts, a.M * a.R * a.parts * across)
    if a.NORM != "none":
        kept = a.M * (2 * a.parts + 1)
        t.load(a.moments, kept, kept * across)
        t.store(a.stats, 2 * a.M)
    _inner_vectors(a, down * across, t)
    t.store(a.h, a.M * a.R)
    _written(a, down, t, a.M * a.K)
    t.dots(down * across * cdiv(a.R, a.BLOCK_R), a.BLOCK_M, a.BLOCK_K, a.BLOCK_R)


def _inner_vectors(a: SimpleNamespace, programs: int, t: Traffic) -> None:
    """What h is made of beside the product."""
    if a.NORM == "layer":
        t.load(a.tilt, a.R, a.R * programs)
    if a.HAS_SHIFT:
        t.load(a.shift, a.R, a.R * programs)


def _written(a: SimpleNamespace, tiles: int, t: Traffic, residual: int) -> None:
    """From h to y; ``residual`` elements of the residual come from memory."""
    t.load(a.up, a.R * a.K, a.R * a.K * tiles)
    if a.HAS_UP_BIAS:
        t.load(a.up_bias, a.K, a.K * tiles)
    if a.HAS_RESIDUAL:
        t.load(a.residual, residual, a.M * a.K)
    t.store(a.y, a.M * a.K)


@entry("_bottleneck_grad_kernel")
def _bottleneck_grad(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    tiles, normed = grid[0], a.NORM != "none"
    walks = 1
    missed = _missed(a, a.grad_y, *([a.x] if normed else [])) if a.WANT_X else 0
    again = a.WANT_X and a.OWN
    t.load(a.grad_y, a.M * a.K + missed * again, a.M * a.K * (1 + again))
    t.load(a.up, a.R * a.K, a.R * a.K * tiles)
    t.load(a.h, a.M * a.R, a.M * a.R)
    t.store(a.grad_h, a.M * a.R)
    if a.WANT_S:
        t.store(a.s, a.M * a.R)
    if a.WANT_X:
        walks += 1 + normed
        t.load(a.down, a.R * a.K, a.R * a.K * tiles * (1 + normed))
        if normed:
            t.load(a.x, a.M * a.K + missed, 2 * a.M * a.K)
            t.load(a.stats, 2 * a.M, 2 * a.M)
        if a.NORM == "layer":
            t.load(a.tilt, a.R, a.R * tiles)
        t.store(a.grad_x, a.M * a.K)
    t.dots(walks * tiles * cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


@entry("_bottleneck_grad_outer_kernel")
def _bottleneck_grad_outer(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = grid
    normed = a.NORM != "none"
    t.load(a.products, a.M * a.R * a.parts, a.M * a.R * a.parts * across)
    t.load(a.h, a.M * a.R, a.M * a.R * across)
    t.store(a.grad_h, a.M * a.R)
    if a.WANT_S:
        t.store(a.s, a.M * a.R)
    if normed:
        t.load(a.stats, 2 * a.M, 2 * a.M * across)
    if a.WANT_X:
        if normed:
            t.load(a.across, a.M * a.R * a.parts, a.M * a.R * a.parts * across)
            t.load(a.x, a.M * a.K, a.M * a.K)
        if a.NORM == "layer":
            t.load(a.tilt, a.R, a.R * down * across)
        t.load(a.down, a.R * a.K, a.R * a.K * down)
        if a.OWN:
            t.load(a.grad_y, a.M * a.K, a.M * a.K)
        t.store(a.grad_x, a.M * a.K)
        t.dots(down * across * cdiv(a.R, a.BLOCK_R), a.BLOCK_M, a.BLOCK_K, a.BLOCK_R)


@entry("_bottleneck_down_kernel")
def _bottleneck_down(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    across, lanes, parts = grid
    t.load(a.grad_h, a.M * a.R, a.M * a.R * across)
    t.store(a.sums, a.R * parts)
    if a.WANT_PRODUCT:
        t.load(a.x, a.M * a.K, a.M * a.K * lanes)
        if a.NORM != "none":
            t.load(a.stats, 2 * a.M, 2 * a.M * across * lanes)
        t.store(a.products, a.R * a.K * parts)
        t.dots(across * lanes * cdiv(a.M, a.BLOCK_M), a.BLOCK_R, a.BLOCK_K, a.BLOCK_M)


@entry("_bottleneck_finish_kernel")
def _bottleneck_finish(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    t.load(a.sums, a.R * a.parts, a.R * a.parts * grid[0])
    if a.WANT_PRODUCT:
        t.load(a.products, a.R * a.K * a.parts, a.R * a.K * a.parts)
    if a.WANT_GAMMA or a.WANT_BETA:
        t.load(a.down, a.R * a.K, a.R * a.K)
    if a.WANT_DOWN:
        for vector, there in ((a.gamma, a.HAS_GAMMA), (a.beta, a.HAS_BETA)):
            if there:
                t.load(vector, a.K, a.K * cdiv(a.R, a.BLOCK_R))
        t.store(a.grad_down, a.R * a.K)
    if a.WANT_DOWN_BIAS:
        t.store(a.grad_down_bias, a.R)
    for vector, wanted in ((a.grad_gamma, a.WANT_GAMMA), (a.grad_beta, a.WANT_BETA)):
        if wanted:
            t.store(vector, a.K)


@entry("_norm_kernel")
def _norm(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    normed = a.NORM != "none"
    t.load(a.x, a.M * a.K, a.M * a.K * (2 if normed and not a.WHOLE else 1))
    for vector, there in ((a.gamma, a.HAS_GAMMA), (a.bias, a.HAS_BIAS)):
        if there:
            t.load(vector, a.K, a.K * grid[0])
    t.store(a.y, a.M * a.K)
    if normed:
        t.store(a.stats, 2 * a.M)


@entry("_norm_grad_kernel")
def _norm_grad(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    parts, tiles = grid
    t.load(a.grad_y, a.M * a.K, a.M * a.K)
    normed = a.NORM != "none"
    if a.WANT_GAMMA or (normed and a.WANT_X):
        t.load(a.x, a.M * a.K, a.M * a.K)
        if normed:
            t.load(a.stats, 2 * a.M, 2 * a.M * tiles)
    if a.WANT_X:
        if a.HAS_GAMMA:
            t.load(a.gamma, a.K, a.K * parts)
        t.store(a.grad_x, a.M * a.K)
    for vector, wanted in ((a.grad_gamma, a.WANT_GAMMA), (a.grad_bias, a.WANT_BIAS)):
        if wanted:
            t.store(vector, a.K * parts)


@entry("_norm_grad_wide_kernel")
def _norm_grad_wide(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    for tensor in (a.grad_y, a.x):
        t.load(tensor, a.M * a.K, 2 * a.M * a.K)
    if a.HAS_GAMMA:
        t.load(a.gamma, a.K, 2 * a.K * grid[0])
    t.load(a.stats, 2 * a.M, 2 * a.M)
    t.store(a.grad_x, a.M * a.K)
