"""Attentions of transformers on our ops: the same numbers, in every family and every mode."""

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
from deltaops.modules import AttentionBlock, attention_functions
from deltaops.surgery import blocks
from deltaops.testing import assert_accurate

from .conftest import Tiny
from .families import answer, kinds, model_of, rows

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(
        deltaops.backends()["cpu"] != "ready", reason="the native core is not built"
    ),
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
PADDED = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])


def clip() -> Tiny:
    vision = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = transformers.CLIPConfig(vision_config=vision, num_labels=2)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    return Tiny(transformers.CLIPForImageClassification(config), batch, ("classifier",))


def language(name: str, **settings: Any) -> Tiny:
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    return Tiny(model_of(name, **settings), {"input_ids": ids, "labels": ids})


def of(name: str, tiny: Callable[..., Tiny]) -> Tiny:
    """The family's model; one whose name ends in "padded" gets a mask, too."""
    plain = name.removesuffix(" padded")
    torch.manual_seed(0)
    if plain == "clip":
        return clip()
    found = language("Qwen3", num_key_value_heads=1) if plain == "qwen3" else tiny(plain)
    if plain != name:
        found.batch["attention_mask"] = PADDED
    return found


def result(given: Tiny, model: nn.Module) -> list[Tensor]:
    """The loss, and all gradients in a row."""
    model.zero_grad()
    loss = given.loss(model)
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), torch.cat(grads)]


def counted(monkeypatch: pytest.MonkeyPatch, op: str) -> list[torch.Size]:
    """Shapes of queries that reach ``op``."""
    seen: list[torch.Size] = []
    real = getattr(attention_functions, op)

    def run(x: Tensor, *rest: Any, **settings: Any) -> Tensor:
        seen.append(x.shape)
        y: Tensor = real(x, *rest, **settings)
        return y

    monkeypatch.setattr(attention_functions, op, run)
    return seen


