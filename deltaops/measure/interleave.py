"""Peers timed in turns, so that whatever the machine does, it does to all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summary of one peer's rounds; at least one."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))

    def scaled(self, factor: float) -> Timing:
        """The same rounds in another unit, or a share of each."""
        return Timing(self.median * factor, self.low * factor, self.high * factor, self.rounds)

    def as_json(self) -> dict[str, float]:
        """Field → value."""
        return asdict(self)


def interleaved(
    peers: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float = float("inf"),
    warmup: int = 1,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time each peer once a round, in an order that rotates from round to round.

    Args:
        peers: name → the call to time.
        rounds: how often each is timed.
        seconds: for all rounds of all peers. Each gets the same share; one that is too slow for
            ``rounds`` calls in it sits rounds out, evenly spread, and is timed at least once.
        warmup: untimed rounds before, at least one where ``seconds`` is given.
        on_round: called after each round, for a progress bar.
    """
    names = list(peers)
    taken = dict.fromkeys(names, 0.0)
    for _ in range(warmup):
        for name in names:
            began = time.perf_counter()
            peers[name]()
            taken[name] = time.perf_counter() - began
        on_round()
    turns = {name: _turns(rounds, seconds / max(len(names), 1), taken[name]) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            if _plays(turn, turns[name], rounds):
                began = time.perf_counter()
                peers[name]()
                found[name].append(time.perf_counter() - began)
        on_round()
    return {name: Timing.of(values) for name, values in found.items()}


def _turns(rounds: int, share: float, one: float) -> int:
    """How many of the rounds a peer takes part in."""
    return rounds if one * rounds <= share else max(1, int(share / one))


def _plays(turn: int, turns: int, rounds: int) -> bool:
    """Whether this round is one of the ``turns`` that are spread evenly over ``rounds``."""
    return (turn + 1) * turns // rounds > turn * turns // rounds
