"""What a start recommendation looks at: the task's texts and the model, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaops.errors import DataError
from deltaops.methods.causal import is_causal
from deltaops.modules import token_table
from deltaops.surgery.anatomy import anatomy, is_linear

READ = 2000
"""Texts that are tokenized for the features, evenly spread over all of them."""
WORDS = 5000
"""Distinct words that are looked up in the vocabulary."""
ENCODER, DECODER, BOTH = "encoder", "decoder", "encoder-decoder"


@dataclass(frozen=True)
class Task:
    """Texts to tune on.

    Attributes:
        texts: at least one.
        tokenizer: of the model, as transformers has it.
        labels: one for each text; None for a language model.
        seq_len: tokens that are kept of a text.
    """

    texts: Sequence[str]
    tokenizer: Any
    labels: Sequence[str] | None = None
    seq_len: int = 128

    def __post_init__(self) -> None:
        """Raises: DataError where there is nothing to read, or labels are missing."""
        if not self.texts:
            raise DataError("suggest: the data has no texts. Give at least one.")
        if self.labels is None:
            return
        if len(self.labels) != len(self.texts):
            raise DataError(
                f"suggest: expected a label for each of {len(self.texts)} texts, got "
                f"{len(self.labels)}."
            )
        if len(set(self.labels)) < 2:
            raise DataError(
                "suggest: classification needs two labels or more, the data has "
                f"{len(set(self.labels))}. Name another label column, or give no labels."
            )


@dataclass(frozen=True)
class TaskFeatures:
    """Of the texts."""

    examples: int
    labels: int | None
    """Distinct ones; None for a language model."""
    mean_tokens: float
    """Of a text, cut at the length that is kept."""
    long_tokens: int
    """19 of 20 texts have no more, cut likewise."""
    type_token_ratio: float
    """Distinct words over words, of the texts read."""
    pieces: float
    """Tokens a word, with a space before it or without, whichever are fewer: 1 where the
    vocabulary has every word whole."""
    known_words: float
    """Share of the distinct words that the vocabulary has whole."""
    unknown: float
    """Share of the words' tokens that the tokenizer does not know."""
    read: int
    """Texts that were tokenized for this."""


@dataclass(frozen=True)
class ModelFeatures:
    """Of the model."""

    kind: str
    family: str
    """:data:`ENCODER`, :data:`DECODER` or :data:`BOTH`."""
    parameters: int
    dtype: str
    hidden: int
    blocks: int
    attentions: int
    feed_forwards: int
    linears: int
    biased: float
    """Share of the linear layers that have a bias."""
    embedding: str | None
    """The last part of the path of the tokens' table; None where there is none."""


def features_of(task: Task) -> TaskFeatures:
    """Of ``task``. Raises: DataError where the tokenizer makes no token of any text."""
    step = max(1, math.ceil(len(task.texts) / READ))
    texts = list(task.texts[::step])
    encoded = task.tokenizer(texts, truncation=True, max_length=task.seq_len)["input_ids"]
    lengths = sorted(len(row) for row in encoded)
    if not lengths[-1]:
        raise DataError("suggest: the tokenizer makes no token of any text. Is it the model's?")
    words = [word for text in texts for word in text.split()]
    distinct = list(dict.fromkeys(words))
    known = _looked_up(task.tokenizer, distinct[:WORDS])
    counted = [known[word] for word in words if word in known]
    tokens = sum(size for size, _ in counted)
    labels = None if task.labels is None else len(set(task.labels))
    return TaskFeatures(
        examples=len(task.texts),
        labels=labels,
        mean_tokens=sum(lengths) / len(lengths),
        long_tokens=lengths[math.ceil(0.95 * len(lengths)) - 1],
        type_token_ratio=len(distinct) / max(1, len(words)),
        pieces=tokens / max(1, len(counted)),
        known_words=sum(found == (1, 0) for found in known.values()) / max(1, len(known)),
        unknown=sum(lost for _, lost in counted) / max(1, tokens),
        read=len(texts),
    )


def features_of_model(model: nn.Module) -> ModelFeatures:
    """Of ``model``, which has no delta."""
    blocks = anatomy(model)
    linears = [m for m in model.modules() if is_linear(m)]
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # the innermost one's is what is called: T5's own stands beside those of its two stacks
    tables = [table for m in model.modules() if (table := token_table(m)) is not None]
    table = tables[-1] if tables else None
    named = {id(m): path for path, m in model.named_modules()}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return ModelFeatures(
        kind=type(model).__name__,
        family=family_of(model),
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(first.dtype).removeprefix("torch."),
        hidden=int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0)),
        blocks=len(blocks),
        attentions=sum(len(block.attentions) for block in blocks),
        feed_forwards=sum(block.feed_forward is not None for block in blocks),
        linears=len(linears),
        biased=sum(m.bias is not None for m in linears) / max(1, len(linears)),
        embedding=None if table is None else named[id(table)].rpartition(".")[2],
    )


def family_of(model: nn.Module) -> str:
    """Whether it reads both ways, writes, or has one stack for each."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return BOTH
    return DECODER if is_causal(model) else ENCODER


def _looked_up(tokenizer: Any, words: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Word → its tokens, and how many of them are the one for what is unknown.

    Some vocabularies have a word with the space before it, others would count that space.
    """
    if not words:
        return {}
    unknown = tokenizer.unk_token_id
    ways = [
        tokenizer([before + word for word in words], add_special_tokens=False)["input_ids"]
        for before in ("", " ")
    ]
    rows = (min(pair, key=len) for pair in zip(*ways, strict=True))
    return {w: (len(row), row.count(unknown)) for w, row in zip(words, rows, strict=True)}
