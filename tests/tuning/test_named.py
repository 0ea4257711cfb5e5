"""Intrinsic prompt tuning on an encoder, whose answers are names; and which models have which."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import deltaops
from deltaops import Adapter, Prompt
from deltaops.errors import CheckpointError, ConfigError, DataError
from deltaops.methods.decoder import read_facts
from deltaops.testing.architectures import build
from deltaops.tuning.answering import Named, Written, load_answering
from deltaops.tuning.intrinsic import fit, tune, whole_of_decoder
from deltaops.tuning.wholes import WholeAdapter, WholePrompt, whole_of
from deltaops.tuning.workshop import Settings, Workshop

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(steps=3, batch_size=4, seq_len=12, eval_fraction=0.4)
FIT: dict[str, Any] = {"intrinsic_dim": 2, "whole": WholePrompt(Prompt(3)), "fit_steps": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three tasks of two labels each."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, labels in (("one", "good bad"), ("two", "old_card new_card"), ("three", "late lost")):
        rows = [f"my card is {('old', 'new')[i % 2]},{labels.split()[i % 2]}\n" for i in range(20)]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    return [str(folder / f"{name}.csv") for name in ("one", "two", "three")]


def test_both_stages_on_an_encoder(encoder: Path, files: list[str], tmp_path: Path) -> None:
    workshop = Workshop(str(encoder), SETTINGS)
    tasks = workshop.tasks(files)
    before = {k: v.clone() for k, v in workshop.model.state_dict().items()}
    rows = fit(workshop, tasks[:2], tmp_path / "decoder", model=str(encoder), **FIT)
    assert read_facts(tmp_path / "decoder")["answers"] == "named"
    found = tune(workshop, tasks[1:], tmp_path / "decoder", tmp_path / "out", compare=True)
    assert [(row.task, row.seen) for row in found] == [("two", True), ("three", False)]
    assert found[0].full == rows[1][1]
    assert found[1].start == workshop.score(tasks[2], "", "")
    after = workshop.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    handle = deltaops.load(workshop.model, tmp_path / "out" / "three")
    assert workshop.score(tasks[2], "", "") == found[1].tuned
    assert sum(p.numel() for p in handle.parameters()) == 2


def test_both_stages_of_adapters(encoder: Path, files: list[str], tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    settings = Settings(steps=10, batch_size=4, seq_len=12, eval_fraction=0.4, lr=1e-3)
    workshop = Workshop(
        str(encoder), settings, lambda what, step, loss: losses.setdefault(what, []).append(loss)
    )
    tasks = workshop.tasks(files)
    before = {k: v.clone() for k, v in workshop.model.state_dict().items()}
    whole = WholeAdapter(Adapter("pfeiffer", size=3))
    decoder = tmp_path / "decoder"
    fit(
        workshop, tasks[:2], decoder, model="m", whole=whole, intrinsic_dim=2, fit_steps=30,
        fit_lr=1e-2,
    )  # fmt: skip
    assert sum(losses["decoder"][-4:]) < sum(losses["decoder"][:4])
    assert read_facts(decoder)["of"] == "adapter"
    loaded = deltaops.load(workshop.model, decoder / "full" / "one")
    assert loaded.delta == whole.delta
    loaded.revert()
    found = tune(workshop, tasks[2:], decoder, tmp_path / "out", compare=True, lr=0.05)
    assert found[0].full is not None
    after = workshop.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    handle = deltaops.load(workshop.model, tmp_path / "out" / "three")
    assert workshop.score(tasks[2], "", "") == found[0].tuned
    assert sum(p.numel() for p in handle.parameters()) == 2


def test_a_vector_of_adapters_goes_back_where_it_came_from(encoder: Path) -> None:
    model = load_answering(str(encoder), None).model
    whole = WholeAdapter(Adapter(size=3, layer_norm=True))
    handle = deltaops.attach(model, whole.delta)
    with torch.no_grad():
        for number, parameter in enumerate(handle.parameters()):
            parameter.fill_(float(number))
    vector = whole.vector(handle)
    state = {key: tensor.detach().clone() for key, tensor in handle.state().items()}
    handle.revert()
    with whole.bound(model, vector) as again:
        found = again.state()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_only_prompts_and_adapters_have_decoders() -> None:
    with pytest.raises(ConfigError, match="--of must be prompt or adapter"):
        whole_of(deltaops.LoRA())
    with pytest.raises(ConfigError, match="--of must be prompt or adapter"):
        whole_of(deltaops.Compacter())
    for delta in (Prompt(3, modules_to_save=("x",)), Adapter(modules_to_save=("x",))):
        with pytest.raises(ConfigError, match=r"modules_to_save=\('x',\) would train beside"):
            whole_of(delta)


def test_a_prompts_decoder_keeps_its_settings(
    encoder: Path, files: list[str], tmp_path: Path
) -> None:
    whole = WholePrompt(Prompt(3, "random", autocast_adapter_dtype=False))
    workshop = Workshop(str(encoder), SETTINGS)
    tasks = workshop.tasks(files[:2])
    fit(workshop, tasks, tmp_path / "decoder", model="m", **(FIT | {"whole": whole}))
    found = whole_of_decoder(tmp_path / "decoder")
    assert found.delta == whole.delta
    assert not found.intrinsic(decoder=tmp_path / "decoder").autocast_adapter_dtype  # type: ignore[attr-defined]


def test_what_cannot_be_saved_leaves_the_model_alone(
    encoder: Path, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = Workshop(str(encoder), SETTINGS)
    tasks = workshop.tasks(files[:2])
    fit(workshop, tasks, tmp_path / "decoder", model="m", **FIT)

    def fail(*_: Any) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("deltaops.surgery.handle.Handle.save", fail)
    with pytest.raises(CheckpointError, match="the disk is full"):
        tune(workshop, tasks, tmp_path / "decoder", tmp_path / "out", compare=False)
    assert deltaops.surgery.handle_of(workshop.model) is None


def test_nothing_but_the_prompt_learns(encoder: Path, files: list[str]) -> None:
    losses: list[float] = []
    settings = Settings(steps=30, batch_size=12, seq_len=12, lr=0.02, eval_fraction=0.4)
    workshop = Workshop(str(encoder), settings, lambda what, step, loss: losses.append(loss))
    (task,) = workshop.tasks(files[:1])
    start = workshop.score(task, "", "")
    handle, _ = workshop.tune(deltaops.Prompt(4), task, "one")
    assert {p.numel() for p in task.reader.parameters() if p.requires_grad} == {
        sum(p.numel() for p in handle.parameters())
    }
    handle.revert()
    assert losses[-1] < losses[0]
    assert workshop.score(task, "", "") == start


def test_a_model_answers_as_it_is_made_for(base: Path, encoder: Path, tmp_path: Path) -> None:
    assert isinstance(load_answering(str(encoder), None), Named)
    assert isinstance(load_answering(str(base), None), Written)
    assert isinstance(load_answering(str(base), "named"), Named)
    with pytest.raises(ConfigError, match="--answers must be written or named, got 'said'"):
        load_answering(str(base), "said")
    build("vit").save_pretrained(tmp_path / "vit")  # type: ignore[operator]  # transformers'
    with pytest.raises(ConfigError, match="is a 'vit', which transformers lists neither"):
        load_answering(str(tmp_path / "vit"), None)
    build("t5").save_pretrained(tmp_path / "t5")  # type: ignore[operator]  # transformers'
    with pytest.raises(ConfigError, match="is an encoder–decoder, which writes"):
        load_answering(str(tmp_path / "t5"), "named")


def test_names_decide_what_is_right(encoder: Path, files: list[str], tmp_path: Path) -> None:
    renamed = tmp_path / "one.csv"
    renamed.write_text(Path(files[0]).read_text().replace(",good", ",money"))
    workshop = Workshop(str(encoder), SETTINGS)
    first, second = (workshop.tasks([str(file)])[0] for file in (files[0], renamed))
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("old_card", "old card"), "'old card' and 'old_card' are the same to the encoder"),
        (("old", "_"), "makes no token of the label '_'"),
        (("old", "new_" * 999), "has 999 tokens, and the encoder takes"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(
    labels: tuple[str, str], message: str, encoder: Path, tmp_path: Path
) -> None:
    rows = [f"my card is late,{labels[i % 2]}\n" for i in range(8)]
    (tmp_path / "one.csv").write_text("text,label\n" + "".join(rows))
    with pytest.raises(DataError, match=f"task 'one': .*{message}"):
        Workshop(str(encoder), SETTINGS).tasks([str(tmp_path / "one.csv")])


def test_a_tokenizer_without_padding_is_told(encoder: Path, files: list[str]) -> None:
    workshop = Workshop(str(encoder), SETTINGS)
    workshop.tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="no padding token, which the names of labels need"):
        workshop.tasks(files[:1])


def test_a_model_without_all_of_its_weights_is_refused(encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(encoder, tmp_path / "model")
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    for key in [key for key in weights if key.startswith("pooler.")]:
        del weights[key]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    load_answering(str(folder), None)  # nothing reads a pooler
    with pytest.raises(ConfigError, match=r"no weights for \d+ parameters .* 'cls\.predictions"):
        load_answering(str(folder), "written")
    key = next(key for key in weights if key.endswith("query.weight"))
    for value in (None, torch.zeros(3, 3)):
        broken = {k: v for k, v in weights.items() if k != key}
        broken |= {} if value is None else {key: value}
        safetensors.torch.save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=r"no weights for 1 param|cannot be loaded"):
            load_answering(str(folder), None)
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_answering(str(folder), None)
