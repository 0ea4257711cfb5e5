"""Entries of the kernels that multiply no matrices: ``gated``, ``rotary``, ``prompt_embedding``."""

from __future__ import annotations

from types import SimpleNamespace

from .tally import Traffic, cdiv, distinct, entry


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
    tokens, groups = grid[0] // cdiv(a.L, a.BLOCK_L) * a.L, grid[1]
    heads = tokens * a.H * 2 * a.half
    t.load(a.x, heads, heads)
    for table in (a.cos, a.sin):
        t.load(table, distinct(table), tokens * groups * 2 * a.half)
    t.store(a.y, heads)


@entry("_prompt_kernel")
def _prompt(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    batch = grid[0] // cdiv(a.P + a.T, a.BLOCK_L)
    tokens = batch * a.T
    t.load(a.prompt, a.P * a.D, batch * a.P * a.D)
    t.load(a.ids, tokens, tokens * grid[1])
    t.load(a.table, min(a.V, tokens) * a.D, tokens * a.D)
    t.store(a.y, batch * (a.P + a.T) * a.D)


@entry("_prompt_grad_kernel")
def _prompt_grad(a: SimpleNamespace, grid: tuple[int, ...], t: Traffic) -> None:
    t.load(a.grad_y, a.B * a.P * a.D, a.B * a.P * a.D)
    t.store(a.grad_prompt, a.P * a.D)
