"""LoRA on the routers of a mixture, with PEFT's "all-linear" beside it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.func import functional_call

import deltaops
from deltaops import LoRA
from deltaops.errors import CheckpointError, TargetError
from deltaops.surgery import Handle
from deltaops.surgery.files import CONFIG, WEIGHTS
from deltaops.testing import bound, relative_error

from .mixtures import IDS, answer, build, grad_of, loss_of, shaken, stirred

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# transformers renames gradient checkpointing between the versions that we support
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # PEFT looks for its patterns among modules, says so, and uses them
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),
]
ROUTER = "layers.0.mlp.gate"


def router(**settings: Any) -> LoRA:
    """On nothing but routers; of a rank above the number of experts, as is usual."""
    given = {"r": 6, "alpha": 9, "target_modules": [], "target_parameters": ["gate.weight"]}
    return LoRA(**given | settings)


def everything(family: str) -> Any:
    """PEFT's "all-linear" on a model of ``family``, not at its start."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
    return stirred(peft.get_peft_model(build(family), config))


@pytest.mark.parametrize("family", ["Mixtral", "Olmoe"])
def test_a_file_of_pefts_all_linear_means_the_same(family: str, tmp_path: Path) -> None:
    theirs = everything(family)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (
        "gate.weight" in json.loads((tmp_path / "theirs" / CONFIG).read_text())["target_parameters"]
    )
    model = build(family)
    handle = deltaops.load(model, tmp_path / "theirs")
    assert ROUTER in handle.sites
    assert relative_error(answer(model), answer(build(family))) > 0.01
    assert relative_error(answer(model), answer(theirs)) < 16 * bound(0.0, torch.float32)
    for each in (model, theirs):
        loss_of(answer(each)).backward()
    expected = {k: grad_of(p) for k, p in theirs.named_parameters() if p.requires_grad}
    grads = {k: grad_of(t) for k, t in handle.state().items()}  # type: ignore[arg-type]  # parameters
    found = handle.delta.to_peft_tensors(grads, handle.places)
    assert found.keys() == {key.replace(".default", "") for key in expected}
    for key, grad in expected.items():
        torch.testing.assert_close(found[key.replace(".default", "")], grad, rtol=1e-3, atol=1e-7)
    handle.save(tmp_path / "ours")
    mine, back = (
        safetensors.torch.load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "theirs")
    )
    assert mine.keys() == back.keys()
    assert all(torch.equal(mine[key], back[key]) for key in mine)
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    assert torch.equal(answer(again), answer(theirs))


def test_accelerate_takes_all_linear_and_leaves_the_router_to_peft() -> None:
    model = everything("Mixtral")

    def run() -> list[Tensor]:
        model.zero_grad()
        y = answer(model)
        loss_of(y).backward()
        return [y, *(grad_of(p) for p in model.parameters() if p.requires_grad)]

    expected = run()
    rows = {row.path: row for row in deltaops.accelerate(model).rows if ".layers.0." in row.path}
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert rows[f"base_model.model.{ROUTER}"].kind == "left alone"
    for place in ("mlp.experts", "self_attn.q_proj"):
        assert rows[f"base_model.model.layers.0.{place}"].backend != "peft"


def test_numbers_and_gradients_against_float64() -> None:
    model = build(num_hidden_layers=1)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # the only one in float64
    handle = shaken(model, router(use_rslora=True))
    leaves = {k: t.detach().double().requires_grad_() for k, t in handle.state().items()}
    a, b = leaves[f"{ROUTER}.lora_A.weight"], leaves[f"{ROUTER}.lora_B.weight"]
    weight = exact.get_parameter(f"{ROUTER}.weight") + 9 / 6**0.5 * b @ a
    expected = functional_call(exact, {f"{ROUTER}.weight": weight}, kwargs={"input_ids": IDS})
    y = answer(model)
    assert relative_error(y, answer(build(num_hidden_layers=1))) > 0.01
    assert relative_error(y, expected.last_hidden_state) < 16 * bound(0.0, torch.float32)
    loss_of(expected.last_hidden_state).backward()
    loss_of(y).backward()
    for key, tensor in handle.state().items():
        assert relative_error(grad_of(tensor), grad_of(leaves[key])) < 1e-4, key


