"""Peers timed in turns, so that whatever the machine does, it does to all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int
    each: tuple[float | None, ...] = ()
    """By round of the run, None where the peer sat it out; empty where that was not kept."""

    @classmethod
    def of(cls, seconds: Sequence[float | None]) -> Timing:
        """Summary of one peer's rounds, of which it played at least one; None: it sat out."""
        played = [s for s in seconds if s is not None]
        each = tuple([None if s is None else float(f"{s:.4g}") for s in seconds])
        if len(played) == 1:
            return cls(played[0], played[0], played[0], 1, each)
        low, median, high = statistics.quantiles(played, n=4, method="inclusive")
        return cls(median, low, high, len(played), each)

    def scaled(self, factor: float) -> Timing:
        """The same rounds in another unit, or a share of each."""
        each = tuple([None if s is None else s * factor for s in self.each])
        return Timing(
            self.median * factor, self.low * factor, self.high * factor, self.rounds, each
        )

    def over(self, other: Timing) -> Timing | None:
        """This peer's time over the other's, round by round: a machine that changes its speed
        changes both. None where fewer than three rounds have both."""
        pairs = zip(self.each, other.each, strict=False)
        ratios = [a / b for a, b in pairs if a is not None and b is not None]
        return Timing.of(ratios) if len(ratios) >= 3 else None

    def as_json(self) -> dict[str, Any]:
        """Field → value."""
        return asdict(self)


def interleaved(
    peers: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float = float("inf"),
    warmup: int = 1,
    paired: int = 0,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time each peer once a round, in an order that rotates from round to round.

    Args:
        peers: name → the call to time.
        rounds: how often each is timed.
        seconds: for all rounds of all peers. Each gets the same share; one that is too slow for
            ``rounds`` calls in it sits rounds out, evenly spread, and is timed at least once.
        warmup: untimed rounds before, at least one where ``seconds`` is given.
        paired: where it is not 0, all sit out the same rounds and take part in so many at least:
            each round that has one has all, for ratios of few rounds.
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
    if paired and names:
        turns = dict.fromkeys(names, max(min(paired, rounds), min(turns.values())))
    found: dict[str, list[float | None]] = {name: [None] * rounds for name in names}
    for turn in range(rounds):
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            if _plays(turn, turns[name], rounds):
                began = time.perf_counter()
                peers[name]()
                found[name][turn] = time.perf_counter() - began
        on_round()
    return {name: Timing.of(values) for name, values in found.items()}


def _turns(rounds: int, share: float, one: float) -> int:
    """How many of the rounds a peer takes part in."""
    return rounds if one * rounds <= share else max(1, int(share / one))


def _plays(turn: int, turns: int, rounds: int) -> bool:
    """Whether this round is one of the ``turns`` that are spread evenly over ``rounds``."""
    return (turn + 1) * turns // rounds > turn * turns // rounds
