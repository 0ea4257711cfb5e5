"""Two methods on one model keep what both promise; every kind of place that two can share is here.

Every two of ``test_contract.METHODS`` are, with --everything (``make matrix``), or are refused. The
oracle is that of the single methods, :mod:`.plain`, one after the other on one plain model.
"""

from __future__ import annotations

import copy
import importlib
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import (
    IA3,
    Adapter,
    BitFit,
    Combined,
    Compacter,
    IntrinsicAdapter,
    LNTuning,
    LoRA,
    ParallelAdapter,
    Prefix,
    Prompt,
)
from deltaops.errors import AttachError
from deltaops.methods import Promise
from deltaops.modules import LinearPlace, place
from deltaops.surgery import Handle
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, build

from .oracle import assert_like_plain, grad_of, loss_of
from .plain import apply_plainly
from .test_contract import METHODS

# transformers renames gradient checkpointing between the versions that we support
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

PAIRS: dict[str, Callable[[], Combined]] = {
    # one linear: a branch and its bias; norms beside them
    "lora+bitfit": lambda: LoRA(r=3, alpha=5) + BitFit(),
    # one linear: two branches, of other ranks and another φ
    "lora+parallel-layer": lambda: (
        LoRA(r=3, alpha=5) + ParallelAdapter(size=4, target_modules=["key-value"], scaling=0.5)
    ),
    # around one linear: a gain on what the branch added, whichever came first
    "ia3+lora": lambda: IA3() + LoRA(r=2, alpha=3),
    # after one linear: the adapter reads rows of the trained length, whichever came first
    "houlsby+dora": lambda: Adapter(size=5) + LoRA(r=3, alpha=5, use_dora=True),
    # around one sub-layer: the adapter after it reads the one beside it; MAM's places
    "adapter+parallel": lambda: Adapter(style="pfeiffer", size=5) + ParallelAdapter(),
    "prefix+parallel": lambda: Prefix(num_virtual_tokens=4) + ParallelAdapter(size=6),
    # two that the model holds, decoded in one pass
    "prefix-mlp+intrinsic": lambda: (
        Prefix(num_virtual_tokens=3, reparameterised=True, encoder_hidden_size=7)
        + IntrinsicAdapter(intrinsic_dim=4, size=5, seed=7)
    ),
    # the weight by one, the bias by the other, in copies of their own
    "pissa+bitfit": lambda: LoRA(r=3, alpha=5, init_lora_weights="pissa") + BitFit(),
    "compacter+lntuning": lambda: Compacter(size=6, phm_dim=2) + LNTuning(),
    "prompt+lora": lambda: (
        Prompt(num_virtual_tokens=5, prompt_tuning_init="random") + LoRA(r=3, alpha=5)
    ),
}
ONCE = (
    {"prompt", "pool", "intrinsic"}, {"prefix", "prefix-mlp", "prefix-pool"}, {"intrinsic-adapter"},
)  # fmt: skip
"""Of each of these sets a model has one, once."""
ALONE: tuple[tuple[set[str], set[str]], ...] = (
    # lengths of rows are those of W and of what trains beside it; a start takes W apart
    ({"dora", "pissa"}, {"lora", "dora", "pissa", "parallel-layer", "ia3"}),
    ({"bitfit", "parallel-layer"}, {"bitfit", "parallel-layer"}),
    ({"bitfit", "lntuning"}, {"lntuning"}),
)
"""One of the first and one of the second would change the same parameter, on a BERT at least."""


def refusal(one: str, other: str) -> str | None:
    """Why ``one`` and ``other`` of METHODS cannot be together, as the error says it; or None."""
    if any({one, other} <= kinds for kinds in ONCE):
        return "both want to be"
    pairs = ((one, other), (other, one))
    if any(a in first and b in second for first, second in ALONE for a, b in pairs):
        return "change the same parameter"
    return None


def both(one: str, other: str) -> Combined:
    return Combined({one: METHODS[one](), other if other != one else "twin": METHODS[other]()})


