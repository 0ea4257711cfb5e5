"""Settings as the native core takes them, for callers without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from deltaops.errors import ConfigError, ShapeError

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


def attention_scale(op: str, scale: float | None, q: Sequence[int]) -> float:
    """``scale``, or 1 / √D of queries of this shape.

    Raises: ConfigError for one that is not finite.
    """
    found = q[3] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(found):
        raise ConfigError(f"{op}: scale must be finite, got {scale!r}.")
    return found


def check_heads(op: str, q: Sequence[int], k: Sequence[int], causal: bool) -> None:
    """Shapes of queries ``[B, H, Lq, D]`` and of keys ``[B, Hkv, Lk, D]``, four sizes each.

    Raises: ShapeError.
    """
    if q[3] < 1:
        raise ShapeError(f"{op}: q must be [B, H, Lq, D] with D ≥ 1, got {list(q)}.")
    if k[1] < 1 or q[1] % k[1]:
        raise ShapeError(
            f"{op}: q must have a multiple of the heads of k, got {q[1]} and {k[1]}. Heads of keys "
            "are shared by equally many heads of queries."
        )
    if causal and q[2] != k[2]:
        raise ShapeError(
            f"{op}: causal needs as many queries as keys, got {q[2]} and {k[2]}. Pass a mask that "
            "says which query sees which key."
        )
