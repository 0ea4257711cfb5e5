"""Every backend of ``prefix_attention`` that is ready here, against the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deltaops.backends import PrefixAttentionBackend, PrefixAttentionCall, registered
from deltaops.testing import (
    BIASED_PREFIX_CASES,
    PREFIX_ATTENTION_CASES,
    AttentionCase,
    PrefixAttentionCase,
    PrefixAttentionTensors,
    assert_accurate,
)

FLOAT = torch.float32
ON_CPU = PrefixAttentionCall("cpu", FLOAT, FLOAT, 1, 1, 1, 64, 64, 8, 64, False, False)
BACKENDS = [
    name
    for name, backend in registered().items()
    if name != "reference" and not backend.unsupported(ON_CPU) and not backend.unavailable()
]
ALL = (True,) * 5
NAMES = ("y", "lse", "grad_q", "grad_k", "grad_v", "grad_prefix_k", "grad_prefix_v")
every = pytest.mark.parametrize("backend", BACKENDS)
cases = pytest.mark.parametrize("case", [*PREFIX_ATTENTION_CASES, *BIASED_PREFIX_CASES], ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def named(backend: str) -> PrefixAttentionBackend:
    return cast(PrefixAttentionBackend, registered()[backend])


def both_ways(
    run: PrefixAttentionBackend,
    given: PrefixAttentionTensors,
    grad_y: Tensor,
    needs: Sequence[bool] = ALL,
) -> list[Tensor]:
    """y, lse and the wanted gradients."""
    y, lse = cast(Any, run).prefix_attention_forward(*given.forward_arguments(), **given.more)
    arguments = given.backward_arguments(grad_y, y, lse)
    grads = cast(Any, run).prefix_attention_backward(*arguments, needs, **given.more)
    return [y, lse, *grads]


def test_the_native_core_is_here() -> None:
    assert "cpu" in BACKENDS, registered()["cpu"].unavailable()


@every
@cases
@dtypes
def test_matches_fp64_reference_with_the_same_bits_again(
    backend: str, case: PrefixAttentionCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, grad_y = case.tensors(dtype), case.grad_y(dtype)
    before = [t.clone() for t in (*given.inputs, grad_y)]
    oracle = both_ways(named("reference"), given.to(torch.float64), grad_y.double())
    low = both_ways(named("reference"), given, grad_y)
    for create in (torch.empty, torch.empty_strided):  # so that what is not written shows
        monkeypatch.setattr(
            torch, create.__name__, lambda *a, create=create, **k: create(*a, **k).fill_(torch.nan)
        )
    got = both_ways(named(backend), given, grad_y)
    again = both_ways(named(backend), given, grad_y)
    monkeypatch.undo()
    assert all(torch.equal(*pair) for pair in zip(got, again, strict=True))
    assert all(torch.equal(*pair) for pair in zip(before, (*given.inputs, grad_y), strict=True))
    sees = oracle[1].isfinite()
    for results in (got, oracle, low):
        assert torch.equal(results[1], results[1].where(sees, torch.inf))
        results[1] = results[1][sees]
    for name, *results in zip(NAMES, got, oracle, low, strict=True):
        assert_accurate(*results, name)
    for mine in (got[0], *got[2:5]):
        assert mine.transpose(1, 2).is_contiguous()
        assert not mine._is_view()
    for mine in got[5:]:
        assert mine.is_contiguous()


@every
def test_no_number_of_threads_changes_a_bit(backend: str) -> None:
    case = PrefixAttentionCase(20, AttentionCase(5, 6, 37, 24, h_kv=3, causal=True))
    given, grad_y, run = case.tensors(torch.float32), case.grad_y(torch.float32), named(backend)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(both_ways(run, given, grad_y))
    finally:
        torch.set_num_threads(threads)
    for name, first, *others in zip(NAMES, *results, strict=True):
        assert all(torch.equal(first, other) for other in others), name


@every
@pytest.mark.parametrize(
    "needs",
    [(0, 0, 0, 1, 1), (0, 0, 0, 0, 1), (1, 0, 0, 1, 0), (0, 1, 1, 0, 0)],
    ids=lambda needs: "".join(map(str, needs)),
)
def test_what_is_not_wanted_changes_no_bit_of_the_rest(
    backend: str, needs: tuple[bool, ...]
) -> None:
    case = PrefixAttentionCase(20, AttentionCase(2, 4, 37, 24, h_kv=2, l_kv=150, mask="shared"))
    given, grad_y, run = case.tensors(torch.float32), case.grad_y(torch.float32), named(backend)
    whole, some = both_ways(run, given, grad_y), both_ways(run, given, grad_y, needs)
    wanted = [g for g, need in zip(whole[2:], needs, strict=True) if need]
    assert all(torch.equal(*pair) for pair in zip(some[2:], wanted, strict=True))


def test_a_prefix_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    case = PrefixAttentionCase(7, AttentionCase(2, 4, 9, 20, h_kv=2, layout="merged"), sliced=True)
    given, grad_y = case.tensors(torch.float32), case.grad_y(torch.float32)
    assert not given.prefix_k.is_contiguous()

    def refuse(t: Tensor) -> Tensor:
        assert t.is_contiguous(), "copied"
        return t

    monkeypatch.setattr(Tensor, "contiguous", refuse)
    strided = both_ways(named("cpu"), given, grad_y)
    monkeypatch.undo()
    dense = [t.contiguous() for t in (given.prefix_k, given.prefix_v)]
    assert all(
        torch.equal(*pair)
        for pair in zip(
            strided,
            both_ways(named("cpu"), replace(given, prefix_k=dense[0], prefix_v=dense[1]), grad_y),
            strict=True,
        )
    )


@every
@dtypes
def test_a_prefix_of_nothing_is_attention(backend: str, dtype: torch.dtype) -> None:
    case = PrefixAttentionCase(0, AttentionCase(2, 4, 137, 24, h_kv=2, causal=True))
    given, grad_y, run = case.tensors(dtype), case.grad_y(dtype), cast(Any, named(backend))
    got = both_ways(run, given, grad_y)
    y, lse = run.attention_forward(*given.rest.forward_arguments())
    arguments = given.rest.backward_arguments(grad_y, y, lse)
    want = y, lse, *run.attention_backward(*arguments, ALL[:3])
    assert all(torch.equal(*pair) for pair in zip(got[:5], want, strict=True))


@every
def test_algebra(backend: str) -> None:
    case, run = PrefixAttentionCase(6, AttentionCase(3, 4, 33, 16, h_kv=2)), named(backend)
    given, grad_y = case.tensors(torch.float32), case.grad_y(torch.float32)
    want = both_ways(run, given, grad_y)
    # the order of a prefix says nothing: keys are a set
    turned = replace(given, prefix_k=given.prefix_k.flip(1), prefix_v=given.prefix_v.flip(1))
    got = both_ways(run, turned, grad_y)
    torch.testing.assert_close(got[:5], want[:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([g.flip(1) for g in got[5:]], want[5:], rtol=1e-4, atol=1e-5)
    # a batch of which each sequence is there twice: twice the gradient
    rest = replace(given.rest, **{n: getattr(given.rest, n).repeat(2, 1, 1, 1) for n in "qkv"})
    twice = both_ways(run, replace(given, rest=rest), grad_y.repeat(2, 1, 1, 1))
    torch.testing.assert_close(twice[5:], [2 * g for g in want[5:]], rtol=1e-4, atol=1e-5)
    # scores that say nothing: the mean of the prefix's values and the sequence's own
    y = both_ways(run, replace(given, rest=replace(given.rest, scale=1e-30)), grad_y)[0]
    values = torch.cat([given.prefix_v.expand(3, -1, -1, -1), given.rest.v], 2)
    mean = values.mean(2, keepdim=True).repeat_interleave(2, 1).expand(y.shape)
    torch.testing.assert_close(y, mean, rtol=1e-5, atol=1e-6)
