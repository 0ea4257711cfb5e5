"""Pools of prompts: choice and gradients against float64, the term of the loss, the record."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deltaops
from deltaops import PromptPool
from deltaops.errors import AttachError, ConfigError, ShapeError
from deltaops.modules import PooledPrompts
from deltaops.surgery import Handle
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, batch, build

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [0] * 3 + [1] * 4])
LABELS = torch.tensor([0, 1, 1])
SIZE, LENGTH, TOP = 5, 2, 2


def pooled(model: nn.Module, **settings: Any) -> Handle:
    """A pool far from its start."""
    handle = deltaops.attach(model, PromptPool(SIZE, LENGTH, top_k=TOP, **settings))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return handle


def by_hand(base: Any, prompts: Tensor, keys: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Loss with its term and the gradients of prompts and keys, sample by sample."""
    base = copy.deepcopy(base).requires_grad_(False).to(dtype)
    prompts, keys = (t.detach().to(dtype).requires_grad_() for t in (prompts, keys))
    embeds = base.get_input_embeddings()(IDS)
    cosines, rows, chosen = [], [], []
    for sample, mask in zip(embeds, MASK, strict=True):
        query = sample[mask == 1].mean(0)
        cosines.append(torch.stack([functional.cosine_similarity(query, k, dim=0) for k in keys]))
        chosen.append(sorted(cosines[-1].argsort(descending=True)[:TOP].tolist()))
        rows.append(torch.cat([*(prompts[i] for i in chosen[-1]), sample]))
    before = torch.ones(3, TOP * LENGTH, dtype=torch.int64)
    loss = base(
        inputs_embeds=torch.stack(rows), attention_mask=torch.cat([before, MASK], 1), labels=LABELS
    ).loss
    pull = sum(1 - cosines[b][i] for b in range(3) for i in chosen[b]) / (3 * TOP)
    chances = torch.stack([(c / 0.1).softmax(0) for c in cosines]).mean(0)
    shares = [sum(i in mine for mine in chosen) / (3 * TOP) for i in range(SIZE)]
    balance = SIZE * sum(f * p for f, p in zip(shares, chances, strict=True)) - 1
    loss = loss + 0.4 * pull + 0.3 * balance
    loss.backward()
    assert prompts.grad is not None
    assert keys.grad is not None
    return [loss.detach(), prompts.grad, keys.grad]


def test_choice_loss_and_gradients_against_float64() -> None:
    base = build("bert", head="ForSequenceClassification")
    model: Any = copy.deepcopy(base).train()
    handle = pooled(model, key_loss=0.4, balance=0.3)
    prompts, keys = handle.parameters()
    found = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    found.backward()
    exact = by_hand(base, prompts, keys, torch.float64)
    usual = by_hand(base, prompts, keys, torch.float32)
    assert prompts.grad is not None
    assert keys.grad is not None
    for ours, low, high in zip([found, prompts.grad, keys.grad], usual, exact, strict=True):
        limit = 4 * bound(relative_error(low, high), torch.float32)
        assert relative_error(ours.detach(), high) < limit


def test_the_term_joins_whatever_loss_the_model_returns() -> None:
    model: Any = build("bert", head="ForSequenceClassification")
    pooled(model)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    plain = model(**inputs).loss
    with pytest.raises(AttachError, match="no pass in training"):
        deltaops.auxiliary_loss(model)
    model.train()
    whole = model(**inputs).loss
    torch.testing.assert_close(whole, plain + deltaops.auxiliary_loss(model))
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], whole)
    model.bert(IDS)  # a pass in training that no loss came of
    torch.testing.assert_close(model.eval()(**inputs).loss, plain)
    model.train()
    logits = model(input_ids=IDS).logits
    assert logits.requires_grad  # without a loss, nothing joins, and the term is there to be asked
    assert deltaops.auxiliary_loss(model).requires_grad


@pytest.mark.parametrize(
    ("kind", "head"),
    [("gpt2", "LMHeadModel"), ("bert", "ForMaskedLM"), ("bert", "ForSequenceClassification")],
)
def test_the_term_is_scaled_as_the_loss_of_a_micro_batch_is(kind: str, head: str) -> None:
    """Whether that takes notice of the step's labels, and whichever it counts."""
    model: Any = build(kind, head=head)
    pooled(model)
    model.train()
    labels = LABELS if head.endswith("Classification") else IDS.masked_fill(MASK == 0, -100)
    items = {"num_items_in_batch": torch.tensor(11)}
    for rows in (slice(2), slice(2, 3)):
        inputs = {"input_ids": IDS[rows], "attention_mask": MASK[rows], "labels": labels[rows]}
        found = _added(model, inputs | items)
        model.eval()
        share = (model(**inputs, **items).loss / model(**inputs).loss).detach()
        model.train()
        torch.testing.assert_close(found, _added(model, inputs) * share)


