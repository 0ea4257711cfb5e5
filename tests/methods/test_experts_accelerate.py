"""The experts of a mixture in a model that PEFT built, accelerated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaops
from deltaops.testing import bound, relative_error

from .mixtures import (
    NAMES,
    answer,
    build,
    loss_of,
    stirred,
)

transformers = pytest.importorskip("transformers")

# transformers renames gradient checkpointing between the versions that we support
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def test_accelerate_runs_the_experts_of_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=NAMES)
    model = peft.get_peft_model(build(), config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]

    def run() -> list[Tensor]:
        model.zero_grad()
        y = answer(model)
        loss_of(y).backward()
        return [y, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = run()
    report = deltaops.accelerate(model)
    rows = {r.path: r for r in report.rows if "experts" in r.path}
    assert len(rows) == 2
    assert all(r.kind == "peft lora" and r.backend != "peft" for r in rows.values())
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert list(model.state_dict()) == keys
    with model.disable_adapter():
        off = answer(model)
        assert {r.reason for r in deltaops.report(model).rows if "experts" in r.path} == {
            "adapters are disabled: PEFT's forward"
        }
    assert relative_error(off, answer(build())) < 16 * bound(0.0, torch.float32)
    report.revert()
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(answer(model), expected[0])


def peft_model() -> Any:
    """Of one layer, with an adapter on attention and experts that is not at its start."""
    peft = pytest.importorskip("peft")
    return stirred(peft.get_peft_model(build(num_hidden_layers=1), peft_config()))


def peft_config() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=NAMES)


def test_adapters_added_after_accelerate_and_merged_are_those_of_plain_peft(
    tmp_path: Path,
) -> None:
    plain, fast = peft_model(), peft_model()
    plain.save_pretrained(tmp_path)
    deltaops.accelerate(fast)
    for model in (plain, fast):
        model.add_adapter("second", peft_config())
        model.load_adapter(tmp_path, "third")
        stirred(model)
    assert list(fast.state_dict()) == list(plain.state_dict())
    limit = 16 * bound(0.0, torch.float32)
    for active in ("second", ["default", "third"]):
        for model in (plain, fast):
            model.base_model.set_adapter(active)
        assert relative_error(answer(fast), answer(plain)) < limit
        rows = [r for r in deltaops.report(fast).rows if "experts" in r.path]
        assert [r.backend != "peft" for r in rows] == [True]
    for model in (plain, fast):
        model.merge_adapter()
    assert relative_error(answer(fast), answer(plain)) < limit
    (row,) = [r for r in deltaops.report(fast).rows if "experts" in r.path]
    assert row.reason == "adapters are merged: PEFT's forward"
    for model in (plain, fast):
        model.unmerge_adapter()
    assert relative_error(answer(fast), answer(plain)) < limit


def test_accelerate_leaves_other_parameters_and_says_why() -> None:
    peft = pytest.importorskip("peft")
    names = ["gate.weight", "experts.down_proj"]
    model = peft.get_peft_model(
        build(), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names)
    )
    rows = {r.path: r for r in deltaops.accelerate(model).rows if ".mlp" in r.path}
    router = rows["base_model.model.layers.0.mlp.gate"]
    assert router.kind == "left alone"
    assert "weight of MixtralTopKRouter is no parameter of experts" in router.reason
    assert rows["base_model.model.layers.0.mlp.experts"].backend != "peft"
