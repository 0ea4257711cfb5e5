"""PEFT's files, bit-equal both ways, and everything that a hostile or broken one may hold."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import deltaops
from deltaops import LoRA
from deltaops.errors import CheckpointError, ConfigError, DeltaopsError
from deltaops.surgery import files
from deltaops.surgery.match import selects

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def bits(folder: Path) -> bytes:
    return (folder / files.WEIGHTS).read_bytes()


def configuration(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / files.CONFIG).read_text())
    assert isinstance(config, dict)
    return config


@pytest.fixture
def saved(tiny: Callable[..., Any], shake: Callable[[nn.Module], None], tmp_path: Path) -> Path:
    """An adapter of the tiny BERT with its head."""
    case = tiny("bert")
    handle = deltaops.attach(case.model, LoRA(r=4, modules_to_save=case.head))
    shake(case.model)
    handle.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_load_refused(tiny: Callable[..., Any], folder: Path, message: str) -> None:
    """Loading raises and the model is as it was."""
    case = tiny("bert")
    state = {k: v.clone() for k, v in case.model.state_dict().items()}
    classes = [type(m) for m in case.model.modules()]
    with pytest.raises(CheckpointError, match=message):
        deltaops.load(case.model, folder)
    assert [type(m) for m in case.model.modules()] == classes
    assert all(p.requires_grad for p in case.model.parameters())
    now = case.model.state_dict()
    assert state.keys() == now.keys()
    assert all(torch.equal(state[k], now[k]) for k in state)


# ----------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_ours_opens_in_peft_and_saves_the_same_bits(
    tiny: Callable[..., Any], shake: Callable[[nn.Module], None], tmp_path: Path, family: str
) -> None:
    import peft

    case = tiny(family)
    handle = deltaops.attach(case.model, LoRA(r=4, alpha=6, modules_to_save=case.head))
    shake(case.model)
    handle.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(family).model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert bits(tmp_path / "ours") == bits(tmp_path / "theirs")
    ours, back = configuration(tmp_path / "ours"), configuration(tmp_path / "theirs")
    assert ours.pop("target_modules") == sorted(handle.sites)
    shortened = back.pop("target_modules")  # PEFT drops common beginnings of a long list
    assert all(selects(shortened, path) for path in handle.sites)
    assert {k: back[k] for k in ours} == ours
    case.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(case.loss(), case.loss(theirs.eval()))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_theirs_opens_in_ours_and_saves_the_same_bits(
    tiny: Callable[..., Any], shake: Callable[[nn.Module], None], tmp_path: Path, family: str
) -> None:
    import peft

    case = tiny(family)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        lora_dropout=0.1,
        target_modules="all-linear",
        modules_to_save=list(case.head) or None,
        fan_in_fan_out=family == "gpt2",
    )
    theirs = peft.get_peft_model(case.model, config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny(family)
    handle = deltaops.load(ours.model, tmp_path / "theirs")
    assert isinstance(handle.delta, LoRA)
    assert handle.delta.use_rslora
    assert handle.delta.dropout == 0.1
    handle.save(tmp_path / "ours")
    assert bits(tmp_path / "ours") == bits(tmp_path / "theirs")
    ours.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.loss(), case.loss(theirs.eval()))


def test_names_of_the_user_are_kept_in_the_file(tiny: Callable[..., Any], tmp_path: Path) -> None:
    handle = deltaops.attach(tiny("llama").model, LoRA(r=4, target_modules=["v_proj", "q_proj"]))
    handle.save(tmp_path)
    assert configuration(tmp_path)["target_modules"] == ["q_proj", "v_proj"]


def test_load_gives_the_same_logits_and_can_be_frozen(
    tiny: Callable[..., Any], saved: Path
) -> None:
    first, second = tiny("bert"), tiny("bert")
    deltaops.load(first.model, saved)
    handle = deltaops.load(second.model, saved, trainable=False)
    assert not any(p.requires_grad for p in second.model.parameters())
    with torch.no_grad():
        assert torch.equal(first.loss(), second.loss())
    handle.revert()
    assert all(p.requires_grad for p in second.model.parameters())


def test_named_adapter_lies_in_its_own_folder(tiny: Callable[..., Any], tmp_path: Path) -> None:
    handle = deltaops.attach(tiny("llama").model, LoRA(r=4), name="french")
    handle.save(tmp_path)
    assert (tmp_path / "french" / files.WEIGHTS).is_file()
    deltaops.load(tiny("llama").model, tmp_path / "french")


def test_half_precision_base_keeps_the_adapter_in_float32(
    tiny: Callable[..., Any], shake: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    case = tiny("llama")
    handle = deltaops.attach(case.model.to(torch.bfloat16), LoRA(r=4))
    shake(case.model)
    handle.save(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / files.WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float32}


# ---------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights(tiny: Callable[..., Any], saved: Path, keep: int) -> None:
    (saved / files.WEIGHTS).write_bytes(bits(saved)[:keep])
    assert_load_refused(tiny, saved, "truncated or no safetensors file")


def test_weights_that_are_a_pickle_in_disguise(tiny: Callable[..., Any], saved: Path) -> None:
    torch.save({"a": torch.zeros(1)}, saved / files.WEIGHTS)
    assert_load_refused(tiny, saved, "truncated or no safetensors file")


def test_pickle_is_refused_with_the_reason(tiny: Callable[..., Any], saved: Path) -> None:
    (saved / files.WEIGHTS).rename(saved / files.PICKLE)
    assert_load_refused(tiny, saved, "runs the code in it. `deltaops convert")


def test_the_file_that_is_missing_is_named(tmp_path: Path) -> None:
    for names in (files.PEFT, files.OURS):
        with pytest.raises(CheckpointError, match=f"has no {names.config},"):
            files.read_config(tmp_path, names)


def change(folder: Path, **changes: torch.Tensor | None) -> str:
    """Replace (or, for None, drop) the first tensor whose key ends so; returns that key."""
    tensors = safetensors.torch.load(bits(folder))
    key = ""
    for ending, value in changes.items():
        key = next(k for k in sorted(tensors) if k.endswith(ending.replace("__", ".")))
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    safetensors.torch.save_file(tensors, folder / files.WEIGHTS)
    return key


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "1 tensors are missing"),
        (torch.zeros(3, 24), r"must be \[4, 24\]"),
        (torch.zeros(24, 4), r"must be \[4, 24\]"),
        (torch.zeros(4, 24, dtype=torch.int64), "must be floating point"),
        (torch.full((4, 24), float("nan")), "NaN or infinity"),
        (torch.full((4, 24), float("inf")), "NaN or infinity"),
    ],
    ids=["missing", "rank", "transposed", "integer", "nan", "inf"],
)
def test_wrong_tensors(
    tiny: Callable[..., Any], saved: Path, value: torch.Tensor | None, message: str
) -> None:
    change(saved, query__lora_A__weight=value)
    assert_load_refused(tiny, saved, message)


def test_nan_can_be_allowed(tiny: Callable[..., Any], saved: Path) -> None:
    change(saved, query__lora_A__weight=torch.full((4, 24), float("nan")))
    deltaops.load(tiny("bert").model, saved, allow_nonfinite=True)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.bert.nowhere.lora_A.weight",
        "../../etc/passwd",
        "__class__.__init__.lora_A.weight",
        "query.lora_A.weight",
    ],
)
def test_foreign_keys(tiny: Callable[..., Any], saved: Path, key: str) -> None:
    tensors = safetensors.torch.load(bits(saved)) | {key: torch.zeros(4, 24)}
    safetensors.torch.save_file(tensors, saved / files.WEIGHTS)
    assert_load_refused(tiny, saved, "belong to nothing in this model")


def test_no_tensors(tiny: Callable[..., Any], saved: Path) -> None:
    safetensors.torch.save_file({}, saved / files.WEIGHTS)
    assert_load_refused(tiny, saved, "holds no tensors")


def test_adapter_of_another_architecture(tiny: Callable[..., Any], tmp_path: Path) -> None:
    deltaops.attach(tiny("llama").model, LoRA(r=4)).save(tmp_path)
    assert_load_refused(tiny, tmp_path, "does not fit this model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1]", "must hold an object"),
        ("\xff\xfe", "peft_type|cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
    ids=["empty", "cut", "list", "binary", "deep"],
)
def test_broken_configuration(
    tiny: Callable[..., Any], saved: Path, text: str, message: str
) -> None:
    (saved / files.CONFIG).write_bytes(text.encode("latin-1"))
    assert_load_refused(tiny, saved, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "tensors are missing"),
        ({"rank_pattern": {"query": 2}}, r"must be \[2, 24\]"),
        ({"alpha_pattern": {"query": "2"}}, "alpha_pattern must map"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "corda"}, "changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "a start drawn at random"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "do not go together"),
        ({"target_parameters": ["query.weight"]}, "target_parameters is for experts"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"some_future_feature": 3}, "some_future_feature"),
        ({"peft_type": "VERA"}, "peft_type='VERA'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"r": "8"}, "r must be an integer"),
        ({"r": 10**12}, r"must be \[1000000000000, 24\]"),
        ({"lora_alpha": None}, "alpha must be finite"),
        ({"lora_dropout": 2}, "dropout must be"),
        ({"target_modules": None}, "has no target_modules"),
        ({"target_modules": {"a": 1}}, "must be a list of names"),
        ({"target_modules": "(["}, "does not compile"),
        ({"target_modules": ["nowhere"]}, "does not fit this model"),
        ({"modules_to_save": [3]}, "must be a list of names"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_configuration_that_we_do_not_express(
    tiny: Callable[..., Any], saved: Path, changes: dict[str, Any], message: str
) -> None:
    config = configuration(saved) | changes
    (saved / files.CONFIG).write_text(json.dumps(config))
    assert_load_refused(tiny, saved, message)


@pytest.mark.parametrize("backwards", [False, True], ids=["sorted", "reversed"])
def test_what_is_wrong_first_in_the_model_is_said(
    tiny: Callable[..., Any], saved: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    """safetensors hands tensors out in the order of a hash table that differs from run to run."""
    load = safetensors.torch.load

    def ordered(data: bytes) -> dict[str, torch.Tensor]:
        return dict(sorted(load(data).items(), reverse=backwards))

    monkeypatch.setattr(safetensors.torch, "load", ordered)
    config = configuration(saved) | {"r": 5}
    (saved / files.CONFIG).write_text(json.dumps(config))
    assert_load_refused(tiny, saved, r"layer\.0\.attention\.self\.query\.lora_A\.weight' must be")
    config |= {"target_modules": ["value"]}
    (saved / files.CONFIG).write_text(json.dumps(config))
    first = r"belong to nothing in this model: '[^']*layer\.0\.attention\.output\.dense\.lora_A"
    assert_load_refused(tiny, saved, first)


def test_missing_folder_and_missing_files(tiny: Callable[..., Any], tmp_path: Path) -> None:
    assert_load_refused(tiny, tmp_path / "none", "is not a folder")
    assert_load_refused(tiny, tmp_path, "has no adapter_config.json")
    (tmp_path / files.CONFIG).write_text('{"peft_type": "LORA", "target_modules": ["query"]}')
    assert_load_refused(tiny, tmp_path, "has no adapter_model.safetensors")


def test_hostile_adapter_name_when_loading(tiny: Callable[..., Any], saved: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        deltaops.load(tiny("bert").model, saved, name="../evil")


# ------------------------------------------------------------------------------ full disk


@pytest.mark.parametrize("fails_in", ["fsync", "save_file", "replace"])
def test_full_disk_keeps_the_old_checkpoint(
    tiny: Callable[..., Any], saved: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    case = tiny("bert")
    handle = deltaops.load(case.model, saved)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = safetensors.torch if fails_in == "save_file" else os
    monkeypatch.setattr(owner, fails_in, full)
    with torch.no_grad():
        next(handle.parameters()).zero_()
    with pytest.raises(CheckpointError, match="No space left"):
        handle.save(saved)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    deltaops.load(tiny("bert").model, saved)


def test_full_disk_leaves_no_half_of_a_new_one(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = deltaops.attach(tiny("llama").model, LoRA(r=4))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        handle.save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_checkpoint_replaces_it_and_keeps_other_files(
    tiny: Callable[..., Any], saved: Path
) -> None:
    (saved / "notes.txt").write_text("mine")
    case = tiny("bert")
    handle = deltaops.load(case.model, saved)
    with torch.no_grad():
        next(handle.parameters()).zero_()
    old = bits(saved)
    handle.save(saved)
    assert bits(saved) != old
    assert {p.name for p in saved.iterdir()} == {files.CONFIG, files.WEIGHTS, "notes.txt"}


def test_saving_onto_a_file_is_an_error(tiny: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    handle = deltaops.attach(tiny("llama").model, LoRA(r=4))
    with pytest.raises(DeltaopsError):
        handle.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
