"""Pools of prefixes: one choice for a stack, anew in every pass; what test_contract leaves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA, Prefix, PrefixPool, Prompt, PromptPool
from deltaops.errors import AttachError, ConfigError, ShapeError, TargetError
from deltaops.surgery import Handle
from deltaops.testing.architectures import build

pytestmark = [
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [0] * 3 + [1] * 4])
SIZE, LENGTH, TOP = 5, 2, 2
PROMPT = Prompt(3, prompt_tuning_init="random")


def pooled(model: nn.Module, more: Any = None, **settings: Any) -> Handle:
    """A pool far from its start."""
    delta = PrefixPool(SIZE, LENGTH, **{"top_k": TOP} | settings)
    handle = deltaops.attach(model, delta if more is None else delta + more)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return handle


def states(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    found: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return found


@pytest.mark.parametrize("top", [TOP, SIZE])
def test_a_sample_sees_what_a_prefix_of_its_choice_would_be_alone(top: int) -> None:
    model: Any = build("bert")
    base = copy.deepcopy(model)
    handle = pooled(model, top_k=top)
    y = states(model, IDS, MASK)
    indices = deltaops.choices(model).indices
    assert (len(indices.unique(dim=0)) > 1) == (top < SIZE)
    for sample, items in enumerate(indices):
        twin = copy.deepcopy(base)
        alone = deltaops.attach(twin, Prefix(num_virtual_tokens=top * LENGTH))
        rows = torch.cat([torch.arange(LENGTH) + i * LENGTH for i in items])
        with torch.no_grad():
            for key, parameter in alone.named_parameters():
                parameter.copy_(handle.state()[key][:, rows])
        expected = states(twin, IDS[sample : sample + 1], MASK[sample : sample + 1])
        torch.testing.assert_close(y[sample : sample + 1], expected, rtol=1e-4, atol=1e-5)


def test_dropout_of_the_weights_takes_torchs_way_to_the_same() -> None:
    model: Any = build("bert")
    pooled(model)
    expected = states(model, IDS, MASK)
    for module in model.modules():
        if hasattr(module, "prefix_k"):
            module.training, module.dropout.p = True, 1e-9
    torch.testing.assert_close(states(model, IDS, MASK), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_two_passes_before_their_backward_pass_each_have_their_own(name: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model: Any = build(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        handle = pooled(model)
        loss = states(model, IDS).square().sum() + states(model, IDS.flip(1)).cos().sum()
        first, second = (deltaops.choices(model, reset=True).indices for _ in range(2))
        assert len(first)
        assert not len(second)
        loss.backward()
        grads.append([p.grad for p in handle.parameters() if p.grad is not None])
    assert len(grads[0]) == 2 * 2
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_a_cache_keeps_the_choice_of_its_sequences() -> None:
    model: Any = build("gpt2", head="LMHeadModel")
    pooled(model)
    whole = model(input_ids=IDS).logits
    first = model(input_ids=IDS[:, :4], use_cache=True)
    model(input_ids=IDS.flip(0))  # another batch between
    rest = model(input_ids=IDS[:, 4:], past_key_values=first.past_key_values)
    assert not torch.equal(whole[0], whole[1])
    # by its first tokens alone a sequence may choose other prefixes than by all
    one = model(input_ids=IDS[:, :4]).logits
    torch.testing.assert_close(first.logits, one)
    again = model(input_ids=IDS[:, :4], use_cache=True)
    twin = model(input_ids=IDS[:, 4:], past_key_values=again.past_key_values)
    assert torch.equal(rest.logits, twin.logits)
    for layer in again.past_key_values.layers:  # behind the back of the cache
        layer.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ShapeError, match="chosen for 3 samples, and an attention was called with"):
        model(input_ids=IDS[:1, :1], past_key_values=again.past_key_values)


@pytest.mark.parametrize("more", [None, PROMPT], ids=["alone", "behind a prompt"])
def test_what_a_cache_does_to_its_sequences_it_does_to_what_they_chose(more: Any) -> None:
    model: Any = build("gpt2")
    pooled(model, more)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
        chosen = deltaops.choices(model).indices
        assert not torch.equal(chosen[order], chosen)
        whole = model(input_ids=IDS[:, 5:], past_key_values=copy.deepcopy(cache)).last_hidden_state
        for change, by, rows in (
            ("reorder_cache", order, order),
            ("batch_select_indices", order[:2], order[:2]),
            ("batch_repeat_interleave", 2, torch.arange(3).repeat_interleave(2)),
        ):
            changed = pickle.loads(pickle.dumps(cache))
            getattr(changed, change)(by)
            y = model(input_ids=IDS[rows, 5:], past_key_values=changed).last_hidden_state
            torch.testing.assert_close(y, whole[rows], rtol=1e-4, atol=1e-5)


def test_generation_by_beams_and_in_chunks() -> None:
    model: Any = build("llama", head="ForCausalLM")
    pooled(model, query_tokens=3)
    ids = IDS.masked_fill(MASK[[0, 2, 2]] == 0, 0)
    settings: dict[str, Any] = {
        "attention_mask": MASK[[0, 2, 2]], "max_new_tokens": 5, "do_sample": False,
        "eos_token_id": None,
    }  # fmt: skip
    straight = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prefill_chunk_size=6, **settings), straight)
    beams = [model.generate(ids, num_beams=3, use_cache=c, **settings) for c in (True, False)]
    assert torch.equal(*beams)
    with pytest.raises(ShapeError, match='to generate cache_implementation="dynamic"'):
        model.generate(ids, cache_implementation="static", **settings)


def test_a_compiled_model_keeps_the_choice_in_the_cache_that_it_makes() -> None:
    model: Any = build("llama")
    pooled(model)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        caches = [run(input_ids=IDS[:, :5]).past_key_values for run in (compiled, model)]
        y, expected = (
            model(input_ids=IDS[:, 5:], past_key_values=cache).last_hidden_state for cache in caches
        )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_sequence_of_tokens_is_refused() -> None:
    model: Any = build("gpt2")
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    handle = pooled(model)
    with pytest.raises(AttachError, match="must come from a pass of the model with its pool"):
        model(input_ids=IDS[:, :1], past_key_values=cache)
    with pytest.raises(ShapeError, match=r"attention_mask must be \[B, T\]"):
        model(input_ids=IDS, attention_mask=torch.zeros(3, 1, 7, 7))
    with pytest.raises(AttachError, match="was called by itself"):
        model.h[0].attn(torch.randn(1, 3, 24))
    with handle.disabled():
        model.h[0].attn(torch.randn(1, 3, 24))


def test_prompts_and_prefixes_of_two_pools_are_told_apart() -> None:
    model: Any = build("bert", head="ForSequenceClassification").train()
    more = PromptPool(4, 1, top_k=1, prompt_tuning_init="random")
    handle = pooled(model, more)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 1])}
    whole = model(**inputs).loss
    extra = deltaops.auxiliary_loss(model)
    assert deltaops.choices(model, of="prompts").similarities.shape == (3, 4)
    assert deltaops.choices(model, of="prefixes").similarities.shape == (3, SIZE)
    with pytest.raises(
        AttachError, match="must be one of the pools of BertForSequenceClassification"
    ):
        deltaops.choices(model)
    torch.testing.assert_close(whole, model.eval()(**inputs).loss + extra)
    assert "2 of 5 in a pool, chosen for each sample by its embeddings" in str(
        deltaops.report(model)
    )
    handle.revert()
    assert not model._forward_hooks


@pytest.mark.parametrize("more", [LoRA(r=2), PROMPT], ids=["with lora", "without prompt"])
def test_by_states_a_sample_is_known_without_prefixes(more: Any) -> None:
    model: Any = build("bert", head="ForSequenceClassification")  # which has a prompt's states too
    handle = pooled(model, more, query="states")
    states(model.bert, IDS, MASK)
    found = deltaops.choices(model).similarities
    with handle.disabled(*(part for part in handle.parts if part != "lora")):
        y = states(model.bert, IDS, MASK)
    keys = next(p for key, p in handle.named_parameters() if key.endswith("prefix_pool.keys"))
    means = torch.stack([y[b, MASK[b] == 1].mean(0) for b in range(3)])
    expected = nn.functional.cosine_similarity(means[:, None], keys[None], dim=-1)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"top_k": 11}, ConfigError, "PrefixPool: top_k must be at most size=10"),
        ({"layers_to_transform": [1]}, ConfigError, "its stack chooses before the first layer"),
        ({"target_modules": ["attention"]}, TargetError, "Add 'stack' to target_modules"),
        ({"target_modules": ["stack"]}, TargetError, "Add 'attention' to target_modules"),
    ],
)
def test_settings_that_cannot_be(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build("bert")
    with pytest.raises(error, match=message):
        deltaops.attach(model, PrefixPool(**settings))
    with pytest.raises(AttachError, match="the part 'prefix-pool' can have no gate"):
        deltaops.attach(model, (PrefixPool() + LoRA()).with_gates())
    assert all(p.requires_grad for p in model.parameters())
