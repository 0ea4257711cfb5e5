"""Tiny causal language models of any family, and what they answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import deltaops
from deltaops.modules import Block

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def model_of(name: str, **settings: Any) -> nn.Module:
    """A causal language model of the family ``name``, norms with weights that are not one."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES | settings)
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model: nn.Module = getattr(transformers, kind)(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def answer(model: nn.Module, **settings: Any) -> list[Tensor]:
    """The loss and the gradients of all that trains."""
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **settings).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def kinds(model: nn.Module) -> list[str]:
    return sorted({type(m).mixin.__name__ for m in model.modules() if isinstance(m, Block)})


def rows(model: nn.Module, kind: str, **settings: Any) -> list[Any]:
    return [row for row in deltaops.report(model, **settings).rows if row.kind == kind]
