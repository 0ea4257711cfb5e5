"""LoRA that starts from the weight itself: what is taken out, what is left, what a file says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import deltaops
from deltaops import LoRA
from deltaops.errors import AttachError, CheckpointError, ConfigError
from deltaops.methods.lora_start import taken_out
from deltaops.surgery.files import CONFIG, WEIGHTS
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, build

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

STARTS = ["pissa", "pissa_niter_4", "olora"]
# a product of 24 terms, subtracted and added again, in every layer
CLOSE = 16 * bound(0.0, torch.float32)


def spread(n: int, k: int) -> torch.Tensor:
    """A matrix whose singular values fall as those of trained weights do."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(n, k, dtype=torch.float64), full_matrices=False)
    return (u * 0.7 ** torch.arange(min(n, k))) @ v


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize(("n", "k"), [(37, 23), (23, 37)])
def test_what_is_taken_out_is_the_best_of_its_rank(start: str, n: int, k: int) -> None:
    weight, rank, scaling = spread(n, k), 5, 1.7
    a, b = taken_out(start, weight.float(), rank, scaling, torch.Generator().manual_seed(1))
    assert (a.shape, b.shape) == ((rank, k), (n, rank))
    left = torch.linalg.matrix_norm(weight - scaling * (b.double() @ a.double()), ord=2)
    assert abs(left.item() - 0.7**rank) < 1e-4  # Eckart and Young: the next singular value
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # each half has the root


def test_olora_takes_out_a_part_of_qr() -> None:
    weight = spread(9, 7)
    a, b = taken_out("olora", weight, 3, 1.0, None)
    torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(b.T @ weight, a)  # so what is left is orthogonal to B


def test_a_sketch_is_drawn_from_the_generator() -> None:
    weight = torch.randn(20, 30)
    first, again, other = (
        taken_out("pissa_niter_1", weight, 2, 1.0, torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("start", STARTS)
def test_the_model_starts_as_it_was_with_another_weight(start: str) -> None:
    model = build("gpt2")
    before = answer("gpt2", model.requires_grad_(False))
    layer: Any = model.get_submodule("h.0.mlp.c_fc")
    weight = layer.weight
    handle = deltaops.attach(model, LoRA(r=4, alpha=6, init_lora_weights=start))
    assert relative_error(answer("gpt2", model), before) < CLOSE
    assert relative_error(layer.weight, weight) > 0.1
    assert not layer.weight.requires_grad
    with handle.disabled():
        assert layer.weight is weight
    assert layer.weight is not weight
    handle.revert()
    assert layer.weight is weight


def test_in_half_precision_what_is_left_is_rounded_once() -> None:
    model = nn.Sequential(nn.Linear(32, 24, bias=False, dtype=torch.bfloat16))
    weight = model[0].weight.detach().double()
    handle = deltaops.attach(model, LoRA(r=4, alpha=4, init_lora_weights="pissa"))
    a, b = (p.detach().double() for p in handle.parameters())
    assert a.dtype == torch.float64
    left = weight - b @ a
    assert relative_error(model[0].weight, left) <= 2.0**-9


def test_a_tied_embedding_keeps_its_weight() -> None:
    model: Any = build("llama", head="ForCausalLM", tie_word_embeddings=True)
    weight = model.model.embed_tokens.weight
    assert model.lm_head.weight is weight
    before = weight.detach().clone()
    handle = deltaops.attach(
        model, LoRA(r=2, target_modules=["lm_head"], init_lora_weights="pissa")
    )
    assert model.model.embed_tokens.weight is weight
    assert torch.equal(weight, before)
    handle.revert()
    assert model.lm_head.weight is weight


def test_what_cannot_be_taken_out_is_refused_before_any_change() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    twin = copy.deepcopy(model)
    with pytest.raises(AttachError, match="holds NaN or infinity"):
        deltaops.attach(model, LoRA(r=2, init_lora_weights="pissa"))
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert torch.equal(model[0].weight, twin[0].weight)
    with pytest.raises(ConfigError, match="r=5 is above its smaller dimension"):
        deltaops.attach(model, LoRA(r=5, init_lora_weights="pissa"))


# ------------------------------------------------------------------------------------- files


def trained(delta: Any) -> nn.Module:
    model = build("bert")
    handle = deltaops.attach(model, delta)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_2", "use_rslora": True, "rank_pattern": {"query": 2}},
        {"init_lora_weights": "olora", "alpha_pattern": {"query": 1.5}},
    ],
    ids=["pissa", "sketched-rslora", "olora"],
)
def test_a_file_is_a_plain_lora_for_every_reader(settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = trained(LoRA(r=3, alpha=6, **settings))
    handle = deltaops.surgery.handle_of(model)
    assert handle is not None
    handle.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["init_lora_weights"]) == (6, True)
    expected = answer("bert", model)
    theirs = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    assert relative_error(answer("bert", theirs), expected) < CLOSE
    back = build("bert")
    loaded = deltaops.load(back, tmp_path)
    assert isinstance(loaded.delta, LoRA)
    assert loaded.delta.init_lora_weights is True
    assert relative_error(answer("bert", back), expected) < CLOSE


