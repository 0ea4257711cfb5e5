"""What LoRA on the experts of a mixture refuses, and before anything changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA
from deltaops.errors import CheckpointError, ConfigError, ShapeError, TargetError
from deltaops.modules.experts import Way, run_experts
from deltaops.surgery import experts as surgery_experts

from .mixtures import (
    NAMES,
    PLACE,
    SIZES,
    build,
    experts_only,
    shaken,
)

transformers = pytest.importorskip("transformers")

# transformers renames gradient checkpointing between the versions that we support
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def test_experts_are_known_whatever_stands_around_and_no_failure_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    accelerate = pytest.importorskip("accelerate")

    experts = build().get_submodule(PLACE)
    for around in (
        torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode(),
        FakeTensorMode(), accelerate.init_empty_weights(include_buffers=True),
    ):  # fmt: skip
        surgery_experts._cache.clear()
        with around:
            assert surgery_experts.unlike_experts(experts) is None
    surgery_experts._cache.clear()
    with monkeypatch.context() as patch:
        patch.setattr(surgery_experts, "reference", lambda x, *others: x)
        assert "compute something else" in str(surgery_experts.unlike_experts(experts))
    assert surgery_experts.unlike_experts(experts) is None
    experts._apply_gate = lambda x: x[..., ::2]
    assert "has a gate of its own" in str(surgery_experts.unlike_experts(experts))


SHAPES: dict[str, tuple[dict[str, Tensor], str]] = {
    "x": ({"x": torch.zeros(3, 5)}, r"x must be \[T, 4\], got \[3, 5\]"),
    "index": ({"index": torch.zeros(2, 1, dtype=torch.long)}, r"index must be \[3, J\]"),
    "weights": ({"weights": torch.zeros(3, 2)}, r"weights must be \[3, 1\]"),
    "down": ({"down": torch.zeros(2, 4, 5)}, r"down must be \[2, 4, 3\]"),
    "no such expert": ({"index": torch.full((3, 1), 2)}, "from 0 to 1"),
}


@pytest.mark.parametrize(("wrong", "message"), SHAPES.values(), ids=SHAPES)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, Tensor], message: str) -> None:
    given = {
        "x": torch.zeros(3, 4), "index": torch.zeros(3, 1, dtype=torch.long),
        "weights": torch.ones(3, 1), "gate_up": torch.zeros(2, 6, 4), "down": torch.zeros(2, 4, 3),
    } | wrong  # fmt: skip
    x, index, weights, gate_up, down = given.values()
    way = Way("auto", False, "auto")
    with pytest.raises(ShapeError, match=message):
        run_experts(x, index, weights, (gate_up, []), (down, []), nn.SiLU(), way)


def tiny_gpt_oss() -> Any:
    with torch.device("meta"):
        config = transformers.GptOssConfig(**SIZES)
        return transformers.GptOssModel(config)


class _Halved(nn.Module):
    """Experts with the two parameters, which are computed with in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 4))
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x / 2


class HalvedExperts(_Halved):
    pass


REFUSALS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gpt-oss": (
        tiny_gpt_oss,
        {},
        r"GptOssExperts has gate_up_proj \[5, 24, 40\], gate_up_proj_bias \[5, 40\], down_proj .*"
        "without biases",
    ),
    "other arithmetic": (
        lambda: nn.ModuleDict({"experts": HalvedExperts()}),
        {},
        "and computes something else with them than Mixtral's experts do",
    ),
    "unknown name": (
        build,
        {"target_parameters": ["experts.gate_proj"]},
        r"target_parameters names 'experts.gate_proj', and no parameter .* Nearest: experts",
    ),
    "router": (
        build,
        {"target_modules": ["gate"]},
        "routers are parameters: name those in target_parameters",
    ),
    "norm": (build, {"target_parameters": ["norm.weight"]}, "name layers in target_modules"),
    "linear": (
        build,
        {"target_parameters": ["q_proj.weight"], "target_modules": "all-linear"},
        "weight of Linear: target_parameters is for experts",
    ),
    "dora": (build, {"use_dora": True}, "it holds experts, and use_dora needs linear layers"),
    "pissa": (build, {"init_lora_weights": "pissa"}, "it holds experts, and init_lora_weights"),
    "excluded": (build, {"exclude_modules": ["experts"]}, "says nothing of target_parameters"),
    "another layer": (
        build,
        {"target_parameters": [f"{PLACE}.down_proj"], "layers_to_transform": [1]},
        r"in none of layers_to_transform=\[1\]",
    ),
    "the root": (
        lambda: build().get_submodule(PLACE),
        {"target_parameters": ["down_proj"]},
        "down_proj of MixtralExperts is at the model's root",
    ),
    "one of two": (
        build,
        {"target_parameters": [*NAMES, "q_proj.weight"]},
        "Take parameters that it cannot have out of target_parameters.$",
    ),
    "saved whole": (build, {"modules_to_save": ["experts"]}, "modules_to_save trains it whole"),
    "as a module": (
        build,
        {"target_modules": ["mlp.experts"], "target_parameters": ()},
        "experts are parameters: name those in target_parameters",
    ),
    "none there": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)),
        {"target_modules": "experts", "target_parameters": ()},
        "no experts in 3-D parameters",
    ),
}


@pytest.mark.parametrize(("make", "settings", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_it_cannot_do_is_refused_before_anything_changes(
    make: Any, settings: dict[str, Any], message: str
) -> None:
    model = make()
    before = [(type(m), sorted(vars(m)), list(m._modules)) for m in model.modules()]
    with pytest.raises(TargetError, match=message):
        deltaops.attach(model, experts_only(**settings))
    assert [(type(m), sorted(vars(m)), list(m._modules)) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_no_targets_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="target_modules is empty"):
        LoRA(target_modules=[])
    with pytest.raises(ConfigError, match="target_parameters must be module names"):
        LoRA(target_parameters=[3])  # type: ignore[arg-type]


def test_a_file_for_other_experts_is_refused(tmp_path: Path) -> None:
    shaken(build(), experts_only()).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"must be \[12, 24\] for this model"):
        deltaops.load(build(num_local_experts=4, num_experts=4), tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        deltaops.load(transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), tmp_path)
