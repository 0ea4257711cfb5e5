"""The gates before the timing: they let right numbers through and stop wrong ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaops.measure import layers, steps


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_passes_its_gate_and_is_timed(dtype: str, dropout: float) -> None:
    result = layers.measure_layer((24, 32, 40), dtype, dropout, 1)
    assert {layers.FROZEN_EAGER, layers.FROZEN_OURS, layers.FUSED} <= set(result.timings)


def test_a_wrong_layer_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.delta_linear
    monkeypatch.setattr(layers, "delta_linear", lambda *a: right(*a) * 1.01)
    with pytest.raises(AssertionError, match="relative error"):
        layers.measure_layer((24, 32, 40), "f32", 0.0, 1)


def small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=96, use_cache=False,
        )
    )  # fmt: skip


WORKLOAD = steps.Workload("small", small_llama, 96, batch=2, length=8)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_steps_of_every_peer_are_timed() -> None:
    pytest.importorskip("peft")
    result = steps.measure_steps(WORKLOAD, dropout=0.0, rounds=1)
    assert set(result.timings) == {steps.FROZEN, steps.PEFT, steps.ACCELERATED, steps.ATTACHED}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_wrong_peer_is_stopped() -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    models = steps._peers(small_llama(), 0.0)
    with torch.no_grad():
        steps._adapters(models[steps.ATTACHED])[0][1].add_(0.01)
    with pytest.raises(AssertionError, match="nothing was timed"):
        steps._gate(models, WORKLOAD.tokens())
