"""Texts → token ids → batches; a fixed order of examples that depends on the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from deltaops.errors import ConfigError, DataError

from .read import Example

IGNORED = -100  # the label that the loss of transformers' models leaves out
_UNKNOWN = 0.9
"""Part of the texts' tokens, at which the tokenizer is not the model's."""
_TINY = 0.1
"""Entries of a tokenizer over the model's; less are the special tokens alone."""
_REMEDY = "Save the model's own tokenizer beside it: tokenizer.save_pretrained(folder)."


@dataclass(frozen=True)
class TokenSet:
    """Token ids of every example, ready to be batched.

    Attributes:
        ids: one int64 ``[T]`` an example.
        classes: int64 ``[len(ids)]``, or None for a language model, whose labels are its own ids.
        pad: id that fills a batch up to its longest example; masked out.
    """

    ids: Sequence[Tensor]
    classes: Tensor | None
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` ``[B, T]`` and ``labels`` ``[B, T]`` or ``[B]``."""
        picked = [self.ids[i] for i in rows]
        shape = (len(picked), max(len(t) for t in picked))
        input_ids = torch.full(shape, self.pad, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, t in enumerate(picked):
            input_ids[row, : len(t)] = t
            mask[row, : len(t)] = 1
        if self.classes is None:
            labels = input_ids.masked_fill(mask == 0, IGNORED)
        else:
            labels = self.classes[list(rows)]
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def by_length(self) -> TokenSet:
        """The same examples, short ones first, so that batches in this order hold few pads."""
        return self._pick(sorted(range(len(self)), key=lambda row: len(self.ids[row])))

    def fingerprint(self) -> str:
        """A hash of every id and class: the same data through the same tokenizer."""
        digest = hashlib.sha256()
        for t in (*self.ids, *([] if self.classes is None else [self.classes])):
            digest.update(len(t).to_bytes(8, "little"))
            digest.update(t.numpy().tobytes())
        return digest.hexdigest()

    def split(self, fraction: float, seed: int) -> tuple[TokenSet, TokenSet | None]:
        """Training and held-out part; the latter is None for ``fraction`` 0.

        A language model's blocks are held out at the end of the text, so that no held-out block
        has neighbours on both sides in the training part; labelled examples are drawn at random.
        Raises: DataError where either part would be empty.
        """
        if fraction == 0:
            return self, None
        held = max(1, round(len(self) * fraction))
        if held >= len(self):
            what = "blocks of --seq-len tokens" if self.classes is None else "examples"
            raise DataError(
                f"the data gives {len(self)} {what}, and holding out {fraction:.0%} leaves none to "
                "train on. Give more data, a shorter --seq-len, or --eval-fraction 0."
            )
        if self.classes is None:
            order = list(range(len(self)))
        else:
            order = torch.randperm(len(self), generator=_generator(seed, 0)).tolist()
        cut = len(self) - held
        return self._pick(sorted(order[:cut])), self._pick(sorted(order[cut:]))

    def _pick(self, rows: Sequence[int]) -> TokenSet:
        classes = None if self.classes is None else self.classes[list(rows)]
        return TokenSet([self.ids[i] for i in rows], classes, self.pad)


@dataclass(frozen=True)
class Order:
    """Which examples make up step ``i``; every epoch is shuffled by (seed, epoch), nothing else.

    So the position in the data *is* the number of the step. The last, short batch is left out.
    """

    examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data; data smaller than a batch is one batch."""
        return max(1, self.examples // self.batch_size)

    def rows(self, step: int) -> list[int]:
        """The examples of ``step``, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return list(_shuffled(self.examples, self.seed, epoch)[start : start + self.batch_size])


@lru_cache(maxsize=2)
def _shuffled(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(torch.randperm(examples, generator=_generator(seed, epoch + 1)).tolist())


def _generator(seed: int, stream: int) -> torch.Generator:
    mixed = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little", signed=True))


def pack_text(examples: Sequence[Example], tokenizer: Any, seq_len: int) -> TokenSet:
    """All texts in a row, an end-of-text token after each, cut into blocks ``[seq_len]``.

    Raises: DataError where there is not one whole block.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids: list[int] = []
    for encoded in _encode([e.text for e in examples], tokenizer):
        ids += encoded
        if end is not None:
            ids.append(end)
    count = len(ids) // seq_len
    if count == 0:
        raise DataError(
            f"the data gives {len(ids)} tokens, expected at least one block of --seq-len "
            f"{seq_len}. Give more text or a shorter --seq-len."
        )
    blocks = torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len)
    return TokenSet(list(blocks), None, _pad(tokenizer))


def label_texts(
    examples: Sequence[Example], tokenizer: Any, seq_len: int
) -> tuple[TokenSet, list[str]]:
    """Each text cut at ``seq_len`` tokens, with the number of its label; and the sorted labels.

    Raises: DataError where there are fewer than two labels.
    """
    labels = sorted({e.label for e in examples if e.label is not None})
    if len(labels) < 2:
        raise DataError(
            f"classification needs two labels or more, the data has {len(labels)}: "
            f"{', '.join(labels)}. Check --label-column."
        )
    number = {label: i for i, label in enumerate(labels)}
    encoded = tokenizer([e.text for e in examples], truncation=True, max_length=seq_len)
    for example, row in zip(examples, encoded["input_ids"], strict=True):
        if not row:
            raise DataError(
                f"line {example.line}: the tokenizer makes no token of {example.text[:40]!r}."
            )
    ids = [torch.tensor(row, dtype=torch.int64) for row in encoded["input_ids"]]
    classes = torch.tensor([number[e.label] for e in examples if e.label is not None])
    return TokenSet(ids, classes, _pad(tokenizer)), labels


def load_tokenizer(model: str, config: Any) -> Any:
    """The tokenizer of ``model``, a folder or hub id, which has this configuration.

    transformers makes one of special tokens alone where a folder has no files of a tokenizer.
    Raises: ConfigError for such a one, and where it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    # besides OSError and ValueError, tokenizers raises Exception itself for a damaged file
    except Exception as error:
        raise ConfigError(
            f"--model {model}: its tokenizer cannot be loaded: {error}. {_REMEDY}"
        ) from error
    entries = getattr(config.get_text_config(), "vocab_size", None) or 0
    if len(tokenizer) < _TINY * entries:
        raise ConfigError(
            f"--model {model}: its tokenizer has {len(tokenizer)} entries, and the model {entries} "
            f"tokens. {_REMEDY}"
        )
    return tokenizer


def check_known(ids: Sequence[Tensor], tokenizer: Any, model: str) -> None:
    """Raises: ConfigError where texts are hardly anything but unknown tokens.

    Args:
        ids: of each text.
        tokenizer: which made them.
        model: its name, for the message.
    """
    unknown = tokenizer.unk_token_id
    special = torch.tensor([i for i in tokenizer.all_special_ids if i != unknown])
    found = torch.cat(list(ids))
    words = found[~torch.isin(found, special)]
    count = 0 if unknown is None else int((words == unknown).sum())
    if count > _UNKNOWN * len(words):
        raise ConfigError(
            f"--model {model}: its tokenizer knows next to nothing of the texts: {count} of their "
            f"{len(words)} tokens are unknown to it. {_REMEDY}"
        )


def _encode(texts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    # verbose=False: "longer than the model's maximum" does not matter to text that is cut later
    for text in texts:
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _pad(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if token is not None:
            return int(token)
    raise AssertionError("unreachable: 0 is not None")
