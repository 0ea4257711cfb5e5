"""Which components stay within a budget, and where new ones come.

All components of all places compete for the parameters: the highest scores stay. A share of the
budget is not theirs but that of new components, which are on trial there and displace nobody; when
the trial is over they compete as all others do, and the next ones come, in turns to the places that
score above the mean of those with room. So ranks also grow under a budget that does not change.
Parameters are what is counted, since a component costs as many as K + N.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deltaops.surgery.components import Sized


@dataclass(frozen=True)
class Chosen:
    """What stays and what comes."""

    kept: dict[str, tuple[int, ...]]
    """Path → components that stay."""
    new: dict[str, int]
    """Path → how many new ones come."""
    cut: float
    """The lowest score that stays and was not bound to."""
    means: dict[str, float]
    """Path → mean score of what stays."""


def choose(
    places: Mapping[str, Sized],
    scores: Mapping[str, list[float]],
    trial: Mapping[str, int],
    budget: int,
    *,
    smallest: int,
    largest: int,
    share: float,
    grow: bool,
) -> Chosen:
    """Which components stay within ``budget``, and where new ones come.

    Args:
        places: by path.
        scores: of their components.
        trial: path → how many of its last components are on trial.
        budget: parameters of all places; it holds ``smallest`` components of each.
        smallest: components of each place that stay in any case, its best.
        largest: no rank above it by new ones.
        share: of the budget, that components on trial and new ones have to themselves.
        grow: whether new ones come.
    """
    kept: dict[str, set[int]] = {path: set() for path in places}
    left = budget

    def take(path: str, component: int, reserve: float) -> bool:
        """Whether it stays, with ``reserve`` parameters left for others."""
        nonlocal left
        rank = len(kept[path])
        cost = places[path].parameters(rank + 1) - places[path].parameters(rank)
        if left - cost < reserve:
            return False
        kept[path].add(component)
        left -= cost
        return True

    judged = {path: range(place.rank - trial.get(path, 0)) for path, place in places.items()}
    ranked = sorted(
        (-scores[path][i], at, path, i) for at, path in enumerate(places) for i in judged[path]
    )
    for _, _, path, i in ranked:
        if len(kept[path]) < smallest:
            take(path, i, 0)
    cut = 0.0
    for negative, _, path, i in ranked:
        # something stays in any case: a LoRA is at one place at least
        reserve = share * budget if left < budget else 0
        if i not in kept[path] and take(path, i, reserve):
            cut = -negative
    for path, place in places.items():
        for i in range(len(judged[path]), place.rank):
            take(path, i, 0)
    means = {path: _mean([scores[path][i] for i in chosen]) for path, chosen in kept.items()}
    new = dict.fromkeys(places, 0)
    if grow:
        room = {path: min(largest, p.largest) - len(kept[path]) for path, p in places.items()}
        for path in _turns({p: len(kept[p]) for p in places if kept[p] and room[p] > 0}, means):
            if places[path].unit > left:
                break
            if new[path] < room[path]:
                new[path] += 1
                left -= places[path].unit
    return Chosen({path: tuple(sorted(kept[path])) for path in places}, new, cut, means)


def _turns(ranks: Mapping[str, int], means: Mapping[str, float]) -> Iterator[str]:
    """Those of ``ranks`` that score above their mean, the highest first, over and over."""
    if not ranks:
        return
    mean = sum(means[path] * rank for path, rank in ranks.items()) / sum(ranks.values())
    mean = min(mean, max(means[path] for path in ranks))  # rounding can lift it above all of them
    good = [path for path in ranks if means[path] >= mean]
    good.sort(key=lambda path: -means[path])
    for _ in range(max(ranks.values())):  # a place at most doubles the highest rank there is
        yield from good


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
