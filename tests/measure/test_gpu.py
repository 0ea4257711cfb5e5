"""The GPU benchmark without a GPU: its gate, turns, drift and report, on made-up clocks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltaops.measure import gpu
from deltaops.measure.interleave import Timing

pytest.importorskip("peft")
TINY = gpu.Case(24, 32, 48, 4)


def one_second(call: gpu.Call) -> float:
    call()
    return 1.0


def measure(case: gpu.Case, capture: Callable[[gpu.Call], gpu.Call] = lambda c: c) -> gpu.Result:
    return gpu.measure(
        case, device="cpu", backend="auto", rounds=4, clock=one_second, capture=capture,
        compile_peft=False, cache_bytes=1e4,
    )  # fmt: skip


@pytest.mark.parametrize("case", [TINY, gpu.Case(2, 32, 48, 4), gpu.Case(24, 32, 48, 4, 0.1)])
def test_every_peer_passes_and_is_timed_a_copy(case: gpu.Case) -> None:
    copies = len(gpu.operands(case, "cpu", 1e4))
    result = measure(case)
    assert set(result.timings) == {gpu.FROZEN, gpu.PEFT, gpu.OURS}
    assert {t.median for t in result.timings.values()} == {1 / copies}
    assert result.as_json()["valid"]


def test_operands_outgrow_the_cache() -> None:
    copies = gpu.operands(TINY, "cpu", 1e5)
    assert sum(2 * (o.x.numel() + o.weight.numel() + o.grad_y.numel()) for o in copies) >= 1e5
    assert not torch.equal(copies[0].x, copies[1].x)


def test_peft_computes_what_ours_does() -> None:
    (o, *_) = gpu.operands(TINY, "cpu", 0)
    theirs = gpu._peft_layer(TINY, o)(o.x)
    ours = gpu._ours(TINY, o, "auto")[0]
    torch.testing.assert_close(theirs, ours, rtol=0.05, atol=0.05)


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.delta_linear
    monkeypatch.setattr(gpu, "delta_linear", lambda *a, **k: right(*a, **k) * 1.1)
    with pytest.raises(AssertionError, match="relative error"):
        measure(TINY)


def test_a_peer_that_cannot_be_captured_is_timed_and_noted() -> None:
    def refuse(call: gpu.Call) -> gpu.Call:
        raise RuntimeError("operation not permitted when stream is capturing")

    result = measure(TINY, refuse)
    assert "not captured" in result.notes[gpu.OURS]
    assert gpu.OURS in result.timings


def test_a_run_that_drifts_is_discarded() -> None:
    assert gpu.drift([1.0, 1.0, 1.03, 1.03]) == pytest.approx(0.03)
    slow = iter([1.0, 1.0, 1.0, 1.5, 1.5] + [1.0] * 5)  # the first run drifts, the second does not
    seconds, moved, discarded = gpu.steady({gpu.FROZEN: lambda: None}, lambda call: next(slow), 4)
    assert (seconds[gpu.FROZEN], moved, discarded) == ([1.0] * 4, 0.0, 1)
    ever = iter(range(1, 100))
    _, moved, discarded = gpu.steady({gpu.FROZEN: lambda: None}, lambda call: float(next(ever)), 4)
    assert moved > gpu.DRIFT
    assert discarded == gpu.ATTEMPTS - 1


def test_peers_take_turns() -> None:
    calls: list[str] = []
    peers = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    gpu.take_turns(peers, one_second, 2)
    assert "".join(calls) == "ab" + "ab" + "ba"


def test_the_report_says_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made_up(case: gpu.Case) -> gpu.Result:
        timings = {gpu.FROZEN: Timing.of([1e-3]), gpu.OURS: Timing.of([2e-3])}
        return gpu.Result(case, timings, 0.5, 2, {gpu.PEFT: "peft is not installed"})

    ticks = iter([0.0, 1.0, 2.0, 11.0])
    cases = (TINY, TINY, TINY)
    assert gpu.run(tmp_path, 10.0, "Some GPU", cases, made_up, lambda: next(ticks)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"24×32×48 r=4 +1000.0 +2000.0 .*2.000 +— +—   invalid", printed)
    assert "1 of 3 cases left out" in printed
    written = json.loads((tmp_path / "gpu-some-gpu.json").read_text())
    assert [r["valid"] for r in written["delta_linear"]] == [False, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
