"""Batches that mix PEFT's adapters on an accelerated model: as PEFT's own, and as one by one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops.errors import AttachError, ConfigError, TargetError
from deltaops.modules import APART, sharing

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

NAMES = ["second", "__base__", "default", "third", "second"]
RANKS = {"default": 4, "second": 2, "third": 7}


@pytest.fixture
def case(tiny: Callable[..., Any], shake: Callable[[nn.Module], None]) -> Any:
    """A PEFT Llama with three adapters of different ranks and places, and its accelerated twin."""
    import peft

    case = tiny("llama")

    def config(rank: int, *targets: str) -> Any:
        return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))

    case.model = peft.get_peft_model(case.model, config(4, "q_proj", "v_proj"))
    case.model.add_adapter("second", config(2, "q_proj", "o_proj"))
    case.model.add_adapter("third", config(7, "q_proj", "v_proj", "down_proj"))
    shake(case.model)
    case.model.eval()
    case.fast = copy.deepcopy(case.model)
    deltaops.accelerate(case.fast)
    case.ids = torch.randint(3, 50, (5, 7), generator=torch.Generator().manual_seed(0))
    return case


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], Tensor | None]]:
    """The ranks and the adapter of each of PEFT's layers that reached the op, and the number of
    those that did so together, as ranks [0]."""
    from deltaops.modules import peft_linear
    from deltaops.ops import delta_linear_group

    real, found = peft_linear.delta_linear, []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        found.append(([branch.a.shape[0] for branch in args[3]], args[4]))
        return real(*args, **kwargs)

    def together(x: Tensor, layers: list[Any], **kwargs: Any) -> list[Tensor]:
        found.append(([0], None))
        found.extend(([b.a.shape[0] for b in one.branches], one.adapter) for one in layers)
        return delta_linear_group(x, layers, **kwargs)

    monkeypatch.setattr(peft_linear, "delta_linear", counted)
    monkeypatch.setattr(sys.modules["deltaops.modules.sharing"], "delta_linear_group", together)
    return found


def one_by_one(model: Any, ids: Tensor, names: list[str]) -> Tensor:
    rows = []
    for row, name in zip(ids.split(1), names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row).logits)
        else:
            model.set_adapter(name)
            rows.append(model(row).logits)
    return torch.cat(rows)


@torch.no_grad()
def test_the_same_numbers_as_peft_and_as_one_by_one(case: Any, seen: list[Any]) -> None:
    fast = case.fast(case.ids, adapter_names=NAMES).logits
    a_layer = [[0], [2, 4, 7], [], [4, 7], [2], [0], [], [], [7]]
    assert [ranks for ranks, _ in seen] == 2 * a_layer, "q, k and v; o; gate and up; down"
    adapter = seen[1][1]
    assert adapter.tolist() == [[0] * 7, [-1] * 7, [1] * 7, [2] * 7, [0] * 7]
    torch.testing.assert_close(fast, case.model(case.ids, adapter_names=NAMES).logits)
    torch.testing.assert_close(fast, one_by_one(case.model, case.ids, NAMES))
    torch.testing.assert_close(fast, one_by_one(case.fast, case.ids, NAMES))


@torch.no_grad()
def test_one_adapter_for_all_is_the_plain_call(case: Any, seen: list[Any]) -> None:
    fast = case.fast(case.ids, adapter_names=["third"] * 5).logits
    assert {adapter is None for _, adapter in seen} == {True}
    case.fast.set_adapter("third")
    torch.testing.assert_close(fast, case.fast(case.ids).logits)


@torch.no_grad()
def test_names_in_the_call_itself_are_of_that_layer_alone(case: Any) -> None:
    attention = case.fast.base_model.model.model.layers[0].self_attn
    places = attention.q_proj, attention.k_proj, attention.v_proj
    x = torch.randn(5, 7, attention.q_proj.in_features)
    want = attention.q_proj(x, adapter_names=NAMES), *(place(x) for place in places[1:])
    with sharing(attention, places):
        got = attention.q_proj(x, adapter_names=NAMES), *(place(x) for place in places[1:])
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@torch.no_grad()
def test_layers_share_again_after_a_batch_whose_first_layer_has_no_adapter(
    tiny: Callable[..., Any], seen: list[Any]
) -> None:
    import peft

    model = peft.get_peft_model(tiny("llama").model, peft.LoraConfig(target_modules=["v_proj"]))
    deltaops.accelerate(model.eval())
    ids = torch.tensor([[3, 4], [5, 6]])
    with deltaops.adapters_by_sample(model, ["default", "__base__"]):
        model(ids)
    assert [ranks for ranks, _ in seen[:1]] == [[8]], "v by itself"
    assert not any(APART in vars(module) for module in model.modules())
    seen.clear()
    model(ids)
    assert [ranks for ranks, _ in seen[:4]] == [[0], [], [], [8]]


@pytest.mark.parametrize("beams", [1, 2])
def test_generate(case: Any, beams: int) -> None:
    settings = dict(max_new_tokens=4, do_sample=False, num_beams=beams, adapter_names=NAMES)
    fast, slow = (m.generate(input_ids=case.ids, **settings) for m in (case.fast, case.model))
    assert torch.equal(fast, slow)


def test_bfloat16_model_with_float32_adapters(case: Any) -> None:
    for model in (case.fast, case.model):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        fast, slow = (m(case.ids, adapter_names=NAMES).logits for m in (case.fast, case.model))
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast, slow, atol=0.03, rtol=0.03)


def test_training_reaches_each_adapter_as_one_by_one(case: Any) -> None:
    grads = []
    for mixed in (True, False):
        model = copy.deepcopy(case.fast if mixed else case.model).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        if mixed:
            with pytest.raises(ValueError, match="training mode"):
                model(case.ids, adapter_names=NAMES)
            with deltaops.adapters_by_sample(model, NAMES):
                logits = model(case.ids).logits
        else:
            logits = []
            for row, name in zip(case.ids.split(1), NAMES, strict=True):
                for layer in model.modules():
                    if hasattr(layer, "lora_A"):
                        layer._active_adapter = [name]
                logits.append(model(row).logits)
            logits = torch.cat(logits)
        logits.square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert all(grad is not None and grad.any() for grad in grads[0].values())
    torch.testing.assert_close(*grads)


def test_names_that_do_not_fit_are_refused_and_nothing_stays(case: Any) -> None:
    before = case.fast(case.ids).logits
    by_sample = deltaops.adapters_by_sample
    with pytest.raises(ValueError, match="same as the number of inputs"):
        with by_sample(case.fast, NAMES[:3]):
            case.fast(case.ids)
    with pytest.raises(ConfigError, match="default, second, third and no fourth"):
        with by_sample(case.fast, ["fourth", "__base__"]):
            pass
    for names in ("second", [], [0, 1]):
        with pytest.raises(ConfigError, match="list of strings"):
            with by_sample(case.fast, names):
                pass
    with pytest.raises(TargetError, match="no LoRA layer"):
        with by_sample(nn.Linear(2, 2), NAMES):
            pass
    case.fast.train().gradient_checkpointing_enable()
    with pytest.raises(AttachError, match="gradient checkpointing"):
        with by_sample(case.fast, NAMES):
            pass
    case.fast.gradient_checkpointing_disable()
    assert torch.equal(case.fast.eval()(case.ids).logits, before)
    assert not any(m._forward_pre_hooks for m in case.fast.modules())
    with pytest.raises(ValueError, match="same as the number of inputs"):
        case.fast(case.ids, adapter_names=NAMES[:3])  # last: PEFT 0.21 leaves its hooks behind


def test_merged_adapters_are_refused_and_disabled_ones_add_nothing(case: Any) -> None:
    with torch.no_grad(), case.fast.disable_adapter():
        off = case.fast(case.ids, adapter_names=NAMES).logits
        torch.testing.assert_close(off, case.fast(case.ids).logits)
    case.fast.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        case.fast(case.ids, adapter_names=NAMES)
