"""Which way a delta_linear goes on a GPU: the rule, the tables, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from deltaops.backends import DeltaLinearCall
from deltaops.backends.triton import (
    TritonBackend,
    core,
    delta_linear,
    planner,
    record,
    tables,
    targets,
)
from deltaops.dispatch import explain_call
from deltaops.errors import DataError

GPU = "sm_90"
"""The name that a GPU has where one stands in."""


def setting(m: int, n: int = 4096, k: int = 4096, rank: int = 16, **changes: Any) -> tables.Setting:
    plain = tables.Setting(m, n, k, rank, "bfloat16", "bfloat16", False)
    return plain._replace(**changes)


def entry(one: tables.Setting, *forward: float) -> tables.Entry:
    timed = dict(zip(tables.PLANS, forward, strict=True))
    return tables.Entry(one, {"forward": timed, "backward": timed})


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DELTAOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    planner.forget()
    with core.standing_in(targets.TARGETS[GPU]):
        yield
    planner.forget()


def plan(one: tables.Setting, plain: bool = True) -> planner.Plan:
    return planner.choose(one, "meta", plain)


# ------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(("k", "share"), [(4096, 0.918), (14336, 0.975)])
def test_the_break_even_is_that_of_the_design_page(k: int, share: float) -> None:
    assert planner.break_even(setting(8192, k=k), "forward") == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(
    ("one", "forward", "backward"),
    [
        (setting(8192), "split", "split"),
        (setting(1), "fused", "fused"),  # the weight's bytes are the limit
        (setting(8192, k=512), "fused", "split"),  # a short product beside a large output
        (setting(8192, n=512), "split", "fused"),
        (setting(8192, rank=0), "torch", "torch"),
    ],
)
def test_the_start_follows_the_rule(one: tables.Setting, forward: str, backward: str) -> None:
    assert plan(one)[:2] == (forward, backward)


def test_small_tiles_need_more_of_a_reason() -> None:
    one = setting(8192, k=1024)
    assert plan(one).forward == "fused"
    assert plan(one, plain=False).forward == "split"
    assert plan(one._replace(adapter="float32")).forward == "split"


def test_the_library_takes_no_mask_and_no_wider_adapter() -> None:
    assert planner.possible(setting(8), "backward") == ("fused", "split", "torch")
    assert planner.possible(setting(8, dropout=True), "forward") == ("fused", "split", "torch")
    assert planner.possible(setting(8, dropout=True), "backward") == ("fused", "split")
    assert planner.possible(setting(8, adapter="float32"), "forward") == ("fused", "split")
    with planner.forced("fused", "torch"), pytest.raises(ValueError, match="'torch' is forced"):
        plan(setting(8, dropout=True))


# ----------------------------------------------------------------------------------- the tables


def keep(path: Path, *entries: tables.Entry, gpu: str = GPU) -> None:
    tables.write(path, tables.Table(gpu, {"date": "a day"}, entries))


def test_the_fastest_of_the_nearest_call_is_taken() -> None:
    few, many = setting(16), setting(8192)
    keep(tables.own(GPU), entry(few, 1.0, 2.0, 3.0), entry(many, 3.0, 2.0, 1.0))
    for one, wanted in ((few, "fused"), (setting(20), "fused"), (setting(6000), "torch")):
        assert plan(one)[:2] == (wanted, wanted)
    assert "fastest for 8192×4096×4096 r=16 bfloat16 on sm_90" in plan(many).why
    # what was fastest cannot make a mask: the fastest that can
    assert plan(many._replace(dropout=True))[:2] == ("torch", "split")


def test_the_same_table_gives_the_same_plan() -> None:
    keep(tables.own(GPU), *(entry(setting(m), 2.0, 2.0, 2.0) for m in (16, 64)))
    first = [plan(setting(m)) for m in range(1, 100)]
    planner.forget()
    assert [plan(setting(m)) for m in range(1, 100)] == first
    assert plan(setting(32)).forward == "fused"


@pytest.mark.parametrize(
    "one", [setting(8192), setting(16, dtype="float16", adapter="float16"), setting(16, rank=0)]
)
def test_a_call_unlike_all_that_was_measured_starts_by_the_rule(one: tables.Setting) -> None:
    rule = plan(one)
    keep(tables.own(GPU), entry(setting(16), 3.0, 3.0, 1.0))
    planner.forget()
    assert plan(one)[:2] == rule[:2]
    assert "has no call like it" in plan(one).why


def test_ones_own_table_goes_before_the_packages() -> None:
    keep(tables.SHIPPED / tables.file_name(GPU), entry(setting(16), 3.0, 2.0, 1.0))
    assert plan(setting(16)).forward == "torch"
    keep(tables.own(GPU), entry(setting(16), 1.0, 2.0, 3.0))
    assert plan(setting(16)).forward == "torch"  # read once
    planner.forget()
    assert plan(setting(16)).forward == "fused"


def test_a_table_is_added_to(tmp_path: Path) -> None:
    old = tables.Table(GPU, {}, (entry(setting(16), 1, 2, 3), entry(setting(64), 1, 2, 3)))
    new = old.with_entries([entry(setting(16), 3, 2, 1), entry(setting(1), 1, 2, 3)], {"date": "x"})
    assert [e.setting.m for e in new.entries] == [1, 16, 64]
    assert new.entries[1].best("forward", tables.PLANS) == "torch"
    tables.write(tmp_path / "t.json", new)
    assert tables.read(tmp_path / "t.json", GPU) == new


def changed(**changes: Any) -> str:
    call = {**setting(16)._asdict(), "seconds": {"forward": {"fused": 1e-5}}}
    good = {"format": tables.FORMAT, "version": 1, "gpu": GPU, "measured": {}, "calls": [call]}
    call |= changes.pop("call", {})
    return json.dumps(good | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "could not be read as JSON"),
        ("[]", 'has no "format"'),
        (changed(version=2), "is of version 2, not 1"),
        (changed(gpu="NVIDIA A100"), "was measured on 'NVIDIA A100', not on 'sm_90'"),
        (changed(calls=3), 'a list "calls"'),
        (changed(calls=[{}]), "call 0 must have m, n"),
        (changed(call={"m": -1}), "call 0: m must be int, not -1"),
        (changed(call={"dropout": 1}), "dropout must be bool, not 1"),
        (changed(call={"seconds": {"sideways": {}}}), "seconds must be of forward and backward"),
        (changed(call={"seconds": {"forward": {"magic": 1}}}), "must have plans of fused"),
        (changed(call={"seconds": {"forward": {"fused": 0}}}), "must be seconds, not 0"),
        (changed(call={"seconds": {"forward": {"fused": "1"}}}), "must be seconds, not '1'"),
        (changed(call={"seconds": {"forward": {"fused": 1e999}}}), "must be seconds, not inf"),
    ],
)
def test_a_damaged_or_foreign_table_is_refused(text: str, message: str) -> None:
    path = tables.own(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        plan(setting(16))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "tune-kernels --fresh" in str(caught.value)


def test_a_good_table_of_that_kind_is_read() -> None:
    path = tables.own(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(changed(), encoding="utf-8")
    assert plan(setting(16)).why.startswith("fastest for")
    assert plan(setting(16)).backward == "fused"  # not measured: by the rule


# ------------------------------------------------------------------------------- what comes of it


def test_explain_says_which_plan_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.bfloat16
    call = DeltaLinearCall("cuda", half, (half,), 8192, 4096, 4096, (16,), True, "row")
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: None)
    found = explain_call(call, "triton")
    assert found.plan is not None
    assert "y split, dx split: not measured on this GPU" in found.reason
    assert "plan: y split" in str(found)
    keep(tables.own(GPU), entry(setting(8192), 1.0, 2.0, 3.0))
    planner.forget()
    assert "y fused, dx fused: fastest for 8192" in explain_call(call, "triton").reason


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(), (3,), (3, 5)])
def test_the_librarys_products_add_up(ranks: tuple[int, ...], bias: bool) -> None:
    x, weight, s = torch.randn(4, 7), torch.randn(7, 6), torch.randn(4, sum(ranks))
    factors = [torch.randn(r, 6).bfloat16() for r in ranks]  # narrower than the model
    offset = torch.randn(6) if bias else None
    out = torch.empty(4, 6)
    delta_linear._add_products(out, offset, s, factors, x, weight)
    wanted = x.double() @ weight.double() + (0 if offset is None else offset.double())
    for part, factor in zip(s.double().split(ranks or (0,), 1), factors, strict=False):
        wanted += part @ factor.double()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", tables.PLANS)
def test_the_plan_is_what_is_launched(name: str) -> None:
    times = [1.0 if one == name else 2.0 for one in tables.PLANS]
    keep(tables.own(GPU), entry(setting(64), *times))
    x, weight, a, b, s = (
        torch.empty(*shape, dtype=dtype, device="meta")
        for shape, dtype in (
            ((64, 4096), torch.bfloat16), ((4096, 4096), torch.bfloat16),
            ((16, 4096), torch.bfloat16), ((4096, 16), torch.bfloat16), ((64, 16), torch.float32),
        )
    )  # fmt: skip
    run, rest = TritonBackend(), ([2.0], [0.0], ["identity"], None)
    with record.recording() as launches:
        run.forward(x, weight, None, [a], [b], [None], *rest)
        run.backward(x, x, weight, [a], [b], s, *rest, [True, False, True, True, False])
    kernels = [launch.kernel for launch in launches]
    both = ("_forward_kernel", "_grad_input_kernel")
    assert all((kernel in kernels) == (name != "torch") for kernel in both)
    assert kernels.count("torch.addmm_") == (0 if name == "fused" else 2)
