"""Bytes and operations of a launch, from its grid, its tiles and its tensors.

Two counts of bytes. *Asked* is what the programs load and store, all of them, as they mask it: what
caches and memory serve together, in shares that no count tells. *Once* is each element that the
launch touches, counted once: what memory must move at least, where the caches keep everything
between the programs of a launch and nothing between launches; but where all programs at work walk
over their rows twice, and these rows are more than L2 holds, each walk counts. Operations are those
of the matrix products as they are issued, with their padding.

An entry a kernel, below, says what its programs walk over. tests/kernels/interpreted.py holds the
kernels' entries to the loads and stores that Triton's interpreter makes, to the byte, in the calls
that it runs. Of torch's own products each operand and result counts once: what happens inside is
not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from deltaops.errors import ConfigError

from .record import Launch


@dataclass
class Traffic:
    """Of one launch, or of several. Bytes, operations."""

    loaded: int = 0
    stored: int = 0
    once: int = 0
    operations: int = 0
    launches: int = 0

    def load(self, t: Tensor, elements: int, asked: int) -> None:
        """``elements`` of ``t`` are read, ``asked`` times in all together."""
        self.loaded += asked * t.element_size()
        self.once += elements * t.element_size()

    def store(self, t: Tensor, elements: int) -> None:
        """``elements`` of ``t`` are written, each once."""
        self.stored += elements * t.element_size()
        self.once += elements * t.element_size()

    def dots(self, count: int, m: int, n: int, k: int) -> None:
        """``count`` products of [m, k] by [k, n]."""
        self.operations += 2 * count * m * n * k

    @property
    def asked(self) -> int:
        """Bytes that all programs load and store."""
        return self.loaded + self.stored

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.loaded + other.loaded,
            self.stored + other.stored,
            self.once + other.once,
            self.operations + other.operations,
            self.launches + other.launches,
        )


_L2 = 50 << 20
"""Bytes of an H100's L2 (NVIDIA H100 Tensor Core GPU Architecture, table 3); taken for all."""
_AT_ONCE = 256
"""Programs at work: two for each of its 132 multiprocessors, nearly."""

Entry = Callable[[SimpleNamespace, tuple[int, ...], Traffic], None]
ENTRIES: dict[str, Entry] = {}


def entry(kernel: str) -> Callable[[Entry], Entry]:
    """What the launch parameters (by name), the grid and the tally make of ``kernel``."""

    def keep(function: Entry) -> Entry:
        ENTRIES[kernel] = function
        return function

    return keep


def traffic(launch: Launch) -> Traffic:
    """Of this launch. Raises: ConfigError for a kernel that has no entry here."""
    found = Traffic(launches=1)
    if launch.kernel.startswith("torch."):
        _library(launch, found)
        return found
    if launch.kernel not in ENTRIES:
        raise ConfigError(
            f"the traffic of {launch.kernel} is not modelled. "
            "Add an entry to deltaops/backends/triton/traffic.py."
        )
    ENTRIES[launch.kernel](SimpleNamespace(**launch.arguments), launch.grid, found)
    return found


def _library(launch: Launch, t: Traffic) -> None:
    """torch's own: each tensor once; how its tiles go is the library's business."""
    reads, writes = launch.arguments["reads"], launch.arguments["writes"]
    for read in reads:
        t.load(read, distinct(read), distinct(read))
    for written in writes:
        t.store(written, distinct(written))
    if launch.kernel in ("torch.mm", "torch.addmm", "torch.addmm_"):
        left, right = reads[-2:]
        t.dots(1, left.shape[0], right.shape[1], left.shape[1])


def distinct(t: Tensor) -> int:
    """Elements of ``t`` in memory: a broadcast dimension is one."""
    return math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


# --------------------------------------------------------------------------------- delta_linear


