"""LoRA on all linear layers of real architectures, against float64 and against PEFT."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops.modules import LinearPlace
from deltaops.surgery import handle_of
from deltaops.testing import bound, relative_error

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

DTYPES = [torch.float32, torch.bfloat16]


def settings(tiny: Any, **more: Any) -> deltaops.LoRA:
    return deltaops.LoRA(r=4, alpha=8, modules_to_save=tiny.head, **more)


def gradients(tiny: Any, model: nn.Module) -> dict[str, Tensor]:
    """The loss and every LoRA gradient."""
    model.zero_grad()
    loss = tiny.loss(model)
    loss.backward()
    found = {
        name: p.grad
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    assert sum("lora_" in name for name in found) > 10
    return {"loss": loss.detach(), **found}


def assert_like_oracle(
    actual: dict[str, Tensor], oracle: dict[str, Tensor], baseline: dict[str, Tensor]
) -> None:
    """Hold every tensor to the table; one error is a draw, so the worst baseline sets the bound."""
    assert actual.keys() == oracle.keys() == baseline.keys()
    worst = max(relative_error(baseline[k], oracle[k]) for k in oracle)
    for key, tensor in actual.items():
        assert tensor.dtype == baseline[key].dtype, key
        limit = bound(worst, baseline["loss"].dtype)
        assert relative_error(tensor, oracle[key]) <= limit, key


def on_reference(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, LinearPlace):
            module.backend = "reference"
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_loss_and_gradients_match_fp64(
    family: Any, shake: Callable[[nn.Module], None], dtype: torch.dtype
) -> None:
    model = family.model.to(dtype)
    deltaops.attach(model, settings(family))
    shake(model)
    oracle = gradients(family, on_reference(copy.deepcopy(model).double()))
    baseline = gradients(family, on_reference(copy.deepcopy(model)))
    assert_like_oracle(gradients(family, model), oracle, baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_accelerated_peft_matches_peft(
    family: Any, shake: Callable[[nn.Module], None], dtype: torch.dtype
) -> None:
    model = peft_model(family.model.to(dtype), family.head)
    shake(model)
    oracle = gradients(family, copy.deepcopy(model).double())
    baseline = gradients(family, copy.deepcopy(model))
    keys = list(model.state_dict())
    report = deltaops.accelerate(model)
    assert all(row.kind != "left alone" for row in report.rows)
    assert list(model.state_dict()) == keys
    assert_like_oracle(gradients(family, model), oracle, baseline)


def peft_model(model: nn.Module, head: tuple[str, ...], **more: Any) -> nn.Module:
    import peft
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        modules_to_save=list(head) or None,
        fan_in_fan_out=transposed,
        **more,
    )
    return peft.get_peft_model(model, config)


def test_identity_at_start_to_the_bit(family: Any) -> None:
    with torch.no_grad():
        before = family.loss()
        deltaops.attach(family.model, settings(family), backend="reference")
        after = family.loss()
    assert relative_error(after, before) <= bound(0.0, torch.float32)


def test_merge_equals_apply_and_unmerge_restores_bits(
    family: Any, shake: Callable[[nn.Module], None]
) -> None:
    handle = deltaops.attach(family.model, settings(family))
    shake(family.model)
    weights = {k: v.clone() for k, v in family.model.state_dict().items()}
    with torch.no_grad():
        applied = family.loss()
        handle.merge()
        assert handle.merged
        merged = family.loss()
        handle.unmerge()
    # float32 sums in another order, over a handful of layers
    assert relative_error(merged, applied) < 32 * bound(0.0, torch.float32)
    assert all(torch.equal(weights[k], v) for k, v in family.model.state_dict().items())


def test_revert_restores_bits_flags_keys_and_classes(
    family: Any, shake: Callable[[nn.Module], None]
) -> None:
    model = family.model
    next(model.parameters()).requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    classes = {k: type(m) for k, m in model.named_modules()}
    identities = {k: id(p) for k, p in model.named_parameters()}
    handle = deltaops.attach(model, settings(family, dropout=0.1))
    base = {k for k in model.state_dict() if "lora_" not in k}
    assert base == set(state), "the base model's keys must stay as they were"
    shake(model)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1)
    family.loss().backward()
    optimizer.step()
    handle.revert()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags
    assert {k: type(m) for k, m in model.named_modules()} == classes
    assert {k: id(p) for k, p in model.named_parameters()} == identities
    assert not any("delta" in key or key == "backend" for m in model.modules() for key in vars(m))


def test_deepcopy_and_pickle_of_the_model(family: Any, shake: Callable[[nn.Module], None]) -> None:
    deltaops.attach(family.model, settings(family))
    shake(family.model)
    buffer = io.BytesIO()
    torch.save(family.model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(family.model), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        expected = family.loss()
        for twin in copies:
            assert torch.equal(family.loss(twin), expected)
            handle = handle_of(twin)
            assert handle is not None
            handle.revert()
            assert not any(isinstance(m, LinearPlace) for m in twin.modules())
    assert handle_of(family.model) is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_replays_dropout(
    tiny: Callable[..., Any], shake: Callable[[nn.Module], None], reentrant: bool
) -> None:
    case = tiny("llama")
    deltaops.attach(case.model, settings(case, dropout=0.5))
    shake(case.model)
    case.model.train()
    case.model.enable_input_require_grads()
    torch.manual_seed(5)
    plain = gradients(case, case.model)
    case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    replayed = gradients(case, case.model)
    for key, tensor in plain.items():
        assert torch.equal(tensor, replayed[key]), key


def test_torch_compile_fullgraph_of_a_model(
    tiny: Callable[..., Any], shake: Callable[[nn.Module], None]
) -> None:
    case = tiny("gpt2")
    handle = deltaops.attach(case.model, settings(case))
    shake(case.model)
    results = []
    for model in (case.model, torch.compile(case.model, fullgraph=True, backend="aot_eager")):
        case.model.zero_grad()
        # without labels: transformers logs inside its loss, which does not compile
        logits = model(case.batch["input_ids"]).logits
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in handle.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eager) < 64 * bound(0.0, torch.float32)


def test_tied_weights_stay_tied(tiny: Callable[..., Any]) -> None:
    case = tiny("gpt2")
    deltaops.attach(case.model, settings(case))
    assert case.model.lm_head.weight is case.model.transformer.wte.weight


def test_generate_with_cache_equals_without(
    tiny: Callable[..., Any], shake: Callable[[nn.Module], None]
) -> None:
    case = tiny("llama")
    deltaops.attach(case.model, settings(case))
    shake(case.model)
    case.model.eval()
    prompt = case.batch["input_ids"][:, :4]
    texts = [
        case.model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)
