"""What the methods are compared on: a pre-trained encoder, a new head, and labelled texts.

The head reads the mean of the tokens' last states. All dropout is off, so that two
programs can be held to each other.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.tuning.encoder import encoder_folder, load_encoder
from deltaops.tuning.read import Columns, read_examples
from deltaops.tuning.sentence import Answer, mean_state
from deltaops.tuning.tokens import TokenSet, check_known, label_texts, load_tokenizer

HEAD = "classifier"


class Reader(nn.Module):
    """An encoder of transformers under a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Answer:
        """Args: ids and mask ``[B, T]``, labels ``[B]``."""
        mean = mean_state(self.encoder, input_ids, attention_mask)
        logits = self.classifier(mean)
        return Answer(functional.cross_entropy(logits, labels), logits)


@dataclass(frozen=True)
class Material:
    """The encoder and the texts, as all contenders get them."""

    encoder: nn.Module
    width: int
    classes: int
    train: TokenSet
    test: TokenSet

    def texts(self) -> str:
        """A hash of all tokens and labels."""
        parts = self.train.fingerprint(), self.test.fingerprint()
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def weights(self) -> str:
        """A hash of the encoder's parameters."""
        digest = hashlib.sha256()
        for parameter in self.encoder.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def reader(self, seed: int) -> Reader:
        """A new copy; its head is the same for the same seed."""
        torch.manual_seed(seed)
        return Reader(copy.deepcopy(self.encoder), self.width, self.classes)


def read_material(
    model: str, train: str, test: str | None, columns: Columns, seq_len: int, seed: int
) -> Material:
    """Load everything. Without ``test`` a tenth of ``train`` is held out.

    Raises: ConfigError, DataError.
    """
    examples = read_examples(train, columns)
    held = [] if test is None else read_examples(test, columns)
    folder = encoder_folder(model)
    encoder, width = load_encoder(folder, model)
    tokenizer = load_tokenizer(folder, encoder.config)
    data, labels = label_texts(examples + held, tokenizer, seq_len)
    check_known(data.ids, tokenizer, model)
    assert data.classes is not None  # label_texts numbers the labels
    cut = len(examples)
    if test is None:
        fit, kept = data.split(0.1, seed)
        assert kept is not None  # a tenth was asked for
    else:
        fit = TokenSet(data.ids[:cut], data.classes[:cut], data.pad)
        kept = TokenSet(data.ids[cut:], data.classes[cut:], data.pad)
    return Material(encoder, width, len(labels), fit, by_length(kept))


def by_length(data: TokenSet) -> TokenSet:
    """The same texts, the short ones first: batches with little padding."""
    assert data.classes is not None  # only labelled texts are compared on
    order = sorted(range(len(data)), key=lambda i: len(data.ids[i]))
    return TokenSet([data.ids[i] for i in order], data.classes[order], data.pad)
