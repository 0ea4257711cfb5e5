"""Ranks of a live model: the function, the optimizer, the files and the way back."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import Adapter, BitFit, Compacter, LoRA, ParallelAdapter
from deltaops.errors import AttachError, ConfigError, TargetError
from deltaops.surgery import Handle, handle_of, rescale, resize, sum_adapters
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import batch, build

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

GPT2, LLAMA = "gpt2", "llama"
HEADS = {GPT2: "LMHeadModel", LLAMA: "ForCausalLM"}
PLACES = {
    GPT2: ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
    LLAMA: ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
}
RANKS = {family: {grown: 7, shrunk: 2} for family, (grown, shrunk) in PLACES.items()}


def attached(family: str, delta: Any, dtype: torch.dtype = torch.float32) -> Handle:
    """A model with trained-looking values."""
    handle = deltaops.attach(build(family, head=HEADS[family]).to(dtype), delta)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return handle


def logits(family: str, model: nn.Module) -> Tensor:
    found: Tensor = model(**batch(family)).logits
    return found


def step(family: str, handle: Handle, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    ids = batch(family)["input_ids"]
    handle.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def delta_weight(handle: Handle, path: str) -> Tensor:
    a, b = (handle.state()[f"{path}.lora_{side}.weight"].detach().double() for side in "AB")
    assert isinstance(handle.delta, LoRA)
    return handle.delta.scaling_at(path) * b @ a


@pytest.mark.parametrize("family", [GPT2, LLAMA])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_growing_keeps_the_function(family: str, dtype: torch.dtype) -> None:
    handle = attached(family, LoRA(r=3, alpha=7, use_rslora=True), dtype)
    before = logits(family, handle.model)
    changes = [delta_weight(handle, path) for path in PLACES[family]]
    scales = [handle.delta.scaling_at(path) for path in PLACES[family]]
    rows = resize(handle, dict.fromkeys(PLACES[family], 8), generator=torch.Generator())
    assert [(row.before, row.after, row.error) for row in rows] == [(3, 8, 0.0)] * 2
    for path, change, scale in zip(PLACES[family], changes, scales, strict=True):
        assert torch.equal(delta_weight(handle, path), change)
        assert handle.delta.scaling_at(path) == scale
        a, b = (handle.state()[f"{path}.lora_{side}.weight"] for side in "AB")
        assert not b[:, 3:].any()
        assert a[3:].abs().min() > 0
    assert relative_error(logits(family, handle.model), before) < 8 * bound(0.0, dtype)


@pytest.mark.parametrize("family", [GPT2, LLAMA])
def test_shrinking_keeps_what_was_named_and_says_what_is_lost(family: str) -> None:
    handle = attached(family, LoRA(r=6, alpha=7), torch.float64)
    path = PLACES[family][0]
    whole = delta_weight(handle, path)
    a, b = (handle.state()[f"{path}.lora_{side}.weight"].detach().clone() for side in "AB")
    (row,) = resize(handle, {path: 2}, keep={path: [4, 1]})
    part = delta_weight(handle, path)
    oracle = 7 / 6 * b[:, [1, 4]] @ a[[1, 4]]
    assert row.kept == (1, 4)
    assert relative_error(part, oracle) < 1e-15
    assert row.error == pytest.approx(float((whole - part).norm() / whole.norm()), rel=1e-9)


def test_by_norm_the_largest_stay_and_by_svd_the_best_sum(tmp_path: Path) -> None:
    path = PLACES[GPT2][0]
    handle = attached(GPT2, LoRA(r=6), torch.float64)
    a, b = (handle.state()[f"{path}.lora_{side}.weight"].detach() for side in "AB")
    sizes = [float(b[:, i].norm() * a[i].norm()) for i in range(6)]
    largest = sorted(sorted(range(6), key=lambda i: -sizes[i])[:3])
    whole = delta_weight(handle, path)
    other = copy.deepcopy(handle.model)
    (row,) = resize(handle, {path: 3})
    assert list(row.kept) == largest
    (best,) = resize(handle_of(other), {path: 3}, by="svd")
    sigma = torch.linalg.svdvals(whole)
    found = delta_weight(handle_of(other), path)
    assert best.error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-6)
    assert float((whole - found).norm() / whole.norm()) == pytest.approx(best.error, rel=1e-9)
    assert best.error < row.error


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "sgd"])
def test_the_next_step_is_that_of_a_model_built_at_that_rank(kind: str) -> None:
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    }[kind]
    shrunk, grown = PLACES[GPT2]
    handle = attached(GPT2, LoRA(r=4, alpha=4, target_modules=["c_attn", "c_proj"]), torch.float64)
    optimizer = make(handle.parameter_groups(1e-2))
    for _ in range(2):
        step(GPT2, handle, optimizer)
    held = {k: copy.deepcopy(optimizer.state[p]) for k, p in handle.state().items()}
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    resize(handle, {shrunk: 2, grown: 6}, keep={shrunk: [0, 3]}, optimizer=optimizer)
    assert settings == [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in handle.parameters()
    }

    # the same tensors, by hand, in a model that was attached so
    other = deltaops.attach(
        build(GPT2, head=HEADS[GPT2]).double(),
        LoRA(
            r=4,
            alpha=4,
            target_modules=["c_attn", "c_proj"],
            rank_pattern={shrunk: 2, grown: 6},
            alpha_pattern={shrunk: 2, grown: 6},
        ),
    )
    second = make(other.parameter_groups(1e-2))
    for key, parameter in other.state().items():
        with torch.no_grad():
            parameter.copy_(handle.state()[key])
        second.state[parameter] = {
            name: by_hand(key, value, shrunk, grown) for name, value in held[key].items()
        }
    step(GPT2, handle, optimizer)
    step(GPT2, other, second)
    for key, parameter in other.state().items():
        assert torch.equal(parameter, handle.state()[key]), key


def by_hand(key: str, value: Any, shrunk: str, grown: str) -> Any:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if key.startswith(f"{shrunk}."):
        return value[[0, 3]].clone() if "lora_A" in key else value[:, [0, 3]].clone()
    if key.startswith(f"{grown}."):
        along = 0 if "lora_A" in key else 1
        shape = list(value.shape)
        shape[along] = 2
        return torch.cat([value, value.new_zeros(shape)], along)
    return value


@pytest.mark.parametrize("family", [GPT2, LLAMA])
def test_files_merging_and_reverting_go_on(family: str, tmp_path: Path) -> None:
    plain = build(family, head=HEADS[family])
    bits = {k: v.clone() for k, v in plain.state_dict().items()}
    handle = attached(family, LoRA(r=4, alpha=9))
    resize(handle, RANKS[family] | {second_layer(handle): 0})
    expected = logits(family, handle.model)
    handle.save(tmp_path / "ours", format="deltaops")
    handle.save(tmp_path / "peft", format="peft")
    for folder in ("ours", "peft"):
        loaded = deltaops.load(build(family, head=HEADS[family]), tmp_path / folder)
        assert torch.equal(logits(family, loaded.model), expected)
        assert loaded.sites == handle.sites
    handle.merge()
    assert relative_error(logits(family, handle.model), expected) < 32 * bound(0.0, torch.float32)
    handle.unmerge()
    assert torch.equal(logits(family, handle.model), expected)
    handle.revert()
    assert type(handle.model) is type(plain)
    after = handle.model.state_dict()
    assert after.keys() == bits.keys()
    assert all(torch.equal(after[key], value) for key, value in bits.items())
    assert {type(m) for m in handle.model.modules()} == {type(m) for m in plain.modules()}


def second_layer(handle: Handle) -> str:
    return handle.sites[1]


@pytest.mark.parametrize("family", [GPT2, LLAMA])
def test_peft_computes_the_same_from_the_file(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    handle = attached(family, LoRA(r=4, alpha=9, target_modules="all-linear"))
    resize(handle, RANKS[family] | {second_layer(handle): 0})
    handle.save(tmp_path, format="peft")
    expected = logits(family, handle.model)
    theirs = peft.PeftModel.from_pretrained(build(family, head=HEADS[family]), tmp_path).eval()
    limit = 32 * bound(0.0, torch.float32)
    assert relative_error(logits(family, theirs), expected) < limit
    deltaops.accelerate(theirs)
    assert relative_error(logits(family, theirs), expected) < limit


def test_a_part_of_a_combination_beside_others(tmp_path: Path) -> None:
    handle = attached(GPT2, LoRA(r=4).named("mine") + LoRA(r=2) + BitFit())
    handle.weigh("mine", 0.5)
    path, gone = PLACES[GPT2]
    expected = logits(GPT2, handle.model)
    resize(handle, {path: 6}, part="mine")
    assert relative_error(logits(GPT2, handle.model), expected) < 8 * bound(0.0, torch.float32)
    resize(handle, {gone: 0}, part="mine")
    resize(handle, {gone: 0, path: 1}, part="lora")
    assert "lora_A" not in dict(handle.model.get_submodule(gone).named_children())
    expected = logits(GPT2, handle.model)
    handle.save(tmp_path)
    loaded = deltaops.load(build(GPT2, head=HEADS[GPT2]), tmp_path)
    assert torch.equal(logits(GPT2, loaded.model), expected)
    assert loaded.places == handle.places
    handle.disable("mine", "lora", "bitfit")
    handle.enable()
    assert torch.equal(logits(GPT2, handle.model), expected)


@pytest.mark.parametrize(
    "delta", [Adapter(size=4), ParallelAdapter(size=4), ParallelAdapter(4, target_modules=["c_fc"])]
)
def test_adapters_have_one_size_for_all_places(delta: Any, tmp_path: Path) -> None:
    handle = attached(GPT2, delta)
    optimizer = torch.optim.AdamW(handle.parameters())
    step(GPT2, handle, optimizer)
    expected = logits(GPT2, handle.model)
    resize(handle, dict.fromkeys(handle.sites, 7), optimizer=optimizer)
    assert relative_error(logits(GPT2, handle.model), expected) < 8 * bound(0.0, torch.float32)
    step(GPT2, handle, optimizer)
    resize(handle, dict.fromkeys(handle.sites, 2), optimizer=optimizer)
    expected = logits(GPT2, handle.model)
    handle.save(tmp_path)
    loaded = deltaops.load(build(GPT2, head=HEADS[GPT2]), tmp_path)
    assert torch.equal(logits(GPT2, loaded.model), expected)
    with pytest.raises(ConfigError, match="one size for all of its"):
        resize(handle, {handle.sites[0]: 3})


def test_adapters_of_several_sizes_can_stay_as_they_are() -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 6), "two": nn.Linear(8, 8)})
    delta = Adapter(reduction_factor=2, target_modules=["one", "two"])
    handle = deltaops.attach(model, delta)
    assert resize(handle, {"one": 3, "two": 4}) == ()
    assert handle.delta == delta
    assert len(resize(handle, {"one": 4, "two": 4})) == 1


def test_dora_and_embeddings_grow_and_shrink(tmp_path: Path) -> None:
    for delta in (LoRA(r=3, use_dora=True), LoRA(r=3, target_modules=["wpe", "c_fc"])):
        handle = attached(GPT2, delta)
        optimizer = torch.optim.AdamW(handle.parameters())
        step(GPT2, handle, optimizer)
        expected = logits(GPT2, handle.model)
        resize(handle, dict.fromkeys(handle.sites, 5), optimizer=optimizer)
        assert relative_error(logits(GPT2, handle.model), expected) < 8 * bound(0.0, torch.float32)
        step(GPT2, handle, optimizer)
        resize(handle, dict.fromkeys(handle.sites, 2) | {handle.sites[0]: 0}, optimizer=optimizer)
        expected = logits(GPT2, handle.model)
        handle.save(tmp_path)
        loaded = deltaops.load(build(GPT2, head=HEADS[GPT2]), tmp_path)
        assert torch.equal(logits(GPT2, loaded.model), expected)


def test_other_scales_are_in_the_file(tmp_path: Path) -> None:
    handle = attached(LLAMA, LoRA(r=4, alpha=9))
    path = PLACES[LLAMA][0]
    rescale(handle, {path: 0.3})
    assert handle.delta.scaling_at(path) == 0.3
    assert handle.delta.scaling_at(PLACES[LLAMA][1]) == 9 / 4
    expected = logits(LLAMA, handle.model)
    handle.save(tmp_path)
    loaded = deltaops.load(build(LLAMA, head=HEADS[LLAMA]), tmp_path)
    assert torch.equal(logits(LLAMA, loaded.model), expected)


def test_a_bad_request_changes_nothing() -> None:
    path, other = PLACES[GPT2]
    handle = attached(GPT2, LoRA(r=4))
    optimizer = torch.optim.AdamW(handle.parameters())
    step(GPT2, handle, optimizer)
    half = torch.optim.AdamW(list(handle.parameters())[:3])
    odd = torch.optim.Adafactor(handle.parameters())
    step(GPT2, handle, odd)
    before = {key: p for key, p in handle.state().items()}
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TargetError, "Nearest", {"ranks": {path: 2, "transformer.h.0.attn.c_atn": 2}}),
        (ConfigError, "a number for each path, got 8", {"ranks": 8}),
        (ConfigError, "integer ≥ 0", {"ranks": {path: 2, other: -1}}),
        (ConfigError, "at most 24", {"ranks": {other: 25}}),
        (ConfigError, "distinct components", {"ranks": {path: 2}, "keep": {path: [1, 1]}}),
        (ConfigError, "distinct components", {"ranks": {path: 2}, "keep": {path: [4]}}),
        (ConfigError, "keep names", {"ranks": {path: 2}, "keep": {other: [1]}}),
        (ConfigError, "by must be", {"ranks": {path: 2}, "by": "luck"}),
        (ConfigError, "part must name", {"ranks": {path: 2}, "part": "mine"}),
        (ConfigError, "one place at least", {"ranks": dict.fromkeys(handle.sites, 0)}),
        (ConfigError, "and does not. Make it", {"ranks": {other: 6}, "optimizer": half}),
        (ConfigError, "Adafactor cannot follow", {"ranks": {other: 2}, "optimizer": odd}),
    ]
    random = torch.get_rng_state()
    for error, message, request in bad:
        with pytest.raises(error, match=message):
            resize(handle, **request)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(handle.state()[key] is p for key, p in before.items())
    assert handle.delta == LoRA(r=4)
    handle.merge()
    with pytest.raises(AttachError, match="merged"):
        resize(handle, {path: 2})
    for delta in (LoRA(r=4, init_lora_weights="pissa"), Compacter(size=4, phm_dim=2)):
        with pytest.raises(ConfigError, match="a rank that can change"):
            resize(attached(GPT2, delta), {path: 2})
    with pytest.raises(ConfigError, match="rescale: expected the handle"):
        rescale(nn.Linear(2, 2), {path: 2.0})  # type: ignore[arg-type]  # what a PEFT user would pass
    with pytest.raises(ConfigError, match="resize: expected the handle"):
        resize(nn.Linear(2, 2), {path: 2})  # type: ignore[arg-type]  # what a PEFT user would pass


def test_components_that_cancel_or_are_no_numbers() -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 6), "two": nn.Linear(6, 6)})
    handle = deltaops.attach(model, LoRA(r=2))
    with torch.no_grad():
        for key, parameter in handle.state().items():
            parameter.copy_(torch.tensor([1.0, -1.0]) if "lora_B" in key else torch.ones(2, 6))
    (row,) = resize(handle, {"one": 1})
    assert row.error == math.inf
    with torch.no_grad():
        handle.state()["two.lora_A.weight"][0, 0] = math.nan
    for by in ("norm", "svd"):
        with pytest.raises(ConfigError, match="must be finite to be compared"):
            resize(handle, {"two": 1}, by=by)
    (row,) = resize(handle, {"two": 1}, keep={"two": [1]})
    assert math.isnan(row.error)


def test_by_svd_no_rank_above_the_layer(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"one": nn.Linear(6, 3)})

    deltaops.attach(model(), LoRA(r=2)).save(tmp_path / "part")
    sum_adapters([tmp_path / "part"] * 3, tmp_path / "sum")
    handle = deltaops.load(model(), tmp_path / "sum")
    with pytest.raises(ConfigError, match="at most 3, the smaller side"):
        resize(handle, {"one": 5}, by="svd")
    (row,) = resize(handle, {"one": 5})
    assert row.after == handle.delta.rank("one") == len(handle.state()["one.lora_A.weight"]) == 5


def test_a_path_that_ends_another_has_a_rank_of_its_own(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        return nn.ModuleDict({"0": nn.Linear(6, 6), "1": inner, "2": nn.Linear(6, 6)})

    handle = deltaops.attach(model(), LoRA(r=2, alpha=3))
    assert handle.sites == ("0", "1.0", "1.1", "2")
    resize(handle, {"0": 3})
    assert [handle.delta.rank(path) for path in handle.sites] == [3, 2, 2, 2]
    assert {key for key, _ in handle.delta.rank_pattern} == {"0", r"1\.0"}
    resize(handle, {"1.0": 0})
    handle.save(tmp_path)
    loaded = deltaops.load(model(), tmp_path)
    assert loaded.sites == handle.sites == ("0", "1.1", "2")
    assert {k: t.shape for k, t in loaded.state().items()} == {
        k: t.shape for k, t in handle.state().items()
    }
