"""Small mixtures of experts of transformers, and what tests ask of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA
from deltaops.surgery import Handle

transformers = pytest.importorskip("transformers")

NAMES = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
PLACE = "layers.0.mlp.experts"
SIZES = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12,
    "moe_intermediate_size": 20, "num_local_experts": 5, "num_experts": 5,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8,
}  # fmt: skip


def build(family: str = "Mixtral", **settings: Any) -> Any:
    """A model without a head, the same bits every time."""
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}Model")(config).eval()


def answer(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).last_hidden_state
    return found


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).mean()


def shaken(model: nn.Module, delta: LoRA, **settings: Any) -> Handle:
    """``delta`` on ``model``, far from its start."""
    handle = deltaops.attach(model, delta, **settings)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return handle


def experts_only(**settings: Any) -> LoRA:
    return LoRA(**{"r": 3, "alpha": 5, "target_modules": [], "target_parameters": NAMES} | settings)


def grad_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def stirred(model: Any) -> Any:
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model
