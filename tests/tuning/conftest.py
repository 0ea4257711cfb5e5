"""A base model that trains in a second: the demo's, barely trained, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaops.cli.quiet import quiet_transformers


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deltaops.tuning import small_model

    quiet_transformers()
    folder = tmp_path_factory.mktemp("base") / "gpt2"
    small_model.build(folder, 1, lambda point: None)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("def area(width, height):\n    return width * height\n" * 200)
    return path


WORDS = ["card", "lost", "late", "money", "when", "where", "my", "is", "good", "bad", "old", "new"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT of any weights, with a tokenizer that knows the words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from deltaops.testing.architectures import build

    quiet_transformers()
    folder = tmp_path_factory.mktemp("encoder")
    build("bert", hidden_dropout_prob=0.1).save_pretrained(folder)  # type: ignore[operator]  # transformers'
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]").save_pretrained(folder)
    return folder
