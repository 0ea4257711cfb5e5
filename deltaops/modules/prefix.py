"""A prefix of trained keys and values on an attention module of transformers.

transformers looks the function that attends up by a name in the config. Under :data:`NAME` stands
one that reads a prefix from the module's own parameters; what makes masks under that name is what
makes them for "sdpa". So masks, positions and caches are those of the model without a prefix: every
query sees it, and it is no token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError, ConfigError
from deltaops.ops import prefix_attention
from deltaops.reference.prefix_attention import join, mask_of_both

from .attention_functions import BIAS, asks, attend, attends, known_sdpa, visible

NAME = "deltaops"
"""The implementation, as transformers' configs have it."""
KEYS, VALUES = "prefix_k", "prefix_v"
"""Names of the parameters ``[Hkv, P, D]`` on an attention module."""


def register() -> None:
    """Make :data:`NAME` known to transformers; again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend_with_prefix)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def switch(model: Any) -> str:
    """Have ``model`` attend by :data:`NAME`.

    Args:
        model: one of transformers.
    Returns: the implementation of before, for ``model.set_attn_implementation``.
    Raises: AttachError where its attention does not go by that table, and nothing has changed.
    """
    register()
    before: str = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        raise AttachError(
            f"prefix: {type(model).__name__} must ask transformers' AttentionInterface which "
            f"function attends, and it computes its attention itself. Use another delta on it."
        )
    model.set_attn_implementation(NAME)
    return before


def add_prefix(module: nn.Module, keys: Tensor, values: Tensor) -> None:
    """Give an attention module a prefix.

    Args:
        module: an attention of a model that :func:`switch` has been called on, or will be.
        keys: ``[Hkv, P, D]``, which become a parameter.
        values: as ``keys``.
    Raises: ConfigError where it has one, or these are not two of one shape.
    """
    there: Tensor | None = getattr(module, KEYS, None)
    if there is not None:
        raise ConfigError(
            f"prefix: {type(module).__name__} must have no prefix yet, and has one of "
            f"{there.shape[1]} keys. Remove it first."
        )
    if keys.dim() != 3 or keys.shape != values.shape:
        raise ConfigError(
            f"prefix: keys and values must both be [Hkv, P, D], got {list(keys.shape)} and "
            f"{list(values.shape)}."
        )
    module.register_parameter(KEYS, nn.Parameter(keys))
    module.register_parameter(VALUES, nn.Parameter(values))


def remove_prefix(module: nn.Module) -> None:
    """Take it away again."""
    for name in (KEYS, VALUES):
        delattr(module, name)


def attend_with_prefix(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: :func:`deltaops.ops.prefix_attention` where that computes it.

    Dropout, a mask of numbers and a bias are none of the op's. There transformers' function for
    "sdpa" runs on copies of keys and values with the prefix before them. A module without a prefix
    has :func:`~.attention_functions.attend`.

    Args:
        module: the attention; its prefix, whether it is causal, how many queries share a key.
        query: ``[B, H, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``.
        value: as ``key``.
        attention_mask: ``[B or 1, H or 1, Lq, Lk]``, without the prefix.
        dropout: of the weights.
        scaling: of the scores; ``D ** -0.5`` where None.
        is_causal: instead of the module's own.
        **named: for "sdpa".
    Returns: y ``[B, Lq, H, D]``, and None for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as theirs

    prefix_k: Tensor | None = getattr(module, KEYS, None)
    if prefix_k is None:
        return attend(
            theirs, "auto", False, module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **named,
        )  # fmt: skip
    prefix_v: Tensor = getattr(module, VALUES)
    k, v, causal = visible(module, query, key, value, attention_mask, is_causal)
    groups = max(getattr(module, "num_key_value_groups", 1), 1)
    fits = known_sdpa() is not None and not (dropout or asks(theirs, named))
    if fits and attends(query, k, v, attention_mask, groups, causal):
        y = prefix_attention(
            query, k, v, prefix_k, prefix_v, mask=attention_mask, causal=causal, scale=scaling
        )
        return y.transpose(1, 2).contiguous(), None  # no copy: this is how it lies
    mask = attention_mask
    if mask is None or mask.dtype is torch.bool:
        mask = mask_of_both(query, k, prefix_k, mask, causal)
    else:
        mask = _grown(mask, prefix_k)
    if named.get(BIAS) is not None:
        named[BIAS] = _grown(named[BIAS], prefix_k)
    out: tuple[Tensor, Tensor | None] = theirs(
        module, query, join(prefix_k, k), join(prefix_v, v), mask,
        dropout=dropout, scaling=scaling, is_causal=False, **named,
    )  # fmt: skip
    return out


def _grown(added: Tensor, prefix: Tensor) -> Tensor:
    """Numbers that are added to scores, and nothing added to those of a prefix."""
    return torch.cat([added.new_zeros((*added.shape[:3], prefix.shape[1])), added], 3)