@entry("_forward_kernel")
def _forward(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = _cdiv(a.M, a.BLOCK_M), _cdiv(a.N, a.BLOCK_N)
    steps = 0
    if a.HAS_BASE:
        t.load(a.x, a.M * a.K, a.M * a.K * across)
        t.load(a.weight, a.N * a.K, a.N * a.K * down)
        t.dots(down * across * _cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_N, a.BLOCK_K)
    for rank, up in zip(a.RANKS, a.b, strict=True):
        t.load(a.s, a.M * rank, a.M * rank * across)
        t.load(up, a.N * rank, a.N * rank * down)
        steps += _cdiv(rank, a.BLOCK_R)
    t.dots(down * across * steps, a.BLOCK_M, a.BLOCK_N, a.BLOCK_R)
    if a.HAS_BIAS:
        t.load(a.bias, a.N, a.N * down)
    t.store(a.y, a.M * a.N)


@entry("_persistent_forward_kernel")
def _persistent_forward(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    _persistent(a.x, a.weight, a.s, a.b, a.y, (a.M, a.N, a.K, a.R),
                (a.BLOCK_M, a.BLOCK_N, a.BLOCK_K), t)  # fmt: skip
    if a.HAS_BIAS:
        t.load(a.bias, a.N, a.N * _cdiv(a.M, a.BLOCK_M))


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
    down, across = _cdiv(rows, block[0]), _cdiv(cols, block[1])
    for first, second, length in ((left, right, inner), (side, factor, rank)):
        t.load(first.base, rows * length, rows * length * across)
        t.load(second.base, cols * length, cols * length * down)
        t.dots(down * across * _cdiv(length, block[2]), *block)
    t.store(out.base, rows * cols)


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
    t.dots(down * across * _cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


@entry("_drop_and_project_kernel")
def _drop_and_project(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = grid
    t.load(a.x, a.M * a.K, a.M * a.K * across)
    t.load(a.a, a.R * a.K, a.R * a.K * down)
    t.load(a.seed, 1, math.prod(grid))
    for made in (a.dropped, a.keep):
        t.store(made, a.M * a.K)
    t.store(a.s, a.M * a.R)
    t.dots(down * across * _cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


@entry("_stored_grad_input_kernel")
def _stored_grad_input(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = _cdiv(a.M, a.BLOCK_M), _cdiv(a.K, a.BLOCK_K)
    t.load(a.keep, a.M * a.K, a.M * a.K)
    for left, right, length, block in (
        (a.grad_s, a.a, a.R, a.BLOCK_R), (a.grad_y, a.weight, a.N, a.BLOCK_N),
    ):  # fmt: skip
        t.load(left, a.M * length, a.M * length * across)
        t.load(right, a.K * length, a.K * length * down)
        t.dots(down * across * _cdiv(length, block), a.BLOCK_M, a.BLOCK_K, block)
    t.store(a.grad_x, a.M * a.K)


@entry("_grad_up_kernel")
def _grad_up(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    across, lanes, parts = grid
    steps = across * lanes * _cdiv(a.M, a.BLOCK_M)
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
    t.dots(across * lanes * _cdiv(a.M, a.BLOCK_M), a.BLOCK_R, a.BLOCK_K, a.BLOCK_M)


@entry("_project_group_kernel")
def _project_group(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, parts = grid
    steps = down * _cdiv(a.K, a.BLOCK_K)
    t.load(a.x, a.M * a.K, a.M * a.K)
    for rank, lanes, factor in zip(a.RANKS, a.LANES, a.a, strict=True):
        t.load(factor, rank * a.K, rank * a.K * down)
        t.dots(steps, a.BLOCK_M, lanes, a.BLOCK_K)
    _masks(a, math.prod(grid), t)
    t.store(a.s, a.M * sum(a.RANKS) * parts)


@entry("_grad_down_group_kernel")
def _grad_down_group(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    across, parts = grid
    steps = across * _cdiv(a.M, a.BLOCK_M)
    t.load(a.x, a.M * a.K, a.M * a.K)
    for rank, lanes, factor in zip(a.RANKS, a.LANES, a.grad_a, strict=True):
        t.load(a.grad_s, a.M * rank, a.M * rank * across)
        t.store(factor, rank * a.K * parts)
        t.dots(steps, lanes, a.BLOCK_K, a.BLOCK_M)
    _masks(a, math.prod(grid), t)


@entry("_grad_input_kernel")
def _grad_input(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = _cdiv(a.M, a.BLOCK_M), _cdiv(a.K, a.BLOCK_K)
    _downs(a, down, across, t)
    if a.HAS_BASE:
        for dy, weight, n in zip(a.grad_y, a.weight, a.N, strict=True):
            t.load(dy, a.M * n, a.M * n * across)
            t.load(weight, n * a.K, n * a.K * down)
            t.dots(down * across * _cdiv(n, a.BLOCK_N), a.BLOCK_M, a.BLOCK_K, a.BLOCK_N)
    t.store(a.grad_x, a.M * a.K)


def _downs(a: SimpleNamespace, down: int, across: int, t: Traffic) -> None:
    """The rank part of dx, of so many tiles."""
    for rank, factor in zip(a.RANKS, a.a, strict=True):
        t.load(a.grad_s, a.M * rank, a.M * rank * across)
        t.load(factor, a.K * rank, a.K * rank * down)
        t.dots(down * across * _cdiv(rank, a.BLOCK_R), a.BLOCK_M, a.BLOCK_K, a.BLOCK_R)
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
    t.dots(down * lanes * _cdiv(a.K, a.BLOCK_K), a.BLOCK_N, a.BLOCK_R, a.BLOCK_K)


@entry("_row_norms_finish_kernel")
def _row_norms_finish(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    steps = _cdiv(a.R, a.BLOCK_R)
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
    down, across, steps = _cdiv(a.M, a.BLOCK_M), _cdiv(a.N, a.BLOCK_N), _cdiv(a.K, a.BLOCK_K)
    t.load(a.x, a.M * a.K, a.M * a.K * across)
    t.load(a.codes, a.codes.numel(), a.codes.numel() * down)
    t.load(a.scales, a.scales.numel(), a.N * steps * down)
    if a.NF4:
        t.load(a.table, 16, down * across * steps * a.BLOCK_N * a.BLOCK_K)
    t.dots(down * across * steps, a.BLOCK_M, a.BLOCK_N, a.BLOCK_K)
    for rank, up in zip(a.RANKS, a.b, strict=True):
        t.load(a.s, a.M * rank, a.M * rank * across)
        t.load(up, a.N * rank, a.N * rank * down)
        t.dots(down * across * _cdiv(rank, a.BLOCK_R), a.BLOCK_M, a.BLOCK_N, a.BLOCK_R)
    if a.HAS_BIAS:
        t.load(a.bias, a.N, a.N * down)
    t.store(a.y, a.M * a.N)


@entry("_grad_input_quantized_kernel")
def _grad_input_quantized(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across, steps = _cdiv(a.M, a.BLOCK_M), _cdiv(a.K, a.BLOCK_K), _cdiv(a.N, a.BLOCK_N)
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


# ----------------------------------------------------------------------------- prefix_attention


@entry("_attention_kernel")
def _attention(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    heads = grid[1]
    t.load(a.q, heads * a.Lq * a.D, heads * a.Lq * a.D)
    _walk_keys(a, heads, t, 2)
    t.store(a.y, heads * a.Lq * a.D)
    t.store(a.lse, heads * a.Lq)


@entry("_grad_query_kernel")
def _grad_query(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    heads = grid[1]
    rows = heads * a.Lq
    for tensor in (a.grad_y, a.y):
        t.load(tensor, rows * a.D, rows * a.D)
    t.store(a.delta, rows)
    if a.WANTED:
        t.load(a.lse, rows, rows)
        t.load(a.q, rows * a.D, rows * a.D)
        _walk_keys(a, heads, t, 3)
        t.store(a.grad_q, rows * a.D)


def _walk_keys(a: SimpleNamespace, heads: int, t: Traffic, products: int) -> None:
    """Each tile of queries over the prefix, and over the keys that some of it sees."""
    tiles = _cdiv(a.Lq, a.BLOCK_M)
    most = keys = 0
    blocks = tiles * _cdiv(a.P, a.BLOCK_N)
    for tile in range(tiles):
        last = min(a.Lk, (tile + 1) * a.BLOCK_M) if a.CAUSAL else a.Lk
        steps = _cdiv(last, a.BLOCK_N)
        read = min(a.Lk, steps * a.BLOCK_N)
        blocks, keys, most = blocks + steps, keys + read, max(most, read)
    for prefix in (a.prefix_k, a.prefix_v):
        t.load(prefix, distinct(prefix), heads * tiles * a.P * a.D)
    for tensor in (a.k, a.v):
        t.load(tensor, heads // a.group * most * a.D, heads * keys * a.D)
    if a.MASKED:
        pairs = sum(min(r + 1, a.Lk) for r in range(a.Lq)) if a.CAUSAL else a.Lq * a.Lk
        t.load(a.mask, distinct(a.mask), heads * pairs)
    t.dots(heads * blocks * products, a.BLOCK_M, a.BLOCK_N, a.BLOCK_D)


@entry("_grad_key_kernel")
def _grad_key(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    tiles, kv_heads, parts = grid
    walks = kv_heads * (parts // a.pieces)  # heads of keys in all sequences
    steps = rows = pairs = 0
    for tile in range(tiles):
        first = tile * a.BLOCK_N
        cols = range(first, min(first + a.BLOCK_N, a.keys))
        for piece in range(a.pieces):
            begin = piece * a.chunk
            end = min(begin + a.chunk, a.Lq)
            if a.CAUSAL:
                begin = max(begin, first // a.BLOCK_M * a.BLOCK_M)
            blocks = max(0, _cdiv(end - begin, a.BLOCK_M))
            seen = range(begin, max(begin, min(a.Lq, begin + blocks * a.BLOCK_M)))
            steps, rows = steps + blocks, rows + len(seen)
            if a.MASKED and a.CAUSAL:
                pairs += sum(max(0, min(r + 1, cols.stop) - cols.start) for r in seen)
            elif a.MASKED:
                pairs += len(seen) * len(cols)
    for tensor in (a.k, a.v):
        t.load(tensor, distinct(tensor), kv_heads * parts * a.keys * a.D)
    queries = walks * a.group
    for tensor in (a.q, a.grad_y):
        t.load(tensor, queries * a.Lq * a.D, queries * rows * a.D)
    for tensor in (a.lse, *([a.delta] if a.WANT_K else [])):
        t.load(tensor, queries * a.Lq, queries * rows)
    if a.MASKED:
        t.load(a.mask, distinct(a.mask), queries * pairs)
    for tensor, wanted in ((a.grad_k, a.WANT_K), (a.grad_v, a.WANT_V)):
        if wanted:
            t.store(tensor, kv_heads * parts * a.keys * a.D)
    products = 1 + 2 * a.WANT_K + a.WANT_V
    t.dots(queries * steps * products, a.BLOCK_M, a.BLOCK_N, a.BLOCK_D)


# ----------------------------------------------------------------------- bottleneck and norm_bias


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
    rows = min(a.M, _AT_ONCE * a.BLOCK_M)
    walked = rows * a.K * sum(t.element_size() for t in matrices)
    return a.M * a.K if walked > _L2 else 0


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
    t.dots(2 * tiles * _cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


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
    t.dots(down * lanes * _cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


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
    t.dots(down * across * _cdiv(a.R, a.BLOCK_R), a.BLOCK_M, a.BLOCK_K, a.BLOCK_R)


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
    t.dots(walks * tiles * _cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


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
        t.dots(down * across * _cdiv(a.R, a.BLOCK_R), a.BLOCK_M, a.BLOCK_K, a.BLOCK_R)


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
        t.dots(across * lanes * _cdiv(a.M, a.BLOCK_M), a.BLOCK_R, a.BLOCK_K, a.BLOCK_M)


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
                t.load(vector, a.K, a.K * _cdiv(a.R, a.BLOCK_R))
        t.store(a.grad_down, a.R * a.K)
    if a.WANT_DOWN_BIAS:
        t.store(a.grad_down_bias, a.R)
    for vector, wanted in ((a.grad_gamma, a.WANT_GAMMA), (a.grad_beta, a.WANT_BETA)):
        if wanted:
            t.store(vector, a.K)


@entry("_norm_kernel")
def _norm(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    t.load(a.x, a.M * a.K, a.M * a.K * (1 if a.WHOLE else 2))
    for vector, there in ((a.gamma, a.HAS_GAMMA), (a.bias, a.HAS_BIAS)):
        if there:
            t.load(vector, a.K, a.K * grid[0])
    t.store(a.y, a.M * a.K)
    t.store(a.stats, 2 * a.M)


@entry("_norm_grad_kernel")
def _norm_grad(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    parts, tiles = grid
    t.load(a.grad_y, a.M * a.K, a.M * a.K)
    if a.WANT_X or a.WANT_GAMMA:
        t.load(a.x, a.M * a.K, a.M * a.K)
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


# ------------------------------------------------------------------------------ gated and rotary


@entry("_gated_kernel")
def _gated(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    for tensor in (a.gate, a.up):
        t.load(tensor, a.M * a.K, a.M * a.K)
    t.store(a.y, a.M * a.K)


@entry("_gated_grad_kernel")
def _gated_grad(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    for tensor in (a.grad_y, a.gate, *([a.up] if a.WANT_GATE else [])):
        t.load(tensor, a.M * a.K, a.M * a.K)
    for tensor, wanted in ((a.grad_gate, a.WANT_GATE), (a.grad_up, a.WANT_UP)):
        if wanted:
            t.store(tensor, a.M * a.K)


@entry("_rotary_kernel")
def _rotary(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    tokens, groups = grid[0] // _cdiv(a.L, a.BLOCK_L) * a.L, grid[1]
    heads = tokens * a.H * 2 * a.half
    t.load(a.x, heads, heads)
    for table in (a.cos, a.sin):
        t.load(table, distinct(table), tokens * groups * 2 * a.half)
    t.store(a.y, heads)


# ------------------------------------------------------------------------------ prompt_embedding


@entry("_prompt_kernel")
def _prompt(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    batch = grid[0] // _cdiv(a.P + a.T, a.BLOCK_L)
    tokens = batch * a.T
    t.load(a.prompt, a.P * a.D, batch * a.P * a.D)
    t.load(a.ids, tokens, tokens * grid[1])
    t.load(a.table, min(a.V, tokens) * a.D, tokens * a.D)
    t.store(a.y, batch * (a.P + a.T) * a.D)


@entry("_prompt_grad_kernel")
def _prompt_grad(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    t.load(a.grad_y, a.B * a.P * a.D, a.B * a.P * a.D)
    t.store(a.grad_prompt, a.P * a.D)
