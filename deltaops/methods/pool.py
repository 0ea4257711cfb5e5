"""What the methods share that choose for each sample from a pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.modules import EMBEDDINGS, STATES, draws_on

from . import stack
from .base import Site
from .causal import is_causal
from .targets import is_count, is_number

SOURCES = (EMBEDDINGS, STATES)
FIRST = 16
"""Tokens that choose in a causal stack, where ``query_tokens`` says nothing."""
_WORDS = 16
"""Tokens drawn for the start of a key, which is the mean of their embeddings, as a query is."""


def check_pool(delta: Any) -> None:
    """Raises: ConfigError where a setting of the pool of ``delta`` cannot be."""
    title = type(delta).__name__
    for name in ("size", "length", "top_k", "query_tokens"):
        value = getattr(delta, name)
        if not is_count(value) and not (name == "query_tokens" and value is None):
            raise ConfigError(f"{title}: {name} must be an integer ≥ 1, got {value!r}.")
    if delta.top_k > delta.size:
        raise ConfigError(
            f"{title}: top_k must be at most size={delta.size}, got {delta.top_k}. A sample "
            "cannot choose more than there are."
        )
    if delta.query not in SOURCES:
        raise ConfigError(f"{title}: query must be {' or '.join(SOURCES)}, got {delta.query!r}.")
    for name in ("key_loss", "balance"):
        value = getattr(delta, name)
        if not is_number(value) or value < 0:
            raise ConfigError(f"{title}: {name} must be a number ≥ 0, got {value!r}.")


def known_by(delta: Any, site: Site, module: nn.Module) -> int:
    """e: the features of what a sample of the stack ``module`` is known by."""
    return stack.width_of(site, module) if delta.query == EMBEDDINGS else site.out_features


def settings_of(delta: Any, module: nn.Module) -> dict[str, Any]:
    """What :class:`deltaops.modules.Pool` is told, on the stack ``module``."""
    tokens = FIRST if delta.query_tokens is None and is_causal(module) else delta.query_tokens
    return {
        "top_k": delta.top_k, "source": delta.query, "tokens": tokens,
        "key_loss": delta.key_loss, "balance": delta.balance,
    }  # fmt: skip


def start_keys(
    delta: Any, shape: tuple[int, ...], table: nn.Embedding | None, random: torch.Generator | None
) -> Tensor:
    """Where queries lie, as far as that is known; an entry is about 1, whose rate is small."""
    if delta.query == EMBEDDINGS and table is not None:
        ids = stack.drawn(table, shape[0] * _WORDS, random)
        words = stack.start_rows(table, ids, len(ids), shape[1], random)
        keys = words.view(shape[0], _WORDS, -1).mean(1)
        return keys / keys.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    return torch.randn(shape, generator=random, device=draws_on(random))
