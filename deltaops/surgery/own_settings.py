"""Ranks and scales of single places, in the settings that files hold: LoRA's patterns.

A pattern names places in full then, the longest path first, since the first that matches counts and
a short path may be the end of a longer one. PEFT reads them the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from deltaops.methods import LoRA
from deltaops.methods.base import BY_PARAMETER, Site


class Own(NamedTuple):
    """What a place has for itself."""

    rank: int
    alpha: float


def alpha_for(scale: float, rank: int, rslora: bool) -> float:
    """The alpha whose scale at ``rank`` is ``scale``, to the bit where float64 has one."""
    root = math.sqrt(rank) if rslora else rank
    near = scale * root
    neighbours = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in neighbours if alpha / root == scale), near)


def with_own(delta: LoRA, sites: Iterable[Site], changed: Mapping[str, Own]) -> LoRA:
    """``delta`` with what ``changed`` says of paths; the others keep what they have.

    Args:
        sites: all of the part.
        changed: by path.
    """
    sites = tuple(sites)
    layers = [site.path for site in sites if site.place not in BY_PARAMETER]
    own = {p: changed.get(p) or Own(delta.rank(p), delta.alpha_at(p)) for p in layers}
    if len(layers) < len(sites):  # patterns and defaults go on saying what experts and routers have
        ranks, alphas = _patterns(own)
        return replace(
            delta,
            rank_pattern=ranks
            | {k: r for k, r in dict(delta.rank_pattern).items() if k not in ranks},
            alpha_pattern=alphas
            | {k: a for k, a in dict(delta.alpha_pattern).items() if k not in alphas},
        )
    ((usual, _),) = Counter(own.values()).most_common(1)
    odd = {path for path, one in own.items() if one != usual}
    # one that ends as an odd one does would be taken for it
    named = {path for path in own if path in odd or path.endswith(tuple(f".{one}" for one in odd))}
    ranks, alphas = _patterns({path: one for path, one in own.items() if path in named})
    return replace(delta, r=usual.rank, alpha=usual.alpha, rank_pattern=ranks, alpha_pattern=alphas)


def _patterns(own: Mapping[str, Own]) -> tuple[dict[str, int], dict[str, float]]:
    """Of ranks and of alphas, whole paths."""
    paths = sorted(own, key=len, reverse=True)
    return (
        {re.escape(path): own[path].rank for path in paths},
        {re.escape(path): own[path].alpha for path in paths},
    )


def without(delta: LoRA, paths: Iterable[str]) -> LoRA:
    """``delta`` with ``paths`` among what it excludes, as one regular expression."""
    before = delta.exclude_modules
    if isinstance(before, tuple):  # names, which match from the end
        found = [rf"(?:.*\.)?(?:{'|'.join(map(re.escape, before))})"]
    else:
        found = [] if before is None else [f"(?:{before})"]
    return replace(delta, exclude_modules="|".join([*found, *map(re.escape, paths)]))
