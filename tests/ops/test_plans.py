"""Signatures of calls: what the native core reads of tensors tells calls apart as attributes do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops.backends.cpu import native
from deltaops.errors import ConfigError, DtypeError, GradientError, NoBackendError, ShapeError
from deltaops.ops import Branch, delta_linear
from deltaops.ops.plans import _looker, look, look_at_attributes

needs_views = pytest.mark.skipif(
    isinstance(native(), str) or not native().views(),  # type: ignore[union-attr]  # a module then
    reason="the native core is missing, or torch has no C exchange table",
)


class Call:
    """The arguments of one ``look``, and one way to change them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.weight, self.bias = torch.randn(4, 6), torch.randn(6, 6), torch.randn(6)
        self.a, self.b, self.inner = torch.randn(2, 6), torch.randn(6, 2), torch.randn(2)
        self.settings: tuple[Any, ...] = (0.5, 0.0, "relu")
        self.backend, self.strict = "auto", False

    def arguments(self) -> tuple[Any, ...]:
        branch = Branch(self.a, self.b, *self.settings, self.inner)
        return self.x, self.weight, self.bias, [branch], self.backend, self.strict


def put(name: str, value: Callable[[Any], Any]) -> Callable[[Call], None]:
    return lambda call: setattr(call, name, value(getattr(call, name)))


def replace_data(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Call], None]:
    """The same tensor object, with other contents: no identity tells."""

    def change(call: Call) -> None:
        tensor = getattr(call, name)
        tensor.data = value(tensor)

    return change


CHANGES = {
    **{
        f"{name} {what}": replace_data(name, value)
        for name in ("x", "weight", "a", "b")
        for what, value in {
            "dtype": lambda t: t.bfloat16(),
            "half": lambda t: t.half(),
            "rows": lambda t: t[:-1].contiguous(),
            "strides": lambda t: t.T.contiguous().T,
            "dimension": lambda t: t[None],
        }.items()
    },
    "no bias": put("bias", lambda _: None),
    "bias dtype": replace_data("bias", lambda t: t.double()),
    "bias stride": replace_data("bias", lambda t: t.repeat_interleave(2)[::2]),
    "no inner bias": put("inner", lambda _: None),
    "inner dtype": replace_data("inner", lambda t: t.bfloat16()),
    "scaling": put("settings", lambda s: (0.25, *s[1:])),
    "dropout": put("settings", lambda s: (s[0], 0.5, s[2])),
    "activation": put("settings", lambda s: (*s[:2], "silu")),
    "backend": put("backend", lambda _: "cpu"),
    "strict": put("strict", lambda _: True),
}


@needs_views
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_call_has_another_signature(change: Callable[[Call], None]) -> None:
    call = Call()
    before, slow_before = look(*call.arguments()), look_at_attributes(*call.arguments())
    again = look(*Call().arguments())
    assert before is not None
    assert again is not None
    assert before[0] == again[0]  # other tensors of the same kind: the same call
    change(call)
    after, slow_after = look(*call.arguments()), look_at_attributes(*call.arguments())
    assert after is not None
    assert slow_before is not None
    assert slow_after is not None
    assert slow_after[0] != slow_before[0]
    assert after[0] != before[0]
    assert [id(t) for t in after[1]] == [id(t) for t in slow_after[1]]


@needs_views
def test_many_branches_keep_their_order_and_settings() -> None:
    call = Call()
    x, weight, bias, (branch,), *rest = call.arguments()
    keys = set()
    for at in range(24):  # longer than the core's buffer on the stack
        branches = [branch._replace(scaling=float(i == at)) for i in range(24)]
        seen = look(x, weight, bias, branches, *rest)
        assert seen is not None
        keys.add(seen[0])
    assert len(keys) == 24


class Sub(Tensor):
    pass


@needs_views
@pytest.mark.parametrize("name", ["x", "weight", "bias", "a", "b", "inner"])
@pytest.mark.parametrize(
    "other",
    [
        lambda t: t.as_subclass(Sub),
        lambda t: nn.Buffer(t.to("meta")),
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
    ],
    ids=["subclass", "buffer", "meta", "sparse"],
)
def test_what_cannot_be_viewed_takes_the_other_way(
    name: str, other: Callable[[Tensor], Tensor]
) -> None:
    call = Call()
    setattr(call, name, other(getattr(call, name)))
    assert look(*call.arguments()) is None


