"""Several layers of the same x, and several branches of a layer, in one pass over what they share

    S_j = s_j · drop_j(x) A_jᵀ      dA_j = dS_jᵀ drop_j(x)
    dx  = Σ_j mask_j ⊙ (dS_j A_j) + Σ_i dy_i W_i

    x, dx [M,K]  A_j [R_j,K]  S_j, dS_j [M,R_j] fp32, side by side in [M,ΣR]  dy_i [M,N_i]
    W_i [N_i,K]; j counts the branches of all layers, i the layers (q, k and v; gate and up).

As project.py, grad_down.py and grad_input.py do it for one branch, with an accumulator for each: a
tile of x is read once and masked for each branch that has dropout. dx is one accumulator, which
runs over the rows of all W as if they were one matrix, and is rounded once.
Traffic: x once for all S and once for all dA, dx once; alone, each layer reads x and writes dx, and
autograd reads both of two gradients and writes their sum. The sums of a branch go in the order, and
in the tiles, that they have alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .dropout import drop_threshold, each_threshold, keep_mask, keep_scale
from .grad_down import grad_down
from .grad_input import Downs, launch_grad_input
from .precision import Precision
from .project import project
from .reduce import partials_or, sum_partials
from .tiles import load_tile, store_tile


@dataclass(frozen=True)
class Part:
    """A branch of a layer of the group.

    Attributes:
        a: ``[R, K]``.
        scaling: s.
        dropout: p.
        seed: int64 ``[1]`` of its layer; None where nothing of that has dropout.
        stream: which branch of its layer it is.
        precision: that its layer's rank terms have alone.
        adapter: int32 ``[M]``, which branch each row has; None where it has all.
    """

    a: Tensor
    scaling: float
    dropout: float
    seed: Tensor | None
    stream: int
    precision: Precision
    adapter: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


@triton.jit
def _project_group_kernel(
    x,
    a,
    s,
    seed,
    M,
    K,
    chunk,
    x_row,
    x_col,
    a_row,
    a_col,
    s_part,
    s_row,
    scale,
    stream,
    threshold,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    DROPOUT: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    first = part * chunk
    sums = ()
    keys = ()
    for i in tl.static_range(len(RANKS)):
        if DROPOUT[i]:
            keys = keys + (tl.load(seed[i]),)
        else:
            keys = keys + (0,)
        sums = sums + (tl.zeros([BLOCK_M, tl.constexpr(LANES[i])], tl.float32),)
    for k in range(first, tl.minimum(first + chunk, K), BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        tile = load_tile(x, row, col, x_row, x_col, M, K)
        more = ()
        for i in tl.static_range(len(RANKS)):
            left = tile
            if DROPOUT[i]:
                keep = keep_mask(keys[i], row, k, stream[i], threshold[i], BLOCK_M, BLOCK_K)
                left = tl.where(keep, tile, 0.0)
            lane = tl.arange(0, LANES[i])
            down = load_tile(a[i], lane, col, a_row[i], a_col[i], RANKS[i], K)
            right = tl.trans(down.to(WORK))
            more = more + (tl.dot(left.to(WORK), right, sums[i], input_precision=PRECISION),)
        sums = more
    target = s + part.to(tl.int64) * s_part
    offset = 0
    for i in tl.static_range(len(RANKS)):
        lane = tl.arange(0, LANES[i])
        store_tile(target + offset, row, lane, s_row, 1, M, RANKS[i], sums[i] * scale[i])
        offset += RANKS[i]


def project_group(x: Tensor, parts: Sequence[Part], s: Tensor) -> None:
    """Write S of all ``parts`` side by side into ``s [M, ΣR]`` (fp32, rows may be strided)."""
    m, k = x.shape
    end = 0
    for some in together(x, parts, backward=False):
        begin, end = end, end + sum(one.rank for one in some)
        target, precision = s[:, begin:end], some[0].precision
        if len(some) == 1:
            (one,) = some
            project(
                x, one.a, target, scaling=one.scaling, precision=precision,
                dropout=one.dropout, seed=one.seed, stream=one.stream, adapter=one.adapter,
                number=one.stream,
            )  # fmt: skip
            continue
        lanes = tuple(configs.rank_lanes(one.rank, precision.wide) for one in some)
        thresholds = _thresholds(some)
        config = configs.project_group(m, some[0].rank, sum(lanes), precision.wide, any(thresholds))
        grid_m = triton.cdiv(m, config.rows)
        pieces, chunk = configs.split(k, config.cols, grid_m)
        sums = partials_or(target, pieces)
        _project_group_kernel[(grid_m, pieces)](
            x,
            tuple(one.a for one in some),
            sums,
            tuple(one.seed for one in some),
            m,
            k,
            chunk,
            *x.stride(),
            tuple(one.a.stride(0) for one in some),
            tuple(one.a.stride(1) for one in some),
            *sums.stride()[:2],
            tuple(one.scaling * keep_scale(t) for one, t in zip(some, thresholds, strict=True)),
            tuple(one.stream for one in some),
            each_threshold(thresholds),
            RANKS=tuple(one.rank for one in some),
            LANES=lanes,
            DROPOUT=tuple(t > 0 for t in thresholds),
            WORK=precision.work,
            PRECISION=precision.dot,
            BLOCK_M=config.rows,
            BLOCK_K=config.cols,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if pieces > 1:
            sum_partials(sums, target)


@triton.jit
def _grad_down_group_kernel(
    grad_s,
    x,
    grad_a,
    seed,
    M,
    K,
    chunk,
    gs_row,
    x_row,
    x_col,
    ga_part,
    scale,
    column,
    stream,
    threshold,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    DROPOUT: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_col = tl.program_id(0) * BLOCK_K
    col = first_col + tl.arange(0, BLOCK_K)
    part = tl.program_id(1).to(tl.int64)
    first = part * chunk
    sums = ()
    keys = ()
    for i in tl.static_range(len(RANKS)):
        if DROPOUT[i]:
            keys = keys + (tl.load(seed[i]),)
        else:
            keys = keys + (0,)
        sums = sums + (tl.zeros([tl.constexpr(LANES[i]), BLOCK_K], tl.float32),)
    for m in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        tile = load_tile(x, row, col, x_row, x_col, M, K)
        more = ()
        for i in tl.static_range(len(RANKS)):
            right = tile
            if DROPOUT[i]:
                keep = keep_mask(keys[i], row, first_col, stream[i], threshold[i], BLOCK_M, BLOCK_K)
                right = tl.where(keep, tile, 0.0)
            lane = tl.arange(0, LANES[i])
            side = load_tile(grad_s + column[i], row, lane, gs_row, 1, M, RANKS[i]).to(WORK)
            left = tl.trans(side)
            more = more + (tl.dot(left, right.to(WORK), sums[i], input_precision=PRECISION),)
        sums = more
    for i in tl.static_range(len(RANKS)):
        lane = tl.arange(0, LANES[i])
        target = grad_a[i] + part * ga_part[i]
        store_tile(target, lane, col, K, 1, RANKS[i], K, sums[i] * scale[i])


def grad_down_group(
    grad_s: Tensor,
    x: Tensor,
    parts: Sequence[Part],
    grad_a: Sequence[Tensor | None],
    *,
    capability: int,
) -> None:
    """Write those of ``grad_a`` ``[R, K]`` (contiguous) that are given, for grad_s ``[M, ΣR]`` of
    all ``parts``."""
    m, k = x.shape
    wanted, targets, columns, column = [], [], [], 0
    for one, target in zip(parts, grad_a, strict=True):
        if target is not None:
            wanted.append(one)
            targets.append(target)
            columns.append(column)
        column += one.rank
    begin = 0
    for some in together(x, wanted, backward=True):
        here, precision = slice(begin, begin + len(some)), some[0].precision
        begin += len(some)
        if len(some) == 1:
            (one,), (at,) = some, columns[here]
            grad_down(
                grad_s[:, at : at + one.rank], x, targets[here][0], precision=precision,
                dropout=one.dropout, seed=one.seed, stream=one.stream,
            )  # fmt: skip
            continue
        lanes = tuple(configs.grad_down(one.rank, precision.wide).rank for one in some)
        thresholds = _thresholds(some)
        config = configs.grad_down_group(
            some[0].rank, sum(lanes), precision.wide, any(thresholds), capability
        )
        grid_k = triton.cdiv(k, config.cols)
        pieces, chunk = configs.split(m, config.rows, grid_k, configs.OF_GRAD_DOWN)
        sums = [partials_or(target, pieces) for target in targets[here]]
        _grad_down_group_kernel[(grid_k, pieces)](
            grad_s,
            x,
            tuple(sums),
            tuple(one.seed for one in some),
            m,
            k,
            chunk,
            grad_s.stride(0),
            *x.stride(),
            tuple(t.stride(0) for t in sums),
            tuple(keep_scale(t) for t in thresholds),
            tuple(columns[here]),
            tuple(one.stream for one in some),
            each_threshold(thresholds),
            RANKS=tuple(one.rank for one in some),
            LANES=lanes,
            DROPOUT=tuple(t > 0 for t in thresholds),
            WORK=precision.work,
            PRECISION=precision.dot,
            BLOCK_M=config.rows,
            BLOCK_K=config.cols,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if pieces > 1:
            for t, target in zip(sums, targets[here], strict=True):
                sum_partials(t, target)


def grad_input_group(
    grad_y: Sequence[Tensor],
    weight: Sequence[Tensor],
    grad_s: Tensor,
    parts: Sequence[Part],
    grad_x: Tensor,
    *,
    precision: Precision,
    capability: int,
    has_base: bool = True,
) -> None:
    """Write ``grad_x [M, K]`` of all layers together, for grad_s ``[M, ΣR]`` of all ``parts``;
    without ``Σ dy W`` where not ``has_base``."""
    plain = all(
        configs.is_plain(dy, w, [part.rank])
        for dy, w in zip(grad_y, weight, strict=True)
        for part in parts
    )
    masked, wide = any(_thresholds(parts)), precision.wide
    config = configs.grad_input_group(
        grad_x.shape[0], grad_x.dtype, capability, wide, plain, masked
    )
    downs = Downs.of(
        grad_s,
        [part.a for part in parts],
        [part.dropout for part in parts],
        [part.seed for part in parts],
        [part.stream for part in parts],
    )
    launch_grad_input(grad_y, weight, downs, grad_x, precision, config, has_base)


def together(x: Tensor, parts: Sequence[Part], *, backward: bool) -> Iterator[list[Part]]:
    """Runs of ``parts`` that one launch takes. What would be several programs for its rank goes
    alone, and so does forward what needs an address for each element of x, or is of some rows only;
    what has too many lanes beside the others, or other tiles of x, begins anew. So each sum is cut
    into the pieces that it has alone."""
    some: list[Part] = []
    held, tiles = 0, (0, 0)
    for part in parts:
        wide = part.precision.wide
        aligned = configs.is_aligned(x, part.a)
        most = configs.group_lanes(wide)
        config = (
            configs.grad_down(part.rank, wide)
            if backward
            else configs.project(x.shape[0], part.rank, wide, aligned, masked=part.dropout > 0)
        )
        alone = part.adapter is not None or not aligned
        crowded = part.rank > config.rank or (alone and not backward)
        lanes = most if crowded else config.rank
        same = tiles == (config.rows, config.cols) and part.precision == some[0].precision
        if some and (held + lanes > most or not same):
            yield some
            some, held = [], 0
        some.append(part)
        held, tiles = held + lanes, (config.rows, config.cols)
    if some:
        yield some


def _thresholds(parts: Sequence[Part]) -> tuple[int, ...]:
    return tuple(drop_threshold(part.dropout) for part in parts)
