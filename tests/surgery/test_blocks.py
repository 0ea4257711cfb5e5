"""RMSNorm, gated MLPs and rotary embeddings on one op each: whose they are, what is left."""

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
from deltaops.modules import Block, GatedMlpBlock, RmsNormBlock, rotary_block
from deltaops.surgery import blocks

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(
        deltaops.backends()["cpu"] != "ready", reason="the native core is not built"
    ),
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

ALL = ["GatedMlpBlock", "RmsNormBlock", "RotaryBlock"]
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def model_of(name: str, **settings: Any) -> nn.Module:
    """A causal language model of the family ``name``, norms with weights that are not one."""
    config = getattr(transformers, f"{name}Config")(**SIZES | settings)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def answer(model: nn.Module, **settings: Any) -> list[Tensor]:
    """The loss and the gradients of all that trains."""
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **settings).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def kinds(model: nn.Module) -> list[str]:
    return sorted({type(m).mixin.__name__ for m in model.modules() if isinstance(m, Block)})


def rows(model: nn.Module, kind: str) -> list[Any]:
    return [row for row in deltaops.report(model).rows if row.kind == kind]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", ALL),
        ("Mistral", ALL),
        ("Qwen2", ALL),
        ("Phi3", ["RmsNormBlock"]),  # gate and up are one projection, and it turns a part of a head
        ("Gemma", ["GatedMlpBlock", "RotaryBlock"]),  # its norm multiplies by 1 + weight
        ("GPTNeoX", []),
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
    assert len(rows(model, "rotary")) == 2
    for row in (*rows(model, "norm"), *rows(model, "gated mlp"), *rows(model, "rotary")):
        assert (row.backend, row.reason) == ("cpu", "fused by cpu")
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
    for kind in ("norm", "gated mlp", "rotary"):
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


def test_what_is_not_known_is_left_alone() -> None:
    model = model_of("Llama", hidden_act="mish")
    model.model.norm.forward = lambda x: x  # somebody has been here
    blocks.swap_blocks(model, "auto", False)
    assert kinds(model) == ["RmsNormBlock", "RotaryBlock"]
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
        assert kinds(model) == ["GatedMlpBlock", "RotaryBlock"]
    finally:
        blocks._known.cache_clear()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that reached the op ``rotary``."""
    seen: list[torch.Size] = []
    real = rotary_block.rotary

    def rotary(x: Tensor, *tables: Tensor, **settings: Any) -> Tensor:
        seen.append(x.shape)
        return real(x, *tables, **settings)

    monkeypatch.setattr(rotary_block, "rotary", rotary)
    return seen


def test_shared_heads_and_generation_are_turned_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("Llama", num_key_value_heads=1).eval()
    seen = counted(monkeypatch)
    ids = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    want = model.generate(ids, **settings)
    blocks.swap_blocks(model, "auto", False)
    assert torch.equal(model.generate(ids, **settings), want)
    assert torch.Size([1, 2, 3, 12]) in seen
    assert torch.Size([1, 1, 1, 12]) in seen


def test_other_settings_give_another_class_and_the_same_ones_the_same() -> None:
    model, twin = model_of("Llama"), model_of("Llama")
    attention = model.model.layers[0].self_attn
    base = type(attention)
    blocks.swap_blocks(model, "auto", False)
    first = type(attention)
    blocks.swap_blocks(twin, "auto", False)
    assert type(twin.model.layers[0].self_attn) is first
    blocks.swap_blocks(model, "reference", False)
    assert type(attention) is not first
    assert type(attention).__mro__[2:4] == first.__mro__[2:4]
    assert issubclass(type(attention), base)
    blocks.restore_blocks(model)
    assert type(attention) is base


def test_what_the_op_does_not_take_is_turned_by_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as theirs

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 5, 6, generator=generator) for h in (4, 2))
    cos, sin = torch.randn(2, 2, 5, 6, generator=generator)
    wide = cos.double(), sin.double()
    trained = cos.clone().requires_grad_(), sin
    for tables, settings in (((cos, sin), {"unsqueeze_dim": 1}), (wide, {}), (trained, {})):
        got = rotary_block.rotate(theirs, "auto", False, q, k, *tables, **settings)
        for a, b in zip(got, theirs(q, k, *tables, **settings), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype


def test_another_rotation_under_the_same_name_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama import modeling_llama

    def interleaved(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    blocks._known()  # as it was when the first model came
    monkeypatch.setattr(modeling_llama, "rotate_half", interleaved)
    model = model_of("Llama")
    blocks.swap_blocks(model, "auto", False)
    assert kinds(model) == ["GatedMlpBlock", "RmsNormBlock"]
