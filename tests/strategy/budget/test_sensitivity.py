"""Ranks before training: against the gradient itself, and without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltaops
from deltaops import Adapter, LoRA
from deltaops.errors import ConfigError
from deltaops.strategy import allocate
from deltaops.testing.architectures import batch, build

from .planted import PLANTED, K, N, attached, batches, count, loss, model

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

UNIT = K + N


def squares(path: str) -> torch.Tensor:
    """σᵢ(∂L/∂W)² of a layer, by torch alone."""
    plain = model().double()
    for one in batches(2):
        (loss(plain, {key: t.double() for key, t in one.items()}) / 2).backward()
    return torch.linalg.svdvals(plain.get_submodule(path).weight.grad).square()


def test_with_all_directions_the_worth_is_that_of_the_gradient() -> None:
    found = allocate(attached(), batches(2), loss, parameters=8 * UNIT, largest=K)
    for path, worth in found.worth.items():
        assert worth == pytest.approx(float(squares(path).sum()), rel=1e-4)
    singular = sorted(
        ((float(s), path) for path in found.ranks for s in squares(path)), reverse=True
    )
    oracle = [path for _, path in singular[:8]]
    assert found.ranks == {path: oracle.count(path) for path in found.ranks}
    assert found.parameters == 8 * UNIT


def test_a_sketch_finds_the_planted_places_and_applying_it_keeps_to_the_budget() -> None:
    handle = attached()
    budget = 4 * UNIT + 5
    found = allocate(handle, batches(2), loss, parameters=budget)
    assert {path for path, rank in found.ranks.items() if rank} == set(PLANTED)
    assert found.ranks[PLANTED[0]] > found.ranks[PLANTED[1]]
    optimizer = torch.optim.AdamW(handle.parameters())
    found.apply(handle, optimizer=optimizer)
    assert handle.sites == PLANTED
    assert count(handle) == found.parameters == 4 * UNIT <= budget
    assert f"{4 * UNIT} of {budget} parameters" in str(found)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, handle.parameters()))


@pytest.mark.parametrize(("family", "head"), [("gpt2", "LMHeadModel"), ("llama", "ForCausalLM")])
def test_nothing_is_left_behind_in_a_language_model(family: str, head: str) -> None:
    whole = build(family, head=head).train()
    handle = deltaops.attach(whole, LoRA(r=2, dropout=0.5))
    ids = batch(family)["input_ids"]
    whole(input_ids=ids, labels=ids).loss.backward()
    before = [
        (p, p.clone(), None if p.grad is None else p.grad.clone()) for p in whole.parameters()
    ]
    modes = [module.training for module in whole.modules()]
    random = torch.get_rng_state()

    def lm(model: Any, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return found

    first = allocate(handle, [ids], lm, parameters=1500)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in whole.modules()] == modes
    for (parameter, bits, grad), now in zip(before, whole.parameters(), strict=True):
        assert now is parameter
        assert torch.equal(now, bits)
        assert (now.grad is None) is (grad is None)
        assert grad is None or torch.equal(now.grad, grad)
    assert allocate(handle, [ids], lm, parameters=1500) == first
    first.apply(handle)
    assert count(handle) == first.parameters <= 1500


def test_budgets_that_cannot_be_met_are_refused_before_anything_changes() -> None:
    handle = attached()
    held = list(handle.parameters())
    with pytest.raises(ConfigError, match=f"one component at one place, which take {UNIT} "):
        allocate(handle, batches(1), loss, parameters=UNIT - 1)
    with pytest.raises(ConfigError, match=r"6 places at rank 2, which take 336 .*and is 300"):
        allocate(handle, batches(1), loss, parameters=300, smallest=2)
    with pytest.raises(ConfigError, match="at least one batch"):
        allocate(handle, [], loss, parameters=300)
    with pytest.raises(ConfigError, match="one number, got"):
        allocate(handle, batches(1), lambda m, b: m(b["x"]), parameters=300)
    with pytest.raises(ConfigError, match="the gradient is zero"):
        allocate(handle, batches(1), lambda m, b: m(b["x"]).sum() * 0, parameters=300)
    with pytest.raises(ConfigError, match="without a gradient"):
        allocate(handle, batches(1), lambda m, b: b["y"].sum(), parameters=300)
    adapters = deltaops.attach(model(), Adapter(size=2, target_modules=["layers.0"]))
    with pytest.raises(ConfigError, match="must be a LoRA on linear layers"):
        allocate(adapters, batches(1), loss, parameters=300)
    assert all(a is b for a, b in zip(held, handle.parameters(), strict=True))
