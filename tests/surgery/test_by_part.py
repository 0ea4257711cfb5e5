"""Batches that mix the parts of an attached combination: as one part after the other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import Combined, LoRA
from deltaops.errors import AttachError, ConfigError

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

NAMES = ["b", "__base__", "a", "wide", "b"]
PARTS = {
    "a": LoRA(r=4, target_modules=("q_proj", "v_proj")),
    "b": LoRA(r=2, target_modules=("q_proj", "o_proj", "down_proj")),
    "wide": LoRA(r=7, target_modules=("q_proj", "down_proj")),
}


@pytest.fixture
def case(tiny: Callable[..., Any]) -> Any:
    """A Llama with three parts of different ranks and places."""
    case = tiny("llama")
    case.handle = deltaops.attach(case.model, Combined(PARTS))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in case.handle.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    case.ids = torch.randint(3, 50, (5, 7), generator=generator)
    return case


def one_by_one(case: Any, loss: bool = False) -> list[Tensor]:
    """The logits of each sample with its part alone; with ``loss``, their squares go backward."""
    rows = []
    for row, name in zip(case.ids.split(1), NAMES, strict=True):
        with case.handle.disabled(*(part for part in PARTS if part != name)):
            rows.append(case.model(row).logits)
            if loss and name in PARTS:
                rows[-1].square().sum().backward()
    return rows


def grads(case: Any) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in case.handle.named_parameters()}
    case.model.zero_grad()
    return found


@torch.no_grad()
def test_the_same_numbers_as_one_by_one(case: Any) -> None:
    case.model.eval()
    with deltaops.adapters_by_sample(case.model, NAMES):
        together = case.model(case.ids).logits
    torch.testing.assert_close(together, torch.cat(one_by_one(case)))
    assert not torch.equal(case.model(case.ids).logits, together), "all parts at once again"


def test_gradients_are_those_of_one_by_one(case: Any) -> None:
    case.model.train()
    with deltaops.adapters_by_sample(case.model, NAMES):
        case.model(case.ids).logits.square().sum().backward()
    together = grads(case)
    one_by_one(case, loss=True)
    wanted = grads(case)
    assert None not in together.values()
    for name, grad in together.items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


def test_what_does_not_fit_is_told_before_anything_runs(
    tiny: Callable[..., Any], case: Any
) -> None:
    with pytest.raises(ConfigError, match="parts a, b, wide and no c"):
        deltaops.adapters_by_sample(case.model, ["c"]).__enter__()
    with (
        pytest.raises(ConfigError, match=r"called with \[5, 7, .* names has 2"),
        deltaops.adapters_by_sample(case.model, ["a", "b"]),
    ):
        case.model(case.ids)
    with (
        deltaops.adapters_by_sample(case.model, NAMES),
        pytest.raises(AttachError, match="open already"),
    ):
        deltaops.adapters_by_sample(case.model, NAMES).__enter__()
    other = tiny("llama").model
    handle = deltaops.attach(other, LoRA(r=2) + deltaops.BitFit())
    with pytest.raises(AttachError, match=r"'bitfit' is at .* more than a branch"):
        deltaops.adapters_by_sample(other, ["lora"]).__enter__()
    with handle.disabled("bitfit"), deltaops.adapters_by_sample(other, ["lora", "__base__"]):
        other(case.ids[:2])
    handle.revert()
    deltaops.attach(other, LoRA(r=2)).merge()
    with pytest.raises(AttachError, match="merged into the weights"):
        deltaops.adapters_by_sample(other, ["default"]).__enter__()


def test_a_batch_of_training_after_one_of_inference(case: Any) -> None:
    with deltaops.adapters_by_sample(case.model, NAMES):
        with torch.inference_mode():
            expected = case.model(case.ids).logits
        logits = case.model(case.ids).logits
        logits.square().sum().backward()
    assert torch.equal(logits, expected)
    assert None not in grads(case).values()


@torch.no_grad()
def test_a_copy_made_meanwhile_is_of_no_context(case: Any) -> None:
    expected = case.model(case.ids).logits
    with deltaops.adapters_by_sample(case.model, NAMES):
        twins = copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))
    for twin in twins:
        assert torch.equal(twin(case.ids).logits, expected)
        with deltaops.adapters_by_sample(twin, ["a"] * 5):
            assert not torch.equal(twin(case.ids).logits, expected)


@torch.no_grad()
def test_a_compiled_place_hears_the_names(case: Any) -> None:
    place = case.model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 7, place.in_features)
    torch.compiler.reset()
    compiled: Any = torch.compile(place, backend="eager", fullgraph=True)
    everything = place(x)
    torch.testing.assert_close(compiled(x), everything)
    for names in (NAMES, NAMES[::-1]):
        with deltaops.adapters_by_sample(case.model, names):
            torch.testing.assert_close(compiled(x), place(x))
            assert not torch.equal(place(x), everything)
    torch.testing.assert_close(compiled(x), everything)


def test_what_would_be_in_all_samples_is_refused(tiny: Callable[..., Any], case: Any) -> None:
    with (
        case.handle.disabled("b"),
        pytest.raises(AttachError, match="'b' is switched off"),
        deltaops.adapters_by_sample(case.model, NAMES),
    ):
        pass
    with deltaops.adapters_by_sample(case.model, NAMES):
        with pytest.raises(AttachError, match="one weight is for all samples"):
            case.handle.merge()
        case.model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
        with pytest.raises(AttachError, match="requires a gradient"):
            case.model(case.ids)
        case.handle.revert()
    assert not any("_deltaops_samples" in vars(module) for module in case.model.modules())
    pair = nn.ModuleList([case.model, tiny("llama").model])
    for model in pair:
        deltaops.attach(model, LoRA(r=2))
    with pytest.raises(AttachError, match="a delta each"):
        deltaops.adapters_by_sample(pair, ["default"]).__enter__()
