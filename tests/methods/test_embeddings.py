"""LoRA on embeddings: numbers and gradients, files, ties, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA
from deltaops.errors import CheckpointError, TargetError
from deltaops.modules.embedding import add_lora
from deltaops.surgery import handle_of
from deltaops.surgery.files import WEIGHTS
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, build

pytestmark = [
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

NAMES = ["q_proj", "embed_tokens"]
KEY = "base_model.model.embed_tokens.base_layer.weight"


def shaken(model: nn.Module, delta: LoRA) -> Any:
    handle = deltaops.attach(model, delta)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return handle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 11)], ids=str)
def test_numbers_and_gradients_against_float64(
    shape: tuple[int, ...], padding: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 7, shape)  # so that many are the same
    given = [torch.randn(size) for size in ((*shape, 5), (3, 7), (5, 3))]
    given[0] = given[0].to(dtype)
    outer = torch.randn(*shape, 5).to(dtype)

    def plainly(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        read = nn.functional.embedding(ids, a.T, padding) @ b.T
        return (y + 1.5 * read).to(y.dtype)

    def ours(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return add_lora(y, ids, a, b, 1.5, padding)

    def run(form: Any, wide: bool) -> list[Tensor]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in given]
        y = form(*leaves)
        return [y, *torch.autograd.grad((y * outer).sum(), leaves)]

    found, again, baseline, oracle = (
        run(form, wide)
        for form, wide in ((ours, False), (ours, False), (plainly, False), (plainly, True))
    )
    for one, same, theirs, exact in zip(found, again, baseline, oracle, strict=True):
        assert one.dtype == theirs.dtype
        assert torch.equal(one, same)
        assert relative_error(one, exact) <= bound(relative_error(theirs, exact), one.dtype)


def test_the_same_bits_on_several_threads() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 3000, requires_grad=True), torch.randn(8, 16)
    ids, y = torch.randint(0, 50, (4000,)), torch.randn(4000, 8)
    threads = torch.get_num_threads()
    grads = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            grads += torch.autograd.grad(add_lora(y, ids, a, b, 1.0, None).square().sum(), a)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[1], grads[2])
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].is_contiguous()


def test_it_starts_as_the_model_was_and_is_undone() -> None:
    model = build("bert")
    before = answer("bert", model.requires_grad_(False))
    names = [(type(m), sorted(vars(m)), list(m._modules)) for m in model.modules()]
    embedding: Any = model.get_submodule("embeddings.word_embeddings")
    weight = embedding.weight
    handle = deltaops.attach(model, LoRA(r=3, target_modules=["word_embeddings"]))
    assert torch.equal(embedding(torch.arange(9)), nn.functional.embedding(torch.arange(9), weight))
    assert {k: tuple(t.shape) for k, t in handle.state().items()} == {
        "embeddings.word_embeddings.lora_embedding_A": (3, 60),
        "embeddings.word_embeddings.lora_embedding_B": (24, 3),
    }
    assert "Embedding 60→24 lora" in str(handle)
    assert [r.kind for r in deltaops.report(model).rows if r.path.endswith("word_embeddings")] == [
        "lora"
    ]
    assert "lora=(default: r=3, alpha=8)" in repr(embedding)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    changed = answer("bert", model)
    assert relative_error(changed, before) > 0.01
    with handle.disabled():
        assert relative_error(answer("bert", model), before) < 16 * bound(0.0, torch.float32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer("bert", twin), changed)
        found = handle_of(twin)
        assert found is not None
        found.merge()
        assert relative_error(answer("bert", twin), changed) < 16 * bound(0.0, torch.float32)
        found.unmerge()
        assert torch.equal(answer("bert", twin), changed)
    handle.revert()
    assert [(type(m), sorted(vars(m)), list(m._modules)) for m in model.modules()] == names
    assert embedding.weight is weight


def test_half_precision_and_autocast() -> None:
    model = nn.Sequential(nn.Embedding(9, 6)).to(torch.bfloat16)
    ids = torch.arange(9)
    handle = shaken(model, LoRA(r=2, target_modules=["0"]))
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    y = model(ids)
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(ids), y)
    assert relative_error(y, copy.deepcopy(model).double()(ids)) <= 2.0**-9


def test_torch_compile() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=0))
    handle = shaken(model, LoRA(r=2, target_modules=["0"]))
    ids = torch.tensor([[0, 3, 3]])
    expected = model(ids)
    expected.square().sum().backward()
    grads = [p.grad for p in handle.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(ids)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close([p.grad for p in handle.parameters()], grads)


# ------------------------------------------------------------------------------------- files


def test_files_go_both_ways_and_peft_computes_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = build("llama")
    handle = shaken(model, LoRA(r=3, alpha=5, dropout=0.1, target_modules=NAMES))
    handle.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours", is_trainable=True)
    theirs.eval()
    found, expected = answer("llama", model), answer("llama", theirs)
    assert relative_error(found, expected) < 16 * bound(0.0, torch.float32)
    for y in (found, expected):
        (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).mean().backward()
    grads = {k: p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    for key, tensor in handle.state().items():
        name = (
            key.replace(".weight", "")
            + ".default"
            + (".weight" if "_embedding_" not in key else "")
        )
        torch.testing.assert_close(
            tensor.grad, grads.pop(f"base_model.model.{name}"), rtol=1e-3, atol=1e-6
        )
    assert not grads
    theirs.save_pretrained(tmp_path / "theirs")
    ours, back = (
        safetensors.torch.load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "theirs")
    )
    assert torch.equal(back.pop(KEY), model.get_parameter("embed_tokens.weight"))  # PEFT adds it
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[key], back[key]) for key in ours)
    again = build("llama")
    deltaops.load(again, tmp_path / "theirs")
    assert torch.equal(answer("llama", again), answer("llama", model))
    back[KEY] = torch.zeros(60, 24)
    safetensors.torch.save_file(back, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"replaces the frozen weight at 'embed_tokens\.weight'"
    ):
        deltaops.load(build("llama"), tmp_path / "theirs")


def test_with_pissa_embeddings_start_beside_their_weight(tmp_path: Path) -> None:
    model = build("llama")
    weight = model.get_parameter("embed_tokens.weight")
    handle = shaken(model, LoRA(r=2, target_modules=NAMES, init_lora_weights="pissa"))
    assert model.get_parameter("embed_tokens.weight") is weight
    handle.save(tmp_path)
    back = build("llama")
    deltaops.load(back, tmp_path)
    error = relative_error(answer("llama", back), answer("llama", model))
    assert error < 16 * bound(0.0, torch.float32)


# -------------------------------------------------------------------------- ties and refusals


def test_an_embedding_that_only_lends_its_weight_is_named() -> None:
    model = build("t5")
    with pytest.warns(UserWarning, match="'shared' itself is not called where 'encoder.embed_t"):
        handle = shaken(model, LoRA(r=2, target_modules=["shared"]))
    assert not answer("t5", model).requires_grad
    handle.revert()
    with pytest.warns(UserWarning, match="also that of 'shared', 'decoder.embed_tokens', which k"):
        shaken(model, LoRA(r=2, target_modules=["encoder.embed_tokens"]))


def test_a_tied_output_layer_keeps_the_frozen_weight() -> None:
    model: Any = build("llama", head="ForCausalLM", tie_word_embeddings=True)
    weight, before = model.lm_head.weight, model.lm_head.weight.detach().clone()
    with pytest.warns(UserWarning, match="its weight is also that of 'lm_head', which keeps it"):
        handle = shaken(model, LoRA(r=2, target_modules=["embed_tokens"]))
    ids = torch.tensor([[5, 6]])
    applied = model(ids).logits
    handle.merge()
    assert model.lm_head.weight is weight
    assert torch.equal(weight, before)
    torch.testing.assert_close(model(ids).logits, applied)
    handle.revert()
    assert model.model.embed_tokens.weight is model.lm_head.weight is weight


@pytest.mark.parametrize(
    ("embedding", "delta", "message"),
    [
        (nn.Embedding(9, 6, max_norm=1.0), LoRA(r=2, target_modules=["0"]), "with max_norm"),
        (nn.Embedding(9, 6), LoRA(r=2, target_modules=["0"], use_dora=True), "use_dora needs"),
    ],
    ids=["max_norm", "dora"],
)
def test_what_it_cannot_do_is_refused(embedding: nn.Module, delta: LoRA, message: str) -> None:
    model = nn.Sequential(embedding)
    with pytest.raises(TargetError, match=message):
        deltaops.attach(model, delta)
    assert type(model[0]) is nn.Embedding


def test_all_linear_still_means_linear_layers() -> None:
    handle = deltaops.attach(build("llama"), LoRA(r=2))
    assert not any("embed" in path for path in handle.sites)
