"""Whether a module has a part of a delta on it, of whichever method."""

from __future__ import annotations

from torch import nn

from .decoded_adapter import DecodedAdapters
from .embedding import DeltaEmbedding
from .experts import DeltaExperts
from .kept import has_copies
from .place import LinearPlace
from .prefix import has_prefix
from .prefix_encoder import PrefixEncoder
from .prefix_pool import PooledPrefixes
from .prompt import has_prompt
from .router import DeltaRouter

_CLASSES = (
    LinearPlace, DeltaEmbedding, DeltaExperts, DeltaRouter, PrefixEncoder, DecodedAdapters,
    PooledPrefixes,
)  # fmt: skip


def holds_delta(module: nn.Module) -> bool:
    """Whether surgery has bound something to ``module``; also while it is disabled or merged.

    A linear layer that runs by the op without a delta is one of a model that has one.
    """
    return (
        isinstance(module, _CLASSES)
        or has_copies(module)
        or has_prefix(module)
        or has_prompt(module)
    )
