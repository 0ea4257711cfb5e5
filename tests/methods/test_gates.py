"""Gates on parts of a combination, against hooks on a plain model that gate by the formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import IA3, Adapter, BitFit, Combined, LoRA, ParallelAdapter, Prefix
from deltaops.errors import AttachError, CheckpointError, NoBackendError
from deltaops.methods import Site
from deltaops.surgery import Handle
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, build

from .oracle import assert_like_plain, grad_of, loss_of
from .plain import apply_plainly, encoded

# transformers renames gradient checkpointing between the versions that we support
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

STACKS: dict[str, Callable[[], Combined]] = {
    "unipelt": lambda: (
        Prefix(num_virtual_tokens=4)
        + Adapter(style="pfeiffer", size=5, layer_norm=True)
        + LoRA(r=3, alpha=5, target_modules=["key-value"])
    ),
    "prefix-mlp+parallel": lambda: (
        Prefix(num_virtual_tokens=3, reparameterised=True, encoder_hidden_size=7)
        + ParallelAdapter(size=6)
        + LoRA(r=2, target_modules=["feed-forward-output"])
    ),
}
everywhere = pytest.mark.parametrize(
    ("stack", "name"), [(s, n) for s in STACKS for n in ("bert", "vit")]
)
for_each_stack = pytest.mark.parametrize("stack", STACKS)


def attached(stack: str, model: nn.Module, **settings: Any) -> Handle:
    """The stack with gates on ``model``, with parameters far from their start."""
    handle = deltaops.attach(model, STACKS[stack]().with_gates(), **settings)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    return handle


def gate(t: dict[str, Tensor], x: Tensor) -> Tensor:
    """``[B, 1, 1]``."""
    return torch.sigmoid(x @ t["gate.weight"] + t["gate.bias"]).mean(1)[:, None, None]


def gated_hooks(model: nn.Module, delta: Any, site: Site, state: dict[str, Tensor]) -> None:
    """What the part does at ``site``, times its gate: the layer with it less the layer without."""
    own = {k[len(site.path) + 1 :]: v for k, v in state.items() if k.startswith(f"{site.path}.")}
    module: Any = model.get_submodule(site.path)
    if isinstance(delta, Prefix):
        apply_plainly(model, delta, (site,), state)
        keys, values = module.__dict__["plain_prefix"]

        def opened(module: Any, args: Any, named: dict[str, Any]) -> None:
            g = gate(own, args[0] if args else named["hidden_states"])[..., None]
            module.__dict__["plain_prefix"] = g * keys, g * values

        module.register_forward_pre_hook(opened, with_kwargs=True)
        return
    read: list[Tensor] = []  # a span reads what its first layer does
    entry = model.get_submodule(site.entry or site.path)
    entry.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    without: list[Tensor] = []
    module.register_forward_hook(lambda m, args, y: without.append(y))
    bare = {k: v for k, v in state.items() if ".gate." not in k}
    apply_plainly(model, delta, (site,), bare)

    def through(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        x, before = read.pop(), without.pop()
        return before + gate(own, before if isinstance(delta, Adapter) else x) * (y - before)

    module.register_forward_hook(through)


def plainly(model: nn.Module, handle: Handle, leaves: dict[str, Tensor]) -> None:
    for part in sorted(handle.parts, key=["prefix", "lora", "parallel", "adapter"].index):
        delta: Any = handle.parts[part]
        sites = [replace(s, part="") for s in handle.places if s.part == part]
        start = f"{part}/"
        own = {k.removeprefix(start): t for k, t in leaves.items() if k.startswith(start)}
        if part == "prefix" and delta.reparameterised:
            encoder = {k: v for k, v in own.items() if k.startswith("prefix_encoder.")}
            own |= encoded(encoder, tuple(sites))
            delta = Prefix(num_virtual_tokens=delta.num_virtual_tokens)
        for site in sites:
            if site.path:
                gated_hooks(model, delta, site, own)


@everywhere
def test_logits_and_gradients_against_float64(stack: str, name: str) -> None:
    base = build(name)
    model = copy.deepcopy(base)
    handle = attached(stack, model)
    y = answer(name, model)
    loss_of(y).backward()
    state = handle.state()
    gates = [k for k in state if ".gate." in k]
    places = [site for site in handle.places if site.path]
    assert len(gates) == 2 * len(places)
    assert all(bool(grad_of(state[key]).any()) for key in gates)

    assert_like_plain(name, base, y, state, lambda plain, leaves: plainly(plain, handle, leaves))


@everywhere
def test_each_sample_has_its_own_gate_and_files_and_revert_give_the_bits(
    stack: str, name: str, tmp_path: Path
) -> None:
    model, twin = build(name), build(name)
    before = answer(name, twin)
    classes = [(type(m), sorted(vars(m))) for m in model.modules()]
    handle = attached(stack, model)
    y = answer(name, model)
    handle.save(tmp_path)
    loaded = deltaops.load(twin, tmp_path)
    assert loaded.delta == handle.delta
    assert torch.equal(answer(name, twin), y)
    for part in handle.parts:
        with handle.disabled(part):
            assert not torch.equal(answer(name, model), y)
    assert torch.equal(answer(name, model), y)
    handle.revert()
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == classes
    assert torch.equal(answer(name, model), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_batch_gives_what_its_samples_give_alone() -> None:
    model = build("bert")
    attached("unipelt", model)
    ids = torch.randint(3, 60, (3, 7))
    together = model(input_ids=ids).last_hidden_state
    alone = torch.cat([model(input_ids=row[None]).last_hidden_state for row in ids])
    assert relative_error(together, alone) < 16 * bound(0.0, torch.float32)


@for_each_stack
def test_open_gates_are_none_and_closed_gates_are_no_delta(stack: str) -> None:
    model, other, base = build("bert"), build("bert"), build("bert")
    handle = deltaops.attach(model, STACKS[stack]().with_gates())
    ungated = deltaops.attach(other, STACKS[stack]())
    with torch.no_grad():
        for key, tensor in handle.state().items():
            if ".gate." not in key:
                tensor.add_(torch.randn_like(tensor) * 0.1)
                ungated.state()[key].copy_(tensor)
            elif key.endswith("gate.bias"):
                tensor.fill_(40.0)  # σ = 1 in float32
    assert relative_error(answer("bert", model), answer("bert", other)) < 16 * bound(
        0.0, torch.float32
    )
    with torch.no_grad():
        for key, tensor in handle.state().items():
            if key.endswith("gate.bias"):
                tensor.fill_(-100.0)
    with handle.disabled("prefix"):  # keys of zero still take their part of a softmax
        assert relative_error(answer("bert", model), answer("bert", base)) < 16 * bound(
            0.0, torch.float32
        )


@for_each_stack
def test_gradient_checkpointing_and_bfloat16(stack: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = build("bert").train()
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]  # transformers'
        handle = attached(stack, model)
        loss_of(answer("bert", model)).backward()
        grads.append(torch.cat([grad_of(p).flatten() for p in handle.parameters()]))
    assert torch.equal(*grads)
    half = build("bert").to(torch.bfloat16)
    handle = attached(stack, half)
    y = answer("bert", half)
    exact = answer("bert", copy.deepcopy(half).double())
    assert relative_error(y, exact) < 16 * bound(0.0, torch.bfloat16)
    loss_of(y).backward()
    assert all(bool(torch.isfinite(grad_of(p)).all()) for p in handle.parameters())


SMALL = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", ["GPT2", "Llama", "T5", "Bloom", "CLIPText", "Mamba"])
def test_causal_models_are_refused_however_they_say_it(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(**SMALL)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(config)
    with pytest.raises(AttachError, match="it would tell a token of those that follow"):
        deltaops.attach(model, (LoRA(r=2) + LoRA(r=2)).with_gates())


@pytest.mark.parametrize("family", ["Bert", "Electra", "DebertaV2", "ViT", "CLIPVision", "Albert"])
def test_encoders_are_not(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(**SMALL)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(config)
    assert deltaops.surgery.plan(model, (LoRA(r=2) + LoRA(r=2)).with_gates()).sites


def test_what_gates_cannot_do_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = build("bert")
    for delta, message in (
        (LoRA(r=2) + BitFit(), "the part 'bitfit' can have no gate"),
        (Adapter(size=2) + IA3(), "the part 'ia3' can have no gate"),
        (LoRA(r=2, use_dora=True).named("rows"), "the part 'rows' can have no gate"),
    ):
        with pytest.raises(AttachError, match=message):
            deltaops.attach(model, delta.with_gates())
    handle = attached("unipelt", model)
    alone = deltaops.attach(build("bert"), LoRA(r=2).named("lora").with_gates())
    with pytest.raises(AttachError, match=r"'lora' at .*its gate depends on the input"):
        alone.merge()
    with pytest.raises(CheckpointError, match="the part 'lora' goes through gates"):
        handle.save(tmp_path, part="lora")
    whys = {row.path: row.reason for row in deltaops.report(model).rows}
    assert "a gate, by which each sample has" in whys["encoder.layer.0.attention.self"]
    assert "a branch with a gate" in whys["encoder.layer.0.attention.self.key"]
    handle.revert()
    for delta, part in ((STACKS["unipelt"](), "prefix"), (Adapter(size=2) + LoRA(r=2), "lora")):
        with pytest.raises(NoBackendError, match=f"strict=True .* '{part}' behind a gate"):
            deltaops.attach(model, delta.with_gates(), strict=True)
    assert deltaops.surgery.handle_of(model) is None
    deltaops.attach(model, (Adapter(size=2) + ParallelAdapter(size=3)).with_gates(), strict=True)
    assert answer("bert", model).isfinite().all()