def test_a_state_dict_of_another_start_is_not_saved_wrongly(tmp_path: Path) -> None:
    delta = LoRA(r=3, target_modules=["query", "value"], init_lora_weights="pissa_niter_1")
    model = trained(delta)
    for other, merged in ((False, False), (True, False), (True, True)):
        again = build("bert")  # which sets the seed
        if other:
            torch.manual_seed(2)
        handle = deltaops.attach(again, delta)
        again.load_state_dict(model.state_dict())
        expected = answer("bert", again)
        if merged:
            handle.merge()
        state = {k: t.clone() for k, t in again.state_dict().items()}
        if not other:
            handle.save(tmp_path)
            back = build("bert")
            deltaops.load(back, tmp_path)
            assert relative_error(answer("bert", back), expected) < CLOSE
        else:
            with pytest.raises(CheckpointError, match="must be the base model's without what"):
                handle.save(tmp_path)
            assert all(torch.equal(t, state[k]) for k, t in again.state_dict().items())
            assert handle.merged is merged
    plain = handle.merge_and_unload()
    assert relative_error(answer("bert", plain), expected) < CLOSE


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_state_dict_on_another_base_is_not_saved_wrongly(start: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = trained(LoRA(r=3, target_modules=["query"], init_lora_weights=start))
    other = build("bert")
    with torch.no_grad():
        other.encoder.layer[1].attention.self.query.weight.mul_(1.01)  # type: ignore[union-attr]  # BERT's
    handle = deltaops.attach(other, LoRA(r=3, target_modules=["query"], init_lora_weights=start))
    other.load_state_dict(model.state_dict())
    with pytest.raises(CheckpointError, match=r"layer\.1\.attention\.self\.query"):
        handle.save(tmp_path)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32], ids=str)
def test_rounding_is_no_other_start(
    start: str, first: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80)).to(first)
    handle = deltaops.attach(model, LoRA(r=16, target_modules=["0"], init_lora_weights=start))
    handle.save(tmp_path)
    model.to(dtype)
    handle.save(tmp_path)
    with handle.disabled():
        pass  # W follows
    handle.save(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_file_of_pefts_is_read_as_peft_reads_it(start: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=start
    )
    theirs = peft.get_peft_model(build("bert"), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["init_lora_weights"] == start
    again = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    ours = build("bert")
    handle = deltaops.load(ours, tmp_path)
    assert handle.delta.init_lora_weights == start  # type: ignore[attr-defined]  # a LoRA's
    for peer in (theirs, again):
        assert relative_error(answer("bert", ours), answer("bert", peer)) < CLOSE
    state = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(state[f"base_model.model.{k}"], t) for k, t in handle.state().items())


def test_a_file_whose_rank_no_weight_has_is_refused(tmp_path: Path) -> None:
    handle = deltaops.attach(build("bert"), LoRA(r=24, target_modules=["query"]))
    handle.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    state = safetensors.torch.load_file(tmp_path / WEIGHTS)
    wide = {k: torch.cat([t, t], dim=0 if "lora_A" in k else 1) for k, t in state.items()}
    safetensors.torch.save_file(wide, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"r": 48, "init_lora_weights": "pissa"}))
    model = build("bert")
    with pytest.raises((CheckpointError, ConfigError), match="r=48 is above"):
        deltaops.load(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters())