def _added(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    items = inputs.pop("num_items_in_batch", None)
    given = {} if items is None else {"num_items_in_batch": items}
    loss = model(**inputs, **given).loss.detach()
    model.eval()
    plain: Tensor = model(**inputs, **given).loss.detach()
    model.train()
    return loss - plain


class Answer(NamedTuple):
    """As our own readers have it."""

    loss: Tensor
    logits: Tensor


class Reader(nn.Module):
    """A model around one of transformers."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Answer:
        states = self.encoder(input_ids).last_hidden_state
        return Answer(states.square().mean(), states)


def test_the_term_joins_the_loss_of_a_model_around_it_and_goes_with_it() -> None:
    model = Reader(build("bert"))
    handle = pooled(model)
    before = model(IDS).loss
    model.train()
    torch.testing.assert_close(model(IDS).loss, before + deltaops.auxiliary_loss(model))
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(IDS).loss, model(IDS).loss)
    with handle.disabled():
        assert torch.equal(model(IDS).loss, Reader(model.encoder).eval()(IDS).loss)
    handle.revert()
    assert not model._forward_hooks


def test_by_states_a_sample_is_known_as_the_untouched_model_has_it() -> None:
    model: Any = build("bert", hidden_dropout_prob=0.5).train()
    handle = pooled(model, query="states", query_tokens=4)
    _, keys = handle.parameters()
    assert all(m.training for m in model.modules())
    model(input_ids=IDS, attention_mask=MASK)
    assert all(m.training for m in model.modules())
    found = deltaops.choices(model)
    with handle.disabled(), torch.no_grad():
        states = model.eval()(input_ids=IDS, attention_mask=MASK).last_hidden_state
    for row, (sample, mask) in enumerate(zip(states, MASK, strict=True)):
        query = sample[mask == 1][:4].mean(0)
        cosines = functional.cosine_similarity(query[None], keys)
        torch.testing.assert_close(found.similarities[row], cosines, rtol=1e-4, atol=1e-5)
        assert found.indices[row].tolist() == sorted(cosines.topk(TOP).indices.tolist())


def test_by_states_where_a_model_returns_tuples() -> None:
    model: Any = build("bert", head="ForSequenceClassification", return_dict=False)
    pooled(model, query="states")
    loss, logits = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    assert logits.shape == (3, 2)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_by_states_in_other_stacks(name: str) -> None:
    model = build(name)
    handle = pooled(model, query="states", query_tokens=3)
    _, keys = handle.parameters()
    answer(name, model)
    with handle.disabled(), torch.no_grad():
        stack: Any = model.get_submodule(handle.sites[0])
        states = stack(input_ids=batch(name)["input_ids"]).last_hidden_state
    expected = functional.cosine_similarity(states[:, :3].mean(1)[:, None], keys[None], dim=-1)
    found = deltaops.choices(model).similarities
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_language_models_choice_does_not_see_what_it_predicts() -> None:
    model: Any = build("gpt2", head="LMHeadModel")
    pooled(model)
    ids = torch.randint(3, 60, (2, 20))
    other = ids.clone()
    other[:, 16:] = 7
    seen = []
    for tokens in (ids, other):
        model(input_ids=tokens)
        seen.append(deltaops.choices(model).similarities)
    assert torch.equal(*seen)


def test_the_record_tells_tables_and_pictures(tmp_path: Path) -> None:
    model: Any = build("bert")
    with pytest.raises(AttachError, match="no pool"):
        deltaops.choices(model)
    pooled(model)
    with pytest.raises(AttachError, match="chosen nothing yet"):
        deltaops.choices(model)
    model(input_ids=IDS)
    model(input_ids=IDS[:2])
    found = deltaops.choices(model, reset=True)
    assert found.indices.shape == (2, TOP)
    assert int(found.usage.sum()) == 5 * TOP
    counts = found.counts(["a", "b"])
    expected = torch.stack([functional.one_hot(row, SIZE).sum(0) for row in found.indices])
    assert torch.equal(torch.stack([counts["a"], counts["b"]]), expected)
    with pytest.raises(ShapeError, match="2 samples"):
        found.counts(["a"])
    assert len(str(found).splitlines()) == 1 + SIZE
    found.draw(tmp_path / "pool.png")
    assert (tmp_path / "pool.png").read_bytes().startswith(b"\x89PNG")
    assert "2 of 5 in a pool" in str(deltaops.report(model))
    with pytest.raises(AttachError, match="chosen nothing yet"):
        deltaops.choices(model)


@pytest.mark.parametrize("balance", [0.0, 0.3])
def test_balance_keeps_one_prompt_from_winning_everything(balance: float) -> None:
    random = torch.Generator().manual_seed(2)
    direction = torch.randn(8, generator=random)
    queries = direction + 0.5 * torch.randn(64, 8, generator=random)
    keys = torch.randn(4, 8, generator=random) - direction
    keys[0] = direction  # the only one near
    pool = PooledPrompts(
        torch.zeros(4, 1, 8), keys, top_k=1, source="states", tokens=None, key_loss=0.5,
        balance=balance,
    )  # fmt: skip
    optimizer = torch.optim.Adam([pool.keys], lr=0.05)
    for _ in range(150):
        pool(queries)
        assert pool.auxiliary is not None
        optimizer.zero_grad()
        pool.auxiliary.backward()
        optimizer.step()
    pool.forget()
    pool(queries)
    assert pool.usage is not None
    assert (int(pool.usage.max()) == 64) == (balance == 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 11}, "top_k must be at most size=10"),
        ({"size": 0}, "size must be an integer ≥ 1"),
        ({"query_tokens": 0}, "query_tokens must be an integer ≥ 1"),
        ({"query": "labels"}, "query must be embeddings or states"),
        ({"balance": -0.1}, "balance must be a number ≥ 0"),
        ({"prompt_tuning_init": "text"}, "prompt_tuning_init must be"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptPool(**settings)
