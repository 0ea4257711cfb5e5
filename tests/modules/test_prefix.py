"""A prefix on the attention modules of small Llama and BERT, against torch and against a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from deltaops.errors import AttachError, ConfigError
from deltaops.modules import AttentionBlock, restore, switch
from deltaops.modules import prefix as ours

transformers = pytest.importorskip("transformers")

P, LENGTH = 5, 9


def llama(**settings: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(**settings: Any) -> Any:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=50, max_position_embeddings=64, hidden_dropout_prob=0.0,
        **{"attention_probs_dropout_prob": 0.0, **settings},
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


MODELS = {"llama": (llama, "self_attn", 2), "bert": (bert, "self", 4)}
each_model = pytest.mark.parametrize(("make", "name", "heads"), MODELS.values(), ids=MODELS)


def attentions(model: nn.Module, name: str) -> list[nn.Module]:
    return [m for path, m in model.named_modules() if path.rpartition(".")[2] == name]


def with_prefix(make: Callable[..., Any], name: str, heads: int, **settings: Any) -> Any:
    """A model in which every weight is frozen but those of its prefixes."""
    torch.manual_seed(0)
    model = make(**settings).eval().requires_grad_(False)
    switch(model)
    found = attentions(model, name)
    assert len(found) == 2
    for module in found:
        ours.add_prefix(module, *torch.randn(2, heads, P, 8))
    return model


def prefixes(model: nn.Module) -> list[Tensor]:
    return [
        p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("prefix_k", "prefix_v")
    ]


def copies(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The oracle: copies before the keys and values, and the mask written out."""
    b, _h, l_q, _d = q.shape
    causal = module.is_causal if is_causal is None else is_causal
    if mask is None:
        mask = torch.ones(1, 1, l_q, k.shape[2], dtype=torch.bool)
        mask = mask.tril() if causal and l_q > 1 else mask
    mask = torch.cat([mask.new_ones(*mask.shape[:3], P), mask], 3)
    keys, values = (
        torch.cat([shared[None].repeat(b, 1, 1, 1), own], 2)
        for shared, own in ((module.prefix_k, k), (module.prefix_v, v))
    )
    y = scaled_dot_product_attention(q, keys, values, mask, dropout, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None


@pytest.fixture
def oracle() -> Iterator[Callable[[], None]]:
    """Once called, :func:`copies` runs in the place of ours."""
    yield lambda: transformers.AttentionInterface.register(ours.NAME, copies)
    ours.register()


def tokens(padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 50, (3, LENGTH), generator=generator)
    seen = torch.ones_like(ids)
    if padded:
        seen[0, :4] = seen[2, :1] = 0
    return {"input_ids": ids, "attention_mask": seen}


def logits_and_gradients(model: Any, **given: Tensor) -> list[Tensor]:
    y = model(**given).logits
    seen = given["attention_mask"].bool()
    return [y[seen], *torch.autograd.grad(y[seen].square().mean(), prefixes(model))]


@each_model
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_logits_and_gradients_are_those_of_copies(
    make: Any, name: str, heads: int, padded: bool, oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, real = with_prefix(make, name, heads), [], ours.prefix_attention
    monkeypatch.setattr(ours, "prefix_attention", lambda *t, **s: calls.append(s) or real(*t, **s))
    got = logits_and_gradients(model, **tokens(padded))
    assert len(calls) == 2
    oracle()
    torch.testing.assert_close(
        got, logits_and_gradients(model, **tokens(padded)), rtol=1e-4, atol=1e-5
    )


def test_logits_are_those_of_a_cache_that_begins_with_it() -> None:
    """Where PEFT puts it, at the positions of a model without one."""
    model, given = with_prefix(*MODELS["llama"]), tokens(False)
    got = model(**given).logits
    cache = transformers.DynamicCache(config=model.config)
    for i, module in enumerate(attentions(model, "self_attn")):
        cache.update(*(t[None].repeat(3, 1, 1, 1) for t in (module.prefix_k, module.prefix_v)), i)
        ours.remove_prefix(module)
    restore(model)
    want = model(
        input_ids=given["input_ids"],
        attention_mask=torch.ones(3, P + LENGTH, dtype=torch.long),
        position_ids=torch.arange(LENGTH)[None],
        past_key_values=cache,
    ).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_is_generation_without() -> None:
    model, given = with_prefix(*MODELS["llama"]), tokens(True)
    results = [
        model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)
    for module in attentions(model, "self_attn"):
        ours.remove_prefix(module)
    bare = model.generate(**given, max_new_tokens=6, do_sample=False)
    assert not torch.equal(bare, results[0])


@each_model
def test_checkpointing_gives_the_same_gradients(make: Any, name: str, heads: int) -> None:
    model, given = with_prefix(make, name, heads), tokens(True)
    want = logits_and_gradients(model, **given)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = logits_and_gradients(model, **given)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@each_model
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_dropout_of_the_weights_is_torchs(
    make: Any, name: str, heads: int, padded: bool, oracle: Any
) -> None:
    dropout = "attention_dropout" if make is llama else "attention_probs_dropout_prob"
    model = with_prefix(make, name, heads, **{dropout: 0.5}).train()
    results = []
    for become_the_oracle in (lambda: None, oracle):
        become_the_oracle()
        torch.manual_seed(7)
        results.append(logits_and_gradients(model, **tokens(padded)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    want = logits_and_gradients(model.eval(), **tokens(padded))[0]
    assert not torch.allclose(results[0][0], want, atol=1e-3)


def test_added_numbers_reach_no_prefix() -> None:
    """T5's bias, and masks of numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, LENGTH, 8, generator=generator)
    module = nn.Module()
    module.is_causal = False
    ours.add_prefix(module, *torch.randn(2, 4, P, 8, generator=generator))
    bias = torch.randn(1, 4, LENGTH, LENGTH, generator=generator)
    scores = 8**-0.5 * q @ torch.cat([module.prefix_k.expand(2, -1, -1, -1), k], 2).mT
    weights = (scores + nn.functional.pad(bias, (P, 0))).softmax(-1)
    want = (weights @ torch.cat([module.prefix_v.expand(2, -1, -1, -1), v], 2)).transpose(1, 2)
    for mask, more in ((bias, {}), (None, {"position_bias": bias})):
        got, _ = ours.attend_with_prefix(module, q, k, v, mask, scaling=8**-0.5, **more)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_bias_is_cut_where_keys_of_a_larger_cache_are() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, LENGTH, 8, generator=generator)
    module = nn.Module()
    module.is_causal = True
    ours.add_prefix(module, *torch.randn(2, 4, P, 8, generator=generator))
    bias = torch.randn(1, 4, LENGTH, P + LENGTH, generator=generator)
    want, _ = ours.attend_with_prefix(module, q, k, v, None, position_bias=bias)
    ahead = torch.ones(2, 4, 3, 8)
    longer = [torch.cat([t, ahead], 2) for t in (k, v)]
    more = torch.cat([bias, torch.ones(1, 4, LENGTH, 3)], 3)
    for settings in ({}, {"dropout": 1e-30}):  # fused, and by transformers' function
        got, _ = ours.attend_with_prefix(module, q, *longer, None, position_bias=more, **settings)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@each_model
def test_without_its_prefix_a_model_is_what_it_was(make: Any, name: str, heads: int) -> None:
    torch.manual_seed(0)
    model, given = make().eval(), tokens(True)
    want, keys = model(**given).logits, list(model.state_dict())
    switch(model)
    assert model.config._attn_implementation == ours.NAME
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(model(**given).logits[seen], want[seen], rtol=1e-4, atol=1e-5)
    for module in attentions(model, name):
        ours.add_prefix(module, *torch.randn(2, heads, P, 8))
        assert not torch.allclose(model(**given).logits[seen], want[seen], atol=1e-3)
        ours.remove_prefix(module)
    restore(model)
    assert model.config._attn_implementation == "sdpa"
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**given).logits, want)


@each_model
def test_an_accelerated_attention_has_its_prefix_and_says_so(
    make: Any, name: str, heads: int
) -> None:
    model, given = with_prefix(make, name, heads), tokens(True)
    want = logits_and_gradients(model, **given)
    for module in attentions(model, name):
        module.__class__ = AttentionBlock.over(type(module), "auto", False)
        module.backend = "auto"
    got = logits_and_gradients(model, **given)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    backend, reason = attentions(model, name)[0].told(64)
    assert backend == "cpu"
    assert "attention fused by cpu" in reason


def test_a_model_that_attends_by_itself_is_refused() -> None:
    config = transformers.MPNetConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=50,
    )  # fmt: skip
    model = transformers.MPNetModel(config)
    before = model.config._attn_implementation
    with pytest.raises(AttachError, match="MPNetModel must ask transformers' AttentionInterface"):
        switch(model)
    assert model.config._attn_implementation == before


def test_bad_prefixes_are_refused() -> None:
    module = nn.Module()
    with pytest.raises(ConfigError, match=r"must both be \[Hkv, P, D\], got \[2, 3\] and \[2, 3\]"):
        ours.add_prefix(module, *torch.randn(2, 2, 3))
    ours.add_prefix(module, *torch.randn(2, 2, 3, 4))
    with pytest.raises(ConfigError, match="must have no prefix yet, and has one"):
        ours.add_prefix(module, *torch.randn(2, 2, 3, 4))