@backends
@pytest.mark.parametrize(
    ("name", "turned", "attended"),
    [
        ("bert", 0, 2),
        ("bert padded", 0, 2),
        ("gpt2", 0, 2),
        ("gpt2 padded", 0, 2),
        ("llama", 4, 2),
        ("llama padded", 4, 2),
        ("qwen3", 4, 2),
        ("qwen3 padded", 4, 2),
        ("vit", 0, 2),
        ("clip", 0, 2),
        ("t5", 0, 0),  # it adds a bias to the scores
        ("t5 padded", 0, 0),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_model(
    name: str,
    turned: int,
    attended: int,
    backend: str,
    tiny: Callable[..., Tiny],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = of(name, tiny)
    model = given.model.train()
    oracle = result(given, copy.deepcopy(model).double())
    baseline = result(given, model)
    rotaries, attentions = counted(monkeypatch, "rotary"), counted(monkeypatch, "attention")
    blocks.swap_blocks(model, backend, False)
    got = result(given, model)
    for what, *those in zip(("loss", "gradients"), got, oracle, baseline, strict=True):
        assert_accurate(*those, what)
    assert (len(rotaries), len(attentions)) == (turned, attended)


@pytest.mark.parametrize("name", ["bert padded", "gpt2", "llama", "qwen3 padded", "vit"])
def test_bfloat16_is_as_near_to_float64(name: str, tiny: Callable[..., Tiny]) -> None:
    given = of(name, tiny)
    model = given.model.to(torch.bfloat16)
    oracle = result(given, copy.deepcopy(model).double())
    baseline = result(given, model)
    blocks.swap_blocks(model, "cpu", False)
    got = result(given, model)
    for what, *those in zip(("loss", "gradients"), got, oracle, baseline, strict=True):
        assert_accurate(*those, what)


@backends
@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT2"])
def test_generation_with_a_cache_says_the_same(
    name: str, implementation: str | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name, num_key_value_heads=1).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    settings = {
        "attention_mask": (ids != 0).long(), "max_new_tokens": 5, "do_sample": False,
        "use_cache": True, "cache_implementation": implementation, "disable_compile": True,
    }  # fmt: skip
    want = model.generate(ids, **settings)
    seen = counted(monkeypatch, "attention")
    blocks.swap_blocks(model, backend, False)
    assert torch.equal(model.generate(ids, **settings), want)
    assert {size[2] for size in seen} == {5, 1}  # the prompt, then token by token


def test_shared_heads_and_single_tokens_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("Llama", num_key_value_heads=1).eval()
    seen = counted(monkeypatch, "rotary")
    blocks.swap_blocks(model, "auto", False)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert torch.Size([1, 2, 3, 12]) in seen
    assert torch.Size([1, 1, 1, 12]) in seen


def test_auto_leaves_short_sequences_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("Llama").eval()
    seen = counted(monkeypatch, "attention")
    blocks.swap_blocks(model, "auto", False)
    model(input_ids=torch.arange(47)[None])
    assert not seen
    model(input_ids=torch.arange(48)[None])
    assert len(seen) == 2
    assert "below 48 queries, here 9" in rows(model, "attention", tokens=9)[0].reason


@backends
def test_gradient_checkpointing_changes_no_bit(backend: str) -> None:
    model = model_of("Llama").train()
    blocks.swap_blocks(model, backend, False)
    want = answer(model, use_cache=False)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        got = answer(model, use_cache=False)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_sliding_windows_come_as_masks() -> None:
    model = model_of("Mistral", sliding_window=3)
    want = answer(model)
    blocks.swap_blocks(model, "cpu", False)
    for got, expected in zip(answer(model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_dropout_in_force_is_transformers_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"attention_dropout": 0.5} if name == "Llama" else {"attn_pdrop": 0.5}
    model = model_of(name, **settings).train()
    seen = counted(monkeypatch, "attention")
    torch.manual_seed(4)
    want = answer(model)
    blocks.swap_blocks(model, "reference", False)
    torch.manual_seed(4)
    for got, expected in zip(answer(model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not seen
    answer(model.eval())
    assert len(seen) == 2


def test_other_implementations_stay_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("Llama", attn_implementation="eager")
    blocks.swap_blocks(model, "auto", False)
    seen = counted(monkeypatch, "attention")
    out = model(input_ids=torch.tensor([[5, 6, 7]]), output_attentions=True)
    assert out.attentions[0].shape == (1, 2, 3, 3)
    assert not seen
    for row in rows(model, "attention"):
        assert row.backend == "cpu"
        assert row.reason.startswith("rotary fused by cpu; attention by transformers")
        assert "'eager'" in row.reason
    model.set_attn_implementation("sdpa")
    model(input_ids=torch.arange(48)[None])
    assert len(seen) == 2
    assert rows(model, "attention")[0].reason == "rotary and attention fused by cpu"


def test_a_bias_on_the_scores_is_transformers_own(tiny: Callable[..., Tiny]) -> None:
    model = tiny("t5").model
    blocks.swap_blocks(model, "auto", False)
    found = rows(model, "attention")
    assert len(found) == 6
    for row in found:
        assert row.backend == "torch"
        assert row.reason == "attention by transformers: a bias is added to the scores"


def test_revert_copies_and_pickles(tiny: Callable[..., Tiny]) -> None:
    for name in ("bert", "gpt2", "llama", "vit"):
        given = tiny(name)
        model = given.model
        classes = [type(m) for m in model.modules()]
        handle = deltaops.attach(model, LoRA(r=2))
        assert "AttentionBlock" in kinds(model)
        want = given.loss(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert kinds(twin) == kinds(model)
            assert torch.equal(given.loss(twin), want)
        handle.revert()
        assert [type(m) for m in model.modules()] == classes


def test_blocks_false_leaves_attention_alone(tiny: Callable[..., Tiny]) -> None:
    model = tiny("bert").model
    deltaops.attach(model, LoRA(r=2), blocks=False)
    assert kinds(model) == []


def test_compiled_it_is_transformers_own(
    tiny: Callable[..., Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tiny("bert")
    want = given.loss()
    blocks.swap_blocks(given.model, "cpu", False)
    seen = counted(monkeypatch, "attention")
    compiled = torch.compile(given.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(given.loss(compiled), want)
    assert not seen


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


def test_float64_runs_as_before_or_says_why_not() -> None:
    model = model_of("GPTNeoX").double()
    want = answer(model)
    blocks.swap_blocks(model, "auto", False)
    for got, expected in zip(answer(model), want, strict=True):
        assert torch.equal(got, expected)
    assert {row.backend for row in rows(model, "attention")} == {"torch"}
    assert "float64" in rows(model, "attention")[0].reason
    blocks.swap_blocks(model, "auto", True)
    with pytest.raises(NoBackendError, match="attention: a fused backend"):
        answer(model)


def test_an_own_rotation_keeps_its_place_beside_our_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.gemma import modeling_gemma

    def interleaved(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    monkeypatch.setattr(modeling_gemma, "rotate_half", interleaved)
    assert set(
        attention_functions.stand_ins(modeling_gemma.GemmaAttention.forward, "auto", False)
    ) == {attention_functions.TABLE}


def test_no_random_number_is_drawn() -> None:
    model = model_of("Llama")
    for known in (attention_functions.known_sdpa, attention_functions.known_rotary):
        known.cache_clear()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    blocks.swap_blocks(model, "auto", False)
    assert isinstance(model.model.layers[0].self_attn, AttentionBlock)
    assert torch.equal(torch.get_rng_state(), state)


@backends
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma"])
def test_without_a_cache_one_op_turns_and_attends(
    name: str, implementation: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ours attends; where another function does, it gets what is turned."""
    torch.manual_seed(0)
    given = language(name, use_cache=False, attn_implementation=implementation)
    model = given.model.train()
    oracle = result(given, copy.deepcopy(model).double())
    baseline = result(given, model)
    blocks.swap_blocks(model, backend, False)
    turned: list[bool] = []
    real = attention_functions.attention

    def run(*heads: Tensor, **also: Any) -> Tensor:
        turned.append(also["tables"] is not None)
        return real(*heads, **also)

    monkeypatch.setattr(attention_functions, "attention", run)
    rotaries = counted(monkeypatch, "rotary")
    got = result(given, model)
    for what, *those in zip(("loss", "gradients"), got, oracle, baseline, strict=True):
        assert_accurate(*those, what)
    assert turned == ([True, True] if implementation == "sdpa" else [])
    assert len(rotaries) == (0 if implementation == "sdpa" else 4)
