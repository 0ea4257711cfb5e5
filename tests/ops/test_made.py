"""S that is made with x waits for the layer that reads x, and for no other."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import deltaops
from deltaops import LoRA
from deltaops.backends import GroupMember, PlainPlan, ReferenceBackend
from deltaops.ops import Branch, Layer, delta_linear, gated, made, norm_bias
from deltaops.reference import delta_linear as reference

K, N, R = 12, 10, 3


class Log:
    """What the backend was asked."""

    def __init__(self) -> None:
        self.made = 0
        self.used = 0
        self.wrong = 0.0
        """Added to each S, to see whether it is read."""


def _s(y: Tensor, reader: GroupMember) -> Tensor:
    a, b, inner = (list(reader.operands[i::3]) for i in range(3))
    plan: Any = reader.plan
    settings = plan.scaling, plan.dropout, plan.activation, reader.seed
    return reference.forward(y, reader.weight, None, a, b, inner, *settings)[1]  # type: ignore[arg-type]  # of one branch


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """The reference makes S with x; of one LoRA a layer."""
    found = Log()

    def make(y: Tensor, readers: Sequence[GroupMember]) -> list[Tensor]:
        found.made += len(readers)
        return [_s(y, reader) + found.wrong for reader in readers]

    def norm_and_s(self: Any, x: Tensor, gamma: Tensor, eps: float, readers: Any) -> Any:
        y, stats = self.norm_bias_forward(x, gamma, None, eps, "rms")
        return y, stats, make(y, readers)

    def gated_and_s(self: Any, gate: Tensor, up: Tensor, readers: Any) -> Any:
        y = self.gated_forward(gate, up, "silu")
        return y, make(y, readers)

    def forward_given(
        self: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operands: Any, s: Tensor
    ) -> Tensor:
        found.used += 1
        wide = s.dtype
        y = x.to(wide) @ weight.to(wide).t() + s @ operands[1].to(wide).t()
        return (y if bias is None else y + bias).to(x.dtype)

    for name, method in (("norm_and_s", norm_and_s), ("gated_and_s", gated_and_s)):
        monkeypatch.setattr(ReferenceBackend, name, method, raising=False)
    for name in ("may_produce", "produces"):
        monkeypatch.setattr(ReferenceBackend, name, lambda *a: True, raising=False)
    monkeypatch.setattr(PlainPlan, "forward_given", forward_given, raising=False)
    yield found
    made.SLOT.waiting = None


def layer(seed: int = 0, dropout: float = 0.0) -> Layer:
    drawn = torch.Generator().manual_seed(seed)
    a, b, w = (torch.randn(*s, generator=drawn) for s in ((R, K), (N, R), (N, K)))
    return Layer(w, None, [Branch(a.requires_grad_(), b.requires_grad_(), 0.5, dropout)])


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).requires_grad_()


def normed(x: Tensor, *layers: Layer) -> Tensor:
    return norm_bias(x, torch.ones(K), norm="rms", readers=lambda: layers, backend="reference")


def linear(x: Tensor, one: Layer) -> Tensor:
    return delta_linear(x, *one, backend="reference")


def test_the_layer_reads_what_was_made(log: Log) -> None:
    one, other = layer(0), layer(1)
    log.wrong = 1.0
    y = normed(tokens(2, 5, K), one, other)
    assert (log.made, log.used) == (2, 0)
    found = [linear(y, other), linear(y, one)]  # in any order
    assert (log.made, log.used) == (2, 2)
    for got, each in zip(found, (other, one), strict=True):
        shift = each.branches[0].b.sum(1)
        assert torch.allclose(got, linear(y, each) + shift, atol=1e-5)
    assert log.used == 2  # once


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["norm", "gated"])
def test_gradients_are_those_of_the_layers_alone(log: Log, kind: str, dropout: float) -> None:
    one, other = layer(0, dropout), layer(1, dropout)

    def run(ahead: bool) -> list[Tensor]:
        torch.manual_seed(4)
        x, gate = tokens(2, 5, K), tokens(2, 5, K)
        readers = (lambda: (one, other)) if ahead else None
        if kind == "norm":
            y = norm_bias(x, torch.ones(K), norm="rms", readers=readers, backend="reference")
        else:
            y = gated(gate, x, readers=readers, backend="reference")
        total = linear(y, one).square().sum() + linear(y, other).pow(3).sum()
        factors = [t for each in (one, other) for t in (each.branches[0].a, each.branches[0].b)]
        return list(torch.autograd.grad(total, [x, *factors]))

    ahead = run(ahead=True)
    assert log.used == 2
    for got, want in zip(ahead, run(ahead=False), strict=True):
        torch.testing.assert_close(got, want)


def test_whatever_has_changed_since_is_computed(log: Log) -> None:
    log.wrong = 1e6
    one = layer()
    with torch.no_grad():
        y = normed(tokens(4, K), one)
        y.add_(1)
        assert linear(y, one).abs().max() < 1e4
        y = normed(tokens(4, K), one)
        one.branches[0].a.mul_(2)
        assert linear(y, one).abs().max() < 1e4
        y = normed(tokens(4, K), one)
        assert linear(y.clone(), one).abs().max() < 1e4  # another tensor
        other = one._replace(branches=[one.branches[0]._replace(scaling=3.0)])
        assert linear(y, other).abs().max() < 1e4
        ids = torch.zeros(4, dtype=torch.int64)
        assert linear(y, one._replace(adapter=ids)).abs().max() < 1e4
    assert log.used == 0
    assert linear(y, one).abs().max() > 1e4


def test_nothing_is_made_for_readers_by_row_under_autocast_or_without_rows(log: Log) -> None:
    one = layer()
    normed(tokens(4, K), one._replace(adapter=torch.zeros(4, dtype=torch.int64)))
    normed(tokens(0, K), one)
    normed(tokens(4, K), one._replace(weight=torch.empty(0)))  # as FSDP has it before the call
    with torch.autocast("cpu", torch.bfloat16):
        normed(tokens(4, K), one)
    assert log.made == 0


def test_what_nobody_claims_is_not_held_by_x(log: Log) -> None:
    y = normed(tokens(4, K), layer())
    waiting = made.SLOT.waiting
    assert waiting is not None
    assert waiting.y() is y
    del y
    gc.collect()
    assert waiting.y() is None


# --------------------------------------------------------------------------------- a whole model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


IDS = torch.arange(12).reshape(2, 6)


def attached(model: nn.Module, dropout: float = 0.0) -> Any:
    delta = LoRA(r=4, dropout=dropout, target_modules="all-linear")
    handle = deltaops.attach(model, delta, backend="reference")
    with torch.no_grad():
        for i, p in enumerate(handle.parameters()):
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return handle


def losses_and_grads(model: Any, checkpointed: bool = False) -> list[Tensor]:
    torch.manual_seed(7)
    if checkpointed:
        loss = checkpoint(lambda: model(IDS, labels=IDS).loss, use_reentrant=False)
    else:
        loss = model(IDS, labels=IDS).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss, *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_llama_s_norms_and_products_make_s_of_what_follows(
    log: Log, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    attached(model, dropout)
    found = losses_and_grads(model)
    assert log.made == log.used == 2 * (3 + 2 + 1)  # q, k, v; gate, up; down
    again = losses_and_grads(model, checkpointed=True)
    assert log.made == log.used == 6 * (3 + 2 + 1)
    monkeypatch.setattr(ReferenceBackend, "produces", lambda *a: False)
    alone = losses_and_grads(model)
    for got, same, want in zip(found, again, alone, strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(same, want)


def test_copies_have_readers_of_their_own_and_revert_forgets_them(log: Log) -> None:
    model = llama()
    handle = attached(model)
    model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = log.used
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if "lora_B" in name:
                    p.mul_(2)
        assert not torch.equal(twin(IDS).logits, model(IDS).logits)
        assert log.used == before + 2 * 12
    handle.revert()
    assert not any("_deltaops_readers" in module.__dict__ for module in model.modules())


def test_a_layer_with_a_hook_is_not_foreseen(log: Log) -> None:
    model = llama()
    attached(model)
    layers: Any = model.model.layers
    layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model(IDS)
    assert log.made == log.used == 2 * 6 - 1
