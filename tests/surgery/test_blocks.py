"""RMSNorm, gated MLPs and attentions on one op each: whose they are, what is left."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA
from deltaops.errors import NoBackendError
from deltaops.modules import ActivationBlock, Block, GatedMlpBlock, RmsNormBlock, block
from deltaops.surgery import blocks

from .families import answer, kinds, model_of, rows

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(
        deltaops.backends()["cpu"] != "ready", reason="the native core is not built"
    ),
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

ALL = ["AttentionBlock", "GatedMlpBlock", "RmsNormBlock"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", ALL),
        ("Mistral", ALL),
        ("Qwen2", ALL),
        ("Phi3", ["AttentionBlock", "RmsNormBlock"]),  # gate and up are one projection
        ("Gemma", ["AttentionBlock", "GatedMlpBlock"]),  # its norm multiplies by 1 + weight
        ("GPTNeoX", ["ActivationBlock", "AttentionBlock"]),
    ],
)
def test_families_by_their_programs(name: str, expected: list[str]) -> None:
    model = model_of(name)
    plain = copy.deepcopy(model)
    for each, fused in ((plain, False), (model, True)):
        torch.manual_seed(3)
        deltaops.attach(each, LoRA(r=4), blocks=fused)
    assert kinds(plain) == []
    assert kinds(model) == expected
    for got, want in zip(answer(model), answer(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_report_names_them_and_revert_gives_the_classes_back() -> None:
    model = model_of("Llama")
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    handle = deltaops.attach(model, LoRA(r=4))
    assert len(rows(model, "norm")) == 5
    assert len(rows(model, "gated mlp")) == 2
    assert len(rows(model, "attention")) == 2
    for row in (*rows(model, "norm"), *rows(model, "gated mlp")):
        assert (row.backend, row.reason) == ("cpu", "fused by cpu")
    for row in rows(model, "attention"):
        assert (row.backend, row.reason) == ("cpu", "rotary and attention fused by cpu")
    handle.revert()
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_accelerate_takes_them_and_its_revert_too() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model_of("Llama"), config)
    want = answer(model)
    report = deltaops.accelerate(model)
    assert kinds(model) == ALL
    for got, expected in zip(answer(model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    deltaops.accelerate(model, backend="reference")
    for kind in ("norm", "gated mlp", "attention"):
        assert {row.backend for row in rows(model, kind)} == {"reference"}
    for got, expected in zip(answer(model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    report.revert()
    assert kinds(model) == []


def test_bfloat16_is_nearer_to_float64_than_before() -> None:
    model = model_of("Llama").to(torch.bfloat16)
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = [copy.deepcopy(m).double()(x.double()) for m in (norm, mlp)]
    before = [m(x) for m in (norm, mlp)]
    blocks.swap_blocks(model, "auto", False)
    for module, oracle, usual in zip((norm, mlp), exact, before, strict=True):
        got = module(x)
        assert got.dtype == torch.bfloat16
        assert (got - oracle).norm() <= (usual - oracle).norm()


def test_a_trained_norm_gets_its_gradient() -> None:
    model = model_of("Llama")
    plain = copy.deepcopy(model)
    blocks.swap_blocks(model, "auto", False)
    for got, want in zip(answer(model), answer(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_copies_and_pickles_are_on_their_own() -> None:
    model = model_of("Llama")
    deltaops.attach(model, LoRA(r=4))
    want = answer(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.model.norm) is type(model.model.norm)
        assert isinstance(twin.model.norm, RmsNormBlock)
        assert twin.model.norm is not model.model.norm
        for got, expected in zip(answer(twin), want, strict=True):
            assert torch.equal(got, expected)


def test_hooks_on_the_activation_still_fire() -> None:
    model = model_of("Llama")
    blocks.swap_blocks(model, "auto", False)
    seen: list[torch.Size] = []
    handle = model.model.layers[0].mlp.act_fn.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.shape)
    )
    want = answer(model)[0]
    assert seen == [torch.Size([2, 9, 40])]
    handle.remove()
    torch.testing.assert_close(answer(model)[0], want)
    assert len(seen) == 1


def mlp(name: str) -> nn.Module:
    """A model whose MLP has a GELU between two layers, and three linear layers in a row."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2))
    config = BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, hidden_act="gelu" if name == "bert" else "gelu_pytorch_tanh",
    )  # fmt: skip
    return BertModel(config)


