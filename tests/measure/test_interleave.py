"""Statistics and turns of the timing, on made-up numbers; no timing is asserted."""

from __future__ import annotations

import json
import time

from deltaops.measure import interleave
from deltaops.measure.cell import OURS, PEFT, Cell
from deltaops.measure.interleave import Timing, interleaved

from .results import cell


def test_median_and_quartiles() -> None:
    timing = Timing.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.low, timing.median, timing.high, timing.rounds) == (2.0, 3.0, 4.0, 5)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1, (2.0,))
    assert Timing.of([2.0, None]).scaled(0.5) == Timing(1.0, 1.0, 1.0, 1, (1.0, None))


def test_ratios_are_taken_round_by_round() -> None:
    """A machine at half speed for most of one peer's rounds says nothing against that peer."""
    slow, fast = Timing.of([2.0, 4.0, 4.2, None, 2.2]), Timing.of([1.0, 2.0, 2.0, 1.0, 1.0])
    ratio = slow.over(fast)
    assert ratio is not None
    assert (ratio.rounds, ratio.median) == (4, 2.05)
    assert Timing.of([2.0, None, 4.0]).over(fast) is None
    both = Cell("step", "m", "f32", 0.0, {PEFT: slow, OURS: fast})
    assert both.ratio(PEFT, OURS) == 2.05
    assert Cell.of_json(json.loads(json.dumps(both.as_json()))) == both


def test_every_peer_runs_once_a_round_in_rotating_order() -> None:
    calls: list[str] = []
    peers = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleaved(peers, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(t.rounds == 3 for t in timings.values())


def test_a_slow_peer_sits_rounds_out() -> None:
    calls: list[str] = []
    peers = {
        "fast": lambda: calls.append("f"),
        "slow": lambda: (time.sleep(0.03), calls.append("s")),
    }
    timings = interleaved(peers, rounds=10, seconds=0.1)
    assert timings["fast"].rounds == 10
    assert timings["slow"].rounds == 1
    assert calls.count("s") == 2  # one of them is the warm-up


def test_paired_peers_sit_out_the_same_rounds() -> None:
    peers = {"fast": lambda: None, "slow": lambda: time.sleep(0.01)}
    timings = interleaved(peers, rounds=9, seconds=0.01, paired=3)
    played = [[s is not None for s in t.each] for t in timings.values()]
    assert played[0] == played[1]
    assert sum(played[0]) == 3


def test_rounds_are_spread_evenly() -> None:
    assert [t for t in range(9) if interleave._plays(t, 3, 9)] == [2, 5, 8]
    for turns in range(1, 8):
        assert sum(interleave._plays(t, turns, 7) for t in range(7)) == turns


def test_ratios() -> None:
    one = cell("lora", {OURS: 1.0, PEFT: 3.0})
    assert one.ratio(PEFT, OURS) == 3.0
    assert one.speedup(OURS) == 3.0
    assert one.ratio("absent", OURS) is None
    assert one.best(OURS, PEFT, "absent") == OURS
    assert one.best("absent") is None
    assert Cell.of_json(one.as_json()) == one