@needs_views
def test_a_branch_that_is_none_is_refused() -> None:
    call = Call()
    x, weight, bias, (branch,), *rest = call.arguments()
    with pytest.raises(TypeError, match=r"deltaops\.ops\.Branch"):
        look(x, weight, bias, [branch[:3]], *rest)
    with pytest.raises(TypeError):
        look(x, weight, bias, [branch._replace(scaling="much")], *rest)


def test_a_name_that_is_no_text_is_refused_in_words() -> None:
    x, weight, bias, (branch,), *_ = Call().arguments()
    with pytest.raises(ConfigError, match="activation must be one of identity"):
        delta_linear(x, weight, bias, [branch._replace(activation=None)])
    with pytest.raises(NoBackendError, match="backend must be one of auto"):
        delta_linear(x, weight, bias, [branch], backend=None)  # type: ignore[arg-type]  # on purpose


@needs_views
def test_a_torch_without_the_exchange_table_gives_the_same_bits() -> None:
    core: Any = native()
    call = Call()
    x, weight, bias, branches, *_ = call.arguments()
    a = branches[0].a.requires_grad_()

    def run() -> list[Tensor]:
        y = delta_linear(x, weight, bias, branches, backend="cpu")
        return [y.detach(), *torch.autograd.grad(y.sum(), [a])]

    want = run()
    _looker.cache_clear()
    core.set_tensor_types(int, nn.Parameter)  # a type that has no table
    try:
        assert not core.views()
        got = run()
    finally:
        core.set_tensor_types(Tensor, nn.Parameter)
        _looker.cache_clear()
    assert core.views()
    assert [torch.equal(p, q) for p, q in zip(got, want, strict=True)] == [True, True]


# ------------------------------------------------------------------- calls, one after the other


def place() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False)
    deltaops.attach(model, deltaops.LoRA(r=4, target_modules=["0"], dropout=0.5))
    layer = model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer.eval()


def expected(layer: nn.Module, x: Tensor) -> Tensor:
    (branch,) = layer.branches()
    weight, bias = layer.base()
    delta = branch.scaling * (x @ branch.a.to(x.dtype).T) @ branch.b.to(x.dtype).T
    return torch.nn.functional.linear(x, weight, bias) + delta


def close(y: Tensor, want: Tensor) -> None:
    assert y.dtype == want.dtype
    rounding = 2.0**-6 if y.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y, want, rtol=0.0, atol=rounding * float(want.detach().abs().max()))


def test_calls_follow_every_change_of_a_layer() -> None:
    """The same objects throughout, so that whatever is remembered by object would be stale."""
    layer, x = place(), torch.randn(4, 16)
    close(layer(x), expected(layer, x))
    with torch.no_grad():
        layer.weight.mul_(2.0)
    close(layer(x), expected(layer, x))
    layer.weight.data = torch.randn(16, 16)
    close(layer(x), expected(layer, x))
    layer.weight.data = torch.randn(16, 16).T
    close(layer(x), expected(layer, x))
    layer.lora_A["default"].weight.data = torch.randn(2, 16)
    with pytest.raises(ShapeError, match="b must be"):
        layer(x)
    layer.lora_B["default"].weight.data = torch.randn(16, 2)
    close(layer(x), expected(layer, x))
    layer.to(torch.bfloat16)
    with pytest.raises(DtypeError, match="dtype of x"):
        layer(x)
    close(layer(x.bfloat16()), expected(layer, x.bfloat16()))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    close(layer(x), expected(layer, x))
    assert not torch.equal(layer.train()(x), layer(x))  # dropout draws
    assert torch.equal(layer.eval()(x), layer(x))
    twin = copy.deepcopy(layer)
    twin.weight.data.zero_()
    close(layer(x), expected(layer, x))
    close(twin(x), expected(twin, x))
    other = torch.randn(16, 16)
    swapped = torch.func.functional_call(layer, {"weight": other}, (x,))
    close(swapped - layer(x), x @ (other - layer.weight).T)
    layer.delta_active = False
    assert torch.equal(layer(x), delta_linear(x, layer.weight, layer.bias))


def test_a_known_call_still_looks_at_requires_grad() -> None:
    x, weight, a, b = (
        torch.randn(4, 16),
        torch.randn(16, 16),
        torch.randn(2, 16),
        torch.randn(16, 2),
    )
    branches = [Branch(a, b)]
    assert not delta_linear(x, weight, None, branches).requires_grad
    a.requires_grad_()
    assert delta_linear(x, weight, None, branches).requires_grad
    with torch.no_grad():
        assert not delta_linear(x, weight, None, branches).requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        delta_linear(x, weight, None, branches)
    with pytest.raises(GradientError, match="frozen"):
        delta_linear(x, weight, None, branches)
