"""Files of the methods beside LoRA: PEFT as the oracle where it has them, else our manifest."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaops
from deltaops import IA3, Adapter, BitFit, LNTuning, LoRA, ParallelAdapter
from deltaops.errors import CheckpointError
from deltaops.surgery.files import CONFIG, MANIFEST, TENSORS, WEIGHTS
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import ARCHITECTURES, answer, build

pytestmark = [
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*:UserWarning"),
]


def saved(delta: Any, name: str, folder: Path) -> torch.nn.Module:
    """A model with trained-looking values, and its adapter in ``folder``."""
    model = build(name)
    handle = deltaops.attach(model, delta)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    handle.save(folder)
    return model


PATTERNS = LoRA(
    r=2,
    alpha=4,
    target_modules=["attention-output", "feed-forward-output"],
    rank_pattern={r".*\.0\..*": 3, "attention.output.dense": 5},
    alpha_pattern={"1.output.dense": 1.5},
)
DORA, PLAIN = LoRA(r=3, alpha=5, use_dora=True), LoRA(r=3, alpha=5)
CASES = [(delta, name) for delta in (IA3(), LNTuning()) for name in ARCHITECTURES]
CASES += [(DORA, name) for name in ("gpt2", "bert", "llama")]
CASES += [(PLAIN, name) for name in ("gpt2", "llama", "t5", "vit")]
CASES += [(PATTERNS, "bert")]
CASES += [(delta(layers_to_transform=[1]), "bert") for delta in (LoRA, LNTuning)]
OTHERS = [(delta, name) for delta in (DORA, PLAIN) for name in ARCHITECTURES]
OTHERS = [case for case in OTHERS if case not in CASES]


@pytest.mark.parametrize(
    ("delta", "name"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.everything) for case in OTHERS)],
    ids=[f"{delta.kind}-{name}" for delta, name in CASES + OTHERS],
)
def test_peft_computes_the_same_and_files_go_both_ways(
    delta: Any, name: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = saved(delta, name, tmp_path / "ours")
    ours = deltaops.surgery.handle_of(model)
    assert ours is not None
    theirs = peft.PeftModel.from_pretrained(
        build(name), tmp_path / "ours", is_trainable=True
    ).eval()
    found, expected = answer(name, model), answer(name, theirs)
    assert relative_error(found, expected) < 16 * bound(0.0, torch.float32)
    for y in (found, expected):
        (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).mean().backward()
    grads = {
        key.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for key, p in theirs.named_parameters()
        if p.requires_grad
    }
    for key, tensor in ours.state().items():
        grad = grads.pop(key if key in grads else f"{key}.weight")
        assert (grad is None) == (tensor.grad is None)
        if grad is not None and tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, grad, rtol=1e-3, atol=1e-6)
    assert not grads
    theirs.save_pretrained(tmp_path / "theirs")
    bits = [(tmp_path / folder / WEIGHTS).read_bytes() for folder in ("ours", "theirs")]
    assert bits[0] == bits[1]
    back = build(name)
    deltaops.load(back, tmp_path / "theirs")
    assert torch.equal(answer(name, back), answer(name, model))


@pytest.mark.parametrize(
    "delta",
    [Adapter(size=3, layer_norm=True), ParallelAdapter(), BitFit()],
    ids=["adapter", "parallel", "bitfit"],
)
def test_the_manifest_says_all(delta: Any, tmp_path: Path) -> None:
    saved(delta, "bert", tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {MANIFEST, TENSORS}
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert (manifest["format"], manifest["version"]) == ("deltaops", 1)
    assert manifest["method"] == delta.kind
    handle = deltaops.load(build("bert"), tmp_path)
    assert handle.delta == delta


def test_saving_another_method_replaces_the_other_format(tmp_path: Path) -> None:
    saved(BitFit(), "bert", tmp_path)
    model = saved(LoRA(r=2), "bert", tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    back = build("bert")
    deltaops.load(back, tmp_path)
    assert torch.equal(answer("bert", back), answer("bert", model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"version=1, got 'deltaops' and 2"),
        ({"format": "other"}, r"format='deltaops'"),
        ({"method": "telepathy"}, r"method='telepathy'; deltaops knows lora, adapter"),
        ({"method": ["adapter"]}, r"method=\['adapter'\]"),
        ({"settings": [1]}, "an object of settings"),
        ({"settings": {"size": 0}}, "size must be an integer"),
        ({"settings": {"style": ["pfeiffer"]}}, "style must be one of"),
        ({"settings": {"task_type": {}}}, "task_type must be a label"),
        ({"settings": {"scaling": 10**400}}, "scaling must be finite"),
        ({"settings": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"method": "bitfit", "settings": {}}, "tensors are missing"),
    ],
    ids=str,
)
def test_a_broken_manifest_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(Adapter(size=3), "bert", tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | changes))
    refused("bert", tmp_path, message)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    saved(Adapter(size=3), "bert", tmp_path)
    refused("llama", tmp_path, "belong to nothing in this model")


def test_two_adapters_in_one_folder_are_refused(tmp_path: Path) -> None:
    saved(Adapter(size=3), "bert", tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    refused("bert", tmp_path, "holds two adapters")


def test_an_integer_bias_is_refused(tmp_path: Path) -> None:
    import safetensors.torch

    saved(BitFit(target_modules=["query"]), "bert", tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    whole = {k: v.to(torch.int64) for k, v in tensors.items()}
    safetensors.torch.save_file(whole, tmp_path / TENSORS)
    refused("bert", tmp_path, "must be floating point")


def test_values_beyond_the_models_dtype_are_refused(tmp_path: Path) -> None:
    model = build("bert")
    handle = deltaops.attach(model, BitFit(target_modules=["query"]))
    with torch.no_grad():
        next(handle.parameters()).fill_(1e6)
    handle.save(tmp_path)
    half = build("bert").half()
    with pytest.raises(CheckpointError, match=r"must fit into the model's torch\.float16"):
        deltaops.load(half, tmp_path)
    assert all(p.requires_grad for p in half.parameters())
    deltaops.load(half, tmp_path, allow_nonfinite=True)


def test_a_file_in_float8_loads(tmp_path: Path) -> None:
    import safetensors.torch

    saved(BitFit(target_modules=["query"]), "bert", tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    small = {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}
    safetensors.torch.save_file(small, tmp_path / TENSORS)
    state = deltaops.load(build("bert"), tmp_path).state()
    assert all(torch.equal(state[key], small[key].float()) for key in small)
    small[next(iter(small))].fill_(float("nan"))
    safetensors.torch.save_file(small, tmp_path / TENSORS)
    refused("bert", tmp_path, "holds NaN or infinity")


def refused(name: str, folder: Path, message: str) -> None:
    """Loading raises, and the model is as it was."""
    model = build(name)
    twin = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match=message):
        deltaops.load(model, folder)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
