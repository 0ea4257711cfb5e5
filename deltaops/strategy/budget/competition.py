"""Which components stay within a budget, and where new ones come.

All components of all places compete for the parameters: the highest scores stay. A share of the
budget stays free of them and goes to new components, one a place, first where scores are highest on
average; so ranks grow there, also under a budget that does not change. A new component competes
only the next time. Parameters are what is counted, since a component costs as many as K + N.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from deltaops.surgery.components import Sized


class Chosen(NamedTuple):
    """What stays and what comes."""

    kept: dict[str, tuple[tuple[int, ...], int]]
    """Path → components that stay, and how many new ones come."""
    cut: float
    """The lowest score that stays without being protected; 0 where all do."""
    means: dict[str, float]
    """Path → mean score of what stays."""


def choose(
    places: Mapping[str, Sized],
    scores: Mapping[str, list[float]],
    fresh: Mapping[str, int],
    budget: int,
    *,
    smallest: int,
    largest: int,
    explore: float,
) -> Chosen:
    """Which components stay within ``budget``, and where new ones come.

    Args:
        places: by path.
        scores: of their components.
        fresh: path → how many of its last components are too new to be judged.
        budget: parameters of all places.
        smallest: components of each place that stay in any case, its best.
        largest: no rank above it.
        explore: share of the budget that only new components get.
    """
    kept: dict[str, set[int]] = {path: set() for path in places}
    left = budget

    def take(path: str, component: int, least_left: float) -> bool:
        nonlocal left
        if component in kept[path]:
            return True
        rank = len(kept[path])
        cost = places[path].parameters(rank + 1) - places[path].parameters(rank)
        if left - cost < least_left:
            return False
        kept[path].add(component)
        left -= cost
        return True

    ranked = sorted(
        (
            (-score, at, path, i)
            for at, path in enumerate(places)
            for i, score in enumerate(scores[path])
        ),
    )
    for _, _, path, i in ranked:
        if len(kept[path]) < smallest:
            take(path, i, 0)
    for path, count in fresh.items():
        if path in places:
            for i in range(places[path].rank - count, places[path].rank):
                take(path, i, explore * budget)
    cut = 0.0
    for negative, _, path, i in ranked:
        if i not in kept[path] and take(path, i, explore * budget):
            cut = -negative
    means = {
        path: sum(scores[path][i] for i in chosen) / len(chosen) if chosen else 0.0
        for path, chosen in kept.items()
    }
    new = dict.fromkeys(places, 0)
    if explore:
        for path in sorted(places, key=lambda path: -means[path]):
            rank = len(kept[path])
            if rank and rank < min(largest, places[path].largest) and places[path].unit <= left:
                new[path], left = 1, left - places[path].unit
    return Chosen({path: (tuple(sorted(kept[path])), new[path]) for path in places}, cut, means)
