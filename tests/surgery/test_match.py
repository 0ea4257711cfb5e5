"""Which modules a delta binds to: PEFT's rules for names, our own for types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import deltaops
from deltaops import LoRA
from deltaops.errors import AttachError, TargetError
from deltaops.surgery.match import match, selects

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


class Subclass(nn.Linear):
    """A linear layer that computes something else."""


def net(**layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"plain": nn.Linear(8, 8), **layers})


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": [r"layers.1.mlp.up_proj", "o_proj"]},
        {"target_modules": r".*\.layers\.0\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers"]},
        {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
    ],
    ids=str,
)
def test_names_mean_what_they_mean_to_peft(
    tiny: Callable[..., Any], settings: dict[str, Any]
) -> None:
    import peft

    ours = match(tiny("llama").model, LoRA(**settings))
    theirs = peft.LoraModel(tiny("llama").model, peft.LoraConfig(**settings), "default")
    wrapped = {p for p, m in theirs.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert set(ours.sites) == wrapped


def test_all_linear_leaves_the_output_embedding_out(tiny: Callable[..., Any]) -> None:
    sites = match(tiny("gpt2").model, LoRA()).sites
    assert "lm_head" not in sites
    assert len(sites) == 8


def test_names_match_whole_parts_of_the_path() -> None:
    assert selects(["proj"], "a.proj")
    assert not selects(["proj"], "a.q_proj")
    assert selects("a.*proj", "a.q_proj")
    assert not selects("q_proj", "a.q_proj")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Subclass(8, 8), "subclass"),
        (parametrizations.weight_norm(nn.Linear(8, 8)), "parametrized"),
        (nn.Linear(8, 8, dtype=torch.float8_e4m3fn, device="meta"), "float8"),
        (nn.MultiheadAttention(8, 2).out_proj, "subclass"),
    ],
    ids=["subclass", "parametrized", "float8", "mha"],
)
def test_other_types_are_left_alone_with_a_reason(layer: nn.Module, reason: str) -> None:
    found = match(net(odd=layer), LoRA(r=2))
    assert found.sites == ("plain",)
    assert found.skipped[0].path == "odd"
    assert reason in found.skipped[0].reason


def test_integer_weight_is_left_alone_or_refused_by_name() -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    model = net(odd=layer)
    assert "int8" in match(model, LoRA(r=2)).skipped[0].reason
    with pytest.raises(TargetError, match=r"torch.int8"):
        deltaops.attach(model, LoRA(r=2, target_modules=["odd", "plain"]))


def test_replaced_forward_is_left_alone() -> None:
    model = net(odd=nn.Linear(8, 8))
    model["odd"].forward = lambda x: x  # type: ignore[index]
    assert "forward was replaced" in match(model, LoRA(r=2)).skipped[0].reason


def test_encoder_layer_whose_fast_path_reads_weights_is_left_alone() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = match(net(encoder=encoder), LoRA(r=2))
    assert found.sites == ("plain",)
    assert any("fast path" in skip.reason for skip in found.skipped)


@pytest.mark.parametrize("target", [["qproj"], "qproj"], ids=["name", "regex"])
def test_unknown_name_lists_the_nearest(tiny: Callable[..., Any], target: Any) -> None:
    model = tiny("llama").model
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TargetError, match="q_proj"):
        deltaops.attach(model, LoRA(target_modules=target))
    assert [type(m) for m in model.modules()] == classes


def test_one_unknown_name_among_known_ones_is_an_error(tiny: Callable[..., Any]) -> None:
    with pytest.raises(TargetError, match=r"'vproj'.*v_proj"):
        match(tiny("llama").model, LoRA(target_modules=["q_proj", "vproj"]))


def test_unknown_module_to_save_is_an_error(tiny: Callable[..., Any]) -> None:
    with pytest.raises(TargetError, match=r"modules_to_save names 'clasifier'.*classifier"):
        match(tiny("bert").model, LoRA(modules_to_save=["clasifier"]))


def test_naming_a_container_is_an_error(tiny: Callable[..., Any]) -> None:
    with pytest.raises(TargetError, match="is not a linear layer but a module with others inside"):
        match(tiny("llama").model, LoRA(target_modules=["self_attn"]))


def test_model_without_linear_layers() -> None:
    with pytest.raises(TargetError, match="no module"):
        match(nn.Sequential(nn.Conv2d(1, 1, 1)), LoRA())


def test_peft_model_is_refused_with_the_remedy(tiny: Callable[..., Any]) -> None:
    import peft

    model = peft.get_peft_model(tiny("llama").model, peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(AttachError, match=r"deltaops.accelerate"):
        match(model, LoRA())