REFUSED = [pair for pair in combinations_with_replacement(METHODS, 2) if refusal(*pair)]
EVERY = {
    f"{one} and {other}": partial(both, one, other)
    for one, other in combinations_with_replacement(METHODS, 2)
    if not refusal(one, other)
}
ALL = PAIRS | EVERY
LEFT = [pytest.param(pair, marks=pytest.mark.everything) for pair in EVERY]
NEAREST = (
    "prefix-pool", "prompt", "prefix", "lora", "beside a layer", "bitfit", "lntuning", "ia3",
    "parallel",
)  # fmt: skip
"""The order in which hooks make the function; what comes after a sub-layer is last."""

for_each_pair = pytest.mark.parametrize("pair", [*PAIRS, *LEFT])
on_two = pytest.mark.parametrize("name", ["bert", "llama"])
on_bert_and_where_llama_differs = pytest.mark.parametrize(
    ("pair", "name"),
    [(pair, "bert") for pair in PAIRS]
    + [(pair, "llama") for pair in ("lora+bitfit", "prefix+parallel", "compacter+lntuning")]
    + [
        pytest.param(pair, name, marks=pytest.mark.everything)
        for pair in EVERY
        for name in ("bert", "llama")
    ],
)


def attached(pair: str, model: nn.Module) -> Handle:
    """Both on ``model``, with parameters far from their start."""
    handle = deltaops.attach(model, ALL[pair](), generator=torch.Generator().manual_seed(5))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return handle


