"""Texts classified by a sentence encoder: one vector a text, and what reads it.

A *trained* head is a linear layer, new for each task. A *named* one has nothing to train: a text
belongs to the label whose name the frozen encoder puts nearest, so that whatever is gained over the
start, the delta gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALE = 20.0
"""Of cosines, before the softmax: 1 / temperature, as sentence-transformers ranks by default."""


class Answer(NamedTuple):
    """Loss in nats and logits ``[B, classes]``."""

    loss: Tensor
    logits: Tensor


def mean_state(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean ``[B, D]`` of the tokens' last states, as encoders such as MiniLM are trained to be
    read. Args: ids and mask ``[B, T]``."""
    states: Tensor = encoder(input_ids, attention_mask=attention_mask).last_hidden_state
    states = states[:, -attention_mask.shape[1] :]  # a prompt's states come before the text's
    mask = attention_mask[..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


def name_vectors(encoder: nn.Module, tokenizer: Any, labels: Sequence[str]) -> Tensor:
    """Vectors ``[classes, D]`` of length 1, of labels as people write them: ``card_arrival`` is
    read as "card arrival"."""
    words = [label.replace("_", " ") for label in labels]
    batch = tokenizer(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        mean = mean_state(encoder, batch["input_ids"], batch["attention_mask"])
    return functional.normalize(mean, dim=-1)


class NamedClasses(nn.Module):
    """An encoder whose classes are names: nothing is added that trains.

    Attributes:
        encoder: of transformers.
        names: ``[classes, D]`` of length 1, by :func:`name_vectors`.
    """

    names: Tensor

    def __init__(self, encoder: nn.Module, names: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("names", names)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Answer:
        """Args: ids and mask ``[B, T]``, labels ``[B]``."""
        mean = mean_state(self.encoder, input_ids, attention_mask)
        logits = SCALE * functional.normalize(mean, dim=-1) @ self.names.T
        return Answer(functional.cross_entropy(logits, labels), logits)
