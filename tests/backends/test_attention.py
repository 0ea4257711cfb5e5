"""Every backend of ``attention`` that is ready here, against the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deltaops.backends import AttentionBackend, AttentionCall, registered
from deltaops.memory import LEAST
from deltaops.testing import ATTENTION_CASES, AttentionCase, AttentionTensors, assert_accurate

ON_CPU = AttentionCall("cpu", torch.float32, 1, 1, 1, 64, 64, 64, False, False)
BACKENDS = [
    name
    for name, backend in registered().items()
    if name != "reference" and not backend.unsupported(ON_CPU) and not backend.unavailable()
]
FLOATS = (torch.float32, torch.bfloat16)
NAN = float("nan")
ALL = (True, True, True)
NAMES = ("y", "lse", "grad_q", "grad_k", "grad_v")
every = pytest.mark.parametrize("backend", BACKENDS)
cases = pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def named(backend: str) -> AttentionBackend:
    return cast(AttentionBackend, registered()[backend])


def both_ways(
    run: AttentionBackend, given: AttentionTensors, grad_y: Tensor, needs: Sequence[bool] = ALL
) -> list[Tensor]:
    """y, lse and the wanted gradients."""
    y, lse = cast(Any, run).attention_forward(*given.forward_arguments())
    arguments = given.backward_arguments(grad_y, y, lse)
    return [y, lse, *cast(Any, run).attention_backward(*arguments, needs)]


def test_the_native_core_is_here() -> None:
    assert "cpu" in BACKENDS, registered()["cpu"].unavailable()


@every
@cases
@dtypes
def test_forward_and_gradients_match_fp64_reference(
    backend: str, case: AttentionCase, dtype: torch.dtype
) -> None:
    given, grad_y = case.tensors(dtype), case.grad_y(dtype)
    got = both_ways(named(backend), given, grad_y)
    oracle = both_ways(named("reference"), given.to(torch.float64), grad_y.double())
    low = both_ways(named("reference"), given, grad_y)
    sees = oracle[1].isfinite()  # the others' lse is infinite, in all three
    for results in (got, oracle, low):
        assert torch.equal(results[1], results[1].where(sees, torch.inf))
        results[1] = results[1][sees]
    for name, *results in zip(NAMES, got, oracle, low, strict=True):
        assert_accurate(*results, name)
    for mine in (got[0], *got[2:]):
        assert mine.transpose(1, 2).is_contiguous()
        assert not mine._is_view()


@every
@cases
@dtypes
def test_same_bits_again_inputs_unchanged_all_written(
    backend: str, case: AttentionCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, grad_y, run = case.tensors(dtype), case.grad_y(dtype), named(backend)
    inputs = [t for t in (given.q, given.k, given.v, given.mask, grad_y) if t is not None]
    before, original, strided = [t.clone() for t in inputs], torch.empty, torch.empty_strided

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs).fill_(NAN)

    def poisoned_strided(*args: Any, **kwargs: Any) -> Tensor:
        return strided(*args, **kwargs).fill_(NAN)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_strided", poisoned_strided)
    results: dict[int, list[list[Tensor]]] = {}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            results.setdefault(count, []).append(both_ways(run, given, grad_y))
    finally:
        torch.set_num_threads(threads)
    for runs in results.values():
        for name, first, *others in zip(NAMES, *runs, strict=True):
            assert not first.isnan().any(), name
            assert all(torch.equal(first, other) for other in others), name
    assert all(torch.equal(*pair) for pair in zip(before, inputs, strict=True))


@every
@dtypes
@pytest.mark.parametrize("layout", ["merged", "dense", "columns", "expanded"])
def test_strides_change_no_bit(backend: str, layout: str, dtype: torch.dtype) -> None:
    known = layout in ("merged", "dense", "columns")
    case = AttentionCase(2, 4, 37, 40, h_kv=2, layout=layout if known else "attention", mask="each")
    given, grad_y, run = case.tensors(dtype), case.grad_y(dtype), named(backend)
    if layout == "expanded":  # as the gradient of a sum comes, and one query for all
        grad_y = grad_y[:1, :1, :1, :1].expand_as(grad_y)
        given = replace(given, q=given.q[:, :, :1].expand_as(given.q))
    mask = cast(Tensor, given.mask)
    odd = mask.transpose(2, 3).contiguous().transpose(2, 3)
    strided = both_ways(run, replace(given, mask=odd), grad_y)
    q, k, v, mask = (t.contiguous() for t in (given.q, given.k, given.v, mask))
    dense = both_ways(run, replace(given, q=q, k=k, v=v, mask=mask), grad_y.contiguous())
    assert all(torch.equal(*pair) for pair in zip(strided, dense, strict=True))


@pytest.mark.parametrize("layout", ["attention", "merged", "dense"])
def test_heads_and_masks_are_read_where_they_lie(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = AttentionCase(2, 4, 9, 20, h_kv=2, layout=layout, mask="shared")
    given, grad_y = case.tensors(torch.float32), case.grad_y(torch.float32)

    def refuse(t: Tensor) -> Tensor:
        assert t.is_contiguous(), "copied"
        return t

    monkeypatch.setattr(Tensor, "contiguous", refuse)
    assert len(both_ways(named("cpu"), given, grad_y)) == len(NAMES)


@every
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, True, True)])
def test_what_is_not_wanted_changes_no_bit_of_the_rest(
    backend: str, needs: tuple[bool, ...]
) -> None:
    case = AttentionCase(2, 4, 37, 24, h_kv=2, causal=True)
    given, grad_y, run = case.tensors(torch.float32), case.grad_y(torch.float32), named(backend)
    whole, some = both_ways(run, given, grad_y), both_ways(run, given, grad_y, needs)
    wanted = [g for g, need in zip(whole[2:], needs, strict=True) if need]
    assert len(some[2:]) == len(wanted)
    assert all(torch.equal(*pair) for pair in zip(some[2:], wanted, strict=True))


@every
@dtypes
def test_large_results(backend: str, dtype: torch.dtype) -> None:
    """From recycled memory, which a tensor before has left as it was."""
    case = AttentionCase(2, 8, 330, 128)
    given, grad_y, run = case.tensors(dtype), case.grad_y(dtype), named(backend)
    assert given.q.numel() * given.q.element_size() >= LEAST
    oracle = both_ways(named("reference"), given.to(torch.float64), grad_y.double())
    low = both_ways(named("reference"), given, grad_y)
    first = both_ways(run, given, grad_y)
    copies = [t.clone() for t in first]
    del first
    again = both_ways(run, given, grad_y)
    for name, mine, before, *others in zip(NAMES, again, copies, oracle, low, strict=True):
        assert torch.equal(mine, before)
        assert_accurate(mine, *others, name)


@every
@dtypes
def test_algebra(backend: str, dtype: torch.dtype) -> None:
    case, run = AttentionCase(2, 4, 33, 16, h_kv=2), named(backend)
    given, grad_y = case.tensors(dtype), case.grad_y(dtype)
    # keys that are all the same: the mean of the values, whatever the queries
    flat = replace(given, k=torch.zeros_like(given.k))
    y = both_ways(run, flat, grad_y)[0]
    mean = given.v.float().mean(2, keepdim=True).repeat_interleave(2, 1).expand(y.shape)
    torch.testing.assert_close(y, mean.to(dtype), rtol=2**-7, atol=1e-5)
    # one key alone: its value, and no gradient through the weights
    one = replace(given, k=given.k[:, :, :1], v=given.v[:, :, :1])
    y, _, grad_q, grad_k, _ = both_ways(run, one, grad_y)
    assert torch.equal(y, one.v.repeat_interleave(2, 1).expand(y.shape))
    assert grad_q.abs().max() <= 2**-5
    assert grad_k.abs().max() <= 2**-2
    # twice the values, twice the result
    twice = both_ways(run, replace(given, v=2 * given.v), grad_y)[0]
    assert torch.equal(twice, 2 * both_ways(run, given, grad_y)[0])


@every
def test_large_scores_do_not_overflow(backend: str) -> None:
    case = AttentionCase(1, 2, 40, 16, causal=True, scale=100.0)
    given, grad_y = case.tensors(torch.float32), case.grad_y(torch.float32)
    assert all(bool(t.isfinite().all()) for t in both_ways(named(backend), given, grad_y))


@every
def test_hidden_keys_touch_nothing(backend: str) -> None:
    """Not even where they are not numbers: what is behind a mask may be memory never written."""
    case = AttentionCase(1, 2, 40, 16)
    given, grad_y, run = case.tensors(torch.float32), case.grad_y(torch.float32), named(backend)
    seen = torch.arange(40) < 21
    mask = seen.expand(1, 2, 40, 40)
    want = both_ways(run, replace(given, mask=mask), grad_y)
    k = given.k.masked_fill(~seen[:, None], 1e30)
    got = both_ways(run, replace(given, k=k, mask=mask), grad_y)
    assert all(torch.equal(got[i], want[i]) for i in (0, 1, 3, 4))
