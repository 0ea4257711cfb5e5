"""The GPU benchmark without a GPU: its gate, turns, drift and report, on made-up clocks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from deltaops.measure import gpu, gpu_attention, gpu_clock, gpu_group, gpu_linear, published
from deltaops.measure.interleave import Timing
from deltaops.reference import delta_linear as reference
from deltaops.testing import DeltaLinearCase, assert_accurate

pytest.importorskip("peft")
TINY = gpu.Case(24, 32, 48, 4)


def one_second(call: gpu.Call) -> float:
    call()
    return 1.0


def measure(case: gpu.Subject, capture: Callable[[gpu.Call], gpu.Call] = lambda c: c) -> gpu.Result:
    return gpu.measure(
        case, device="cpu", backend="auto", rounds=4, clock=one_second, capture=capture,
        compile_peft=False, cache_bytes=1e4, peak=lambda call: 7,
    )  # fmt: skip


@pytest.mark.parametrize("case", [TINY, gpu.Case(2, 32, 48, 4), gpu.Case(24, 32, 48, 4, 0.1)])
def test_every_peer_passes_and_is_timed_a_copy(case: gpu.Case) -> None:
    copies = len(gpu_linear.operands(case, "cpu", 1e4))
    result = measure(case)
    plain = set() if case.dropout else {gpu.UNSLOTH}
    trained = {gpu.DEFAULT} if case.backward else set()
    assert set(result.timings) == {gpu.FROZEN, gpu.PEFT, gpu.OURS} | plain | trained
    assert {t.median for t in result.timings.values()} == {1 / copies}
    # its kernels are Triton's, which tests/kernels/interpreted.py runs
    assert set(result.as_json()["left_out"]) == {gpu.LORA_FUSION, gpu.UNSLOTH} - plain


OTHERS: list[tuple[gpu.Subject, set[str]]] = [
    (gpu.GroupCase(24, (32, 16), 48, 4), {gpu.PEFT, "deltaops, layer by layer"}),
    (gpu.GroupCase(24, (32, 16), 48, 4, 0.1), {gpu.PEFT, "deltaops, layer by layer"}),
    (gpu.PrefixCase(2, 4, 2, 24, 16, 5), {"joined and masked"}),
]


@pytest.mark.parametrize(("case", "peers"), OTHERS, ids=str)
def test_groups_and_attention_pass_their_gates_and_are_timed(
    case: gpu.Subject, peers: set[str]
) -> None:
    result = measure(case)
    assert set(result.timings) == {gpu.FROZEN, gpu.OURS} | peers
    assert set(result.peak_bytes.values()) == {7}
    written = result.as_json()
    assert (written["backward"], set(written["peak_bytes"])) == (True, set(result.timings))
    shown = gpu.table([result])
    assert all(name in shown for name in peers - {gpu.PEFT})


@pytest.mark.parametrize(
    ("case", "module", "name"),
    [(OTHERS[0][0], gpu_group, "delta_linear_group"), (OTHERS[2][0], gpu_attention, "joined")],
    ids=str,
)
def test_their_gates_can_fail(
    case: gpu.Subject, module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: [1.1 * t for t in right(*a, **k)])
    with pytest.raises(AssertionError, match="relative error"):
        measure(case)


def test_operands_outgrow_the_cache() -> None:
    copies = gpu_linear.operands(TINY, "cpu", 1e5)
    assert sum(2 * (o.x.numel() + o.weight.numel() + o.grad_y.numel()) for o in copies) >= 1e5
    assert not torch.equal(copies[0].x, copies[1].x)


def test_peft_computes_what_ours_does() -> None:
    (o, *_) = gpu_linear.operands(TINY, "cpu", 0)
    theirs = gpu_linear._peft_layer(TINY, o)(o.x)
    ours = gpu_linear._ours(TINY, o, "auto")[0]
    torch.testing.assert_close(theirs, ours, rtol=0.05, atol=0.05)


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_linear.delta_linear
    monkeypatch.setattr(gpu_linear, "delta_linear", lambda *a, **k: right(*a, **k) * 1.1)
    with pytest.raises(AssertionError, match="deltaops: y: relative error"):
        measure(TINY)


def test_a_peer_with_wrong_numbers_stops_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    right = published.unsloth
    monkeypatch.setattr(published, "unsloth", lambda *a: right(*a) * 1.1)
    with pytest.raises(AssertionError, match="Unsloth's arithmetic: y: relative error"):
        measure(TINY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unsloths_arithmetic_is_that_of_lora(dtype: torch.dtype) -> None:
    case = DeltaLinearCase(19, 24, 40, (5,), bias=False)
    t, grad_y, needs = case.tensors(dtype), case.grad_y(dtype), [True, False, True, True, False]
    wide = t.to(torch.float64)
    wanted, low = (
        [(y := reference.forward(*one.forward_arguments()))[0],
         *reference.backward(*one.backward_arguments(dy, y[1]), needs)]
        for one, dy in ((wide, grad_y.double()), (t, grad_y))
    )  # fmt: skip
    x, a, b = (v.requires_grad_() for v in (t.x, t.a[0], t.b[0]))
    got = published.unsloth(x, t.weight, a, b, t.scaling[0])
    found = [got, *torch.autograd.grad(got, [x, a, b], grad_y)]
    for name, value, want, eager in zip(("y", "x", "a", "b"), found, wanted, low, strict=True):
        assert_accurate(value, want, eager, name)


REFUSED = {
    "too little memory": torch.OutOfMemoryError("tried to allocate 9 GiB\nand so on"),
    "not captured as a graph": RuntimeError("not permitted when stream is capturing"),
}


@pytest.mark.parametrize(
    ("number", "name", "why"),
    [
        (0, gpu.FROZEN, "not captured as a graph"),
        (1, gpu.OURS, "too little memory"),
        (2, gpu.UNSLOTH, "too little memory"),
        (3, gpu.PEFT, "not captured as a graph"),
    ],
)
def test_what_is_no_graph_is_left_out_with_its_reason(number: int, name: str, why: str) -> None:
    turn = iter(range(10))

    def refuse(call: gpu.Call) -> gpu.Call:
        if next(turn) == number:
            raise REFUSED[why]
        return call

    result = measure(TINY, refuse)
    assert result.left_out[name].startswith(why)
    assert "and so on" not in result.left_out[name]
    whole = name in (gpu.FROZEN, gpu.OURS)
    assert (gpu.CASE in result.left_out) == whole == (not result.timings)
    assert name not in result.timings
    shown = gpu.table([result])
    assert f"{name} left out: {why}" in shown
    assert (f"left out: nothing to compare without {name}" in shown) == whole


def test_a_case_that_drifts_ever_has_no_seconds() -> None:
    ever = iter(range(1, 1000))
    result = gpu.measure(
        TINY, device="cpu", backend="auto", rounds=4, clock=lambda call: float(next(ever)),
        capture=lambda call: call, compile_peft=False, cache_bytes=1e4, peak=lambda call: 7,
    )  # fmt: skip
    assert result.timings == {}
    assert "the frozen layer drifted by" in result.left_out[gpu.CASE]
    written = result.as_json()
    assert (written["seconds"], written["runs_discarded"]) == ({}, gpu_clock.ATTEMPTS)
    assert written["frozen_drift"] > gpu_clock.DRIFT


def test_a_run_that_drifts_is_discarded() -> None:
    assert gpu_clock.drift([1.0, 1.0, 1.03, 1.03]) == pytest.approx(0.03)
    slow = iter([1.0, 1.0, 1.0, 1.5, 1.5] + [1.0] * 5)  # the first run drifts, the second does not
    seconds, moved, discarded = gpu_clock.steady(
        {gpu.FROZEN: lambda: None}, lambda call: next(slow), 4
    )
    assert (seconds[gpu.FROZEN], moved, discarded) == ([1.0] * 4, 0.0, 1)
    ever = iter(range(1, 100))
    _, moved, discarded = gpu_clock.steady(
        {gpu.FROZEN: lambda: None}, lambda call: float(next(ever)), 4
    )
    assert moved > gpu_clock.DRIFT
    assert discarded == gpu_clock.ATTEMPTS - 1


def test_ceilings_count_operations_and_bytes_both_ways() -> None:
    assert gpu_clock.ceilings("cpu", size=16, rounds=2, clock=one_second) == {
        "operations_per_second": 2 * 16**3, "copy_bytes_per_second": 2 * 2 * 8 * 16**2
    }  # fmt: skip


def test_peers_take_turns() -> None:
    calls: list[str] = []
    peers = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    gpu_clock.take_turns(peers, one_second, 2)
    assert "".join(calls) == "ab" + "ab" + "ba"


def test_the_report_says_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fate = iter([None, torch.OutOfMemoryError("9 GiB"), AssertionError("y: relative error 1")])

    def made_up(case: gpu.Case) -> gpu.Result:
        if error := next(fate):
            raise error
        timings = {gpu.FROZEN: Timing.of([1e-3]), gpu.OURS: Timing.of([2e-3])}
        return gpu.Result(case, timings, 0.0, 2, {gpu.PEFT: "peft is not installed"})

    ticks = iter([0.0, 1.0, 2.0, 3.0, 11.0])
    cases = (TINY, TINY, TINY, TINY, TINY)
    best = {"operations_per_second": 7.9e14}
    assert gpu.run(tmp_path, 10.0, "Some GPU", cases, made_up, lambda: next(ticks), best) == 1
    printed = capsys.readouterr().out
    assert re.search(r"24×32×48 r=4 +1000.0 +2000.0 .*2.000 +— +— +— +—", printed)
    assert "left out: too little memory on the GPU: 9 GiB" in printed
    assert "left out: wrong numbers: y: relative error 1" in printed
    assert "PEFT left out: peft is not installed (24×32×48 r=4)" in printed
    assert "2 of 5 cases left out" in printed
    assert "operations per second of this GPU at best, in this run: 7.9e+14" in printed
    written = json.loads((tmp_path / "gpu-some-gpu.json").read_text())
    assert [r["wrong"] for r in written["delta_linear"]] == [False, False, True]
    assert [bool(r["seconds"]) for r in written["delta_linear"]] == [True, False, False]
    assert written["not_reached"] == ["24×32×48 r=4"] * 2
    assert written["machine"]["ceilings"] == best


def test_what_was_measured_is_written_when_the_run_stops(tmp_path: Path) -> None:
    fate = iter([None, KeyboardInterrupt()])

    def made_up(case: gpu.Case) -> gpu.Result:
        if error := next(fate):
            raise error
        return gpu.Result(case, {gpu.FROZEN: Timing.of([1.0]), gpu.OURS: Timing.of([1.0])}, 0.0)

    with pytest.raises(KeyboardInterrupt):
        gpu.run(tmp_path, 10.0, "GPU", (TINY, TINY), made_up, lambda: 0.0)
    written = json.loads((tmp_path / "gpu-gpu.json").read_text())
    assert (len(written["delta_linear"]), len(written["not_reached"])) == (1, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
