"""Which way a delta_linear goes on a GPU: the rule, the tables, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


HALF = torch.bfloat16
CALL = DeltaLinearCall("cuda", HALF, (HALF,), 8192, 4096, 4096, (16,), True, "row")


def setting(m: int, n: int = 4096, k: int = 4096, rank: int = 16, **changes: Any) -> tables.Setting:
    plain = tables.Setting(m, n, k, rank, "bfloat16", "bfloat16", False)
    return plain._replace(**changes)


def entry(one: tables.Setting, *forward: float) -> tables.Entry:
    timed = dict(zip(tables.PLANS, forward, strict=False))
    return tables.Entry(one, {"forward": timed, "backward": timed})


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DELTAOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    planner.forget()
    with core.standing_in(targets.TARGETS[GPU]):
        yield
    planner.forget()


def plan(one: tables.Setting, plain: bool = True) -> tuple[str, str]:
    """Of y and of dx."""
    y, dx = (planner.choose(one, direction, "meta", plain) for direction in tables.DIRECTIONS)
    return y.plan, dx.plan


def why(one: tables.Setting, direction: str = "forward") -> str:
    return planner.choose(one, direction, "meta").why


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
    assert plan(one) == (forward, backward)


def test_a_persistent_kernel_is_taken_where_it_saves_more_than_it_loses() -> None:
    able = ("persistent", "beside")
    for one, wanted in ((setting(8192), "persistent"), (setting(8192, k=65536), "split")):
        assert planner.choose(one, "forward", "meta", special=able).plan == wanted


def test_small_tiles_need_more_of_a_reason() -> None:
    one = setting(8192, k=512)
    assert plan(one)[0] == "fused"
    assert plan(one, plain=False)[0] == "split"
    assert plan(one._replace(adapter="float32"))[0] == "split"


def test_the_library_takes_no_mask_and_no_wider_adapter() -> None:
    assert planner.possible(setting(8), "backward") == ("fused", "split", "torch")
    assert planner.possible(setting(8, dropout=True), "forward") == ("fused", "split", "torch")
    assert planner.possible(setting(8, dropout=True), "backward") == ("fused", "split")
    assert planner.possible(setting(8, adapter="float32"), "forward") == ("fused", "split")
    with planner.forced("fused", "torch"), pytest.raises(ValueError, match="'torch' is forced"):
        plan(setting(8, dropout=True))


# ----------------------------------------------------------------------------------- the tables


def keep(path: Path, *entries: tables.Entry, gpu: str = GPU) -> None:
    tables.add(path, gpu, entries, {"date": "a day"}, fresh=True)


def test_the_fastest_of_the_nearest_call_is_taken() -> None:
    few, many = setting(16), setting(8192)
    keep(tables.own(GPU), entry(few, 1.0, 2.0, 3.0), entry(many, 3.0, 2.0, 1.0))
    for one, wanted in ((few, "fused"), (setting(20), "fused"), (setting(6000), "torch")):
        assert plan(one) == (wanted, wanted)
    assert "fastest for 8192×4096×4096 r=16 bfloat16 on sm_90" in why(many)
    # what was fastest cannot make a mask: the fastest that can
    assert plan(many._replace(dropout=True)) == ("torch", "split")


def test_the_same_table_gives_the_same_plan() -> None:
    keep(tables.own(GPU), *(entry(setting(m), 2.0, 2.0, 2.0) for m in (16, 64)))
    first = [plan(setting(m)) for m in range(1, 100)]
    planner.forget()
    assert [plan(setting(m)) for m in range(1, 100)] == first
    assert plan(setting(32))[0] == "fused"


@pytest.mark.parametrize(
    "one", [setting(8192), setting(16, dtype="float16", adapter="float16"), setting(16, rank=0)]
)
def test_a_call_unlike_all_that_was_measured_starts_by_the_rule(one: tables.Setting) -> None:
    rule = plan(one)
    keep(tables.own(GPU), entry(setting(16), 3.0, 3.0, 1.0))
    planner.forget()
    assert plan(one) == rule
    assert "has no call like it" in why(one)


def shipped() -> Path:
    return tables.SHIPPED / tables.file_name(GPU)


def test_ones_own_table_goes_before_the_packages() -> None:
    keep(shipped(), entry(setting(16), 3.0, 2.0, 1.0))
    assert plan(setting(16))[0] == "torch"
    keep(tables.own(GPU), entry(setting(16), 1.0, 2.0, 3.0))
    planner.forget()
    assert plan(setting(16))[0] == "fused"


def test_the_packages_table_is_asked_where_ones_own_has_nothing_like_it() -> None:
    keep(shipped(), entry(setting(8192), 3.0, 2.0, 1.0))
    keep(tables.own(GPU), entry(setting(16), 1.0, 2.0, 3.0))
    assert plan(setting(16)) == ("fused", "fused")
    assert plan(setting(8192)) == ("torch", "torch")
    assert str(shipped()) in why(setting(8192))


def test_a_process_follows_the_tables_that_it_found_first() -> None:
    keep(tables.own(GPU), entry(setting(16), 3.0, 2.0, 1.0))
    assert plan(setting(16))[0] == "torch"
    keep(tables.own(GPU), entry(setting(16), 1.0, 2.0, 3.0))
    assert plan(setting(17))[0] == "torch"  # another M, planned later
    planner.forget()
    assert plan(setting(17))[0] == "fused"


@pytest.mark.parametrize("error", [RuntimeError("no home"), PermissionError("not yours")])
def test_calls_go_where_the_cache_cannot_be_reached(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise error

    if isinstance(error, OSError):
        keep(tables.own(GPU), entry(setting(16), 1.0, 2.0, 3.0))
        monkeypatch.setattr(Path, "read_bytes", refuse)
    else:
        monkeypatch.delenv("DELTAOPS_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", refuse)
    assert plan(setting(8192)) == ("split", "split")
    assert f"cannot be reached ({error})" in why(setting(8192))


def test_each_direction_has_its_own_reason() -> None:
    one = setting(16)
    keep(tables.own(GPU), tables.Entry(one, {"forward": {"torch": 1.0}}))
    assert plan(one) == ("torch", "fused")
    assert why(one).startswith("fastest for")
    assert why(one, "backward").startswith("not measured")
    choices = (planner.choose(one, direction, "meta") for direction in tables.DIRECTIONS)
    assert "; dx fused: not measured" in planner.text(*choices)


def test_a_table_is_added_to(tmp_path: Path) -> None:
    path, first, second = tmp_path / "t.json", {"date": "x"}, {"date": "y"}
    tables.add(path, GPU, [entry(setting(16), 1, 2, 3), entry(setting(64), 1, 2, 3)], first)
    again = tables.Entry(setting(16), {"forward": {"torch": 9}})
    tables.add(path, GPU, [again, entry(setting(1), 1, 2, 3)], second)
    tables.add(path, GPU, [], {"date": "z"}, fresh=True)  # nothing measured: nothing forgotten
    found = tables.read(path, GPU).entries
    assert [e.setting.m for e in found] == [1, 16, 64]
    assert found[1].seconds == {"forward": {"torch": 9}, "backward": found[2].seconds["backward"]}
    assert found[1].measured == {"forward": second, "backward": first}
    assert found[2].measured == {"forward": first, "backward": first}
    tables.add(path, GPU, [again], second, fresh=True)
    assert [e.setting.m for e in tables.read(path, GPU).entries] == [16]


def test_runs_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.json"

    def run(offset: int) -> None:
        for m in range(offset, offset + 5):
            tables.add(path, GPU, [entry(setting(m), 1, 2, 3)], {"run": offset})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, (0, 10, 20, 30)))
    found = tables.read(path, GPU).entries
    assert [e.setting.m for e in found] == [10 * i + j for i in range(4) for j in range(5)]
    assert all(e.measured["forward"] == {"run": e.setting.m // 10 * 10} for e in found)


def test_names_that_differ_in_signs_only_have_their_own_files() -> None:
    assert tables.file_name("A GPU").startswith("a-gpu-")
    assert tables.file_name("A GPU") != tables.file_name("A-GPU")


def test_a_table_of_another_version_is_left_out() -> None:
    path = tables.own(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(changed(version=tables.VERSION - 1), encoding="utf-8")
    assert plan(setting(8192)) == ("split", "split")
    assert f"is of version {tables.VERSION - 1}, not {tables.VERSION}" in why(setting(8192))
    tables.check(path, GPU)
    path.write_text(changed(version=tables.VERSION + 1), encoding="utf-8")
    with pytest.raises(DataError, match=f"is of version {tables.VERSION + 1}"):
        tables.check(path, GPU)  # would be lost


def changed(**changes: Any) -> str:
    seconds, runs = {"forward": {"fused": 1e-5}}, {"forward": 0}
    call = {**setting(16)._asdict(), "seconds": seconds, "runs": runs}
    head = {"format": tables.FORMAT, "version": tables.VERSION, "gpu": GPU}
    good: dict[str, Any] = {**head, "runs": [{}], "calls": [call]}
    call |= changes.pop("call", {})
    return json.dumps(good | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "could not be read as JSON"),
        ("[]", 'has no "format"'),
        ("[" * 100_000, "could not be read as JSON"),
        (changed(version="x"), "is of version 'x', not 2"),
        (changed(runs=[1]), 'a list "runs" of objects'),
        (changed(call={"runs": {}}), "runs must name the run of each direction"),
        (changed(call={"runs": {"forward": 1}}), "runs must be below 1, not 1"),
        (changed(call={"m": 2**2000}), "call 0: m must be int, not 1148"),
        (changed(call={"seconds": {"forward": {"fused": 2**2000}}}), "must be seconds, not 1148"),
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
    assert message in delta_linear.planned(CALL)  # explain and report go on


def test_a_good_table_of_that_kind_is_read() -> None:
    path = tables.own(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(changed(), encoding="utf-8")
    assert why(setting(16)).startswith("fastest for")
    assert plan(setting(16))[1] == "fused"  # not measured: by the rule


# ------------------------------------------------------------------------------- what comes of it


def test_explain_says_which_plan_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALL
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: None)
    found = explain_call(call, "triton")
    assert found.plan is not None
    assert "run by triton (y persistent, dx persistent: not measured on this GPU" in found.reason
    assert "plan: y persistent" in str(found)
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


def launched(m: int, n: int, k: int, rank: int) -> list[str]:
    x, dy, weight, a, b, s = (
        torch.empty(*shape, dtype=dtype, device="meta")
        for shape, dtype in (
            ((m, k), HALF), ((m, n), HALF), ((n, k), HALF),
            ((rank, k), HALF), ((n, rank), HALF), ((m, rank), torch.float32),
        )
    )  # fmt: skip
    run, rest = TritonBackend(), ([2.0], [0.0], ["identity"], None)
    with record.recording() as launches:
        run.forward(x, weight, None, [a], [b], [None], *rest)
        run.backward(dy, x, weight, [a], [b], s, *rest, [True, False, True, True, False])
    return [launch.kernel for launch in launches]


@pytest.mark.parametrize("name", tables.PLANS[:4])  # the last two launch nothing of Triton's
def test_the_plan_is_what_is_launched(name: str) -> None:
    times = [1.0 if one == name else 2.0 for one in tables.PLANS]
    keep(tables.own(GPU), entry(setting(512), *times))
    kernels = launched(512, 4096, 4096, 16)
    both, staying = ("_forward_kernel", "_grad_input_kernel"), name == "persistent"
    assert all((kernel in kernels) == (name in ("fused", "split")) for kernel in both)
    assert all((f"_persistent{kernel}" in kernels) == staying for kernel in both)
    assert kernels.count("torch.addmm_") == (2 if name in ("split", "torch") else 0)


FASTEST = (4.0, 3.0, 2.0, 1.0)
"""Of the plans: the persistent one, where it can run."""


@pytest.mark.parametrize(
    ("gpu", "changes", "taken"),
    [
        ("sm_90", {}, True),
        ("sm_100", {}, True),
        ("sm_80", {}, False),
        ("gfx942", {}, False),
        ("sm_90", {"m": 128}, False),  # few rows
        ("sm_90", {"ranks": (20,)}, False),  # rows of S start off multiples of 16 bytes
        ("sm_90", {"ranks": (8, 8)}, False),  # two branches
        ("sm_90", {"adapter_dtypes": (torch.float32,)}, False),
        ("sm_90", {"weight_layout": "col"}, False),
        ("sm_90", {"n": 4100}, False),
        ("sm_90", {"dropout": True}, True),
    ],
)
def test_the_persistent_plan_is_for_what_its_descriptors_take(
    gpu: str, changes: dict[str, Any], taken: bool
) -> None:
    call = CALL._replace(**{"m": 4096, "dropout": False} | changes)
    if (ranks := len(call.ranks)) > 1:
        call = call._replace(adapter_dtypes=(HALF,) * ranks)
    wide = "float32" if torch.float32 in call.adapter_dtypes else "bfloat16"
    measured = setting(call.m, call.n, call.k, sum(call.ranks), adapter=wide)
    with core.standing_in(targets.TARGETS[gpu]):
        keep(tables.own(gpu), entry(measured, *FASTEST), gpu=gpu)
        said = delta_linear.planned(call)
        assert [f"{out} persistent" in said for out in ("y", "dx")] == [taken, taken], said


def test_nothing_is_said_to_be_persistent_that_was_not_measured() -> None:
    for m in (256, 8192, 32768):
        for plan_of in (
            planner.start(setting(m), "forward", True),
            planner.start(setting(m), "backward", True),
        ):
            assert plan_of.plan != "persistent"
    keep(tables.own(GPU), entry(setting(8192), 3.0, 2.0, 4.0, 5.0))
    assert "y split, dx split" in delta_linear.planned(CALL)


def test_matrices_off_a_multiple_of_16_bytes_are_not_described() -> None:
    good = torch.zeros(32, 64, dtype=HALF)
    able = core.kernels("persistent").is_describable
    assert able(good, good[:, :48], good[3:])
    for bad in (
        good.t(),
        good[:, 1:],
        good[:, ::2],
        good[:0],
        good[:1].expand(4, 64),
        good.float(),
    ):
        assert not able(good, bad)


DECODING = CALL._replace(m=16, dropout=False)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"m": 1, "weight_layout": "col"}, True),
        ({"m": 17}, False),
        ({"ranks": (65,)}, False),
        ({"ranks": (8, 8), "adapter_dtypes": (HALF, HALF)}, False),
        ({"adapter_dtypes": (torch.float32,)}, False),
        ({"dropout": True}, False),
        ({"activations": ("gelu",)}, False),
        ({"branch_bias": True}, False),
        ({"routed": True}, False),
    ],
)
def test_few_rows_of_one_plain_branch_are_decoded(changes: dict[str, Any], taken: bool) -> None:
    call = DECODING._replace(**changes)
    wide = "float32" if torch.float32 in call.adapter_dtypes else "bfloat16"
    measured = setting(call.m, rank=call.rank, adapter=wide)
    timed = dict.fromkeys(("fused", "split", "torch"), 2.0) | {"decode": 1.0}
    keep(tables.own(GPU), tables.Entry(measured, {"forward": timed}))
    said = delta_linear.planned(call)
    assert ("y decode: fastest" in said) == taken, said
    assert "dx decode" not in said


def test_decoding_is_the_start_of_few_rows_and_ranks_alone() -> None:
    assert "y decode: not measured" in delta_linear.planned(DECODING._replace(ranks=(64,)))
    assert "y fused" in delta_linear.planned(DECODING._replace(ranks=(65,)))
    keep(tables.own(GPU), entry(setting(16), 2.0, 3.0, 1.0))
    planner.forget()
    # a table of before there was decode is followed
    assert "y torch, dx torch: fastest" in delta_linear.planned(DECODING)


@pytest.mark.parametrize(
    ("gpu", "rank", "parts"), [("sm_80", 16, 0), ("sm_80", 64, 1), (GPU, 16, 1)]
)
def test_decoding_is_one_launch_or_two(gpu: str, rank: int, parts: int) -> None:
    with core.standing_in(targets.TARGETS[gpu]):
        kernels = launched(16, 4096, 4096, rank)
    assert kernels[parts] == "_decode_kernel"
    assert kernels[:parts] == ["_decode_parts_kernel"] * parts
    assert "_forward_kernel" not in kernels


@pytest.mark.parametrize(
    ("n", "k", "rank", "wanted"),
    [
        (4096, 4096, 16, ("torch", "torch")),
        (4096, 4096, 24, ("fused", "fused")),  # rank lanes left over: other tiles, by the rule
        (4088, 4096, 16, ("torch", "fused")),  # rows of dy are not aligned
        (4096, 4088, 16, ("fused", "fused")),  # nor are x and the weight
    ],
)
def test_explain_names_what_is_launched(n: int, k: int, rank: int, wanted: tuple[str, str]) -> None:
    keep(tables.own(GPU), entry(setting(64, n, k, rank), 3.0, 2.0, 1.0))
    call = CALL._replace(m=64, n=n, k=k, ranks=(rank,), dropout=False)
    found, kernels = delta_linear.planned(call), launched(64, n, k, rank)
    said = tuple(found.split(f"{name} ")[1].split(":")[0].split(",")[0] for name in ("y", "dx"))
    assert said == wanted, found
    gemms = ("_forward_kernel", "_grad_input_kernel")
    assert [g in kernels for g in gemms] == [plan != "torch" for plan in wanted]
    assert kernels.count("torch.addmm_") == wanted.count("torch")
