"""Tasks as texts and the names of their labels, for :class:`~.sentence.NamedClasses`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .read import Example
from .tokens import TokenSet, label_texts


@dataclass(frozen=True)
class NamedSet(TokenSet):
    """Texts with the numbers of their labels.

    Attributes:
        names: of the labels, by number.
    """

    names: Sequence[str]

    def fingerprint(self) -> str:
        """See :class:`TokenSet`; of the names too, which decide what is right."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for name in self.names:
            digest.update(f"{len(name)} {name}".encode())
        return digest.hexdigest()

    def _pick(self, rows: Sequence[int]) -> NamedSet:
        assert self.classes is not None
        classes = self.classes[list(rows)]
        return dataclasses.replace(self, ids=[self.ids[i] for i in rows], classes=classes)


def name_texts(examples: Sequence[Example], tokenizer: Any, seq_len: int) -> NamedSet:
    """Each text cut at ``seq_len`` tokens, with the number of its label.

    Raises: DataError where there are fewer than two labels.
    """
    data, labels = label_texts(examples, tokenizer, seq_len)
    return NamedSet(data.ids, data.classes, data.pad, labels)
