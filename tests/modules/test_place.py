"""Places on single layers: state, forward, hooks, freezing, pickling and compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from deltaops.errors import GradientError
from deltaops.modules import (
    UNFROZEN,
    DeltaLinear,
    Factor,
    FrozenLinear,
    LoraSettings,
    become,
    delta_class,
    features,
    frozen_class,
    unbecome,
)
from deltaops.ops import delta_linear
from deltaops.testing import bound, relative_error


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(7, 5)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 7),
    "no bias": lambda: nn.Linear(5, 7, bias=False),
    "conv1d": conv1d,
}


@pytest.fixture(params=list(KINDS))
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    found = KINDS[request.param]()
    return found.requires_grad_(False)


def with_lora(layer: nn.Module, dropout: float = 0.0) -> nn.Module:
    place = delta_class(type(layer))
    assert place is not None
    become(layer, place, "auto", False)
    for name, rank in (("one", 2), ("two", 3)):
        settings = LoraSettings(rank, 4.0, 4.0 / rank, dropout)
        layer.add_lora(name, settings, torch.randn(rank, 5), torch.randn(7, rank))  # type: ignore[operator]
    return layer


def expected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Two branches in torch, written down once more."""
    weight = layer.weight.t() if hasattr(layer, "nf") else layer.weight
    y = functional.linear(x, weight, layer.bias)
    for name, rank in (("one", 2), ("two", 3)):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # type: ignore[index]
        y = y + (4.0 / rank) * (x @ a.T @ b.T)
    return y


def test_forward_is_base_and_branches(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 5)
    with_lora(layer)
    oracle = expected(copy.deepcopy(layer).double(), x.double())
    assert relative_error(layer(x), oracle) < 4 * bound(0.0, torch.float32)


def test_base_keys_stay_and_adapters_are_named_as_in_peft(layer: nn.Module) -> None:
    base = list(layer.state_dict())
    with_lora(layer)
    keys = list(layer.state_dict())
    assert keys[: len(base)] == base
    assert keys[len(base) :] == [f"lora_{s}.{n}.weight" for s in "AB" for n in ("one", "two")]


def test_unbecome_leaves_nothing(layer: nn.Module) -> None:
    before = type(layer), set(vars(layer)), list(layer.state_dict())
    unbecome(with_lora(layer))
    assert (type(layer), set(vars(layer)), list(layer.state_dict())) == before


def test_features(layer: nn.Module) -> None:
    assert features(layer) == (5, 7)


def test_frozen_place_is_the_layer(layer: nn.Module) -> None:
    x = torch.randn(4, 5, requires_grad=True)
    plain = layer(x)
    place = frozen_class(type(layer))
    assert place is not None
    become(layer, place, "auto", False)
    torch.testing.assert_close(layer(x), plain)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_inactive_deltas_leave_the_base(layer: nn.Module) -> None:
    x = torch.randn(4, 5)
    plain = layer(x)
    with_lora(layer)
    layer.delta_active = False  # type: ignore[assignment]
    torch.testing.assert_close(layer(x), plain)
    assert "inactive" in repr(layer)


def test_an_unfrozen_weight_is_noticed_and_trained(layer: nn.Module) -> None:
    with_lora(layer, dropout=0.0)
    frozen = layer(torch.ones(1, 5))
    assert layer.slow_reason() is None  # type: ignore[operator]
    layer.weight.requires_grad_(True)
    assert layer.slow_reason() == UNFROZEN  # type: ignore[operator]
    y = layer(torch.ones(1, 5))
    torch.testing.assert_close(y, frozen)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.lora_A["one"].weight.grad is not None  # type: ignore[index]
    weight, bias = layer.base()  # type: ignore[operator]
    with pytest.raises(GradientError):
        delta_linear(torch.ones(1, 5), weight, bias)


def test_unfrozen_mixed_precision_returns_the_base_dtype() -> None:
    layer = nn.Linear(5, 7, dtype=torch.bfloat16)
    with_lora(layer)
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    layer.requires_grad_(False)
    assert layer(x).dtype == torch.bfloat16


def test_dropout_only_in_training(layer: nn.Module) -> None:
    with_lora(layer, dropout=0.5)
    x = torch.randn(64, 5)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_hooks_of_the_layer_go_on_working(layer: nn.Module) -> None:
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_forward_pre_hook(lambda *_: seen.append("pre"))
    with_lora(layer)(torch.ones(1, 5))
    assert seen == ["pre", "forward"]


def test_replaced_parameters_are_used(layer: nn.Module) -> None:
    with_lora(layer)
    x = torch.randn(2, 5)
    layer(x)
    layer.lora_A["one"].weight = nn.Parameter(torch.zeros(2, 5))  # type: ignore[index]
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    torch.testing.assert_close(layer(x), expected(layer, x))


def test_pickle_and_deepcopy(layer: nn.Module) -> None:
    with_lora(layer)
    x = torch.randn(2, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_torch_compile_fullgraph(layer: nn.Module, dropout: float) -> None:
    torch._dynamo.reset()  # each parameter of this test compiles the same code object again
    with_lora(layer, dropout)
    x = torch.randn(3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    result = compiled(x)
    result.sum().backward()
    assert layer.lora_B["two"].weight.grad is not None  # type: ignore[index]
    if not dropout:
        torch.testing.assert_close(result, layer(x))
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


def test_only_exact_types_have_a_place() -> None:
    class Special(nn.Linear):
        pass

    assert delta_class(nn.Linear) is DeltaLinear
    assert frozen_class(nn.Linear) is FrozenLinear
    assert delta_class(Special) is None
    assert frozen_class(nn.Conv1d) is None


def test_a_factor_is_no_linear_layer() -> None:
    assert not isinstance(Factor(torch.zeros(2, 3)), nn.Linear)
    assert "2×3, float32" in repr(Factor(torch.zeros(2, 3)))
