"""Entries of the kernels of ``prefix_attention``."""

from __future__ import annotations

from types import SimpleNamespace

from .tally import Traffic, cdiv, distinct, entry


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
    tiles = cdiv(a.Lq, a.BLOCK_M)
    most = keys = 0
    blocks = tiles * cdiv(a.P, a.BLOCK_N)
    for tile in range(tiles):
        last = min(a.Lk, (tile + 1) * a.BLOCK_M) if a.CAUSAL else a.Lk
        steps = cdiv(last, a.BLOCK_N)
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


@entry("_merge_prefix_kernel")
def _merge_prefix(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    tiles, heads = grid
    rows = heads * a.Lq
    for tensor in (a.q, a.own):
        t.load(tensor, rows * a.D, rows * a.D)
    t.load(a.norm, rows, rows)
    for prefix in (a.prefix_k, a.prefix_v):
        t.load(prefix, distinct(prefix), heads * tiles * a.P * a.D)
    t.store(a.y, rows * a.D)
    t.store(a.lse, rows)
    t.dots(2 * heads * tiles * cdiv(a.P, a.BLOCK_N), a.BLOCK_M, a.BLOCK_N, a.BLOCK_D)


@entry("_prefix_grads_kernel")
def _prefix_grads(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    pieces, kv_heads, batch = grid
    heads = kv_heads * batch
    rows = heads * a.group * a.Lq
    full, rest = divmod(a.Lq, a.chunk)
    steps = heads * a.group * (full * cdiv(a.chunk, a.BLOCK_M) + cdiv(rest, a.BLOCK_M))
    for tensor in (a.q, a.grad_y, a.y, *([a.own] if a.WANT_Q else [])):
        t.load(tensor, rows * a.D, rows * a.D)
    t.load(a.lse, rows, rows)
    walks = heads * pieces if a.WHOLE else steps * a.WANT_Q
    for prefix in (a.prefix_k, a.prefix_v):
        t.load(prefix, distinct(prefix) if walks else 0, walks * a.P * a.D)
    if not a.WHOLE:
        t.store(a.delta, rows)
    if a.WANT_Q:
        t.store(a.grad_q, rows * a.D)
    for tensor, wanted in ((a.sums_k, a.WANT_K), (a.sums_v, a.WANT_V)):
        if wanted:
            t.store(tensor, heads * pieces * a.P * a.D)
    if a.WHOLE:
        products = 1 + a.WANT_V + a.WANT_K + (a.WANT_Q or a.WANT_K) + a.WANT_Q
    else:
        products = 3 * a.WANT_Q * cdiv(a.P, a.BLOCK_N)
    t.dots(steps * products, a.BLOCK_M, a.BLOCK_N, a.BLOCK_D)


@entry("_sum_pieces_kernel")
def _sum_pieces(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    for of_v in range(a.FIRST, a.FIRST + grid[1]):
        sums, grad = (a.sums_v, a.grad_v) if of_v else (a.sums_k, a.grad_k)
        t.load(sums, a.parts * a.count, a.parts * a.count)
        t.store(grad, a.count)


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
            blocks = max(0, cdiv(end - begin, a.BLOCK_M))
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
