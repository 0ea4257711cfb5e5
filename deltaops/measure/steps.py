"""Whole training steps: forward, backward and AdamW on the adapters, LoRA r=16 on all linears."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.methods.lora import LoRA
from deltaops.surgery import accelerate, attach

from .interleave import Timing, interleaved

RANK, ALPHA = 16, 32
FROZEN, PEFT, ACCELERATED, ATTACHED = "frozen base", "PEFT", "PEFT accelerated", "deltaops"

# Two float32 programs that sum in different orders: a few hundred roundings of room, while a wrong
# mask, scale or gradient is off by percents.
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-3


@dataclass(frozen=True)
class Workload:
    """A model from a config (random weights) and the batch it is stepped on."""

    name: str
    build: Callable[[], nn.Module]
    vocabulary: int
    batch: int = 8
    length: int = 128

    def tokens(self) -> Tensor:
        """Random ids ``[batch, length]``."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocabulary, (self.batch, self.length), generator=generator)


def llama() -> Workload:
    """Hidden 512, 8 layers, vocabulary 32000: the model of the project's goals."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    return Workload("Llama 512×8, 8×128", lambda: LlamaForCausalLM(config), 32000)


def bert() -> Workload:
    """Hidden 384, 6 layers, masked language model."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Workload("BERT 384×6, 8×128", lambda: BertForMaskedLM(config), config.vocab_size)


WORKLOADS = {"llama": llama, "bert": bert}


@dataclass(frozen=True)
class StepResult:
    """One workload: seconds a step of each peer."""

    workload: str
    dropout: float
    timings: dict[str, Timing]
    tokens: int

    def speedup(self, peer: str, over: str = PEFT) -> float | None:
        """How many times faster than ``over``; None where a peer is missing."""
        if peer not in self.timings or over not in self.timings:
            return None
        return self.timings[over].median / self.timings[peer].median

    def as_json(self) -> dict[str, Any]:
        """Workload and every timing in seconds."""
        return {
            "workload": self.workload,
            "dropout": self.dropout,
            "rank": RANK,
            "tokens": self.tokens,
            "seconds": {name: t.as_json() for name, t in self.timings.items()},
        }


def measure_steps(
    workload: Workload,
    *,
    dropout: float,
    rounds: int,
    on_round: Callable[[], object] = lambda: None,
) -> StepResult:
    """Gate, then time. Raises: AssertionError where a peer's loss or gradients differ."""
    torch.manual_seed(0)
    base = workload.build()
    base.train()
    ids = workload.tokens()
    models = _peers(base, dropout)
    if dropout == 0.0:  # PEFT draws torch's mask, ours is another stream
        _gate(models, ids)
    steps = {name: _stepper(model, ids) for name, model in models.items()}
    timings = interleaved(steps, rounds=rounds, on_round=on_round)
    return StepResult(workload.name, dropout, timings, ids.numel())


def _peers(base: nn.Module, dropout: float) -> dict[str, nn.Module]:
    frozen = copy.deepcopy(base).requires_grad_(False)
    attached = copy.deepcopy(base)
    attach(attached, LoRA(r=RANK, alpha=ALPHA, dropout=dropout))
    peers = {FROZEN: frozen, ATTACHED: attached}
    try:
        import peft
    except ImportError:
        pass  # the table then has no PEFT row, and the command says why
    else:
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear"
        )
        for name in (PEFT, ACCELERATED):
            peers[name] = peft.get_peft_model(copy.deepcopy(base), config)
        accelerate(peers[ACCELERATED])
    for model in peers.values():
        _fill_adapters(model)
    return peers


def _fill_adapters(model: nn.Module) -> None:
    """The same values in every peer, with B away from zero so that every gradient is at work."""
    for i, (_, parameter) in enumerate(_adapters(model)):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def _adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters by the name that both APIs share, in its order."""
    named = [
        (name.removeprefix("base_model.model.").replace(".base_layer", ""), p)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    return sorted(named, key=lambda item: item[0])


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _gate(models: dict[str, nn.Module], ids: Tensor) -> None:
    """Loss and all gradients of the fused peers equal those of PEFT (or of each other)."""
    tuned = [name for name in (PEFT, ACCELERATED, ATTACHED) if name in models]
    found = {}
    for name in tuned:
        parameters = [p for _, p in _adapters(models[name])]
        loss = _loss(models[name], ids)
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        found[name] = (float(loss.detach()), flat)
    expected, gradient = found[tuned[0]]
    for name in tuned[1:]:
        off = abs(found[name][0] - expected) / abs(expected)
        gap = float((found[name][1] - gradient).norm() / gradient.norm())
        if not (off <= LOSS_BOUND and gap <= GRADIENT_BOUND):
            raise AssertionError(
                f"{name} differs from {tuned[0]}: loss by {off:.1e} (bound {LOSS_BOUND:.0e}), "
                f"gradients by {gap:.1e} (bound {GRADIENT_BOUND:.0e}); nothing was timed"
            )


def _stepper(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:  # the frozen base: what its activations cost, with nothing to train
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        inputs = embeddings(ids).detach().requires_grad_()

        def frozen_step() -> None:
            loss: Tensor = model(inputs_embeds=inputs, labels=ids).loss
            torch.autograd.grad(loss, inputs)

        return frozen_step
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        _loss(model, ids).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
