"""Statistics and turns of the timing, on made-up numbers; no timing is asserted."""

from __future__ import annotations

from deltaops.measure.interleave import Timing, interleaved
from deltaops.measure.layers import FUSED, PEFT, LayerResult
from deltaops.measure.steps import ATTACHED, StepResult
from deltaops.measure.steps import PEFT as PEFT_STEP


def test_median_and_quartiles() -> None:
    timing = Timing.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.low, timing.median, timing.high, timing.rounds) == (2.0, 3.0, 4.0, 5)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_every_peer_runs_once_a_round_in_rotating_order() -> None:
    calls: list[str] = []
    peers = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleaved(peers, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(t.rounds == 3 for t in timings.values())


def test_ratios() -> None:
    seconds = {FUSED: Timing.of([1.0]), PEFT: Timing.of([3.0])}
    layer = LayerResult((1, 2, 3), "f32", 0.0, seconds)
    assert layer.ratio(PEFT, FUSED) == 3.0
    assert layer.ratio("absent", FUSED) is None
    assert layer.as_json()["seconds"][PEFT]["median"] == 3.0
    step = StepResult("w", 0.0, {ATTACHED: Timing.of([2.0]), PEFT_STEP: Timing.of([3.0])}, 10)
    assert step.speedup(ATTACHED) == 1.5
    assert step.speedup("absent") is None