def plainly(model: nn.Module, handle: Handle, state: dict[str, Tensor]) -> None:
    """Let ``model`` compute by hooks what both parts do."""

    def place(part: str) -> int:
        kind = handle.parts[part].kind
        if kind == "parallel" and not any(s.entry for s in handle.places if s.part == part):
            kind = "beside a layer"
        return NEAREST.index(kind) if kind in NEAREST else len(NEAREST)

    for part in sorted(handle.parts, key=place):
        sites = tuple(replace(site, part="") for site in handle.places if site.part == part)
        start = f"{part}/"
        own = {k.removeprefix(start): t for k, t in state.items() if k.startswith(start)}
        apply_plainly(model, handle.parts[part], sites, own)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(*pair, marks=() if i % 10 == 0 else pytest.mark.everything)
        for i, pair in enumerate(REFUSED)
    ],
)
def test_two_that_cannot_be_together_are_refused_and_nothing_changes(one: str, other: str) -> None:
    model = build("bert")
    before = [(type(m), sorted(vars(m)), m.training) for m in model.modules()]
    reason = refusal(one, other)
    assert reason is not None
    with pytest.raises(AttachError, match=reason) as found:
        deltaops.attach(model, both(one, other))
    assert all(repr(name) in str(found.value) for name in both(one, other).by_name)
    assert [(type(m), sorted(vars(m)), m.training) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


@for_each_pair
def test_each_linear_is_one_call_of_the_op(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    attached(pair, model)
    weights: Counter[int] = Counter()

    def alone(x: Any, weight: Tensor, *rest: Any, **named: Any) -> Any:
        weights[weight.data_ptr()] += 1
        return op(x, weight, *rest, **named)

    def together(x: Any, layers: Any, **named: Any) -> Any:
        weights.update(layer.weight.data_ptr() for layer in layers)
        return group(x, layers, **named)

    sharing = importlib.import_module("deltaops.modules.sharing")  # a function has its name
    op, group = place.delta_linear, sharing.delta_linear_group
    monkeypatch.setattr(place, "delta_linear", alone)
    monkeypatch.setattr(sharing, "delta_linear_group", together)
    answer("llama", model)
    assert set(weights.values()) == {1}
    assert len(weights) == sum(isinstance(m, LinearPlace) for m in model.modules()) == 14


@on_bert_and_where_llama_differs
def test_start(pair: str, name: str) -> None:
    model, delta = build(name), ALL[pair]()
    before = answer(name, model.requires_grad_(False))
    deltaops.attach(model, delta)
    promised = [part.promises for part in delta.by_name.values()]
    error = relative_error(answer(name, model), before)
    if all(Promise.IDENTITY_AT_START in found for found in promised):
        assert error < 16 * bound(0.0, torch.float32)
    else:
        assert error > 0.0


@for_each_pair
@on_two
def test_logits_and_gradients_against_float64(pair: str, name: str) -> None:
    base = build(name)
    model = copy.deepcopy(base)
    handle = attached(pair, model)
    trained = [id(p) for p in handle.parameters()]
    assert len(trained) == len(set(trained))
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(trained)
    y = answer(name, model)
    loss_of(y).backward()
    state = handle.state()
    assert len(state) == len(trained)

    assert_like_plain(name, base, y, state, lambda plain, leaves: plainly(plain, handle, leaves))


@for_each_pair
@on_two
def test_save_and_load_give_the_same_bits(pair: str, name: str, tmp_path: Path) -> None:
    model = build(name)
    twin = copy.deepcopy(model)
    handle = attached(pair, model)
    handle.save(tmp_path)
    loaded = deltaops.load(twin, tmp_path)
    if "pissa" in pair:  # its file holds the change of W, which is another sum
        error = relative_error(answer(name, twin), answer(name, model))
        assert error < 16 * bound(0.0, torch.float32)
    else:
        assert torch.equal(answer(name, twin), answer(name, model))
    assert loaded.state().keys() == handle.state().keys()
    assert list(loaded.parts) == list(handle.parts)


@on_bert_and_where_llama_differs
def test_each_part_off_is_the_other_alone_and_revert_gives_the_bits(pair: str, name: str) -> None:
    model = build(name)
    before = answer(name, deltaops.attach(copy.deepcopy(model), LoRA(r=1)).model)  # the same ops
    classes = [(type(m), sorted(vars(m)), list(m._parameters)) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    handle = attached(pair, model)
    both = answer(name, model)
    for part in handle.parts:
        with handle.disabled(part):
            assert handle.enabled == tuple(p for p in handle.parts if p != part)
            alone = answer(name, model)
            twin = pickle.loads(pickle.dumps(model))
        assert not torch.equal(alone, both)
        assert torch.equal(answer(name, model), both)
    assert torch.equal(answer(name, twin), alone)
    with handle.disabled():
        assert relative_error(answer(name, model), before) < 16 * bound(0.0, torch.float32)
    with handle.disabled(*handle.parts):
        assert relative_error(answer(name, model), before) < 16 * bound(0.0, torch.float32)
        handle.revert()
    assert [(type(m), sorted(vars(m)), list(m._parameters)) for m in model.modules()] == classes
    now = model.state_dict()
    assert state.keys() == now.keys()
    assert all(torch.equal(state[key], now[key]) for key in state)


@for_each_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_equals_apply_or_names_the_part(pair: str, dtype: torch.dtype) -> None:
    model = build("gpt2").to(dtype)
    handle = attached(pair, model)
    applied = answer("gpt2", model)
    exact = answer("gpt2", copy.deepcopy(model).double())
    stays = [
        name
        for name, part in handle.parts.items()
        if Promise.MERGE_EQUALS_APPLY not in part.promises
    ]
    if stays:
        with pytest.raises(AttachError, match=f"the part '({'|'.join(stays)})' at"):
            handle.merge()
        assert torch.equal(answer("gpt2", model), applied)
        return
    handle.merge()
    assert relative_error(answer("gpt2", model), exact) < 16 * bound(0.0, dtype)
    handle.unmerge()
    assert torch.equal(answer("gpt2", model), applied)


@for_each_pair
def test_gradient_checkpointing_gives_the_same_gradients(pair: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = build("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]  # transformers'
        handle = attached(pair, model)
        loss_of(answer("llama", model)).backward()
        grads.append(torch.cat([grad_of(p).flatten() for p in handle.parameters()]))
    assert torch.equal(*grads)


@for_each_pair
def test_generation_with_a_cache_equals_without(pair: str) -> None:
    model = build("llama", head="ForCausalLM")
    attached(pair, model)
    prompt = torch.tensor([[5, 17, 3, 40]])
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with_cache, without = (
        model.generate(prompt, use_cache=cache, **settings)  # type: ignore[operator]  # transformers'
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_a_trainer_trains_all_parts_with_checkpointing(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = build("llama", head="ForCausalLM")
    base = {k: v.clone() for k, v in model.state_dict().items()}
    handle = deltaops.attach(
        model, LoRA(r=4, alpha=32) + BitFit() + Prefix(num_virtual_tokens=3) + Adapter(size=4)
    )
    before = {k: v.detach().clone() for k, v in handle.state().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    rows = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(8)]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    moved = {k.split("/")[0] for k, v in handle.state().items() if not torch.equal(v, before[k])}
    assert moved == set(handle.parts)
    handle.revert()
    assert all(torch.equal(base[k], v) for k, v in model.state_dict().items())
