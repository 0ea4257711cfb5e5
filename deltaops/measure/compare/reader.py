"""What the methods are compared on: a pre-trained encoder, a head, and labelled texts.

The head reads the mean of the tokens' last states: the names of the labels, or a new linear layer
(:mod:`deltaops.tuning.sentence`). All dropout is off, so that two programs can be held to each
other.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.errors import ConfigError, DataError
from deltaops.tuning.encoder import encoder_folder, load_encoder
from deltaops.tuning.read import Columns, read_examples
from deltaops.tuning.sentence import Answer, NamedClasses, mean_state, name_vectors
from deltaops.tuning.tokens import TokenSet, check_known, label_texts, load_tokenizer

HEAD = "classifier"
NAMED, TRAINED = "named", "trained"
"""Heads: the frozen encoder's vectors of the labels' names, or a new layer that learns too."""


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
    names: Tensor | None = None
    """``[classes, width]`` of length 1 for a named head; None for a trained one."""
    labels: tuple[str, ...] = ()
    """What ``names`` are of."""

    def texts(self) -> str:
        """A hash of all tokens and labels, and of what a named head reads of these."""
        parts = self.train.fingerprint(), self.test.fingerprint(), *self.labels
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def weights(self) -> str:
        """A hash of the encoder's parameters."""
        digest = hashlib.sha256()
        for parameter in self.encoder.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def reader(self, seed: int) -> Reader | NamedClasses:
        """A new copy; its head, and what is attached next, start alike for the same seed."""
        encoder = copy.deepcopy(self.encoder)
        torch.manual_seed(seed)
        if self.names is not None:
            return NamedClasses(encoder, self.names)
        return Reader(encoder, self.width, self.classes)


def read_material(
    model: str,
    train: str,
    test: str | None,
    columns: Columns,
    seq_len: int,
    head: str = NAMED,
) -> Material:
    """Load everything. Without ``test`` a tenth of ``train`` is held out, the same for all seeds.

    Args:
        head: :data:`NAMED` or :data:`TRAINED`.
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
    names = _names(encoder, tokenizer, labels, model) if head == NAMED else None
    read = tuple(labels) if head == NAMED else ()
    cut = len(examples)
    if test is None:
        fit, kept = data.split(0.1, 0)
        assert kept is not None  # a tenth was asked for
    else:
        fit = TokenSet(data.ids[:cut], data.classes[:cut], data.pad)
        kept = TokenSet(data.ids[cut:], data.classes[cut:], data.pad)
    return Material(encoder, width, len(labels), fit, by_length(kept), names, read)


def _names(encoder: nn.Module, tokenizer: Any, labels: Sequence[str], model: str) -> Tensor:
    """Raises: ConfigError where labels are no names, or two the same; or without padding."""
    if all(_is_number(label) for label in labels):
        raise ConfigError(
            f"--head named reads the labels as words, and these are numbers ({labels[0]}, "
            f"{labels[1]}). Give the column with their names, or --head trained."
        )
    try:
        return name_vectors(encoder, tokenizer, labels)
    except (ConfigError, DataError) as error:
        raise ConfigError(f"--model {model}: {error} Or pass --head trained.") from error


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def few(data: TokenSet, classes: int, count: int, seed: int) -> tuple[TokenSet, TokenSet]:
    """``count`` texts of each label, drawn by ``seed``; and as many others of each.

    Raises: ConfigError where a label has not more than ``count``.
    """
    assert data.classes is not None  # only labelled texts are compared on
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=random)
    chosen: list[int] = []
    others: list[int] = []
    for label in range(classes):
        rows = order[data.classes[order] == label].tolist()
        if len(rows) <= count:
            raise ConfigError(
                f"--few-shot {count}: label {label} of the sorted ones has {len(rows)} training "
                "texts, and one more is needed, to judge rates by. Ask for fewer."
            )
        chosen += rows[:count]
        others += rows[count : 2 * count]
    return _rows(data, sorted(chosen)), _rows(data, sorted(others))


def by_length(data: TokenSet) -> TokenSet:
    """The same texts, the short ones first: batches with little padding."""
    assert data.classes is not None  # only labelled texts are compared on
    return _rows(data, sorted(range(len(data)), key=lambda i: len(data.ids[i])))


def _rows(data: TokenSet, order: list[int]) -> TokenSet:
    assert data.classes is not None  # as above
    return TokenSet([data.ids[i] for i in order], data.classes[order], data.pad)
