"""S made with RMSNorm or SwiGLU by the Triton backend, on the emulated grid; and who gets it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from deltaops.backends import GatedCall, GroupMember, NormBiasCall
from deltaops.backends.triton import TritonBackend, core, cuda, planner, produce, tables, targets
from deltaops.reference import delta_linear, gated, norm_bias
from deltaops.testing import assert_accurate

from . import emulated, hopper

RUN: Any = TritonBackend()
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
M, K, N, EPS = 21, 80, 48, 1e-5
GPU = "sm_90"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls on the processor go to the emulated library."""
    monkeypatch.setattr(cuda, "native", hopper.Module)
    monkeypatch.setattr(cuda, "_place", lambda t: (0, 0))
    monkeypatch.setattr(cuda, "runs_on", lambda device, plan: plan == "ampere")
    with planner.forced("ampere", "ampere", produced=True):
        yield


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def member(
    rank: int, dtype: torch.dtype, seed: int = 0, dropout: float = 0.0, activation: str = "identity"
) -> GroupMember:
    a, b, w = (
        normal(*shape, dtype=dtype, seed=seed + i)
        for i, shape in enumerate(((rank, K), (N, rank), (N, K)))
    )
    plan = RUN.prepare(w, [a], [b], [None], [0.5], [dropout], [activation])
    drawn = torch.tensor([2**50 + seed]) if dropout else None
    return GroupMember(plan, w, normal(N, dtype=dtype, seed=seed + 3), [a, b, None], drawn, None)


def made(
    kind: str, x: Tensor, other: Tensor, readers: list[GroupMember]
) -> tuple[Tensor, list[Tensor]]:
    """By the backend: what the layers read, and S of each."""
    if kind == "norm":
        y, stats, s = RUN.norm_and_s(x, other[0], EPS, readers)
        found = norm_bias.forward(x.double(), other[0].double(), None, EPS, "rms")[1]
        assert torch.allclose(stats.double(), found, rtol=1e-5)
        return y, s
    return RUN.gated_and_s(x, other, readers)  # type: ignore[no-any-return]  # typed by the protocol


def exact(kind: str, x: Tensor, other: Tensor) -> Tensor:
    if kind == "norm":
        return norm_bias.forward(x, other[0], None, EPS, "rms")[0]
    return gated.forward(x, other, "silu")


def layer(x: Tensor, one: GroupMember) -> tuple[Tensor, Tensor]:
    """y and S by the reference in the dtype of x."""
    a, b, _ = one.operands
    assert a is not None
    assert b is not None
    assert one.bias is not None
    plan: Any = one.plan
    factors = [a.to(x.dtype)], [b.to(x.dtype)], [None]
    settings = plan.scaling, plan.dropout, plan.activation, one.seed
    return delta_linear.forward(
        x, one.weight.to(x.dtype), one.bias.to(x.dtype), *factors, *settings
    )


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["norm", "gated"])
@pytest.mark.usefixtures("library")
def test_s_and_the_layers_match_float64(kind: str, dropout: float, dtype: torch.dtype) -> None:
    x, other = (normal(M, K, dtype=dtype, seed=seed) for seed in (8, 9))
    x = torch.cat([x, x], 1)[:, :K]  # rows that lie apart
    readers = [member(16, dtype, 0, dropout), member(72, dtype, 20)]
    y, s = made(kind, x, other, readers)
    wide, narrow = exact(kind, x.double(), other.double()), exact(kind, x, other)
    assert_accurate(y, wide, narrow, "x")
    for i, (one, own) in enumerate(zip(readers, s, strict=True)):
        (out64, s64), (low, s_low) = layer(wide, one), layer(narrow, one)
        assert own.dtype == F32
        assert_accurate(own.to(dtype), s64, s_low.to(dtype), f"S of {i}")
        plan: Any = one.plan
        got = plan.forward_given(y, one.weight, one.bias, one.operands, own)
        assert_accurate(got, out64, low, f"y of {i}")


