"""How a method says where it binds: names, regular expressions, or roles that surgery resolves.

Names and regular expressions mean what they mean in PEFT. A role is what a module is for in a
transformer, whatever it is called: surgery reads the module tree to find it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from deltaops.errors import ConfigError

ALL_LINEAR = "all-linear"
"""Every linear layer but the output embedding."""
ALL_NORM = "all-norm"
"""Every LayerNorm and RMSNorm."""
ATTENTION_OUTPUT = "attention-output"
"""The last projection of each attention, self and cross."""
KEY_VALUE = "key-value"
"""The key and value projections of each attention; the fused one where there is only that."""
FEED_FORWARD = "feed-forward"
"""Each feed-forward as a whole: from what its first layer reads to what its last returns."""
FEED_FORWARD_OUTPUT = "feed-forward-output"
"""The last layer of each feed-forward."""

ATTENTIONS = "attention"
"""Each attention as a whole, self and cross."""
DECODER_ATTENTIONS = "decoder-attention"
"""Each self-attention of the decoder; of the only stack where there is no other."""
STACKS = "stack"
"""Each stack of blocks that takes ``inputs_embeds``, with what embeds its tokens."""
EXPERTS = "experts"
"""The experts of each mixture that keeps them in 3-D parameters, all of these."""

ROLES = (
    ALL_LINEAR, ALL_NORM, ATTENTION_OUTPUT, KEY_VALUE, FEED_FORWARD, FEED_FORWARD_OUTPUT,
    ATTENTIONS, DECODER_ATTENTIONS, STACKS, EXPERTS,
)  # fmt: skip


def roles(target: str | tuple[str, ...]) -> tuple[str, ...]:
    """The roles among ``target_modules``; a string may be one, in any case of letters."""
    if isinstance(target, str):
        return (target.lower(),) if target.lower() in ROLES else ()
    return tuple(name for name in target if name in ROLES)


def plain(target: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """``target_modules`` without the roles; an empty tuple where nothing is left."""
    if isinstance(target, str):
        return () if roles(target) else target
    return tuple(name for name in target if name not in ROLES)


def names(subject: str, value: str | Iterable[str] | None) -> tuple[str, ...]:
    """``value`` as a tuple of distinct module names; a single string is one name."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    found = tuple(value) if isinstance(value, Iterable) else (value,)
    for name in found:
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"{subject} must be module names, got {name!r}. Pass strings such as 'q_proj'."
            )
    return tuple(dict.fromkeys(found))


def selector(subject: str, value: str | Iterable[str]) -> str | tuple[str, ...]:
    """``value`` as a regular expression (a string) or a tuple of names (anything else)."""
    if isinstance(value, str):
        if not value:
            raise ConfigError(f"{subject} is empty. Name modules, or leave the default.")
        if not roles(value):
            check_regex(subject, value)
        return value
    found = names(subject, value)
    if not found:
        raise ConfigError(f"{subject} is empty. Name at least one module, or use {ALL_LINEAR!r}.")
    return found


def normalise(delta: Any) -> None:
    """Check what every method says about its targets, and turn lists into tuples.

    Args:
        delta: a frozen dataclass with the fields of :class:`deltaops.methods.base.Delta`.
    Raises: ConfigError.
    """
    title = type(delta).__name__

    def put(field: str, value: object) -> None:
        object.__setattr__(delta, field, value)  # the dataclass is frozen; this is its start

    target = delta.target_modules
    nothing = getattr(delta, "target_parameters", ()) and not isinstance(target, str) and not target
    put("target_modules", () if nothing else selector(f"{title}: target_modules", target))
    if delta.exclude_modules is not None:
        put("exclude_modules", selector(f"{title}: exclude_modules", delta.exclude_modules))
    put("modules_to_save", names(f"{title}: modules_to_save", delta.modules_to_save))
    put("layers_pattern", names(f"{title}: layers_pattern", delta.layers_pattern))
    put("layers_to_transform", _indices(title, delta.layers_to_transform))
    if not isinstance(delta.task_type, str | None):
        raise ConfigError(
            f"{title}: task_type must be a label or None, got {delta.task_type!r}. "
            "Pass 'CAUSAL_LM'."
        )
    target = delta.target_modules
    regex = isinstance(target, str) and not roles(target)
    if delta.layers_to_transform is not None and regex:
        raise ConfigError(
            f"{title}: layers_to_transform needs roles or a list of names in target_modules, got "
            f"the string {target!r}. Put the layers into that regular expression."
        )
    if delta.layers_pattern and delta.layers_to_transform is None:
        raise ConfigError(
            f"{title}: layers_pattern says what layers_to_transform counts, and that is missing. "
            "Pass both or neither."
        )


def check_flags(delta: Any, *fields: str) -> None:
    """Raises: ConfigError where one of ``fields`` is not a bool."""
    for field in fields:
        value = getattr(delta, field)
        if not isinstance(value, bool):
            raise ConfigError(f"{type(delta).__name__}: {field} must be a bool, got {value!r}.")


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number in float64's range, which True is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max  # false for NaN too


def is_count(value: object) -> bool:
    """Whether ``value`` is an integer ≥ 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _indices(title: str, value: int | Iterable[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        found = (value,) if isinstance(value, int) else tuple(value)
    except TypeError:
        found = ()
    if not found or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in found):
        raise ConfigError(
            f"{title}: layers_to_transform must be layer indices ≥ 0, got {value!r}. Pass [0, 1]."
        )
    return found


def check_regex(subject: str, pattern: str) -> None:
    """Raises: ConfigError where ``pattern`` does not compile."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{subject}={pattern!r} is a string, so it is a regular expression, and it does "
            f"not compile: {error}. Pass a list for plain names."
        ) from error
