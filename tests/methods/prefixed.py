"""Small models with a prefix that is far from its start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import deltaops
from deltaops import Prefix
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import batch, build

P = 4
SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60,
}  # fmt: skip


def random(handle: Any) -> Any:
    """The handle, its parameters far from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return handle


def attached(name: str, head: str = "Model", **settings: Any) -> Any:
    settings = {"num_virtual_tokens": P} | settings
    return random(deltaops.attach(build(name, head=head), Prefix(**settings)))


def same(found: Tensor, expected: Tensor) -> bool:
    return relative_error(found, expected) < 16 * bound(0.0, torch.float32)


def inputs(name: str) -> dict[str, Tensor]:
    """Padded on the left, whose positions are the ones that differ."""
    given = batch(name)
    mask = torch.ones_like(given["input_ids"])
    mask[0, :2] = 0
    return given | {"input_ids": given["input_ids"] * mask, "attention_mask": mask}


def logits(model: Any, name: str) -> Tensor:
    """Those of tokens that are no padding."""
    given = inputs(name)
    y: Tensor = model(**given).logits
    return y[given["attention_mask"].bool()] if y.dim() == 3 and name != "t5" else y