@pytest.mark.usefixtures("library")
def test_a_group_goes_on_from_what_was_made() -> None:
    x, gamma = normal(M, K, dtype=BF16, seed=8), normal(1, K, dtype=BF16, seed=9)
    readers = [member(16, BF16, 0), member(8, BF16, 20)]
    y, s = made("norm", x, gamma, readers)
    given = [one._replace(s=own) for one, own in zip(readers, s, strict=True)]
    found = given[0].plan.forward_group(y, given, True)  # type: ignore[attr-defined]  # a GroupingPlan
    for (out, kept), one, own in zip(found, readers, s, strict=True):
        assert kept is own
        plan: Any = one.plan
        alone = plan.forward_given(y, one.weight, one.bias, one.operands, own)
        assert torch.equal(out, alone)


NORM = NormBiasCall("cpu", BF16, (BF16,), M, K, "rms")
PRODUCT = GatedCall("cpu", BF16, M, K, "silu")


@pytest.mark.usefixtures("library")
def test_what_it_takes() -> None:
    one = member(16, BF16)
    a, b, _ = one.operands
    assert a is not None
    assert RUN.produces(NORM, [one])
    assert RUN.produces(PRODUCT, [one, one])
    assert RUN.produces(NORM._replace(parameter_dtypes=()), [one])
    assert RUN.produces(NORM, [one] * 16)
    assert not RUN.produces(NORM, [one] * 17)  # 64 ranks each
    assert not RUN.produces(NORM, [])
    for call in (
        NORM._replace(norm="layer"),
        NORM._replace(parameter_dtypes=(F32,)),
        NORM._replace(dtype=F32, parameter_dtypes=(F32,)),
        NORM._replace(m=0),
        PRODUCT._replace(activation="gelu"),
        PRODUCT._replace(alone=True),
    ):
        assert not RUN.produces(call, [one])
    across = a.t().contiguous().t()
    for other in (
        one._replace(adapter=torch.zeros(M, dtype=torch.int32)),
        one._replace(operands=[a.float(), b, None]),
        one._replace(operands=[across, b, None]),
        one._replace(operands=[]),
        member(16, F16),
    ):
        assert not RUN.produces(NORM, [one, other])


def test_its_limits_are_the_header_s() -> None:
    header = emulated.ROOT / "csrc" / "include" / "deltaops_cuda.h"
    lines = header.read_text(encoding="utf-8").splitlines()
    assert f"#define DELTAOPS_CUDA_MAX_PRODUCED {produce.MOST}" in lines
    source = emulated.ROOT / "csrc" / "cuda" / "ampere" / "produce.h"
    assert f"kPassRanks = {produce.PASS}," in source.read_text(encoding="utf-8")


def test_nobody_gets_it_unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAOPS_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "runs_on", lambda device, plan: plan == "ampere")
    setting = tables.Setting(M, N, K, 16, "bfloat16", "bfloat16", False)
    planner.forget()
    with core.standing_in(targets.TARGETS[GPU]):
        device = torch.device("meta")
        assert not RUN.produces(NORM, [member(16, BF16)])
        assert not RUN.may_produce(NORM, device)
        assert RUN.planned(NORM._replace(device="meta")) is None
        for seconds, chosen in ((3.0, False), (1.0, True)):
            timed = {"forward": {"split": 2.0, "produced": seconds}}
            entry = tables.Entry(setting, timed)
            tables.add(tables.own(GPU), GPU, [entry], {"date": "a day"})
            planner.forget()
            assert RUN.produces(NORM, [member(16, BF16)]) is chosen
            assert RUN.may_produce(NORM, device)
            assert "`produced` was the fastest" in RUN.planned(NORM._replace(device="meta"))
            assert not RUN.may_produce(NORM._replace(norm="layer"), device)
    planner.forget()
