"""Compacter: its sizes, the rule that all layers share, and how its weights are formed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import deltaops
from deltaops import Compacter
from deltaops.errors import ConfigError
from deltaops.modules import KroneckerSum
from deltaops.modules.kronecker import kronecker_sum
from deltaops.surgery import handle_of
from deltaops.surgery.files import TENSORS
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, build

RULE = "encoder.layer.0.attention.output.dense.adapter.down.phm_rule"


def rules(model: nn.Module) -> list[nn.Parameter]:
    """The rule of every matrix."""
    return [m.owner.phm_rule for m in model.modules() if isinstance(m, KroneckerSum)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phm_dim": 0}, "phm_dim must be an integer ≥ 1"),
        ({"phm_rank": 1.0}, "phm_rank must be an integer ≥ 1"),
        ({"phm_init_range": 0}, "phm_init_range must be above 0"),
        ({"shared_phm_rule": 1}, "shared_phm_rule must be a bool"),
        ({"style": "bapna"}, "style must be one of houlsby, pfeiffer"),
        ({"size": 0}, "size must be an integer"),
    ],
    ids=str,
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"Compacter: {message}"):
        Compacter(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "reduction_factor=32 does not divide its 24 features"),
        ({"size": 5, "phm_dim": 5}, "phm_dim=5 does not divide its 24 features"),
        ({"size": 6}, "phm_dim=4 does not divide its bottleneck of 6"),
        ({"size": 4, "phm_rank": 2}, "phm_rank=2 is above 1, its bottleneck of 4 / phm_dim"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_before_any_change(
    settings: dict[str, Any], message: str
) -> None:
    model = build("bert")
    before = [type(m) for m in model.modules()]
    with pytest.raises(ConfigError, match=message):
        deltaops.attach(model, Compacter(**settings))
    assert [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("n", "p", "q", "r"), [(1, 3, 5, 1), (2, 1, 7, 1), (3, 4, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_and_its_gradients_against_float64(
    n: int, p: int, q: int, r: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape).to(dtype) for shape in ((n, n, n), (n, p, r), (n, q, r))]
    outer = torch.randn(n * p, n * q)

    def run(form: Any, wide: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in given]
        weight = form(*leaves)
        return [weight, *torch.autograd.grad((weight * outer).sum(), leaves)]

    def plainly(rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return torch.stack([torch.kron(rule[i], s[i] @ t[i].T) for i in range(n)]).sum(0)

    found, baseline, oracle = (
        run(form, wide)
        for form, wide in (
            (kronecker_sum, dtype), (plainly, dtype), (plainly, torch.float64)
        )
    )  # fmt: skip
    for ours, theirs, exact in zip(found, baseline, oracle, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, exact) <= 2 * bound(relative_error(theirs, exact), dtype)


def test_autocast_forms_the_weight_in_full() -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape) for shape in ((2, 2, 2), (2, 3, 1), (2, 5, 1))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kronecker_sum(*given)
    assert torch.equal(found, kronecker_sum(*given))


def test_the_shared_rule_is_one_parameter_and_counts_once(tmp_path: Path) -> None:
    model = build("bert")
    handle = deltaops.attach(model, Compacter(size=4))
    assert len(rules(model)) == 2 * 2 * 2
    assert len({id(rule) for rule in rules(model)}) == 1
    assert sum(p is rules(model)[0] for p in handle.parameters()) == 1
    groups = handle.parameter_groups(1e-3)
    assert sum(p is rules(model)[0] for group in groups for p in group["params"]) == 1
    assert [k for k in handle.state() if k.endswith("phm_rule")] == [RULE]
    assert len([k for k in model.state_dict() if k.endswith("phm_rule")]) == 1
    sites = 2 * 2
    total = 4**3 + sites * (2 * (24 + 4) + 24 + 4)
    assert sum(p.numel() for p in handle.parameters()) == total
    assert f"trained: {total:,} of" in str(handle)
    plan = deltaops.surgery.plan(build("bert"), Compacter(size=4))
    assert sum(torch.Size(shape).numel() for _, _, shape in plan.tensors()) == total
    handle.save(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / TENSORS)
    assert [k for k in saved if k.endswith("phm_rule")] == [RULE]
    loaded = build("bert")
    deltaops.load(loaded, tmp_path)
    assert len({id(rule) for rule in rules(loaded)}) == 1
    assert torch.equal(rules(loaded)[0], rules(model)[0])


def test_copies_pickles_and_moves_keep_it_one() -> None:
    model = build("bert")
    deltaops.attach(model, Compacter(size=4))
    assigned = copy.deepcopy(model)
    assigned.load_state_dict(model.state_dict(), assign=True)
    for twin in (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), assigned, model.double()
    ):  # fmt: skip
        found = rules(twin)
        assert len({id(rule) for rule in found}) == 1
        handle = handle_of(twin)
        assert handle is not None
        before = answer("bert", twin)
        with torch.no_grad():
            handle.state()[RULE].add_(1.0)
        assert not torch.equal(answer("bert", twin), before)
        handle.revert()
        assert not rules(twin)


def test_rules_of_their_own() -> None:
    model = build("bert")
    handle = deltaops.attach(model, Compacter(size=4, shared_phm_rule=False))
    assert len({id(rule) for rule in rules(model)}) == 2 * 2 * 2
    assert len([k for k in handle.state() if k.endswith("phm_rule")]) == 2 * 2 * 2


def test_start_values_are_the_papers() -> None:
    model = nn.ModuleDict({"out": nn.Linear(8, 4096)})
    delta = Compacter(size=256, phm_rank=2, target_modules=["out"])
    state = deltaops.attach(model, delta, generator=torch.Generator().manual_seed(0)).state()
    rule = state["out.adapter.down.phm_rule"]
    assert abs(rule.std().item() - 1e-4) < 3e-5
    for factor, size in (("s", 64), ("t", 1024)):
        drawn = state[f"out.adapter.down.{factor}"]
        assert drawn.shape == (4, size, 2)
        limit = (6 / (size + 2)) ** 0.5
        assert 0.95 * limit < drawn.abs().max() <= limit
    assert not state["out.adapter.up_bias"].any()


def test_a_file_whose_sizes_cannot_be_is_refused(tmp_path: Path) -> None:
    import json

    handle = deltaops.attach(build("bert"), Compacter(size=6, phm_dim=2, phm_rank=1))
    handle.save(tmp_path)
    manifest = json.loads((tmp_path / "deltaops.json").read_text())
    manifest["settings"]["size"] = 7
    (tmp_path / "deltaops.json").write_text(json.dumps(manifest))
    model = build("bert")
    with pytest.raises(deltaops.errors.DeltaopsError):
        deltaops.load(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters())
