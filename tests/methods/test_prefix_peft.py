"""Prefix tuning with PEFT as the oracle of numbers and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaops
from deltaops import Prefix
from deltaops.errors import (
    CheckpointError,
)
from deltaops.surgery.files import CONFIG, MANIFEST, WEIGHTS
from deltaops.testing.architectures import build

from .prefixed import SIZES, P, attached, inputs, logits, random, same

transformers = pytest.importorskip("transformers")

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


THREE = {"num_layers": 3, "num_decoder_layers": 3}
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "ForCausalLM", "CAUSAL_LM", {}),
    "gpt2": ("gpt2", "LMHeadModel", "CAUSAL_LM", {}),
    "qwen3 classifier": ("qwen3", "ForSequenceClassification", "SEQ_CLS", {}),
    "bert": ("bert", "ForTokenClassification", "TOKEN_CLS", {}),
    "roberta": ("roberta", "ForSequenceClassification", "SEQ_CLS", {}),
    "t5 of 2 layers": ("t5", "ForConditionalGeneration", "SEQ_2_SEQ_LM", {}),
    "t5 of 3 layers": ("t5", "ForConditionalGeneration", "SEQ_2_SEQ_LM", THREE),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("projected", [False, True], ids=["", "mlp"])
@pytest.mark.filterwarnings("ignore:Unsupported layer type.*:UserWarning")
def test_peft_computes_the_same_and_files_go_both_ways(
    case: str, projected: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    name, head, task, sizes = CASES[case]
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=projected
    )
    theirs = peft.get_peft_model(build(name, head=head, **sizes), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    handle = deltaops.load(build(name, head=head, **sizes), tmp_path / "theirs")
    expected, y = logits(theirs, name), logits(handle.model, name)
    assert same(y, expected)
    if not projected:
        for out in (expected, y):
            out.square().mean().backward()
        want = theirs.prompt_encoder["default"].embedding.weight.grad
        assert same(as_peft(handle, "grad", task), want)
    handle.save(tmp_path / "ours")
    if case == "t5 of 2 layers":  # whose layers read the same rows of PEFT's file
        assert (tmp_path / "ours" / MANIFEST).exists()
        return
    again = peft.PeftModel.from_pretrained(build(name, head=head, **sizes), tmp_path / "ours")
    assert torch.equal(logits(again.eval(), name), expected)
    stored, written = (
        json.loads((tmp_path / who / CONFIG).read_text()) for who in ("theirs", "ours")
    )
    known = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")
    assert {k: written[k] for k in known} == {k: stored[k] for k in known}


def as_peft(handle: Any, what: str, task: str) -> Tensor:
    """``[P, R]``: of each layer keys and values, summed where PEFT gives several the same."""
    layers = len(handle.places)
    rows: list[Any] = [0.0] * layers
    for i, site in enumerate(handle.places):
        module = handle.model.get_submodule(site.path)
        both = [getattr(p, what).mT for p in (module.prefix_k, module.prefix_v)]
        flat = torch.cat([t.permute(2, 0, 1).flatten(1) for t in both], 1)
        row = 2 * i % layers if task == "SEQ_2_SEQ_LM" else i
        rows[row] = rows[row] + flat
    return torch.cat([r if isinstance(r, Tensor) else torch.zeros_like(flat) for r in rows], 1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"shift_positions": False}, "first positions"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "is not for GPT2LMHeadModel"),
        ({"layers_to_transform": [1]}, "other modules than all 2 of 'decoder-attention'"),
        ({"reparameterised": True}, "flat=True"),
    ],
    ids=str,
)
def test_what_pefts_file_cannot_hold_is_in_ours(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    from deltaops.surgery.checkpoint import _unlike_peft

    fields = {"shift_positions": True, "task_type": "CAUSAL_LM"} | settings
    handle = attached("gpt2", "LMHeadModel", **fields)
    found = _unlike_peft(handle.model, handle.delta, handle.places, writing=True)
    assert found is not None
    assert reason in found
    handle.save(tmp_path)
    assert (tmp_path / MANIFEST).exists()
    twin = build("gpt2", head="LMHeadModel")
    assert deltaops.load(twin, tmp_path).delta == handle.delta
    assert torch.equal(logits(twin, "gpt2"), logits(handle.model, "gpt2"))


@pytest.mark.parametrize(
    ("name", "head", "task"),
    [
        ("llama", "ForCausalLM", "CAUSAL_LM"),
        ("bert", "Model", "FEATURE_EXTRACTION"),
        ("t5", "ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ],
)
def test_the_class_of_the_model_says_the_task_of_pefts_file(
    name: str, head: str, task: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    sizes = THREE if name == "t5" else {}  # of 2 layers PEFT's file cannot hold both
    delta = Prefix(num_virtual_tokens=P, shift_positions=True, target_modules="decoder-attention")
    handle = random(deltaops.attach(build(name, head=head, **sizes), delta))
    handle.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(build(name, head=head, **sizes), tmp_path).eval()
    key = "last_hidden_state" if head == "Model" else "logits"
    assert same(theirs(**inputs(name))[key], handle.model(**inputs(name))[key])
    assert deltaops.load(build(name, head=head, **sizes), tmp_path).delta.task_type == task  # type: ignore[attr-defined]  # a Prefix's


def test_a_class_that_says_no_task_has_our_file(tmp_path: Path) -> None:
    model = build("llama", head="ForCausalLM")
    model.__class__ = type("Odd", (type(model),), {})
    handle = deltaops.attach(
        model, Prefix(shift_positions=True, target_modules="decoder-attention")
    )
    handle.save(tmp_path)
    assert (tmp_path / MANIFEST).exists()


def test_a_file_of_another_model_or_window_is_refused(tmp_path: Path) -> None:
    handle = attached(
        "llama", "ForCausalLM", shift_positions=True, task_type="CAUSAL_LM",
        target_modules="decoder-attention",
    )  # fmt: skip
    handle.save(tmp_path)
    assert (tmp_path / WEIGHTS).exists()
    other = build("llama", head="ForCausalLM", num_attention_heads=4, num_key_value_heads=2)
    config = transformers.MistralConfig(
        **SIZES, intermediate_size=40, num_key_value_heads=1, sliding_window=4
    )
    for model, message in (
        (other, "num_attention_heads=1, and this LlamaForCausalLM 2"),
        (transformers.MistralForCausalLM(config), "a sliding window leaves PEFT's prefix behind"),
    ):
        before = list(model.state_dict())
        with pytest.raises(CheckpointError, match=message):
            deltaops.load(model, tmp_path)
        assert list(model.state_dict()) == before
