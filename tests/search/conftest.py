"""A small encoder, a task of two labels that it learns in a few steps, and a space of LoRA."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

WORDS = ["card", "lost", "late", "money", "when", "where", "my", "is", "good", "bad", "old", "new"]
LORA: dict[str, Any] = {
    "deltas": {
        "lora": {
            "r": [1, 2, 4],
            "alpha": {"choices": [1, 2], "of": "r"},
            "lr": {"low": 1e-3, "high": 3e-2, "log": True},
        }
    },
    "batch_size": [4, 8],
}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a BERT of any weights, with a tokenizer that knows the words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from deltaops.cli.quiet import quiet_transformers
    from deltaops.testing.architectures import build

    quiet_transformers()
    folder = tmp_path_factory.mktemp("encoder")
    build("bert").save_pretrained(folder)  # type: ignore[operator]  # transformers'
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 texts of two labels, of two lengths."""
    path = tmp_path_factory.mktemp("data") / "task.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(20):
            writer.writerow([f"my {WORDS[i % 4]} is good new {WORDS[i % 6]}", "good"])
            writer.writerow([f"{WORDS[i % 5]} is bad", "bad"])
    return str(path)


@pytest.fixture
def search(encoder: str, data: str) -> Callable[..., Any]:
    """A quick search of the task, by settings that a test may change."""

    def run(out: Path, space: Any = LORA, **changes: Any) -> Any:
        from deltaops.search import search

        settings: dict[str, Any] = {
            "trials": 4, "steps": 6, "rungs": 2, "seq_len": 16, "sampler": "random",
            "pruner": "none",
        }  # fmt: skip
        return search(encoder, data, space, out=out, **settings | changes)

    return run


def told(found: Any) -> list[tuple[Any, ...]]:
    """What a study says of its trials, times left out."""
    return [
        (
            t.number, t.state.name, t.params, t.values, t.intermediate_values,
            t.user_attrs.get("reason"),
        )
        for t in found.study.trials()
    ]  # fmt: skip