@pytest.mark.parametrize("name", ["bert", "bert-tanh", "gpt2"])
def test_an_activation_between_two_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "SMALL", 1)
    model = mlp(name).eval()
    plain = copy.deepcopy(model)
    handle = deltaops.attach(model, LoRA(r=4))
    (first, second) = rows(model, "activation")
    assert (first.backend, first.reason) == ("cpu", "fused by cpu")
    assert (second.backend, second.reason) == ("cpu", "fused by cpu")
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    for each in (plain, copy.deepcopy(model)):
        torch.testing.assert_close(each(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-5)
    calls: list[str] = []
    act = next(m for m in model.modules() if isinstance(m, ActivationBlock))
    x = torch.randn(3, 40, requires_grad=True)
    real = block.gated
    monkeypatch.setattr(
        block, "gated", lambda x, up, name, **more: calls.append(name) or real(x, up, name, **more)
    )
    got, want = act(x), act.base_class.forward(act, x)
    assert calls == ["gelu" if name == "bert" else "gelu_tanh"]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), x), torch.autograd.grad(want.square().sum(), x)
    )
    monkeypatch.setattr(block, "SMALL", 1 << 20)
    act(x)
    assert len(calls) == 1
    assert "fewer than 1048576 elements" in rows(model, "activation")[0].reason
    handle.revert()
    assert kinds(model) == []


def test_what_is_not_known_is_left_alone() -> None:
    model = model_of("Llama", hidden_act="mish")
    model.model.norm.forward = lambda x: x  # somebody has been here
    blocks.swap_blocks(model, "auto", False)
    assert kinds(model) == ["AttentionBlock", "RmsNormBlock"]
    assert not isinstance(model.model.norm, Block)

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    blocks.swap_blocks(Own(), "auto", False)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh", "gelu_new", "swish"])
def test_each_activation(activation: str) -> None:
    model = model_of("Llama", hidden_act=activation)
    plain = copy.deepcopy(model)
    blocks.swap_blocks(model, "auto", False)
    assert isinstance(model.model.layers[0].mlp, GatedMlpBlock)
    for got, want in zip(answer(model), answer(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_wider_weight_widens_as_before() -> None:
    model = model_of("Llama")
    norm = model.model.norm
    x = torch.randn(3, 24).bfloat16()
    want = norm(x)
    blocks.swap_blocks(model, "auto", False)
    assert isinstance(norm, RmsNormBlock)
    assert torch.equal(norm(x), want)
    assert norm(x).dtype == torch.float32


def test_float64_runs_as_before_or_says_why_not() -> None:
    model = model_of("Llama").double()
    want = answer(model)
    blocks.swap_blocks(model, "auto", False)
    for got, expected in zip(answer(model), want, strict=True):
        assert torch.equal(got, expected)
    assert {row.backend for row in rows(model, "norm")} == {"torch"}
    assert "float64" in rows(model, "norm")[0].reason
    blocks.swap_blocks(model, "auto", True)
    with pytest.raises(NoBackendError, match="norm_bias: a fused backend"):
        answer(model)


class Marked(Tensor):
    """A tensor of a class of its own, as a DTensor is."""


def test_tensors_of_other_classes_are_left_to_transformers() -> None:
    model = model_of("Llama")
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    want = norm(x), mlp(x)
    blocks.swap_blocks(model, "auto", True)
    for module, expected in zip((norm, mlp), want, strict=True):
        got = module(x.as_subclass(Marked))
        assert type(got) is Marked
        assert torch.equal(got.as_subclass(Tensor), expected)


def test_compiled_whole_and_left_to_the_compiler() -> None:
    model = model_of("Llama")
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    x = torch.randn(3, 5, 24)
    want = norm(x), mlp(x)
    blocks.swap_blocks(model, "auto", False)
    for module, expected in zip((norm, mlp), want, strict=True):
        compiled: Callable[[Tensor], Tensor] = torch.compile(
            module, fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(compiled(x), expected)


def test_no_random_number_is_drawn() -> None:
    model = model_of("Llama")
    blocks._known.cache_clear()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    blocks.swap_blocks(model, "auto", False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_program_that_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if a version of transformers changed what the class computes, under the same name."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def other(self: Any, hidden_states: Tensor) -> Tensor:
        return (1 + self.weight) * hidden_states

    monkeypatch.setattr(LlamaRMSNorm, "forward", other)
    blocks._known.cache_clear()
    try:
        model = model_of("Llama")
        blocks.swap_blocks(model, "auto", False)
        assert kinds(model) == ["AttentionBlock", "GatedMlpBlock"]
    finally:
        blocks._known.cache_clear()


def test_a_compiler_asks_nothing_of_the_size_of_an_activation() -> None:
    act = nn.GELU()
    act.__dict__.update(backend="auto", strict=False)
    act.__class__ = ActivationBlock.over(nn.GELU, "auto", False)
    whole = torch.export.export(
        nn.Sequential(act), (torch.randn(4, 8),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    x = torch.randn(block.SMALL, 8)
    torch.testing.assert_close(whole.module()(x), nn.functional.gelu(x))
