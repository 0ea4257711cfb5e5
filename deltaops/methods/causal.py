"""Whether a token may not see those that follow it, as far as a module of transformers says."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

from torch import nn


def is_causal(module: nn.Module) -> bool:
    """Of ``module`` or anything in it: by its attentions, the mask that its forward makes, or its
    configuration (Bloom's, MPT's and CodeGen's attentions do not say)."""
    return any(_says(part) for part in module.modules())


def _says(module: nn.Module) -> bool:
    if getattr(module, "is_causal", False):
        return True
    config = getattr(module, "config", None)
    if not hasattr(config, "model_type"):
        return False
    if any(getattr(config, name, None) is False for name in ("is_decoder", "causal")):
        return False  # an encoder that can be a decoder, and is none
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    forward: Any = unwrap(type(module).forward)
    masks = "create_causal_mask" in forward.__code__.co_names
    return masks or (
        hasattr(module, "get_input_embeddings")
        and getattr(config, "model_type", None) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
