"""The report: a line for every layer, with what runs it and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import deltaops
from deltaops import LoRA
from deltaops.errors import AttachError
from deltaops.modules import UNFROZEN


def test_rows_and_text_cover_every_site(tiny: Callable[..., Any]) -> None:
    case = tiny("gpt2")
    handle = deltaops.attach(case.model, LoRA(r=4), backend="reference")
    report = deltaops.report(case.model)
    assert tuple(row.path for row in report.rows if row.kind == "lora") == handle.sites
    others = {row.path: row.kind for row in report.rows if row.kind != "lora"}
    assert others == {
        "lm_head": "frozen",
        "loss_function": "loss",
        "transformer.h.0.attn": "attention",
        "transformer.h.0.mlp.act": "activation",
        "transformer.h.1.attn": "attention",
        "transformer.h.1.mlp.act": "activation",
    }
    assert {row.backend for row in report.rows} == {"reference"}
    assert report.fused == 0
    lines = str(report).splitlines()
    assert len([line for line in lines if "transformer.h" in line]) == len(handle.sites) + 4
    assert lines[-1] == "0 of 14 layers run on a fused backend"


def test_states_show(tiny: Callable[..., Any]) -> None:
    case = tiny("gpt2")
    handle = deltaops.attach(case.model, LoRA(r=4, target_modules=["c_fc", "wpe"]))
    with handle.disabled():
        rows = [r for r in deltaops.report(case.model).rows if r.kind == "lora"]
        assert len(rows) == len(handle.sites)
        assert all("disabled or merged" in row.reason for row in rows)
    case.model.transformer.h[0].mlp.c_fc.weight.requires_grad_(True)
    (row,) = [r for r in deltaops.report(case.model).rows if r.reason == UNFROZEN]
    assert (row.path, row.backend) == ("transformer.h.0.mlp.c_fc", "torch")


def test_skipped_layers_are_listed() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4))
    deltaops.attach(model, LoRA(r=2))
    assert [(row.path, row.kind) for row in deltaops.report(model).rows] == [
        ("0", "lora"),
        ("1", "left alone"),
    ]


def test_untouched_model() -> None:
    assert str(deltaops.report(nn.Linear(2, 2))) == "no layer is touched by deltaops"


def test_revert_of_an_attached_model_is_the_handles(tiny: Callable[..., Any]) -> None:
    case = tiny("gpt2")
    deltaops.attach(case.model, LoRA(r=4))
    with pytest.raises(AttachError, match=r"handle\.revert"):
        deltaops.report(case.model).revert()
