"""Causal models, also those whose attentions do not say it, and what prompts do there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltaops
from deltaops import Prompt, PromptPool
from deltaops.methods.causal import is_causal
from deltaops.methods.pool import FIRST
from deltaops.modules import PooledPrompts
from deltaops.testing.architectures import build

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, dict[str, Any]] = {
    "Bloom": {"vocab_size": 60, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "Mpt": {"vocab_size": 60, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32},
    "CodeGen": {
        "vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4,
        "n_positions": 32,
    },
    "XGLM": {
        "vocab_size": 60, "d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2,
        "max_position_embeddings": 32,
    },
}  # fmt: skip
ONES = ("gpt2", "llama", "qwen3")
OTHERS = ("bert", "roberta", "distilbert", "vit", "clip vision")


def small(family: str, head: str = "Model", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL[family] | settings)
    return getattr(transformers, f"{family}{head}")(config).eval()


@pytest.mark.parametrize("family", SMALL)
def test_those_that_only_make_a_causal_mask_are_causal(family: str) -> None:
    assert is_causal(small(family))


def test_those_that_say_it_and_those_that_are_none() -> None:
    assert all(is_causal(build(name)) for name in ONES)
    assert not any(is_causal(build(name)) for name in OTHERS)
    assert is_causal(build("t5"))
    assert not is_causal(build("t5").get_submodule("encoder"))


def test_a_pool_there_chooses_by_the_first_tokens() -> None:
    model = small("Bloom", "ForCausalLM")
    deltaops.attach(model, PromptPool(3, 2, top_k=1))
    (pool,) = (m for m in model.modules() if isinstance(m, PooledPrompts))
    assert pool.tokens == FIRST


def test_a_class_is_read_at_the_last_token_behind_a_prompt() -> None:
    model = small("Bloom", "ForSequenceClassification", pad_token_id=0, num_labels=3)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = ids.ne(0).long()
    plain = small("Bloom", "ForSequenceClassification", pad_token_id=0, num_labels=3)
    handle = deltaops.attach(model, Prompt(3))
    (prompt,) = handle.parameters()
    embeds = plain.transformer.word_embeddings(ids)
    states: Tensor = plain.transformer(
        inputs_embeds=torch.cat([prompt.expand(2, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(2, 3), mask], 1),
    ).last_hidden_state
    expected = plain.score(states[torch.arange(2), 3 + mask.sum(1) - 1])
    found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected)
