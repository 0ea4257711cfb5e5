"""Packed weights: the same bits, made again when the weight changes, gone when it is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops.errors import ConfigError
from deltaops.ops import Branch, delta_linear
from deltaops.packing import PACKING, _Entry
from deltaops.testing import assert_accurate

pytestmark = pytest.mark.skipif(
    deltaops.backends()["cpu"] != "ready", reason="the native core is not built"
)
N, K = 256, 96


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    PACKING.clear()
    yield
    PACKING.clear()


def call(weight: Tensor) -> list[Tensor]:
    """y and the gradients of x and of both factors."""
    generator = torch.Generator().manual_seed(0)
    x, a, b = (
        torch.randn(shape, generator=generator, dtype=weight.dtype, requires_grad=True)
        for shape in ((20, K), (4, K), (N, 4))
    )
    y = delta_linear(x, weight, None, [Branch(a, b, 0.5)], backend="cpu")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))]


def weight_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["row", "col"])
def test_packed_from_the_second_use_on_with_the_same_bits(dtype: torch.dtype, layout: str) -> None:
    weight = weight_of(dtype)
    if layout == "col":
        weight = weight.t().contiguous().t()
    PACKING.set_policy(weight, "never")
    plain = call(weight)
    assert PACKING.bytes(weight) == 0
    PACKING.set_policy(weight, "auto")
    for _ in range(3):
        assert all(torch.equal(p, q) for p, q in zip(call(weight), plain, strict=True))
    assert PACKING.bytes(weight) > 2 * weight.numel() * 2


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.mul_(2),
    "behind the version counter": lambda w: w.data.mul_(2),
    "other memory": lambda w: w.set_(w * 2),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_packed_again(change: Callable[[Tensor], object]) -> None:
    weight = weight_of()
    for _ in range(3):
        call(weight)
    change(weight)
    again = call(weight)
    PACKING.set_policy(weight, "never")
    assert all(torch.equal(p, q) for p, q in zip(again, call(weight), strict=True))


def test_always_packs_at_once_and_auto_stops_at_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PACKING, "_budget", 1000)
    weight = weight_of()
    for _ in range(3):
        call(weight)
    assert PACKING.bytes(weight) == 0
    PACKING.set_policy(weight, "always")
    for _ in range(2):
        call(weight)
    assert PACKING.bytes(weight) > 0


def test_a_freed_weight_leaves_nothing() -> None:
    weight = weight_of()
    for _ in range(3):
        call(weight)
    assert len(PACKING._entries) == 1
    del weight
    other = weight_of()
    assert PACKING.bytes(other) == 0
    assert len(PACKING._entries) == 0


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="'sometimes'"):
        PACKING.set_policy(weight_of(), "sometimes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'sometimes'"):
        deltaops.attach(nn.Linear(8, 8), deltaops.LoRA(r=2), pack="sometimes")  # type: ignore[arg-type]


def test_attach_runs_the_other_linears_and_report_counts_the_copies() -> None:
    model = nn.Sequential(nn.Linear(K, N, bias=False), nn.Linear(N, K, bias=False))
    x = torch.randn(30, K)
    before, classes = model(x), [type(m) for m in model]
    handle = deltaops.attach(model, deltaops.LoRA(r=2, target_modules=["0"]))
    assert [row.kind for row in deltaops.report(model).rows] == ["lora", "frozen"]
    for _ in range(3):
        torch.testing.assert_close(model(x), before)
    assert deltaops.report(model).packed >= 2 * N * K * 4
    assert "packed copies of frozen weights hold" in str(deltaops.report(model))
    handle.revert()
    assert [type(m) for m in model] == classes
    assert torch.equal(model(x), before)
    deltaops.attach(model, deltaops.LoRA(r=2, target_modules=["0"]), frozen=False, pack="never")
    for _ in range(3):
        model(x)
    report = deltaops.report(model)
    assert ([row.kind for row in report.rows], report.packed) == (["lora"], 0)


def test_what_is_kept_for_many_weights_looks_at_each_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    real = _Entry.expired

    def counted(entry: _Entry) -> bool:
        nonlocal looks
        looks += 1
        return real(entry)

    monkeypatch.setattr(_Entry, "expired", counted)
    many = torch.randn(40, N, K)
    for _ in range(2):
        for weight in many.unbind():
            call(weight)
    assert PACKING.bytes_of(many.unbind()) == PACKING._total >= many.nbytes
    assert looks < 25 * len(many)
    many.mul_(2)
    call(many[0])
    held = sum(e.bytes for e in PACKING._entries.values())
    PACKING.set_policy(many[1], "never")
    assert held > PACKING._total == sum(e.bytes for e in PACKING._entries.values())
    del many, weight
    assert PACKING.bytes(weight_of()) == PACKING._total == len(PACKING._layouts) == 0


def autocast(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return run()


def kept(weight: Tensor) -> Tensor:
    """The converted weight; fails unless there is just one."""
    (found,) = [t for e in PACKING._entries.values() for t in e.converted.values()]
    assert found.shape == weight.shape
    return found


@pytest.mark.parametrize("layout", ["row", "col"])
def test_under_autocast_the_weight_is_converted_once(layout: str) -> None:
    weight = weight_of() if layout == "row" else weight_of().t().contiguous().t()
    PACKING.set_policy(weight, "never")
    plain = autocast(lambda: call(weight))
    assert PACKING.bytes(weight) == 0
    PACKING.set_policy(weight, "auto")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        delta_linear(torch.ones(3, K), weight)  # kept from here on, for calls with gradients too
    first = kept(weight)
    for _ in range(3):
        assert all(
            torch.equal(p, q) for p, q in zip(autocast(lambda: call(weight)), plain, strict=True)
        )
        assert kept(weight) is first
    assert PACKING.bytes(weight) > first.nbytes + 2 * weight.numel() * 2  # and packed twice


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_converted_again(change: Callable[[Tensor], object]) -> None:
    weight = weight_of()
    for _ in range(3):
        autocast(lambda: call(weight))
    change(weight)
    again = autocast(lambda: call(weight))
    assert torch.equal(kept(weight), weight.bfloat16())
    PACKING.set_policy(weight, "never")
    fresh = autocast(lambda: call(weight))
    assert all(torch.equal(p, q) for p, q in zip(again, fresh, strict=True))


def test_a_freed_weight_takes_its_conversion_along() -> None:
    weight = weight_of()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            call(weight)
    assert len(PACKING._entries) == 2  # of the weight and of the converted one
    del weight
    assert PACKING.bytes(weight_of()) == 0
    assert len(PACKING._entries) == 0


def test_conversions_obey_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PACKING, "_budget", 1000)
    weight = weight_of()
    autocast(lambda: call(weight))
    assert PACKING.bytes(weight) == 0
    PACKING.set_policy(weight, "always")
    autocast(lambda: call(weight))
    assert PACKING.bytes(weight) >= kept(weight).nbytes == 2 * weight.numel()


def test_gradients_of_a_kept_conversion_match_the_fp64_oracle() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = weight_of()
    x, a, b = (torch.randn(s, generator=generator) for s in ((20, K), (4, K), (N, 4)))

    def grads(x: Tensor, a: Tensor, b: Tensor, plain: Tensor | None) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in (x, a, b)]
        x, a, b = inputs
        if plain is None:
            y = delta_linear(x, weight, None, [Branch(a, b, 0.5)])
        else:
            y = x @ plain.T + 0.5 * (x @ a.T) @ b.T
        return [y.detach(), *torch.autograd.grad(y.sum(), inputs)]

    for _ in range(3):
        ours = autocast(lambda: grads(x, a, b, None))
    exact = grads(*(t.bfloat16().double() for t in (x, a, b)), weight.bfloat16().double())
    low = grads(*(t.bfloat16() for t in (x, a, b)), weight.bfloat16())
    for name, got, oracle, baseline in zip(("y", "x", "a", "b"), ours, exact, low, strict=True):
        # autocast's own conversions carry the gradients back to float32: the values are bfloat16's
        assert_accurate(got.bfloat16(), oracle, baseline, name)


def test_report_counts_conversions() -> None:
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    deltaops.attach(model, deltaops.LoRA(r=2, target_modules=["0"]))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(30, K))
    assert deltaops.report(model).packed == 2 * N * K
