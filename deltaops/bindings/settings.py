"""Settings as the native core takes them, for callers without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from deltaops.errors import ConfigError

DRAWS = 1 << 16
"""A draw of the dropout stream is 16 bits (csrc/include/philox.h)."""


def threads(asked: int | None) -> int:
    """``asked``, or as many as there are processors that this process may use.

    Raises: ConfigError for less than 1.
    """
    if asked is None:
        return len(os.sched_getaffinity(0))
    if not isinstance(asked, int) or asked < 1:
        raise ConfigError(f"num_threads must be a positive integer or None, got {asked!r}.")
    return asked


def code(op: str, name: str, known: Mapping[str, int], given: str) -> int:
    """The core's number of a word.

    Raises: ConfigError for another word.
    """
    if given not in known:
        raise ConfigError(f"{op}: {name} must be one of {', '.join(known)}, got {given!r}.")
    return known[given]


def drop_threshold(op: str, p: float) -> int:
    """The draws below which an element is dropped.

    Raises: ConfigError unless ``p`` is a probability.
    """
    if not 0.0 <= p <= 1.0:
        raise ConfigError(f"{op}: dropout must be from 0 to 1, got {p!r}.")
    return round(p * DRAWS)
