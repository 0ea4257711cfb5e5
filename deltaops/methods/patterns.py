"""Numbers that some modules have for themselves, by name or regular expression, as PEFT has them.

A key matches a path that is, or behind a dot ends as, the key says; the first that matches counts.
Most keys are names without any sign of a regular expression. They are looked up, so that hundreds
of places with a rank of their own cost no more than one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from deltaops.errors import ConfigError

from .targets import check_regex

Pairs = tuple[tuple[str, Any], ...]
"""Key and number, in their order; what holds them has to be hashable."""


def pairs(field: str, value: Any, valid: Callable[[object], bool]) -> Pairs:
    """A mapping as :data:`Pairs`. Raises: ConfigError.

    Args:
        field: "rank_pattern" or "alpha_pattern".
        value: what was given for it.
        valid: whether a number can stand there.
    """
    try:
        found = tuple((key, number) for key, number in dict(value).items())
    except (TypeError, ValueError):
        found = ((None, value),)
    for key, number in found:
        if not isinstance(key, str) or not key or not valid(number):
            what = "ranks ≥ 1" if field == "rank_pattern" else "finite numbers"
            raise ConfigError(
                f"LoRA: {field} must map names or regular expressions to {what}, got {value!r}. "
                "Pass {'q_proj': 16}."
            )
        check_regex(f"LoRA: {field}", key)
    return found


def first(pattern: Any, path: str, otherwise: float) -> float:
    """The number of the first key that matches ``path``, or ``otherwise``."""
    if not pattern:
        return otherwise
    names, expressions = _parsed(pattern)
    ends = (path, *(path[at + 1 :] for at, sign in enumerate(path) if sign == "."))
    hits = [names[end] for end in ends if end in names]
    hits += [(at, number) for at, found, number in expressions if found.match(path)]
    return min(hits, key=lambda hit: hit[0])[1] if hits else otherwise


@functools.lru_cache(maxsize=64)
def _parsed(
    pattern: Pairs,
) -> tuple[dict[str, tuple[int, Any]], list[tuple[int, re.Pattern[str], Any]]]:
    """Names → position and number; and what has to be tried, with the same."""
    names: dict[str, tuple[int, Any]] = {}
    expressions = []
    for at, (key, number) in enumerate(pattern):
        name = re.sub(r"\\(.)", r"\1", key)
        if re.escape(name) == key:
            names[name] = at, number
        else:
            expressions.append((at, re.compile(rf"(.*\.)?({key})$"), number))
    return names, expressions
