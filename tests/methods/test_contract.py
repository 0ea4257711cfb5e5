"""Every method keeps what it promises, on every architecture; a new one joins by its lines here.

``METHODS`` says how it is made, and ``plain.py`` how it is computed in torch's own functions. What
is tested on a few architectures is tested on all of them with ``--everything`` (``make matrix``),
here, in ``test_training`` and in ``test_distributed``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaops
from deltaops import (
    IA3,
    Adapter,
    BitFit,
    Compacter,
    IntrinsicAdapter,
    IntrinsicPrompt,
    LNTuning,
    LoRA,
    ParallelAdapter,
    Prefix,
    PrefixPool,
    Prompt,
    PromptPool,
)
from deltaops.errors import AttachError, TargetError
from deltaops.methods import METHODS as KNOWN
from deltaops.methods import Delta, Promise
from deltaops.surgery import Handle
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import ARCHITECTURES, HEADS, answer, build

from .oracle import assert_like_plain, grad_of, loss_of
from .plain import apply_plainly

# transformers renames gradient checkpointing between the versions that we support
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

METHODS: dict[str, Callable[[], Delta]] = {
    "lora": lambda: LoRA(r=3, alpha=5, use_rslora=True),
    "dora": lambda: LoRA(r=3, alpha=5, use_dora=True),
    "pissa": lambda: LoRA(r=3, alpha=5, init_lora_weights="pissa"),
    "houlsby": lambda: Adapter(reduction_factor=4),
    "pfeiffer": lambda: Adapter(style="pfeiffer", size=5, layer_norm=True, non_linearity="silu"),
    "compacter": lambda: Compacter(size=6, phm_dim=2),
    "parallel": lambda: ParallelAdapter(),
    "parallel-layer": lambda: ParallelAdapter(size=3, target_modules=["key-value"], scaling=0.5),
    "bitfit": lambda: BitFit(),
    "ia3": lambda: IA3(),
    "lntuning": lambda: LNTuning(),
    "prompt": lambda: Prompt(num_virtual_tokens=5, prompt_tuning_init="random"),
    # without balance, which is of the rows that one process has
    "pool": lambda: PromptPool(
        5, 2, top_k=2, query_tokens=3, balance=0.0, prompt_tuning_init="random"
    ),
    "prefix-pool": lambda: PrefixPool(5, 2, top_k=2, query_tokens=3, balance=0.0),
    "intrinsic": lambda: IntrinsicPrompt(intrinsic_dim=4, num_virtual_tokens=5, seed=7),
    "intrinsic-adapter": lambda: IntrinsicAdapter(intrinsic_dim=4, size=5, seed=7),
    "prefix": lambda: Prefix(num_virtual_tokens=5),
    "prefix-mlp": lambda: Prefix(num_virtual_tokens=3, reparameterised=True, encoder_hidden_size=7),
}
REFUSED = {
    (method, "vit"): "no module around them takes inputs_embeds"
    for method in ("prompt", "pool", "prefix-pool", "intrinsic")
}
"""What cannot be, and why, in the words of the error."""
FEW = ("bert", "gpt2", "llama", "t5")
"""A post-norm encoder, Conv1D with fused projections, a gated decoder with RMSNorm, two stacks."""
PAIRS = [(m, n) for m in METHODS for n in ARCHITECTURES if (m, n) not in REFUSED]
"""Method and architecture: all that there are."""

UNREAD = dict.fromkeys(HEADS, "nothing") | {"clip vision": "post_layernorm"}
"""Part of the names of what the loss of :data:`HEADS` does not depend on."""

everywhere = pytest.mark.parametrize(("method", "name"), PAIRS)


def on(
    *names: str, of: tuple[str, ...] = ARCHITECTURES, methods: Collection[str] = METHODS
) -> pytest.MarkDecorator:
    """All pairs with an architecture in ``of``; beside ``methods`` on ``names``, with --everything
    alone."""
    pairs = [pair for pair in PAIRS if pair[1] in of]
    left = pytest.mark.everything
    return pytest.mark.parametrize(
        ("method", "name"),
        [pytest.param(m, n, marks=() if n in names and m in methods else left) for m, n in pairs],
    )


on_a_few = on(*FEW)
COMPILED = ("lora", "dora", "houlsby", "bitfit", "ia3", "prefix", "prompt", "prefix-pool")
"""One of each way that a delta takes in a compiled model."""


def attached(method: str, model: nn.Module, **settings: Any) -> Handle:
    """The method on ``model``, with parameters far from their start."""
    handle = deltaops.attach(model, METHODS[method](), **settings)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return handle


def unmergeable(method: str, name: str) -> bool:
    """Whether merging is refused: an RMSNorm has no bias to take up."""
    biased_norm = method == "bitfit" and name in ("llama", "qwen3", "t5")
    return biased_norm or Promise.MERGE_EQUALS_APPLY not in METHODS[method]().promises


def test_every_method_is_here() -> None:
    assert {type(make()) for make in METHODS.values()} == set(KNOWN.values())


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(method: str, name: str) -> None:
    with pytest.raises(TargetError, match=REFUSED[method, name]):
        deltaops.attach(build(name), METHODS[method]())


@everywhere
def test_start(method: str, name: str) -> None:
    model, delta = build(name), METHODS[method]()
    before = answer(name, model.requires_grad_(False))
    deltaops.attach(model, delta, generator=torch.Generator().manual_seed(5))
    found = answer(name, model)
    error = relative_error(found, before)
    if Promise.IDENTITY_AT_START in delta.promises:
        assert error < 16 * bound(0.0, torch.float32)  # of a whole model, computed by other ops
    elif Promise.NEAR_IDENTITY_AT_START in delta.promises:
        assert 0.0 < error < 0.02
    else:  # what is drawn is tested with the method
        assert Promise.STATED_AT_START in delta.promises
        assert error > 0.0
        again = build(name)
        deltaops.attach(again, delta, generator=torch.Generator().manual_seed(5))
        assert torch.equal(answer(name, again), found)


@everywhere
def test_logits_and_gradients_against_float64(method: str, name: str) -> None:
    base = build(name)
    model = copy.deepcopy(base)
    handle = attached(method, model)
    trained = {id(p) for p in handle.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    y = answer(name, model)
    loss_of(y).backward()
    state = handle.state()
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)

    assert_like_plain(
        name,
        base,
        y,
        state,
        lambda plain, leaves: apply_plainly(plain, handle.delta, handle.places, leaves),
    )


@everywhere
def test_save_and_load_give_the_same_bits(method: str, name: str, tmp_path: Path) -> None:
    model = build(name)
    twin = copy.deepcopy(model)
    handle = attached(method, model)
    handle.save(tmp_path)
    loaded = deltaops.load(twin, tmp_path)
    if method == "pissa":  # its file holds the change of W, which is another sum
        error = relative_error(answer(name, twin), answer(name, model))
        assert error < 16 * bound(0.0, torch.float32)
    else:
        assert torch.equal(answer(name, twin), answer(name, model))
    assert loaded.sites == handle.sites
    assert loaded.state().keys() == handle.state().keys()
    assert {k for k, p in twin.named_parameters() if p.requires_grad} == {
        k for k, p in model.named_parameters() if p.requires_grad
    }


@on_a_few
def test_merge_equals_apply_or_says_why_not(method: str, name: str) -> None:
    model = build(name)
    handle = attached(method, model)
    applied = answer(name, model)
    if unmergeable(method, name):
        with pytest.raises(AttachError, match="Keep the delta applied"):
            handle.merge()
        assert torch.equal(answer(name, model), applied)
        return
    handle.merge()
    # rounding the weight once is what merging costs; it is felt in every layer
    assert relative_error(answer(name, model), applied) < 16 * bound(0.0, torch.float32)
    handle.unmerge()
    assert torch.equal(answer(name, model), applied)


@on("gpt2")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_merge_in_other_precisions(method: str, name: str, dtype: torch.dtype) -> None:
    if unmergeable(method, name):
        pytest.skip("it does not merge")
    model = build(name).to(dtype)
    handle = attached(method, model)
    oracle = copy.deepcopy(model).double()
    expected = answer(name, oracle)
    model = handle.merge_and_unload()
    assert relative_error(answer(name, model), expected) < 16 * bound(0.0, dtype)
    plain = {type(m).__module__.split(".")[0] for m in model.modules()}
    assert plain <= {"torch", "transformers"}


@everywhere
def test_revert_restores_bits_classes_and_flags(method: str, name: str) -> None:
    model = build(name)
    next(model.parameters()).requires_grad_(False)

    def look() -> list[Any]:
        return [
            (type(m), sorted(vars(m)), list(m._parameters), list(m._modules))
            for m in model.modules()
        ] + [p.requires_grad for p in model.parameters()]

    before, state = look(), {k: v.clone() for k, v in model.state_dict().items()}
    handle = attached(method, model)
    with handle.disabled():
        base = answer(name, model)
    assert not torch.equal(answer(name, model), base)
    handle.revert()
    assert look() == before
    now = model.state_dict()
    assert state.keys() == now.keys()
    assert all(torch.equal(state[key], now[key]) for key in state)


@on_a_few
def test_disabled_is_the_model_without_the_delta(method: str, name: str) -> None:
    model = build(name)
    other = deltaops.attach(copy.deepcopy(model), LoRA(r=1)).model  # the same ops, B = 0
    handle = attached(method, model)
    with handle.disabled(), torch.no_grad():
        assert relative_error(answer(name, model), answer(name, other)) < 16 * bound(
            0.0, torch.float32
        )


@on_a_few
def test_copies_and_pickles_compute_the_same_alone(method: str, name: str) -> None:
    model = build(name)
    attached(method, model)
    expected = answer(name, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(name, twin), expected)
        found = deltaops.surgery.handle_of(twin)
        assert found is not None
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.zero_()
        assert torch.equal(answer(name, model), expected)


@on_a_few
def test_gradient_checkpointing_gives_the_same_gradients(method: str, name: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = build(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]  # transformers'
        handle = attached(method, model)
        loss_of(answer(name, model)).backward()
        grads.append(torch.cat([grad_of(p).flatten() for p in handle.parameters()]))
    # T5's decoder layers add to the gradient of what they all read in another order
    assert relative_error(grads[1], grads[0]) <= (16 * bound(0.0, torch.float32)) * (name == "t5")


@on_a_few
def test_bfloat16(method: str, name: str) -> None:
    model = build(name).to(torch.bfloat16)
    handle = attached(method, model)
    y = answer(name, model)
    assert y.dtype == torch.bfloat16
    wide = copy.deepcopy(model).double()
    assert relative_error(y, answer(name, wide)) < 16 * bound(0.0, torch.bfloat16)
    loss_of(y).backward()
    assert all(bool(torch.isfinite(grad_of(p)).all()) for p in handle.parameters())


@on("gpt2", "llama", "t5", of=("gpt2", "llama", "qwen3", "t5"))
def test_generation_with_a_cache_equals_without(method: str, name: str) -> None:
    model = build(name, head=HEADS[name])
    attached(method, model)
    prompt = torch.tensor([[5, 17, 3, 40]])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    if name == "t5":
        settings["decoder_start_token_id"] = 0
    with_cache, without = (
        model.generate(prompt, use_cache=cache, **settings)  # type: ignore[operator]  # transformers'
        for cache in (True, False)
    )
    assert with_cache.shape == (1, 7 if name == "t5" else 10)
    assert torch.equal(with_cache, without)


@on("llama", methods=COMPILED)
def test_torch_compile(method: str, name: str) -> None:
    model = build(name)
    handle = attached(method, model)
    loss_of(answer(name, model)).backward()
    expected = [answer(name, model), *(grad_of(p).clone() for p in handle.parameters())]
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = answer(name, compiled)
    loss_of(y).backward()
    found = [y, *(grad_of(p) for p in handle.parameters())]
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@on("bert")
def test_it_learns(method: str, name: str) -> None:
    teacher, model = build(name), build(name)
    attached(method, teacher)
    with torch.no_grad():
        target = answer(name, teacher)
    handle = deltaops.attach(model.train(), METHODS[method]())
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        loss = (answer(name, model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
