"""``deltaops.accelerate``: PEFT goes on working, and whatever is not fused says so."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import deltaops
from deltaops.errors import AttachError, TargetError
from deltaops.modules import UNFROZEN, FrozenLinear
from deltaops.ops import Branch

# transformers renames gradient checkpointing between the versions that we support
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
]


def build(model: nn.Module, **settings: Any) -> Any:
    import peft

    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    )
    return peft.get_peft_model(model, config)


@pytest.fixture
def case(tiny: Callable[..., Any], shake: Callable[[nn.Module], None]) -> Any:
    """A PEFT Llama in evaluation, its accelerated twin as ``case.fast``, and a layer of that."""
    case = tiny("llama")
    case.model = build(case.model)
    shake(case.model)
    case.model.eval()
    case.fast = copy.deepcopy(case.model)
    case.report = deltaops.accelerate(case.fast)
    case.layer = case.fast.base_model.model.model.layers[0].self_attn.q_proj
    return case


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of PEFT's layers that reached the op, alone or grouped: x, weight, bias, branches."""
    from deltaops.modules import peft_linear
    from deltaops.ops import delta_linear_group

    seen: list[Any] = []
    theirs: list[Any] = []
    real, layer_of = peft_linear.delta_linear, peft_linear.PeftLoraLinear._layer

    def layer(place: Any, *args: Any) -> Any:
        theirs.append(layer_of(place, *args))
        return theirs[-1]

    def alone(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args)
        return real(*args, **kwargs)

    def together(x: Tensor, layers: list[Any], **kwargs: Any) -> list[Tensor]:
        seen.extend(
            (x, *one) for one in layers if any(o and one.weight is o.weight for o in theirs)
        )
        return delta_linear_group(x, layers, **kwargs)

    monkeypatch.setattr(peft_linear.PeftLoraLinear, "_layer", layer)
    monkeypatch.setattr(peft_linear, "delta_linear", alone)
    monkeypatch.setattr(sys.modules["deltaops.modules.sharing"], "delta_linear_group", together)
    return seen


@torch.no_grad()
def assert_same_logits(case: Any) -> None:
    ids = case.batch["input_ids"]
    torch.testing.assert_close(case.fast(ids).logits, case.model(ids).logits)


def reasons(case: Any) -> dict[str, str]:
    return {row.path.rsplit(".", 2)[-1]: row.reason for row in deltaops.report(case.fast).rows}


def test_every_layer_goes_through_the_op(case: Any, calls: list[Any]) -> None:
    assert_same_logits(case)
    assert len(calls) == 4
    kinds = [row.kind for row in case.report.rows]
    assert kinds.count("peft lora") == 4
    assert kinds.count("frozen") == 11


def test_idempotent_and_reversible(case: Any) -> None:
    classes = {k: type(m) for k, m in case.model.named_modules()}
    fast = {k: type(m) for k, m in case.fast.named_modules()}
    deltaops.accelerate(case.fast)
    assert {k: type(m) for k, m in case.fast.named_modules()} == fast
    case.report.revert()
    assert {k: type(m) for k, m in case.fast.named_modules()} == classes
    assert not any("backend" in vars(m) for m in case.fast.modules())
    deltaops.accelerate(case.fast)
    assert deltaops.accelerate(case.fast, revert=True).rows[0].kind == "left alone"


def test_frozen_layers_are_optional(case: Any) -> None:
    deltaops.accelerate(case.fast, revert=True)
    report = deltaops.accelerate(case.fast, frozen=False, loss=False, blocks=False)
    assert not any(isinstance(m, FrozenLinear) for m in case.fast.modules())
    assert {row.kind for row in report.rows} == {"peft lora"}


def test_disabling_adapters(case: Any, calls: list[Any]) -> None:
    with case.fast.disable_adapter(), case.model.disable_adapter():
        assert_same_logits(case)
        assert "disabled" in reasons(case)["q_proj"]
    assert not calls
    assert_same_logits(case)
    assert calls