def switched(handle: Handle, model: Any) -> list[Tensor]:
    """What the model answers disabled, merged and unmerged."""
    with handle.disabled():
        found = [answer(model)]
    handle.merge()
    found.append(answer(model))
    handle.unmerge()
    return [*found, answer(model)]


def test_it_starts_as_the_model_was_and_is_switched_merged_copied_and_reverted() -> None:
    model = build()
    state, before = copy.deepcopy(model.state_dict()), answer(model)
    kinds = [type(m) for m in model.modules()]
    handle = deltaops.attach(model, router(), frozen=False, blocks=False)
    assert torch.equal(answer(model), before)
    assert [p.numel() for p in handle.parameters()] == [6 * 24, 5 * 6] * 2
    handle.revert()
    handle = shaken(model, router(), frozen=False, blocks=False)
    y = answer(model)
    assert relative_error(y, before) > 0.01
    disabled, merged, unmerged = switched(handle, model)
    assert torch.equal(disabled, before)
    assert relative_error(merged, y) < 16 * bound(0.0, torch.float32)
    assert torch.equal(unmerged, y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(twin), y)
    row = next(row for row in deltaops.report(model).rows if row.path == ROUTER)
    assert row[1:4] == (
        "lora",
        "torch",
        "its small weight and the branch are summed in torch once a pass",
    )
    assert "MixtralTopKRouter 24→5 weight" in str(handle)
    handle.revert()
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert torch.equal(answer(model), before)


def test_bfloat16_checkpointing_and_compilation() -> None:
    model = build(num_hidden_layers=1).to(torch.bfloat16)
    model.set_experts_implementation("eager")  # whatever the sizes are
    handle = shaken(model, router())
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    y = answer(model)
    loss_of(y).backward()
    grads = [grad_of(p).clone() for p in handle.parameters()]
    assert all(float(grad.abs().max()) > 0 for grad in grads)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(answer(model)).backward()
    assert all(
        torch.equal(grad_of(p), grad) for p, grad in zip(handle.parameters(), grads, strict=True)
    )
    gate = model.eval().get_submodule(ROUTER)
    x = torch.randn(7, 24).to(torch.bfloat16)
    for found, eager in zip(torch.compile(gate, backend="aot_eager")(x), gate(x), strict=True):
        torch.testing.assert_close(found, eager)


def test_the_logits_that_transformers_collects_are_the_adapted_ones() -> None:
    model = build(num_hidden_layers=1)
    handle = shaken(model, router())
    (logits,) = model(input_ids=IDS, output_router_logits=True).router_logits
    handle.merge_and_unload()
    (merged,) = model(input_ids=IDS, output_router_logits=True).router_logits
    assert relative_error(logits, merged) < 16 * bound(0.0, torch.float32)


REFUSALS = {
    "dropout": ({"dropout": 0.1}, "it is a router, whose sum of weights has no dropout"),
    "dora": ({"use_dora": True}, "it is a router, and use_dora and init_lora_weights need layers"),
    "pissa": ({"init_lora_weights": "pissa"}, "use_dora and init_lora_weights need layers"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_a_router_cannot_have_is_refused_before_anything_changes(
    settings: dict[str, Any], message: str
) -> None:
    model = build(num_hidden_layers=1)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TargetError, match=message):
        deltaops.attach(model, router(**settings))
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


def test_a_file_for_a_model_without_routers_is_refused(tmp_path: Path) -> None:
    shaken(build(), router()).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit this model: .*leaves no module"):
        deltaops.load(build("Llama"), tmp_path)


def test_a_router_beside_another_delta_is_switched_by_itself() -> None:
    model = build(num_hidden_layers=1)
    before = answer(model)
    handle = shaken(model, router() + deltaops.BitFit(target_modules=["q_proj"]))  # type: ignore[arg-type]  # two
    y = answer(model)
    with handle.disabled("lora"):
        assert relative_error(answer(model), y) > 1e-3
        assert relative_error(answer(model), before) > 1e-3
    assert torch.equal(answer(model), y)
    handle.revert()
    assert relative_error(answer(model), before) < 16 * bound(0.0, torch.float32)
