"""Every backend of ``rotary`` that is ready here, against the float64 reference."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from deltaops.backends import RotaryBackend, RotaryCall, registered
from deltaops.memory import LEAST
from deltaops.reference import rotary as reference
from deltaops.testing import ROTARY_CASES, RotaryCase, assert_accurate

ON_CPU = RotaryCall("cpu", torch.float32, torch.float32, 1, 1, 1, 2)
BACKENDS = [
    name
    for name, backend in registered().items()
    if name != "reference" and not backend.unsupported(ON_CPU) and not backend.unavailable()
]
FLOATS = (torch.float32, torch.bfloat16)
NAN = float("nan")
every = pytest.mark.parametrize("backend", BACKENDS)
cases = pytest.mark.parametrize("case", ROTARY_CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
orders = pytest.mark.parametrize("tokens_first", [True, False], ids=["tokens", "heads"])


def named(backend: str) -> RotaryBackend:
    return cast(RotaryBackend, registered()[backend])


def both_ways(
    run: RotaryBackend,
    x: Tensor,
    grad_y: Tensor,
    cos: Tensor,
    sin: Tensor,
    tokens_first: bool = True,
) -> list[Tensor]:
    return [
        run.rotary_forward(x, cos, sin, tokens_first),
        run.rotary_backward(grad_y, cos, sin, tokens_first),
    ]


def test_the_native_core_is_here() -> None:
    assert "cpu" in BACKENDS, registered()["cpu"].unavailable()


@every
@cases
@dtypes
@orders
def test_forward_and_gradient_match_fp64_reference(
    backend: str, case: RotaryCase, dtype: torch.dtype, tokens_first: bool
) -> None:
    (x, cos, sin), grad_y = case.tensors(dtype), case.grad_y(dtype)
    wide = [t.double() for t in (x, grad_y, cos, sin)]
    got = both_ways(named(backend), x, grad_y, cos, sin, tokens_first)
    oracle = both_ways(named("reference"), *wide)
    low = both_ways(named("reference"), x, grad_y, cos, sin)
    for name, *results in zip(("y", "grad_x"), got, oracle, low, strict=True):
        assert_accurate(*results, name)
        mine = results[0]
        assert (mine.transpose(1, 2) if tokens_first else mine).is_contiguous()


@every
@dtypes
@pytest.mark.parametrize("d", [2, 4, 6, 10, 30, 32, 34, 66, 80, 128])
def test_rounded_once_at_every_width(backend: str, d: int, dtype: torch.dtype) -> None:
    x, cos, sin = RotaryCase(2, 3, 5, d).tensors(dtype)
    got = both_ways(named(backend), x, x, cos, sin)
    want = both_ways(named("reference"), *(t.double() for t in (x, x, cos, sin)))
    half = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    for mine, exact in zip(got, want, strict=True):
        # products of float cancel: their own errors are of the operands' size, up to 4
        torch.testing.assert_close(mine.double(), exact, rtol=half, atol=1e-6)


@every
@cases
@dtypes
def test_same_bits_again_for_any_team_inputs_unchanged_all_written(
    backend: str, case: RotaryCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, cos, sin), grad_y, run = case.tensors(dtype), case.grad_y(dtype), named(backend)
    inputs, original = (x, grad_y, cos, sin), torch.empty
    before = [t.clone() for t in inputs]

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return original(*args, **kwargs).fill_(NAN)

    monkeypatch.setattr(torch, "empty", poisoned)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(both_ways(run, *inputs))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert not first.isnan().any()
        assert all(torch.equal(first, other) for other in others)
    assert all(torch.equal(*pair) for pair in zip(before, inputs, strict=True))


@every
@dtypes
@pytest.mark.parametrize("layout", ["merged", "dense", "columns", "expanded", "reversed"])
def test_strides_change_no_bit(backend: str, layout: str, dtype: torch.dtype) -> None:
    known = layout in ("merged", "dense", "columns")
    case = RotaryCase(2, 3, 7, 38, layout if known else "attention", shared=False)
    (x, cos, sin), grad_y, run = case.tensors(dtype), case.grad_y(dtype), named(backend)
    if layout == "expanded":  # as the gradient of a sum comes, and tables of one token
        x, grad_y = x[:, :1].expand_as(x), grad_y[:1, :1, :1, :1].expand_as(x)
        cos, sin = cos[:, :1].expand_as(cos), sin[:, :1].expand_as(sin)
    if layout == "reversed":  # tables in columns, and of strides that differ
        cos, sin = cos.transpose(1, 2).contiguous().transpose(1, 2), sin.repeat(1, 2, 1)[:, :7]
    strided = both_ways(run, x, grad_y, cos, sin)
    dense = [t.contiguous() for t in (x, grad_y, cos, sin)]
    assert all(torch.equal(*pair) for pair in zip(strided, both_ways(run, *dense), strict=True))


@pytest.mark.parametrize("layout", ["attention", "merged", "dense"])
def test_heads_are_read_where_they_lie(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = RotaryCase(2, 3, 5, 20, layout)
    tensors, grad_y = case.tensors(torch.float32), case.grad_y(torch.float32)

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr(Tensor, "contiguous", refuse)
    x, cos, sin = tensors
    for y in both_ways(named("cpu"), x, grad_y, cos.expand(2, -1, -1), sin.expand(2, -1, -1)):
        assert y.shape == x.shape


@every
@dtypes
def test_large_results(backend: str, dtype: torch.dtype) -> None:
    """From recycled memory, which a tensor before has left as it was."""
    case = RotaryCase(2, 8, 260, 64)
    (x, cos, sin), grad_y, run = case.tensors(dtype), case.grad_y(dtype), named(backend)
    x, grad_y = (torch.cat([t] * (1 if dtype == torch.float32 else 2), 1) for t in (x, grad_y))
    assert x.numel() * x.element_size() >= LEAST
    for tokens_first in (True, False, True):
        got = both_ways(run, x, grad_y, cos, sin, tokens_first)
        low = both_ways(named("reference"), x, grad_y, cos, sin)
        rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2**-7, 1e-6)
        for mine, want in zip(got, low, strict=True):
            torch.testing.assert_close(mine, want, rtol=rtol, atol=atol)
        del got


@every
def test_not_a_number_reaches_its_pair_alone(backend: str) -> None:
    x, cos, sin = RotaryCase(2, 3, 5, 40).tensors(torch.float32)
    x = x.clone()
    x[1, 2, 3, 7] = NAN
    for y in both_ways(named(backend), x, x, cos, sin):
        assert y.isnan().nonzero().tolist() == [[1, 2, 3, 7], [1, 2, 3, 27]]


@every
@dtypes
def test_algebra(backend: str, dtype: torch.dtype) -> None:
    x, cos, _ = RotaryCase(2, 3, 5, 44).tensors(dtype)
    one, zero, run = torch.ones_like(cos), torch.zeros_like(cos), named(backend)
    assert all(torch.equal(y, x) for y in both_ways(run, x, x, one, zero))
    quarter, back = both_ways(run, x, x, zero, one)
    first, second = x.chunk(2, -1)
    assert torch.equal(quarter, torch.cat((-second, first), -1))
    assert torch.equal(back, torch.cat((second, -first), -1))
    twice = run.rotary_forward(2 * x, cos, cos, True)
    assert torch.equal(twice, 2 * run.rotary_forward(x, cos, cos, True))


def test_the_reference_is_a_backend_of_its_own_arrangement() -> None:
    x, cos, sin = RotaryCase(2, 3, 5, 8, "columns").tensors(torch.float64)
    assert torch.equal(
        named("reference").rotary_forward(x, cos, sin, True),
        reference.forward(x, cos, sin, False),
    )
