"""Plans: printable, without effect until applied, and all or nothing then."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deltaops
from deltaops import BitFit, LNTuning, LoRA, Prefix, Prompt, surgery
from deltaops.errors import AttachError, ConfigError, NoBackendError
from deltaops.methods import Combined
from deltaops.methods.base import Delta, Site
from deltaops.modules import LinearPlace
from deltaops.testing.architectures import build


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that surgery could change."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "classes": {k: type(m) for k, m in model.named_modules()},
        "keys": {k: set(vars(m)) for k, m in model.named_modules()},
    }


def assert_same(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert all(torch.equal(before["state"][k], v) for k, v in after.pop("state").items())
    assert {k: v for k, v in before.items() if k != "state"} == after


def test_plan_changes_nothing_and_prints_what_it_would(tiny: Callable[..., Any]) -> None:
    case = tiny("bert")
    before = snapshot(case.model)
    plan = surgery.plan(case.model, LoRA(r=4, modules_to_save=["classifier"]))
    text = str(plan)
    assert "query" in text
    assert "Linear 24→24" in text
    assert "classifier" in text
    assert_same(before, case.model)
    assert plan.apply().sites == tuple(site.path for site in plan.sites)


@pytest.mark.parametrize("broken_at", [0, 3])
def test_failing_halfway_leaves_the_model_as_it_was(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, broken_at: int
) -> None:
    case = tiny("bert")
    before = snapshot(case.model)
    real, calls = LoRA.bind, list[Any]()

    def failing(self: LoRA, *arguments: Any) -> None:
        real(self, *arguments)
        if len(calls) == broken_at:
            raise MemoryError("no memory for this adapter")
        calls.append(arguments)

    monkeypatch.setattr(LoRA, "bind", failing)
    with pytest.raises(MemoryError):
        deltaops.attach(case.model, LoRA(r=4, modules_to_save=["classifier"]))
    assert_same(before, case.model)
    monkeypatch.setattr(LoRA, "bind", real)
    deltaops.attach(case.model, LoRA(r=4, modules_to_save=["classifier"]))


def test_failing_after_the_delta_is_bound_leaves_the_model_as_it_was(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["deltaops.surgery.attach"], "swap_blocks", interrupted)
    case = tiny("bert")
    before = snapshot(case.model)
    with pytest.raises(KeyboardInterrupt):
        deltaops.attach(case.model, LoRA(r=2))
    assert_same(before, case.model)


def test_rank_above_a_dimension_is_refused_before_any_change(tiny: Callable[..., Any]) -> None:
    case = tiny("bert")
    before = snapshot(case.model)
    with pytest.raises(ConfigError, match="r=8 is above its smaller dimension"):
        deltaops.attach(case.model, LoRA(r=8))
    assert_same(before, case.model)


def test_attaching_twice_is_refused(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")
    deltaops.attach(case.model, LoRA(r=4))
    before = snapshot(case.model)
    with pytest.raises(AttachError, match="has a delta already"):
        deltaops.attach(case.model, LoRA(r=4))
    assert_same(before, case.model)


DELTAS = {
    "lora": LoRA(r=2),
    "embedding": LoRA(r=2, target_modules=["embed_tokens"]),
    "norms": LNTuning(),
    "biases": BitFit(),
    "prefix": Prefix(num_virtual_tokens=3),
    "mlp": Prefix(num_virtual_tokens=3, reparameterised=True),
    "prompt": Prompt(num_virtual_tokens=3),
}


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS.keys())
def test_a_delta_on_the_model_survives_every_refused_one(delta: Delta) -> None:
    model: Any = build("llama", head="ForCausalLM")
    plans = [surgery.plan(model, other, frozen=False) for other in (delta, Prompt(), LoRA(r=2))]
    deltaops.attach(model, delta, frozen=False)
    ids, before = torch.tensor([[3, 4, 5]]), snapshot(model)
    expected = model(ids).logits
    for attempt in (
        *(plan.apply for plan in plans),
        lambda: deltaops.attach(model.model, Prompt(num_virtual_tokens=2), frozen=False),
        lambda: deltaops.attach(model.model, delta, frozen=False),
    ):
        with pytest.raises(AttachError, match="has a delta already"):
            attempt()
    assert_same(before, model)
    assert torch.equal(model(ids).logits, expected)


def test_a_refused_delta_undoes_only_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    undone = list[str]()
    monkeypatch.setattr(LoRA, "unbind", lambda self, site, modules: undone.append(site.path))

    def failing(self: LoRA, site: Site, *arguments: Any) -> None:
        if site.path == sites[1]:
            raise MemoryError("no memory for this adapter")

    monkeypatch.setattr(LoRA, "bind", failing)
    plan = surgery.plan(model, LoRA(r=2))
    sites = [site.path for site in plan.sites]
    with pytest.raises(MemoryError):
        plan.apply()
    assert undone == sites[:2]


@pytest.mark.parametrize(
    "name", ["..", "a/b", "a.b", "", "keys", "training", "_modules", "lora_x", "ü", "a\x00", 3]
)
def test_hostile_adapter_names_are_refused(tiny: Callable[..., Any], name: Any) -> None:
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        deltaops.attach(tiny("llama").model, LoRA(r=4), name=name)


def test_unknown_backend_stops_at_attach(tiny: Callable[..., Any]) -> None:
    with pytest.raises(NoBackendError, match="Check the spelling"):
        deltaops.attach(tiny("llama").model, LoRA(r=4), backend="fastest")


def test_not_a_delta_is_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="expected a delta"):
        deltaops.attach(tiny("llama").model, {"r": 4})


def test_generator_decides_the_start(tiny: Callable[..., Any]) -> None:
    starts = []
    for _ in range(2):
        torch.manual_seed(len(starts))
        case = tiny("llama")
        generator = torch.Generator().manual_seed(7)
        handle = deltaops.attach(case.model, LoRA(r=4), generator=generator)
        starts.append([p.detach().clone() for p in handle.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_a_generator_of_its_own_starts_a_part_as_it_would_alone(tiny: Callable[..., Any]) -> None:
    parts: dict[str, Delta] = {"one": LoRA(r=2), "other": LoRA(r=3, target_modules=["query"])}
    case = tiny("bert")

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    handle = surgery.attach(
        case.model, Combined(parts), generator={name: seeded() for name in parts}
    )
    together = {key: tensor.clone() for key, tensor in handle.state().items()}
    handle.revert()
    for name, delta in parts.items():
        handle = surgery.attach(case.model, delta, generator=seeded())
        for key, tensor in handle.state().items():
            assert torch.equal(together[f"{name}/{key}"], tensor)
        handle.revert()
    with pytest.raises(ConfigError, match="one for each of one, other, got one"):
        surgery.attach(case.model, Combined(parts), generator={"one": seeded()})


def test_only_the_delta_and_the_head_train(tiny: Callable[..., Any]) -> None:
    case = tiny("bert")
    handle = deltaops.attach(case.model, LoRA(r=4, modules_to_save=["classifier"]))
    trained = {n for n, p in case.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.startswith("classifier.") for n in trained)
    assert {id(p) for p in handle.parameters()} == {
        id(p) for n, p in case.model.named_parameters() if n in trained
    }


def test_meta_device(tiny: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8, device="meta"))
    deltaops.attach(model, LoRA(r=2))
    assert isinstance(model[0], LinearPlace)
    assert model[0].lora_A["default"].weight.device.type == "meta"  # type: ignore[index]
