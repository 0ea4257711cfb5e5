"""A start recommendation: features, costs that are so, and specs that ``tune`` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaops
from deltaops.errors import ConfigError, DataError
from deltaops.methods.combined import preset
from deltaops.strategy import Suggestion, Task, suggest
from deltaops.strategy.cost import batch_of, held_by, trained_by
from deltaops.strategy.features import features_of
from deltaops.strategy.suggest import some_ids
from deltaops.strategy.suggest_rules import FEW
from deltaops.surgery import plan
from deltaops.testing.architectures import build
from deltaops.tuning.spec import parse_delta

WORDS = ["card", "lost", "late", "money", "when", "where", "my", "is", "good", "bad", "old", "new"]
HELD_WITHIN = 0.1
"""Of what is measured: how far off predicted bytes may be."""


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


def task(count: int = 40, *, labels: bool = True, words: str = "my card is old") -> Task:
    texts = [f"{words} {WORDS[i % 12]} " * 4 for i in range(count)]
    return Task(texts, tokenizer(), [str(i % 2) for i in range(count)] if labels else None, 32)


def of_bert(**settings: Any) -> tuple[Any, Suggestion]:
    model: Any = build("bert", head="ForSequenceClassification")
    return model, suggest(model, task(), modules_to_save=["classifier"], count=20, **settings)


def test_features_are_counted() -> None:
    found = features_of(Task(["my card.", "card lost lost"], tokenizer(), ["a", "b"], 16))
    assert (found.examples, found.labels, found.read) == (2, 2, 2)
    assert found.mean_tokens == 3.0  # the point is a token of its own
    assert found.long_tokens == 3
    assert found.type_token_ratio == 4 / 5
    assert found.pieces == 6 / 5
    assert found.known_words == 3 / 4
    assert found.unknown == 1 / 6
    strange = features_of(Task(["quite my", "my my"], tokenizer(), None, 16))
    assert (strange.pieces, strange.known_words, strange.unknown) == (1.0, 0.5, 0.25)


def test_words_that_a_vocabulary_has_with_their_space_are_whole() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<end>", *"cardĠ", "ca", "rd", "Ġca", "Ġcard"]
    merges = [("c", "a"), ("r", "d"), ("Ġ", "ca"), ("Ġca", "rd")]
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    begins = [("<end>", 0)]  # and is what it calls unknown, as OPT's
    raw.post_processor = processors.TemplateProcessing("<end> $A", special_tokens=begins)
    found = features_of(
        Task(["a card"], PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<end>"))
    )
    assert (found.mean_tokens, found.pieces, found.known_words, found.unknown) == (3, 1, 1, 0)


@pytest.mark.parametrize("name", ["MAM", "UniPELT"])
def test_presets_train_what_is_counted(name: str) -> None:
    model = build("bert", hidden_size=32)
    wish = plan(model, preset(name))
    trained, size = trained_by(wish)
    handle = wish.apply()
    assert trained == sum(p.numel() for p in handle.parameters())
    assert size == 4 * trained


def test_an_encoder_decoder_reads_a_class_at_the_end_of_each_text() -> None:
    model = build("t5", head="ForSequenceClassification", decoder_start_token_id=0)
    found = suggest(model, task(), modules_to_save=["classification_head"], count=1)
    assert (found.model.family, found.model.embedding) == ("encoder-decoder", "embed_tokens")
    assert found.best.cost.held > 0


def test_costs_are_what_attaching_costs_and_tune_takes_the_specs() -> None:
    model, found = of_bert()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    batch = batch_of(model, some_ids(task()), found.shape, 2)
    assert found.shape.tokens == 20
    specs = [c.spec for c in found.candidates]
    assert {"adapter:size=1", "adapter:size=1+bitfit", "prefix:num_virtual_tokens=20"} < {*specs}
    assert "does not divide its 24 features" in dict(found.refused)["UniPELT"]
    for candidate in found.candidates:
        assert candidate.delta == parse_delta(candidate.spec, modules_to_save=["classifier"])
        handle = deltaops.attach(model, candidate.delta)
        trained = list(handle.parameters())
        unique = {id(p): p for p in trained}.values()  # a head is each part's
        assert candidate.cost.trained == sum(p.numel() for p in unique)
        assert candidate.cost.state == 3 * sum(p.numel() * p.element_size() for p in unique)
        handle.revert()
        held = held_by(model, candidate.delta, batch)
        assert candidate.cost.held == pytest.approx(held, rel=HELD_WITHIN)
        assert 0 < candidate.cost.frozen_seconds < candidate.cost.seconds
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.training
    scores = [c.score for c in found.candidates]
    assert scores == sorted(scores, reverse=True)
    told = json.loads(json.dumps(found.as_json()))
    assert told["candidates"][0]["spec"] == found.best.spec
    assert all(c.spec in str(found) for c in found.candidates)
    assert all(reason.source for c in found.candidates for reason in c.reasons)


def test_a_budget_refuses_with_the_number() -> None:
    _, found = of_bert(max_trained=500)
    assert all(c.cost.trained <= 500 for c in found.candidates)
    refused = dict(found.refused)
    assert "over 500" in refused["parallel"]


def test_a_decoder_gets_lora_and_foreign_words_their_embeddings() -> None:
    model = build("llama", head="ForCausalLM")
    found = suggest(model, task(labels=False, words="quite unheard of"), count=1)
    assert found.best.spec == "lora:r=4,alpha=8,target_modules=all-linear+embed_tokens"
    assert "unknown: the embeddings learn too" in str(found)
    own = suggest(model, task(FEW, labels=False), count=1)
    assert own.best.spec == "lora:r=8,alpha=16"


def test_what_cannot_be_looked_at_is_refused() -> None:
    with pytest.raises(DataError, match="no texts"):
        Task([], tokenizer())
    with pytest.raises(DataError, match="a label for each of 2"):
        Task(["a", "b"], tokenizer(), ["x"])
    with pytest.raises(DataError, match="two labels or more"):
        Task(["a", "b"], tokenizer(), ["x", "x"])
    with pytest.raises(ConfigError, match="no blocks with an attention"):
        suggest(torch.nn.Sequential(torch.nn.Linear(2, 2)), task())
    model = build("bert")
    deltaops.attach(model, deltaops.LoRA(r=2))
    with pytest.raises(ConfigError, match="has a delta already"):
        suggest(model, task())


def test_the_command_prints_a_table_and_measures(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from deltaops.cli import app

    folder = tmp_path / "bert"
    build("bert").save_pretrained(folder)  # type: ignore[operator]  # transformers'
    tokenizer().save_pretrained(folder)
    data = tmp_path / "texts.csv"
    texts = task()
    assert texts.labels is not None
    lines = [f"{text},{label}" for text, label in zip(texts.texts, texts.labels, strict=True)]
    data.write_text("\n".join(["text,label", *lines]))
    command = ["suggest", "--model", str(folder), "--data", str(data), "--count", "2"]
    command += ["--task", "classification", "--check", "--rounds", "3"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "40 texts, 2 labels" in result.stdout
    assert "measured" in result.stdout
    assert "(frozen, forward alone)" in result.stdout
    told = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    measured = json.loads(told.stdout)["measured"]
    assert [m["spec"] for m in measured][-1] == "frozen"
    assert all(m["seconds"] > 0 for m in measured)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        CliRunner().invoke(
            app, ["suggest", "--model", str(tmp_path / "no"), "--data", str(data)],
            catch_exceptions=False,
        )  # fmt: skip
