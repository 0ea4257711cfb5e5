"""Bytes and operations of a launch, from its grid, its tiles and its tensors.

Two counts of bytes. *Asked* is what the programs load and store, all of them, as they mask it: what
the caches serve. *Once* is each element that the launch touches, counted once: what memory must
move at least, where the caches keep everything between the programs of a launch and nothing between
launches. Operations are those of the matrix products as they are issued, with their padding.

An entry a kernel, below, says what its programs walk over. tests/kernels/interpreted.py holds every
entry to the loads and stores that Triton's interpreter makes, to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

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


@entry("_grad_input_kernel")
def _grad_input(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across = _cdiv(a.M, a.BLOCK_M), _cdiv(a.K, a.BLOCK_K)
    steps = 0
    for rank, factor in zip(a.RANKS, a.a, strict=True):
        t.load(a.grad_s, a.M * rank, a.M * rank * across)
        t.load(factor, a.K * rank, a.K * rank * down)
        steps += _cdiv(rank, a.BLOCK_R)
    t.dots(down * across * steps, a.BLOCK_M, a.BLOCK_K, a.BLOCK_R)
    if any(a.DROPOUT):
        t.load(a.seed, 1, down * across * sum(a.DROPOUT))
    if a.HAS_BASE:
        t.load(a.grad_y, a.M * a.N, a.M * a.N * across)
        t.load(a.weight, a.N * a.K, a.N * a.K * down)
        t.dots(down * across * _cdiv(a.N, a.BLOCK_N), a.BLOCK_M, a.BLOCK_K, a.BLOCK_N)
    t.store(a.grad_x, a.M * a.K)


@entry("_project_kernel")
def _project(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    down, across, parts = grid
    t.load(a.x, a.M * a.K, a.M * a.K * across)
    t.load(a.a, a.R * a.K, a.R * a.K * down)
    if a.DROPOUT:
        t.load(a.seed, 1, math.prod(grid))
    t.store(a.s, a.M * a.R * parts)
    t.dots(down * across * _cdiv(a.K, a.BLOCK_K), a.BLOCK_M, a.BLOCK_R, a.BLOCK_K)


@entry("_grad_up_kernel")
def _grad_up(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    across, lanes, parts = grid
    steps = across * lanes * _cdiv(a.M, a.BLOCK_M)
    t.load(a.grad_y, a.M * a.N, a.M * a.N * lanes)
    if a.WANT_S:
        t.load(a.b, a.N * a.R, a.N * a.R * parts)
        t.store(a.grad_s, a.M * a.R * across)
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
