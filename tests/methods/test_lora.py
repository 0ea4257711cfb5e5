"""LoRA's configuration and arithmetic."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deltaops
from deltaops import LoRA
from deltaops.errors import CheckpointError, ConfigError
from deltaops.modules import row_norms
from deltaops.testing import bound, relative_error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be"),
        ({"r": -1}, "r must be"),
        ({"r": 2.0}, "r must be"),
        ({"r": True}, "r must be"),
        ({"alpha": math.inf}, "alpha must be finite"),
        ({"alpha": math.nan}, "alpha must be finite"),
        ({"alpha": 10**400}, "alpha must be finite"),
        ({"alpha": "32"}, "alpha must be finite"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": [3]}, "module names"),
        ({"target_modules": 3}, "module names"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": "(["}, "does not compile"),
        ({"exclude_modules": "(["}, "does not compile"),
        ({"use_rslora": 1}, "use_rslora must be a bool"),
        ({"layers_to_transform": [0], "target_modules": "q"}, "needs roles or a list of names"),
        ({"layers_to_transform": [-1], "target_modules": ["q"]}, "layer indices"),
        ({"layers_to_transform": "0", "target_modules": ["q"]}, "layer indices"),
        ({"lr_ratio": 0}, "lr_ratio must be above 0"),
        ({"use_dora": "yes"}, "use_dora must be a bool"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern must map names or regular expressions to ranks"),
        ({"rank_pattern": {"": 1}}, "rank_pattern must map"),
        ({"rank_pattern": 3}, "rank_pattern must map"),
        ({"rank_pattern": {"([": 3}}, "rank_pattern=.*does not compile"),
        ({"alpha_pattern": {"q": "8"}}, "alpha_pattern must map .* to finite numbers"),
        ({"init_lora_weights": False}, "init_lora_weights must be True, 'gaussian'"),
        ({"init_lora_weights": "pissa_niter_"}, "init_lora_weights must be"),
        ({"init_lora_weights": "eva"}, "init_lora_weights must be"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "do not go together"),
        ({"init_lora_weights": "olora", "alpha": 0}, "every alpha must be above 0"),
        ({"init_lora_weights": "pissa", "alpha_pattern": {"q": -1}}, "every alpha must be above 0"),
        ({"layers_pattern": ["h"], "target_modules": ["q"]}, "Pass both or neither"),
    ],
    ids=str,
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError):
        LoRA(rank=3)  # type: ignore[call-arg]


def test_scaling() -> None:
    assert LoRA(r=16, alpha=32).scaling == 2.0
    assert LoRA(r=16, alpha=32, use_rslora=True).scaling == 8.0


def test_prints_what_differs_and_is_a_value() -> None:
    lora = LoRA(r=4, target_modules=["b", "a", "b"])
    assert repr(lora) == "LoRA(r=4, alpha=8, target_modules=('b', 'a'))"
    assert lora == copy.deepcopy(lora) == pickle.loads(pickle.dumps(lora))
    assert hash(lora) == hash(copy.deepcopy(lora))
    patterned = LoRA(rank_pattern={"q": 4}, alpha_pattern={"q": 2.5})
    assert hash(patterned) == hash(copy.deepcopy(patterned))
    assert LoRA.from_peft(patterned.to_peft() | {"target_modules": "all-linear"}) == patterned


@given(
    r=st.integers(1, 512),
    alpha=st.floats(-100, 100),
    dropout=st.floats(0, 0.99),
    rslora=st.booleans(),
    names=st.lists(st.text("abc_.", min_size=1), min_size=1, unique=True),
    saved=st.lists(st.text("abc", min_size=1), unique=True),
)
def test_configuration_survives_pefts_file(
    r: int, alpha: float, dropout: float, rslora: bool, names: list[str], saved: list[str]
) -> None:
    lora = LoRA(
        r=r,
        alpha=alpha,
        dropout=dropout,
        use_rslora=rslora,
        target_modules=sorted(names),
        modules_to_save=saved,
    )
    assert LoRA.from_peft(lora.to_peft()) == lora


def test_pefts_default_configuration_is_understood() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q"]).to_dict()
    config["target_modules"] = list(config["target_modules"])
    assert LoRA.from_peft(config) == LoRA(r=8, alpha=8, target_modules=["q"])


@pytest.mark.parametrize("value", ["mica", "corda", "loftq", "pissa_niter_4", 7])
def test_starts_that_change_the_base_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="init_lora_weights"):
        LoRA.from_peft({"peft_type": "LORA", "target_modules": ["q"], "init_lora_weights": value})


def test_the_first_pattern_that_matches_decides() -> None:
    lora = LoRA(r=2, rank_pattern={r"0\.q": 3, "q": 4, "rest": 5})
    assert [lora.rank(path) for path in ("0.q", "1.q", "q", "1.rest", "crest", "k")] == [
        3, 4, 4, 5, 2, 2
    ]  # fmt: skip


def test_lora_plus_lets_b_learn_faster() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lora = LoRA(r=2, lr_ratio=16, target_modules=["0"], modules_to_save=["1"])
    handle = deltaops.attach(model, lora)
    slow, fast = handle.parameter_groups(1e-3)
    assert (slow["lr"], slow["pace"], fast["lr"], fast["pace"]) == (1e-3, 1.0, 16e-3, 16.0)
    assert [tuple(p.shape) for p in fast["params"]] == [(8, 2)]
    everything = {id(p) for p in [*slow["params"], *fast["params"]]}
    assert everything == {id(p) for p in handle.parameters()}
    optimizer = torch.optim.SGD([slow, fast])
    before = {k: t.detach().clone() for k, t in handle.state().items()}
    for parameter in handle.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for key, tensor in handle.state().items():
        rate = 16e-3 if "lora_B" in key else 1e-3
        torch.testing.assert_close(before[key] - tensor, torch.full_like(tensor, rate))


def test_doras_norms_need_no_merged_weight() -> None:
    torch.manual_seed(0)
    a, b, weight = torch.randn(4, 37), torch.randn(23, 4), torch.randn(23, 37)
    oracle = (weight.double() + 0.7 * (b.double() @ a.double())).norm(dim=1)
    for dtype in (torch.float32, torch.bfloat16):
        norms = row_norms(weight.to(dtype), a, b, 0.7)
        assert norms.dtype == torch.float32
        assert relative_error(norms, oracle) < 8 * bound(0.0, dtype)


def test_dora_leaves_rows_of_zeros_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[1] = 0.0
    x = torch.randn(3, 6)
    before = model(x).detach()
    handle = deltaops.attach(model, LoRA(r=2, use_dora=True))
    y = model(x)
    torch.testing.assert_close(y, before)
    y.sum().backward()
    assert all(
        bool(torch.isfinite(p.grad).all()) for p in handle.parameters() if p.grad is not None
    )
    handle.merge()
    torch.testing.assert_close(model(x), before)


def test_delta_weight_is_computed_in_float32_also_under_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16))
    lora = LoRA(r=8, alpha=24, autocast_adapter_dtype=False)
    deltaops.attach(model, lora)
    a, b = lora.tensors(model[0], "default").values()
    nn.init.normal_(b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta = lora.delta_weight(model[0], "default")
    assert delta.dtype == torch.float32
    oracle = 3.0 * (b.double() @ a.double())
    assert relative_error(delta, oracle) < 8 * bound(0.0, torch.float32)


@pytest.mark.parametrize(
    ("base", "autocast", "adapter"),
    [
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, True, torch.float32),
        (torch.float64, True, torch.float64),
    ],
)
def test_adapter_dtype(base: torch.dtype, autocast: bool, adapter: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=base))
    handle = deltaops.attach(model, LoRA(r=2, autocast_adapter_dtype=autocast))
    assert {p.dtype for p in handle.parameters()} == {adapter}


def test_gaussian_start_values() -> None:
    model = nn.Sequential(nn.Linear(512, 300))
    a, b = deltaops.attach(model, LoRA(r=64, init_lora_weights="gaussian")).parameters()
    assert abs(a.std().item() - 1 / 64) < 3e-4
    assert not b.any()


def test_start_values_have_pefts_distribution() -> None:
    model = nn.Sequential(nn.Linear(512, 300))
    handle = deltaops.attach(model, LoRA(r=64))
    a, b = handle.parameters()
    limit = 512**-0.5
    assert a.abs().max() <= limit
    assert abs(a.std().item() - limit / 3**0.5) < 0.02 * limit
    assert not b.any()