def test_merging_and_unmerging(case: Any, calls: list[Any]) -> None:
    for model in (case.fast, case.model):
        model.merge_adapter()
    assert "merged" in reasons(case)["q_proj"]
    assert_same_logits(case)
    assert not calls
    for model in (case.fast, case.model):
        model.unmerge_adapter()
    assert_same_logits(case)
    assert calls


def test_merge_and_unload(case: Any) -> None:
    case.fast, case.model = case.fast.merge_and_unload(), case.model.merge_and_unload()
    assert_same_logits(case)


def test_several_adapters_switched_and_together(
    case: Any, calls: list[Any], shake: Callable[[nn.Module], None]
) -> None:
    import peft

    for model in (case.fast, case.model):
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
        shake(model)
        model.set_adapter("second")
        model.eval()
    assert_same_logits(case)
    assert [len(args[3]) for args in calls] == [1, 0, 1, 0], "q has the second adapter, v has none"
    deltaops.accelerate(case.fast)
    for model in (case.fast, case.model):
        model.base_model.set_adapter(["default", "second"])
    calls.clear()
    assert_same_logits(case)
    assert [len(args[3]) for args in calls] == [2, 1, 1, 2, 1, 1]
    for model in (case.fast, case.model):
        model.delete_adapter("second")
    assert_same_logits(case)


@pytest.mark.parametrize("names", [["default", "__base__"], ["__base__", "__base__"]])
def test_mixed_batches_stay_in_the_op(case: Any, calls: list[Any], names: list[str]) -> None:
    ids = case.batch["input_ids"]
    with torch.no_grad():
        fast = case.fast(ids, adapter_names=names).logits
        slow = case.model(ids, adapter_names=names).logits
    torch.testing.assert_close(fast, slow)
    assert len(calls) == 4


def test_save_and_from_pretrained(case: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    import peft

    case.fast.save_pretrained(tmp_path / "fast")
    case.model.save_pretrained(tmp_path / "slow")
    name = "adapter_model.safetensors"
    assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes()
    case.fast = peft.PeftModel.from_pretrained(tiny("llama").model, tmp_path / "fast").eval()
    deltaops.accelerate(case.fast)
    assert_same_logits(case)


def test_deepcopy_and_pickle(case: Any) -> None:
    buffer = io.BytesIO()
    torch.save(case.fast, buffer)
    buffer.seek(0)
    case.fast = copy.deepcopy(torch.load(buffer, weights_only=False))
    assert_same_logits(case)


def test_dropout_in_training_is_seeded(case: Any, tiny: Callable[..., Any]) -> None:
    model = build(tiny("llama").model, lora_dropout=0.5)
    deltaops.accelerate(model)
    model.train()
    nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(case.batch["input_ids"]).logits)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def hook(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)


def pre_hook(layer: Any) -> None:
    layer.lora_A["default"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(layer: Any) -> None:
    layer.lora_B["default"].register_full_backward_hook(lambda module, ins, outs: None)


def replaced_forward(layer: Any) -> None:
    inner = layer.base_layer
    inner.forward = lambda x: nn.functional.linear(x, inner.weight) + 1


def parametrized(layer: Any) -> None:
    parametrizations.weight_norm(layer.base_layer)


def parametrized_adapter(layer: Any) -> None:
    parametrizations.weight_norm(layer.lora_A["default"])


def other_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.AlphaDropout(0.5).eval()


def lora_bias(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(layer.out_features))


def unfrozen(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_(True)


def variant(layer: Any) -> None:
    class Twice:
        def forward(self, module: Any, *, result: Tensor, **rest: Any) -> Tensor:
            return result * 2

    layer.lora_variant["default"] = Twice()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "hooks sit on base_layer"),
        (pre_hook, "hooks sit on lora_A"),
        (backward_hook, "backward hooks sit on lora_B"),
        (replaced_forward, "forward of base_layer was replaced"),
        (parametrized, "weight of base_layer is computed"),
        (parametrized_adapter, "weight of lora_A is computed"),
        (other_dropout, "dropout is a AlphaDropout"),
        (lora_bias, "lora_bias is on"),
        (unfrozen, UNFROZEN),
        (variant, "a LoRA variant is set"),
    ],
)
def test_what_cannot_be_fused_runs_pefts_forward_and_says_so(
    case: Any, calls: list[Any], change: Callable[[Any], None], reason: str
) -> None:
    twin = case.model.base_model.model.model.layers[0].self_attn.q_proj
    for layer in (case.layer, twin):
        change(layer)
    row = next(r for r in deltaops.report(case.fast).rows if "layers.0.self_attn.q_proj" in r.path)
    assert reason in row.reason
    assert row.backend == "peft"
    assert_same_logits(case)
    assert len(calls) == 3


