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

from deltaops.errors import ConfigError, DataError
from deltaops.modules import room_of

SCALE = 20.0
"""Of cosines, before the softmax: 1 / temperature, as sentence-transformers ranks by default."""


_ALIKE = 1e-6
"""1 − cosine, below which two names are one: what rounding makes of equal texts of a batch."""


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
    read as "card arrival".

    Raises: ConfigError without padding; DataError for a label with no token, or more of them than
        the encoder has positions, and for two labels that it cannot tell apart.
    """
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            "the tokenizer has no padding token, which the names of labels need. Take an encoder "
            "such as BERT."
        )
    words = [label.replace("_", " ") for label in labels]
    limit = room_of(encoder)
    for label, name in zip(labels, words, strict=True):
        if not tokenizer(name, add_special_tokens=False)["input_ids"]:
            raise DataError(f"the tokenizer makes no token of the label {label!r}. Rename it.")
        length = len(tokenizer(name, verbose=False)["input_ids"])
        if limit is not None and length > limit:
            raise DataError(
                f"the label {label[:40]!r} has {length} tokens, and the encoder takes {limit}. "
                "Rename it."
            )
    batch = tokenizer(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        mean = mean_state(encoder, batch["input_ids"], batch["attention_mask"])
    vectors = functional.normalize(mean, dim=-1)
    same = ((vectors @ vectors.T).fill_diagonal_(0.0) > 1 - _ALIKE).nonzero().tolist()
    if same:
        first, second = (labels[i] for i in same[0])
        raise DataError(
            f"the labels {first!r} and {second!r} are the same to the encoder, which tells them "
            "apart by their names. Rename one of them."
        )
    return vectors


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
