"""The gates before the timing: they let right numbers through and stop wrong ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from deltaops.measure import cases, layers, steps
from deltaops.measure.cell import (
    ACCELERATED,
    EAGER,
    FROZEN,
    OURS,
    OURS_COMPILED,
    OWN_FROZEN,
    PEFT,
    PEFT_COMPILED,
    PEFT_NARROW,
)
from deltaops.measure.saved import saved_bytes
from deltaops.measure.workloads import Workload

SHAPE = (24, 32, 40)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_layer_passes_its_gate_and_is_timed(dtype: str) -> None:
    plain, dropped = layers.measure_layer("lora", SHAPE, dtype, dropouts=(0.0, 0.1), rounds=1)
    assert {FROZEN, OWN_FROZEN, OURS} <= set(plain.timings)
    assert {FROZEN, OWN_FROZEN, OURS} <= set(dropped.timings)
    assert plain.timings[FROZEN] == dropped.timings[FROZEN]
    assert plain.saved[OURS] <= 4 * 24 * 16 + 64
    assert dropped.saved[OURS] <= 4 * 24 * 16 + 64


@pytest.mark.parametrize("op", ["parallel", "sequential", "bitfit"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_op_is_timed_or_says_why_not(op: str, dtype: str) -> None:
    (found,) = layers.measure_layer(op, SHAPE, dtype, rounds=1)
    assert EAGER in found.timings
    assert (OURS in found.timings) is (cases.OPS[op].missing is None)
    assert (OURS in found.absent) is (cases.OPS[op].missing is not None)


@pytest.mark.parametrize(("dropout", "message"), [(0.0, "grad|y"), (0.1, "grad|y")])
def test_a_wrong_layer_is_stopped(
    dropout: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cases.OPS["lora"]
    wrong = replace(right, fused=lambda t, p: right.fused(t, p) * 1.01)
    monkeypatch.setitem(cases.OPS, "lora", wrong)
    with pytest.raises(AssertionError, match=f"relative error|{message}"):
        layers.measure_layer("lora", SHAPE, "f32", dropouts=(dropout,), rounds=1)


def test_another_mask_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.OPS["lora"]

    def other(t: cases.Tensors, p: float) -> torch.Tensor:
        torch.manual_seed(77)
        return right.fused(t, p)

    monkeypatch.setitem(cases.OPS, "lora", replace(right, fused=other))
    with pytest.raises(AssertionError, match="relative error"):
        layers.measure_layer("lora", SHAPE, "f32", dropouts=(0.1,), rounds=1)


def test_a_peer_that_computes_something_else_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.OPS["bitfit"]
    wrong = replace(right, formula=lambda t, s: right.formula(t, s) + 1.0)
    case = cases.LayerCase.of("bitfit", SHAPE, "f32")
    others = {EAGER: lambda: case.back(wrong.formula(case.tensors, None), case.tensors)}
    with pytest.raises(AssertionError, match="something else"):
        layers.hold_layer(case, 0.0, [], others)


def test_a_wrong_product_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OURS in layers.measure_product(SHAPE, "f32", rounds=1).timings
    right = layers.delta_linear
    monkeypatch.setattr(layers, "delta_linear", lambda *a: right(*a) * 1.01)
    with pytest.raises(AssertionError, match="relative error"):
        layers.measure_product(SHAPE, "f32", rounds=1)


def test_saved_bytes_count_a_storage_once() -> None:
    x = torch.randn(8, 4, requires_grad=True)
    assert saved_bytes(lambda: x * x, [x]) == 0
    assert saved_bytes(lambda: x.exp(), [x]) == 8 * 4 * 4

    def twice() -> torch.Tensor:
        y = x.exp()
        return y * y.view(-1).view(8, 4)

    assert saved_bytes(twice, [x]) == 8 * 4 * 4


def small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=96, use_cache=False,
        )
    )  # fmt: skip


WORKLOAD = Workload("small", small_llama, 96, batch=2, length=16)
quiet = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@quiet
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_steps_of_every_peer_are_timed(dtype: str, dropout: float) -> None:
    pytest.importorskip("peft")
    result = steps.measure_steps(WORKLOAD, dropout=dropout, rounds=1, dtype=dtype)
    narrow = {PEFT_NARROW} if dtype == "bf16" else set()
    assert set(result.timings) == {steps.FROZEN, PEFT, ACCELERATED, OURS} | narrow
    assert set(result.saved) == set(result.timings)
    assert result.tokens == 32


@quiet
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_wrong_peer_is_stopped(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    right = steps._peers

    def wrong(base: nn.Module, p: float, dtype: str) -> object:
        models, absent = right(base, p, dtype)
        with torch.no_grad():
            steps._adapters(models[OURS])[0][1].add_(0.01)
        return models, absent

    monkeypatch.setattr(steps, "_peers", wrong)
    with pytest.raises(AssertionError, match="nothing was timed"):
        steps.measure_steps(WORKLOAD, dropout=dropout, rounds=1)


@quiet
def test_a_batch_that_takes_too_long_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "PATIENCE", 0.0)
    result = steps.measure_steps(WORKLOAD, dropout=0.0, rounds=1, dtype="bf16")
    assert result.tokens == 16
    assert result.note.startswith("batch 1×16 instead of 2×16")
    assert "1×16" in result.what
    assert steps.measure_steps(WORKLOAD, dropout=0.0, rounds=1).note == ""


@pytest.mark.slow
@pytest.mark.everything
def test_compiled_peers_are_gated_and_timed() -> None:
    pytest.importorskip("peft")
    (found,) = layers.measure_layer("lora", SHAPE, "f32", rounds=1, compiled=True)
    assert {OURS_COMPILED, PEFT_COMPILED} <= set(found.timings)
