"""Prompts and prefixes as one writes them in eager torch: concatenated, for every sequence anew.

    Prompt   [p₁ … p_P  e₁ … e_T] are the embeddings, and the mask gets P ones more
    Prefix   [Pk; K] and [Pv; V], expanded over the batch, in torch's own attention

For encoders, which is what methods are compared on: the prefix of a decoder would need a mask where
torch's causal attention has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaops.methods import Site

_NAME = "deltaops_eager_prefix"
_HELD = "eager_prefix"
"""Keys and values, in the ``__dict__`` of their attention."""


def prompt(model: nn.Module, delta: Any, site: Site, t: dict[str, nn.Parameter]) -> None:
    """Call the stack with longer embeddings; the states of the prompt are left to the reader."""
    vectors = t["prompt_embeddings"]

    def lengthen(module: Any, args: Any, named: dict[str, Any]) -> Any:
        ids = args[0] if args else named.pop("input_ids")
        mask = named.pop("attention_mask")
        embeds = module.get_input_embeddings()(ids)
        before = vectors.expand(len(embeds), -1, -1)
        longer = torch.cat([mask.new_ones(len(mask), len(vectors)), mask], 1)
        inputs = {"inputs_embeds": torch.cat([before, embeds], 1), "attention_mask": longer}
        return (), named | inputs

    model.get_submodule(site.path).register_forward_pre_hook(lengthen, with_kwargs=True)


def prefix(model: nn.Module, delta: Any, site: Site, t: dict[str, nn.Parameter]) -> None:
    """Let the attention see keys and values of its own before those of the tokens."""
    from transformers import PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    attentions: Any = ALL_ATTENTION_FUNCTIONS
    if _NAME not in attentions:
        attentions.register(_NAME, _attend)
        masks.register(_NAME, masks["sdpa"])
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != _NAME:
            module.set_attn_implementation(_NAME)
    key, value = t.values()
    model.get_submodule(site.path).__dict__[_HELD] = (key, value)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **named: Any
) -> Any:
    """transformers' "sdpa" of longer keys and values ``[B, Hkv, P + T, D]``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    held = module.__dict__.get(_HELD)
    if held is not None:
        k, v = (
            torch.cat([own.expand(len(k), -1, -1, -1), given], 2)
            for own, given in zip(held, (k, v), strict=True)
        )
        if attention_mask is not None:
            seen = attention_mask.new_ones(*attention_mask.shape[:3], held[0].shape[1])
            attention_mask = torch.cat([seen, attention_mask], 3)
    run: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return run(module, q, k, v, attention_mask, **named)
