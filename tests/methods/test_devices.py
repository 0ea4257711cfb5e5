"""Devices that a method meets beside the one it computes on: "meta", and torch's default device."""

from __future__ import annotations

import pytest
import torch

import deltaops
from deltaops import (
    Compacter,
    IntrinsicAdapter,
    IntrinsicPrompt,
    LoRA,
    Prefix,
    PrefixPool,
    Prompt,
    PromptPool,
)
from deltaops.errors import AttachError
from deltaops.methods import Delta
from deltaops.testing.architectures import answer, build

DELTAS: dict[str, Delta] = {
    "lora": LoRA(r=2),
    "dora": LoRA(r=2, use_dora=True),
    "pissa": LoRA(r=2, init_lora_weights="pissa"),
    "sketched": LoRA(r=2, init_lora_weights="pissa_niter_2"),
    "olora": LoRA(r=2, init_lora_weights="olora"),
    "embedding": LoRA(r=2, target_modules=["embed_tokens"]),
    "compacter": Compacter(size=4),
    "prefix": Prefix(num_virtual_tokens=3),
    "mlp": Prefix(num_virtual_tokens=3, reparameterised=True),
    "prompt": Prompt(num_virtual_tokens=3),
    "random": Prompt(num_virtual_tokens=3, prompt_tuning_init="random"),
    "ids": Prompt(num_virtual_tokens=3, prompt_tuning_init=[5, 6]),
    "pool": PromptPool(4, 2, top_k=2),
    "prefix-pool": PrefixPool(4, 2, top_k=2),
    "intrinsic": IntrinsicPrompt(num_virtual_tokens=3),
    "intrinsic-adapter": IntrinsicAdapter(size=4),
}
for_each_delta = pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS.keys())


@for_each_delta
def test_a_model_without_storage_has_it_too(delta: Delta) -> None:
    with torch.device("meta"):
        model = build("llama")
    handle = deltaops.attach(model, delta)
    assert {p.device.type for p in handle.parameters()} == {"meta"}
    assert deltaops.report(model).rows
    handle.revert()
    assert {p.device.type for p in model.parameters()} == {"meta"}


@for_each_delta
def test_the_default_device_is_not_the_models(delta: Delta) -> None:
    other, model = build("llama"), build("llama")
    torch.manual_seed(5)
    expected = list(deltaops.attach(other, delta).parameters())
    torch.manual_seed(5)
    torch.set_default_device("meta")
    try:
        handle = deltaops.attach(model, delta)
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, handle.parameters(), expected))
    assert answer("llama", model).isfinite().all()


def test_adapters_that_are_decoded_at_once_are_refused_on_several_devices() -> None:
    model = build("llama")
    model.layers[1].to("meta")  # type: ignore[operator, index]  # a list of blocks
    kinds = [type(module) for module in model.modules()]
    devices = [p.device.type for p in model.parameters()]
    with pytest.raises(
        AttachError, match=r"must be on one device.*, on cpu; 'layers\.1\..* on meta"
    ):
        deltaops.attach(model, IntrinsicAdapter(size=4))
    assert [type(module) for module in model.modules()] == kinds
    assert [p.device.type for p in model.parameters()] == devices
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("loose", [False, True], ids=["", "without frozen layers and blocks"])
@for_each_delta
def test_data_parallel_is_refused(delta: Delta, loose: bool) -> None:
    """As ``torch.nn.parallel.replicate`` asks each module, which needs two GPUs to begin."""
    model = build("llama")
    around = {"frozen": False, "blocks": False} if loose else {}
    handle = deltaops.attach(model, delta, **around)

    def replicate() -> None:
        for module in model.modules():
            module._replicate_for_data_parallel()

    if isinstance(delta, Prefix) and loose and not delta.reparameterised:
        replicate()  # parameters on plain attentions, which replicas have too
    else:
        with pytest.raises(AttachError, match=r"Use torch\.nn\.parallel\.DistributedDataParallel"):
            replicate()
    handle.revert()
    replicate()