def test_unfrozen_base_weight_still_gets_its_gradient(case: Any) -> None:
    unfrozen(case.layer)
    case.fast(case.batch["input_ids"]).logits.sum().backward()
    assert case.layer.base_layer.weight.grad is not None


def test_unfrozen_frozen_layer_falls_back_visibly(case: Any) -> None:
    head = case.fast.base_model.model.lm_head
    assert isinstance(head, FrozenLinear)
    head.weight.requires_grad_(True)
    case.fast(case.batch["input_ids"]).logits.sum().backward()
    assert head.weight.grad is not None
    row = next(r for r in deltaops.report(case.fast).rows if r.path.endswith("lm_head"))
    assert (row.backend, row.reason) == ("torch", UNFROZEN)


def test_dora_is_left_alone_and_reported(tiny: Callable[..., Any]) -> None:
    import peft

    case = tiny("llama")
    case.model = build(case.model, use_dora=True)
    case.fast = copy.deepcopy(case.model)
    report = deltaops.accelerate(case.fast)
    rows = [row for row in report.rows if row.kind == "left alone"]
    assert len(rows) == 4
    assert all("DoraLinearVariant" in row.reason for row in rows)
    layer = case.fast.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is peft.tuners.lora.layer.Linear
    assert_same_logits(case)


def test_other_lora_layers_are_left_alone_and_reported(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")
    model = build(case.model, target_modules=["q_proj", "embed_tokens"])
    rows = deltaops.accelerate(model).rows
    assert [row.path.rsplit(".", 1)[-1] for row in rows if row.kind == "left alone"] == [
        "embed_tokens"
    ]


def test_adapter_narrower_than_its_base(case: Any, calls: list[Any]) -> None:
    for model in (case.fast, case.model):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    assert "adapter torch.bfloat16 on torch.float32" in reasons(case)["q_proj"]
    assert_same_logits(case)
    assert not calls


def test_autocast(case: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        ids = case.batch["input_ids"]
        fast, slow = case.fast(ids).logits, case.model(ids).logits
    assert fast.dtype == slow.dtype
    torch.testing.assert_close(fast, slow, rtol=0.05, atol=0.05)


def test_torch_compile_fullgraph_of_a_layer(case: Any) -> None:
    x = torch.randn(3, 24)
    compiled = torch.compile(case.layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), case.layer(x))


def test_the_call_adds_what_the_op_needs_and_no_more(case: Any) -> None:
    (branch,) = case.layer.branches()
    assert isinstance(branch, Branch)
    assert branch.a is case.layer.lora_A["default"].weight
    assert branch.scaling == 2.0
    assert branch.dropout == 0.0


def test_models_that_it_is_not_for(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").model
    with pytest.raises(TargetError, match="no LoRA layer of PEFT"):
        deltaops.accelerate(model)
    deltaops.attach(model, deltaops.LoRA(r=4))
    with pytest.raises(AttachError, match="fused already"):
        deltaops.accelerate(model)
