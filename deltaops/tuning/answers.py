"""Tasks as text to text: a text, and an answer that the frozen model itself has to write.

No head is added, so that a prompt is all that a task has. A language model reads the text and
writes the answer after it; an encoder–decoder reads the text and writes the answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deltaops.errors import DataError

from .loop import to_device
from .read import Example
from .tokens import IGNORED, TokenSet, label_texts


@dataclass(frozen=True)
class AnswerSet(TokenSet):
    """Texts with the numbers of their answers.

    Attributes:
        words: one int64 ``[A]`` for each answer, by number.
        apart: the answer is a decoder's, and not written after the text.
    """

    words: Sequence[Tensor]
    apart: bool

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` ``[B, T]`` and ``labels``, of the answers only."""
        assert self.classes is not None
        answers = [self.words[int(i)] for i in self.classes[list(rows)]]
        texts = [self.ids[i] for i in rows]
        blank = [torch.full_like(text, IGNORED) for text in texts]
        if not self.apart:
            texts = [torch.cat(pair) for pair in zip(texts, answers, strict=True)]
            answers = [torch.cat(pair) for pair in zip(blank, answers, strict=True)]
        input_ids = _padded(texts, self.pad)
        mask = _padded([torch.ones_like(text) for text in texts], 0)
        return {
            "input_ids": input_ids, "attention_mask": mask, "labels": _padded(answers, IGNORED),
        }  # fmt: skip

    def fingerprint(self) -> str:
        """See :class:`TokenSet`; of the answers too."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for word in self.words:
            digest.update(word.numpy().tobytes())
        return digest.hexdigest()

    def _pick(self, rows: Sequence[int]) -> AnswerSet:
        assert self.classes is not None
        classes = self.classes[list(rows)]
        return dataclasses.replace(self, ids=[self.ids[i] for i in rows], classes=classes)


def answer_texts(
    examples: Sequence[Example], tokenizer: Any, seq_len: int, *, apart: bool
) -> AnswerSet:
    """Each text cut at ``seq_len`` tokens, and its label as the answer.

    Raises: DataError where there are fewer than two labels.
    """
    data, labels = label_texts(examples, tokenizer, seq_len)
    end = tokenizer.eos_token_id
    words = []
    for label in labels:
        text = label if apart else f" {label}"  # a tokenizer of pieces writes a word with its space
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"the tokenizer makes no token of the label {label!r}. Rename it.")
        words.append(torch.tensor(ids if end is None else [*ids, end]))
    return AnswerSet(data.ids, data.classes, data.pad, words, apart)


@torch.no_grad()
def score(model: torch.nn.Module, data: AnswerSet, batch_size: int) -> dict[str, float]:
    """Mean loss in nats per token of the answers, and the part of them that is right altogether.

    Right is an answer whose every token is the most likely one after those before it: what the
    model would write by itself.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens, right = 0.0, 0, 0
    for first in range(0, len(data), batch_size):
        batch = to_device(data.batch(range(first, min(first + batch_size, len(data)))), device)
        labels = batch["labels"]
        logits = model(**batch).logits.float()
        if not data.apart:
            logits, labels = logits[:, :-1], labels[:, 1:]
        known = labels != IGNORED
        total += float(functional.cross_entropy(logits[known], labels[known], reduction="sum"))
        tokens += int(known.sum())
        right += int(((logits.argmax(-1) == labels) | ~known).all(1).sum())
    model.train(was_training)
    return {"loss": total / max(1, tokens), "accuracy": right / len(data)}


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """``[B, longest]``."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
