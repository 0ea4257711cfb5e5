"""``deltaops.accelerate`` on LoRA of PEFT over layers that bitsandbytes quantised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

pytestmark = [
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # bitsandbytes' own, of its CPU kernels and of half types
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*"),
    pytest.mark.filterwarnings("ignore:.*CPU.*:UserWarning"),
]

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
    ]),
]  # fmt: skip
KINDS = {"nf4": False, "nf4-nested": True, "int8": None}


def quantised(model: nn.Module, kind: str, device: str, **settings: Any) -> nn.Module:
    """The model's layers of attention and feed-forward, as transformers loads them quantised."""
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or path == "lm_head":
            continue
        n, k, bias = layer.out_features, layer.in_features, layer.bias is not None
        made: Any
        if kind == "int8":
            made = bitsandbytes.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False)
            made.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False)
        else:
            made = bitsandbytes.nn.Linear4bit(k, n, bias, **{"quant_type": "nf4", **settings})
            made.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, requires_grad=False, module=made,
                compress_statistics=bool(KINDS[kind]), quant_type=made.weight.quant_type,
            )  # fmt: skip
        if bias:
            made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        model.set_submodule(path, made.to(device))
    model.is_loaded_in_8bit = kind == "int8"
    model.is_loaded_in_4bit = kind != "int8"
    return model.to(device)


def dense(layer: Any) -> Tensor:
    """The weight that a layer's codes stand for, as bitsandbytes has it."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        weight = layer.weight
        found: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        return found
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    back: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return back


def build(case: Any, kind: str, device: str = "cpu", **settings: Any) -> Any:
    """A LoRA of PEFT on the quantised model, every factor at random."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(quantised(case.model, kind, device, **settings), config)
    generator = torch.Generator(device).manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model


@pytest.fixture
def case(tiny: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """A tiny Llama and a LoRA on its quantised layers."""
    case = tiny("llama")
    case.model = build(case, request.param)
    return case


def rows(model: nn.Module) -> list[Any]:
    """Of the report, those of LoRA."""
    found = deltaops.report(model).rows
    return [r for r in found if r.path.endswith(("q_proj", "v_proj", "down_proj"))]


@pytest.mark.parametrize("case", KINDS, indirect=True)
def test_loss_and_gradients_are_those_of_the_weight_that_the_codes_stand_for(case: Any) -> None:
    oracle = copy.deepcopy(case.model)
    for path, layer in list(oracle.named_modules()):
        if type(layer).__module__.startswith("bitsandbytes"):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = nn.Parameter(dense(layer).to(torch.float32), requires_grad=False)
            oracle.set_submodule(path, plain)
    before = {n: t.clone() for n, t in case.model.state_dict().items() if isinstance(t, Tensor)}
    deltaops.accelerate(case.model)
    assert {row.backend for row in rows(case.model)} <= {"cpu", "reference"}
    results = []
    for model in (case.model, oracle):
        loss = case.loss(model)
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        results.append([loss, *grads])
    # layers without an adapter are bitsandbytes' own: of int8 they round x
    close = {"rtol": 0.05, "atol": 1e-2} if case.model.model.is_loaded_in_8bit else {}
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **close)
    after = case.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_multiplies_by_bitsandbytes_own_numbers(
    tiny: Callable[..., Any], kind: str, device: str
) -> None:
    model = build(tiny("llama"), kind, device)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    weight, x = dense(layer.base_layer).float(), torch.randn(3, 5, 40, device=device)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    deltaops.accelerate(model)
    torch.testing.assert_close(layer(x), x @ weight.T + 2.0 * (x @ a.T) @ b.T)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", ["nf4"], indirect=True)
def test_codes_are_read_where_they_lie_and_revert_restores_the_classes(case: Any) -> None:
    layer = case.model.base_model.model.model.layers[0].mlp.down_proj
    kind = type(layer)
    shown = deltaops.accelerate(case.model)
    weight, _ = layer._resolve()
    assert weight.codes.data_ptr() == layer.base_layer.weight.data_ptr()
    assert weight.scales.data_ptr() == layer.base_layer.weight.quant_state.absmax.data_ptr()
    assert "nf4 codes, blocks of 64" in str(shown)
    shown.revert()
    assert type(layer) is kind
    assert {row.reason for row in rows(case.model)} == {
        "not accelerated: call deltaops.accelerate(model)"
    }


def test_what_the_op_cannot_read_runs_in_peft_and_says_so(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")
    model = build(case, "nf4", quant_type="fp4")
    deltaops.accelerate(model)
    assert {(row.kind, row.backend) for row in rows(model)} == {("left alone", "peft")}
    assert all("its codes are fp4" in row.reason for row in rows(model))

    case = tiny("llama")
    model = build(case, "nf4", compute_dtype=torch.bfloat16)
    shown = str(deltaops.accelerate(model))
    assert "PEFT's forward for adapter_names and for inputs other than torch.bfloat16" in shown
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    found = layer._resolve(torch.float32)
    assert found == (
        "the layer multiplies in torch.bfloat16, its input is torch.float32: PEFT's forward"
    )
    with model.disable_adapter():
        assert {row.reason for row in rows(model)} == {"adapters are disabled: PEFT's forward"}
