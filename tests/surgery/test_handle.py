"""The handle: what it prints, switches, merges and undoes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaops
from deltaops import LoRA
from deltaops.errors import AttachError
from deltaops.surgery import handle_of


@pytest.fixture
def shaken(tiny: Callable[..., Any], shake: Callable[[nn.Module], None]) -> Any:
    case = tiny("bert")
    case.before = case.loss().detach()
    case.handle = deltaops.attach(case.model, LoRA(r=4, modules_to_save=["classifier"]))
    shake(case.model)
    with torch.no_grad():
        case.model.classifier.weight.add_(0.5)
        case.after = case.loss()
    return case


def test_print_shows_tree_and_counts(shaken: Any) -> None:
    text = str(shaken.handle)
    trained = sum(p.numel() for p in shaken.handle.parameters())
    assert "[0-1] (× 2)" in text
    assert "classifier" in text
    assert f"trained: {trained:,} of" in text


def test_disabled_computes_the_base_model_and_comes_back(shaken: Any) -> None:
    with torch.no_grad():
        with shaken.handle.disabled():
            assert torch.equal(shaken.loss(), shaken.before)
        assert torch.equal(shaken.loss(), shaken.after)
        shaken.handle.merge()
        merged = shaken.loss()
        with shaken.handle.disabled():
            assert torch.equal(shaken.loss(), shaken.before)
        with pytest.raises(RuntimeError, match="inside"), shaken.handle.disabled():
            raise RuntimeError("inside")
        assert torch.equal(shaken.loss(), merged)


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_inside_disabled_ends_with_the_outer_one(shaken: Any, merged: bool) -> None:
    with torch.no_grad():
        if merged:
            shaken.handle.merge()
        after = shaken.loss()
        with shaken.handle.disabled():
            with shaken.handle.disabled():
                pass
            assert torch.equal(shaken.loss(), shaken.before)
        assert torch.equal(shaken.loss(), after)


def test_what_is_disabled_is_neither_merged_nor_saved(shaken: Any, tmp_path: Path) -> None:
    handle = shaken.handle
    actions: list[Callable[[], Any]] = [
        handle.merge, handle.unmerge, handle.merge_and_unload, handle.state,
        lambda: handle.save(tmp_path / "adapter"),
    ]  # fmt: skip
    with torch.no_grad():
        with handle.disabled():
            for action in actions:
                with pytest.raises(AttachError, match="the delta is disabled here"):
                    action()
        assert not (tmp_path / "adapter").exists()
        assert torch.equal(shaken.loss(), shaken.after)


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_disabled_can_be_reverted(shaken: Any, merged: bool) -> None:
    if merged:
        shaken.handle.merge()
    with shaken.handle.disabled():
        shaken.handle.revert()
    assert not any("lora_" in name for name, _ in shaken.model.named_parameters())
    with torch.no_grad():
        assert torch.equal(shaken.loss(), shaken.before)


def test_merge_and_unload_leaves_a_plain_model(shaken: Any) -> None:
    flags = {n for n, p in shaken.model.named_parameters() if "lora_" not in n}
    with torch.no_grad():
        shaken.handle.merge()
        merged = shaken.loss()
        assert shaken.handle.merge_and_unload() is shaken.model
        assert torch.equal(shaken.loss(), merged)
    assert type(shaken.model.bert.encoder.layer[0].attention.self.query) is nn.Linear
    assert {n for n, _ in shaken.model.named_parameters()} == flags
    assert all(p.requires_grad for p in shaken.model.parameters())
    assert handle_of(shaken.model) is None
    with pytest.raises(AttachError, match="no longer on the model"):
        shaken.handle.merge()


def test_dropped_base_weights_cannot_come_back(shaken: Any) -> None:
    shaken.handle.merge(keep_base=False)
    for action in (shaken.handle.unmerge, shaken.handle.revert):
        with pytest.raises(AttachError, match="keep_base=False"):
            action()
    with pytest.raises(AttachError, match="keep_base=False"), shaken.handle.disabled():
        pass


def test_merging_in_the_wrong_order_is_refused(shaken: Any) -> None:
    with pytest.raises(AttachError, match="not merged"):
        shaken.handle.unmerge()
    shaken.handle.merge()
    with pytest.raises(AttachError, match="already merged"):
        shaken.handle.merge()


def test_merging_what_is_not_finite_changes_nothing(shaken: Any) -> None:
    last = shaken.model.get_submodule(shaken.handle.sites[-1])
    with torch.no_grad():
        last.lora_B["default"].weight[0, 0] = float("nan")
    state = {k: v.clone() for k, v in shaken.model.state_dict().items()}
    with pytest.raises(AttachError, match="not finite"):
        shaken.handle.merge()
    assert not shaken.handle.merged
    now = shaken.model.state_dict()
    assert all(torch.equal(v, now[k]) or "lora_B" in k for k, v in state.items())


def test_merging_a_tied_weight_leaves_its_twin_alone(
    tiny: Callable[..., Any], shake: Callable[[nn.Module], None]
) -> None:
    case = tiny("gpt2")
    embeddings = case.model.transformer.wte.weight.clone()
    handle = deltaops.attach(case.model, LoRA(r=4, target_modules=["lm_head", "c_attn"]))
    shake(case.model)
    with torch.no_grad():
        applied = case.loss()
        handle.merge()
        assert torch.equal(case.model.transformer.wte.weight, embeddings)
        torch.testing.assert_close(case.loss(), applied)
    handle.unmerge()
    assert case.model.lm_head.weight is case.model.transformer.wte.weight


def test_training_a_tied_head_leaves_the_embeddings_alone(tiny: Callable[..., Any]) -> None:
    case = tiny("gpt2")
    handle = deltaops.attach(case.model, LoRA(r=4, modules_to_save=["lm_head"]))
    assert case.model.lm_head.weight is not case.model.transformer.wte.weight
    assert not case.model.transformer.wte.weight.requires_grad
    handle.revert()
    assert case.model.lm_head.weight is case.model.transformer.wte.weight


def test_revert_follows_a_model_that_was_cast(shaken: Any) -> None:
    shaken.model.to(torch.bfloat16)
    shaken.handle.revert()
    assert {p.dtype for p in shaken.model.parameters()} == {torch.bfloat16}


def test_handles_agree(shaken: Any) -> None:
    other = handle_of(shaken.model)
    assert other is not None
    other.merge()
    assert shaken.handle.merged
    other.revert()
    assert not shaken.handle.attached
    assert "reverted" in str(shaken.handle)


def test_copying_a_merged_model_keeps_the_way_back(shaken: Any) -> None:
    shaken.handle.merge()
    twin = copy.deepcopy(shaken.model)
    handle = handle_of(twin)
    assert handle is not None
    handle.revert()
    with torch.no_grad():
        assert torch.equal(shaken.loss(twin), shaken.before)
    assert shaken.handle.merged


@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_made_while_disabled_is_enabled_by_its_handle(shaken: Any, merged: bool) -> None:
    with torch.no_grad():
        if merged:
            shaken.handle.merge()
        after = shaken.loss()
        with shaken.handle.disabled():
            twin = copy.deepcopy(shaken.model)
            assert torch.equal(shaken.loss(twin), shaken.before)
        handle = handle_of(twin)
        assert handle is not None
        assert torch.equal(shaken.loss(twin), after)
        with handle.disabled():
            assert torch.equal(shaken.loss(twin), shaken.before)
        assert torch.equal(shaken.loss(twin), after)
        handle.revert()
        assert torch.equal(shaken.loss(twin), shaken.before)
    assert torch.equal(shaken.loss(), after)


def test_running_statistics_of_a_head_are_restored() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    handle = deltaops.attach(model, LoRA(r=2, modules_to_save=["1"]))
    model(torch.randn(8, 4))
    assert not torch.equal(model[1].running_mean, state["1.running_mean"])
    handle.revert()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
