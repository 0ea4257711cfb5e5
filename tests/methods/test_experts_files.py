"""LoRA on the experts of a mixture in files, PEFT's and ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import deltaops
from deltaops import LoRA
from deltaops.methods.lora_experts import _FAMILIES, _FORMER
from deltaops.surgery.files import CONFIG, WEIGHTS
from deltaops.testing import bound, relative_error

from .mixtures import (
    NAMES,
    answer,
    build,
    grad_of,
    loss_of,
    shaken,
)

transformers = pytest.importorskip("transformers")

# transformers renames gradient checkpointing between the versions that we support
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_save_and_load_give_the_same_bits(dropout: float, tmp_path: Path) -> None:
    delta = LoRA(r=3, dropout=dropout, target_modules=["q_proj", "experts"])
    model = build()
    handle = shaken(model, delta)
    handle.save(tmp_path)
    assert (tmp_path / CONFIG).exists() == (dropout == 0.0)  # PEFT has no dropout there
    twin = build()
    loaded = deltaops.load(twin, tmp_path)
    assert torch.equal(answer(twin), answer(model))
    assert loaded.sites == handle.sites
    mine, theirs = handle.state(), loaded.state()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


TARGETS = {
    "both": {"target_parameters": NAMES},
    "down": {"target_parameters": NAMES[1:]},
    "one layer": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    "patterns": {
        "target_parameters": NAMES,
        "rank_pattern": {r".*\.gate_up_proj": 4},
        "alpha_pattern": {"down_proj": 7},
    },
}


# PEFT looks for its patterns among modules, says so, and uses them
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_files_of_peft_and_ours_mean_the_same(
    family: str, targets: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], **targets)
    theirs = peft.get_peft_model(build(family), config)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = build(family)
    handle = deltaops.load(model, tmp_path / "theirs")
    found, expected = answer(model), answer(theirs)
    assert relative_error(expected, answer(build(family))) > 0.01
    assert relative_error(found, expected) < 16 * bound(0.0, torch.float32)
    for y in (found, expected):
        loss_of(y).backward()
    grads = {k: p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    ours = {k: grad_of(p) for k, p in handle.state().items()}
    ours = handle.delta.to_peft_tensors(ours, handle.places)
    assert ours.keys() == {key.replace(".default", "") for key in grads}
    for key, grad in grads.items():
        torch.testing.assert_close(ours[key.replace(".default", "")], grad, rtol=1e-3, atol=1e-7)
    handle.save(tmp_path / "ours")
    mine, back = (
        safetensors.torch.load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "theirs")
    )
    assert mine.keys() == back.keys()
    assert all(torch.equal(mine[key], back[key]) for key in mine)
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    assert torch.equal(answer(again), answer(theirs))


def test_an_experts_role_is_written_for_peft_by_parameter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build()
    shaken(model, LoRA(r=3, target_modules=["k_proj", "experts"])).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_parameters"] == [
        f"layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert relative_error(answer(theirs), answer(model)) < 16 * bound(0.0, torch.float32)


def test_layers_with_names_that_peft_takes_for_experts_are_written_in_our_format(
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    for kind, family in conversion._MODEL_TO_CONVERSION_PATTERN.items():
        if family in conversion._MOE_TARGET_MODULE_MAPPING and kind.islower():  # no class
            assert kind in _FAMILIES[family].split()
            assert conversion._MOE_TARGET_MODULE_MAPPING[family].keys() == set(_FORMER[family])
    model = build("Qwen3Moe", mlp_only_layers=[0])
    delta = LoRA(r=3, target_modules=["all-linear", "experts"])
    shaken(model, delta).save(tmp_path / "dense")
    assert not (tmp_path / "dense" / CONFIG).exists()
    twin = build("Qwen3Moe", mlp_only_layers=[0])
    deltaops.load(twin, tmp_path / "dense")
    assert torch.equal(answer(twin), answer(model))
    model = build("Qwen3Moe", mlp_only_layers=[0])
    shaken(model, LoRA(r=3, target_modules=["q_proj", "experts"])).save(tmp_path / "without")
    twin = build("Qwen3Moe", mlp_only_layers=[0])
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "without")
    assert relative_error(answer(theirs), answer(model)) < 16 * bound(0.0, torch.float32)
