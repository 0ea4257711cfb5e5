"""BitFit and LN tuning: which parameters they train, what they create, what they do not keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import BitFit, LNTuning, LoRA
from deltaops.errors import AttachError, TargetError
from deltaops.testing.architectures import HIDDEN, answer, build


def test_every_bias_of_layers_and_norms_trains() -> None:
    model = build("bert")
    deltaops.attach(model, BitFit())
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained == {k for k in dict(model.named_parameters()) if k.endswith(".bias")}


def test_biases_by_name() -> None:
    handle = deltaops.attach(build("bert"), BitFit(target_modules=["query", "intermediate.dense"]))
    assert set(handle.state()) == {
        f"encoder.layer.{i}.{path}.bias"
        for i in (0, 1)
        for path in ("attention.self.query", "intermediate.dense")
    }


def test_missing_biases_are_created_at_zero_and_removed() -> None:
    model = build("llama")
    keys = list(model.state_dict())
    handle = deltaops.attach(model, BitFit())
    assert len(handle.state()) == 2 * 7 + 5
    assert not any(bias.any() for bias in handle.state().values())
    handle.revert()
    assert list(model.state_dict()) == keys
    assert model.get_submodule("layers.0.mlp.down_proj").bias is None


def test_missing_biases_can_be_left_missing() -> None:
    with pytest.raises(TargetError, match="leaves no module for bitfit"):
        deltaops.attach(build("llama"), BitFit(create_missing=False))
    with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.q_proj: it has no bias"):
        deltaops.attach(build("llama"), BitFit(target_modules=["q_proj"], create_missing=False))
    handle = deltaops.attach(build("gpt2"), BitFit(create_missing=False))
    assert len(handle.sites) == 2 * 4 + 5


def test_bitfit_keeps_no_input_of_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    deltaops.attach(model, BitFit())
    x = torch.randn(5, 8)
    inner: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda module, args: inner.append(args[0]))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t
    ):
        y = model(x)
    assert not {x.data_ptr(), inner[0].data_ptr()} & set(saved)
    y.sum().backward()
    assert all(layer.bias.grad is not None for layer in model)


class OwnNorm(nn.Module):
    """A LayerNorm that somebody wrote; it reads its bias itself."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 6))
        self.register_parameter("bias", nn.Parameter(torch.ones(6)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_that_a_norm_reads_itself_is_added_once(bias: bool) -> None:
    model = nn.Sequential(OwnNorm(bias))
    x = torch.randn(5, 6)
    before = model(x).detach()
    handle = deltaops.attach(model, BitFit())
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model[0].bias.add_(2.0)
    torch.testing.assert_close(model(x), before + 2.0)
    handle.merge()
    torch.testing.assert_close(model(x), before + 2.0)


def test_norms_of_channels_are_left_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True))
    assert deltaops.attach(model, BitFit()).sites == ("0",)


def test_a_norm_without_a_bias_is_still_given_its_gate() -> None:
    class GatedRMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return y if gate is None else y * gate

    norm, x = GatedRMSNorm(6), torch.randn(5, 6)
    model = nn.ModuleDict({"norm": norm})
    before = norm(x, gate=x).detach()
    deltaops.attach(model, BitFit())
    with torch.no_grad():
        model["norm"].bias.add_(2.0)
    torch.testing.assert_close(norm(x, gate=x), before + 2.0)


def test_a_created_bias_follows_a_model_that_was_cast_while_it_was_away() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    handle = deltaops.attach(model, BitFit())
    handle.merge()
    model.double()
    handle.unmerge()
    assert model[0].bias.dtype == torch.float64
    with handle.disabled():
        model.float()
    assert model(torch.randn(2, 6)).dtype == model[0].bias.dtype == torch.float32


def test_a_bias_follows_its_model() -> None:
    model = build("llama")
    handle = deltaops.attach(model, BitFit())
    model.double()
    with handle.disabled():
        assert answer("llama", model).dtype == torch.float64
    handle.revert()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_norm_without_a_bias_runs_on_its_op() -> None:
    model = build("llama")
    deltaops.attach(model, BitFit())
    rows = {row.path: row for row in deltaops.report(model).rows}
    assert rows["layers.0.input_layernorm"].kind == "norm"
    assert rows["layers.0.self_attn.q_proj"].kind == "bitfit"
    deltaops.attach(other := build("t5"), BitFit())
    reasons = [r.reason for r in deltaops.report(other).rows if r.kind == "norm"]
    assert reasons
    assert all("its bias is added after it" in reason for reason in reasons)


def test_ln_tuning_trains_norms_and_nothing_else() -> None:
    model = build("qwen3")
    handle = deltaops.attach(model, LNTuning())
    assert len(handle.sites) == 2 * 4 + 1
    assert {tuple(t.shape) for t in handle.state().values()} == {(HIDDEN,), (12,)}


def test_ln_tuning_refuses_what_is_no_norm() -> None:
    with pytest.raises(TargetError, match=r"q_proj: Linear is no LayerNorm or RMSNorm\nName the n"):
        deltaops.attach(build("llama"), LNTuning(target_modules=["q_proj", "input_layernorm"]))
    with pytest.raises(TargetError, match="leaves no module for lntuning"):
        deltaops.attach(nn.Sequential(nn.Linear(4, 4)), LNTuning())


def test_lora_still_refuses_norms() -> None:
    with pytest.raises(TargetError, match="not a linear layer"):
        deltaops.attach(build("llama"), LoRA(r=2, target_modules=["q_proj", "input_layernorm"]))


@pytest.mark.parametrize("first", [BitFit(), LNTuning()], ids=["bitfit", "lntuning"])
def test_a_second_delta_is_refused(first: Any) -> None:
    model = build("bert")
    deltaops.attach(model, first, frozen=False)
    with pytest.raises(AttachError, match="has a delta already"):
        deltaops.attach(model, LNTuning())


def test_merged_biases_stay() -> None:
    model = build("bert")
    handle = deltaops.attach(model, BitFit())
    with torch.no_grad():
        for bias in handle.parameters():
            bias.add_(1.0)
    applied, biases = answer("bert", model), [b.clone() for b in handle.parameters()]
    plain = handle.merge_and_unload()
    torch.testing.assert_close(answer("bert", plain), applied)
    now = [p for k, p in plain.named_parameters() if k.endswith(".bias")]
    assert sorted(b.sum().item() for b in now) == sorted(b.sum().item() for b in biases)
