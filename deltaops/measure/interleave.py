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

    def as_json(self) -> dict[str, float]:
        """Field → value."""
        return asdict(self)


def interleaved(
    peers: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time each peer once a round, in an order that rotates from round to round.

    Args:
        peers: name → the call to time.
        rounds: how often each is timed.
        warmup: untimed rounds before.
        on_round: called after each round, for a progress bar.
    """
    names = list(peers)
    for _ in range(warmup):
        for name in names:
            peers[name]()
        on_round()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            peers[name]()
            seconds[name].append(time.perf_counter() - began)
        on_round()
    return {name: Timing.of(values) for name, values in seconds.items()}
