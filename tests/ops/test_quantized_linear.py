"""Quantised weights: what their codes stand for, and layers on them with every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaops.errors import ConfigError, DeviceError, DtypeError, GradientError, ShapeError
from deltaops.ops import Branch, QuantizedWeight, delta_linear, quantized_linear
from deltaops.reference.quantized import NF4, dequantize, quantize_int8, quantize_nf4
from deltaops.testing import assert_accurate

WEIGHTS = {
    "int8": quantize_int8,
    "nf4": quantize_nf4,
    "nf4 in small blocks": lambda w: quantize_nf4(w, 16),
}


def test_values_of_nf4_are_quantiles() -> None:
    outermost = 1.0 - 0.5 * (1.0 / 32.0 + 1.0 / 30.0)
    above, below = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, count, dtype=torch.float64)[:-1])
        for count in (9, 8)
    )
    wanted = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above[0]
    torch.testing.assert_close(torch.tensor(NF4).double(), wanted, rtol=0, atol=1e-6)
    assert torch.tensor(NF4).tolist() == list(NF4)  # as float32 has them


@pytest.mark.parametrize("shape", [(5, 64), (7, 33), (3, 1), (0, 8)], ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_codes_stand_for_the_nearest_values(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape)
    quantized = WEIGHTS[kind](w)
    made = dequantize(quantized, torch.float32)
    assert made.shape == shape
    if not w.numel():
        return
    scales = quantized.scales.repeat_interleave(quantized.block)[: w.numel()].view(shape)
    gap = 0.5 if kind == "int8" else (1.0 - NF4[-2]) / 2 + 0.02
    assert bool(((made - w).abs() <= gap * scales + 1e-6).all())
    assert torch.equal(made, dequantize(quantized, torch.float64).float())
    # what can be said exactly is said exactly
    again = dequantize(WEIGHTS[kind](made), torch.float32)
    torch.testing.assert_close(again, made, rtol=1e-6, atol=0)


def test_the_first_code_of_a_byte_is_its_upper_half() -> None:
    codes = torch.tensor([0x0F, 0xF7, 0x70], dtype=torch.uint8)
    quantized = QuantizedWeight(codes, torch.tensor([2.0, 3.0]), (1, 5), "nf4", 4)
    assert dequantize(quantized, torch.float32).tolist() == [[-2.0, 2.0, 2.0, 0.0, 0.0]]


Made = tuple[Tensor, QuantizedWeight, Tensor, list[Branch]]


def make(kind: str, dtype: torch.dtype, adapter: torch.dtype) -> Made:
    torch.manual_seed(1)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    bias = torch.randn(40).to(dtype).requires_grad_()
    pairs = [(torch.randn(r, 64) / 8, torch.randn(40, r)) for r in (4, 3)]
    leaves = [[t.to(adapter).requires_grad_() for t in pair] for pair in pairs]
    branches = [Branch(*leaves[0], 0.7), Branch(*leaves[1], activation="relu")]
    return x, WEIGHTS[kind](torch.randn(40, 64) / 8), bias, branches


def leaves_of(made: Made) -> list[Tensor]:
    x, _, bias, branches = made
    return [x, bias, *(t for r in branches for t in (r.a, r.b))]


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    return list(torch.autograd.grad(y, leaves, torch.randn(y.shape).to(y.dtype)))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=["f32", "bf16"],
)
def test_outputs_and_gradients(kind: str, dtype: torch.dtype, adapter: torch.dtype) -> None:
    made = make(kind, dtype, adapter)
    x, weight, bias, branches = made
    y = quantized_linear(*made)
    found = [y, *gradients(y, leaves_of(made))]
    again = quantized_linear(*made)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found, [again, *gradients(again, leaves_of(made))], strict=True)
    )
    dense = dequantize(weight, dtype)
    same = delta_linear(x, dense, bias, branches)
    plain = [same, *gradients(same, leaves_of(made))]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    wide = [t.detach().double().requires_grad_() for t in leaves_of(made)]
    inner = [r._replace(a=a, b=b) for r, a, b in zip(branches, wide[2::2], wide[3::2], strict=True)]
    oracle = delta_linear(wide[0], dense.double(), wide[1], inner, backend="reference")
    low = delta_linear(x, dense, bias, branches, backend="reference")
    for i, (got, want, reference) in enumerate(
        zip(found, [oracle, *gradients(oracle, wide)],
            [low, *gradients(low, leaves_of(made))], strict=True)
    ):  # fmt: skip
        assert_accurate(got, want, reference, f"result {i}")


def test_the_weight_is_not_kept_for_the_backward_pass() -> None:
    made = make("nf4", torch.float32, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantized_linear(*made)
    assert all(t.shape != (40, 64) for t in kept)
    assert any(t.data_ptr() == made[1].codes.data_ptr() for t in kept)


def test_strides_of_codes_do_not_matter() -> None:
    made = make("int8", torch.float32, torch.float32)
    x, weight, *rest = made
    columns = weight._replace(
        codes=weight.codes.t().contiguous().t(), scales=weight.scales.repeat_interleave(2)[::2]
    )
    results = [quantized_linear(x, w, *rest) for w in (weight, columns)]
    assert torch.equal(*results)
    grads = [gradients(y, leaves_of(made)) for y in results]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_columns() -> None:
    y = quantized_linear(torch.ones(2, 0), quantize_int8(torch.ones(3, 0)), torch.ones(3))
    assert y.tolist() == [[1.0] * 3] * 2


def test_dropout_draws_what_a_dense_layer_draws() -> None:
    x, weight, bias, (first, _) = make("int8", torch.float32, torch.float32)
    results = []
    for run, w in ((quantized_linear, weight), (delta_linear, dequantize(weight, x.dtype))):
        torch.manual_seed(5)
        y = run(x, w, bias, [first._replace(dropout=0.5)])
        results.append([y, *gradients(y, [x, first.a])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_compilers_and_transforms_compute_the_same() -> None:
    made = make("nf4", torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized_linear(*made)
        dense = dequantize(made[1], torch.bfloat16)
        assert torch.equal(y, delta_linear(made[0], dense, *made[2:]))
    y = quantized_linear(*made)
    x, *rest = made
    compiled = torch.compile(quantized_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*made), y)
    torch.testing.assert_close(torch.vmap(lambda x: quantized_linear(x, *rest))(x), y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "fp4"}, ConfigError, "weight.kind must be one of int8, nf4"),
        ({"block": 0}, ConfigError, "weight.block must be at least 1"),
        ({"kind": "int8", "block": 32}, ConfigError, "weight.block must be 64, a row"),
        ({"codes": torch.zeros(1280, dtype=torch.int8)}, DtypeError, "codes of nf4 must be"),
        ({"scales": torch.zeros(40).double()}, DtypeError, "scales must be torch.float32"),
        ({"codes": torch.zeros(9, dtype=torch.uint8)}, ShapeError, r"must be \[1280\], got \[9\]"),
        ({"scales": torch.zeros(9)}, ShapeError, r"must be \[40\], got \[9\]"),
        ({"scales": torch.zeros(40, device="meta")}, DeviceError, "scales must be on the device"),
        ({"scales": torch.zeros(40).requires_grad_()}, GradientError, "scales are frozen"),
    ],
)
def test_errors_say_what_is_wrong(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    x, weight, bias, branches = make("nf4", torch.float32, torch.float32)
    with pytest.raises(error, match=message):
        quantized_linear(x, weight._replace(**change), bias, branches)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ShapeError, match="x must be"):
        quantized_linear(x[..., :3], weight, bias, branches)


@pytest.mark.parametrize("wants_x", [False, True])
def test_backward_makes_the_weight_for_the_gradient_of_x_alone(
    wants_x: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias, branches = make("nf4", torch.float32, torch.float32)
    x = x.detach().requires_grad_(wants_x)
    made = []

    def counted(*arguments: Any) -> Tensor:
        made.append(dequantize(*arguments))
        return made[-1]

    monkeypatch.setattr("deltaops.reference.quantized.dequantize", counted)
    y = quantized_linear(x, weight, bias, branches)
    assert len(made) == 1
    leaves = [*([x] if wants_x else []), *leaves_of((x, weight, bias, branches))[1:]]
    found = gradients(y, leaves)
    assert len(made) == 1 + wants_x
    wanted = gradients(delta_linear(x, made[0], bias, branches), leaves)
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
