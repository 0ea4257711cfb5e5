"""Whole training steps: forward, backward and AdamW on the adapters, LoRA r=16 on all linears."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.methods.lora import LoRA
from deltaops.surgery import accelerate, attach

from .cases import DTYPES
from .cell import (
    ACCELERATED,
    OURS,
    OURS_COMPILED,
    PEFT,
    PEFT_COMPILED,
    PEFT_NARROW,
    Cell,
)
from .gate import Step, hold_step
from .interleave import interleaved
from .products import step_flops
from .saved import saved_bytes
from .workloads import WORKLOADS, Batch, Workload, bert, llama

__all__ = ["ACCELERATED", "ATTACHED", "FROZEN", "PEFT", "WORKLOADS", "bert", "llama"]

RANK, ALPHA = 16, 32
FROZEN, ATTACHED = "frozen base", OURS

PATIENCE = 4.0
"""Seconds that a bfloat16 step of PEFT may take before the batch is made smaller: without BF16
instructions torch's products are up to a hundred times slower than ours."""


def measure_steps(
    workload: Workload,
    *,
    dropout: float,
    rounds: int,
    dtype: str = "f32",
    seconds: float = float("inf"),
    compiled: bool = False,
    on_round: Callable[[], object] = lambda: None,
) -> Cell:
    """Gate, then time. Raises: AssertionError where a peer's loss or gradients differ.

    Args:
        workload: model and batch; where a peer would take longer than ``PATIENCE`` for it, fewer
            sequences are taken for all peers, and the cell's note says so.
        dropout: of the adapters.
        rounds: at most.
        dtype: of the base model, "f32" or "bf16".
        seconds: for the timing, all peers together.
        compiled: also PEFT and ours under torch.compile (compiled before the timing).
        on_round: called after each round.
    """
    kind = DTYPES[dtype]
    torch.manual_seed(0)
    base = workload.build().to(kind)
    base.train()
    models, absent = _peers(base, dropout, dtype)
    workload, note = _affordable(workload, models.get(PEFT, models[FROZEN]), kind)
    batch = workload.inputs(kind)
    oracle, baseline = _oracles(base, models, batch, dropout, dtype)
    for name in (OURS, ACCELERATED):
        if name in models:
            hold_step(name, _answer(models[name], batch), oracle, baseline)
    if not dropout:  # PEFT draws torch's mask, ours is another stream
        for name in (PEFT, PEFT_NARROW):
            if name in models:
                hold_step(name, _answer(models[name], batch), oracle, baseline)
    saved = {
        name: saved_bytes(lambda m=model: _loss(m, batch), _held(model, batch))  # type: ignore[misc]  # a default in a lambda
        for name, model in models.items()
    }
    flops = float(step_flops(lambda: _loss(models[FROZEN], batch)))
    if compiled:
        _add_compiled(models, absent, batch, oracle, baseline)
    steps = {name: _stepper(model, batch) for name, model in models.items()}
    timings = interleaved(steps, rounds=rounds, seconds=seconds, on_round=on_round)
    return Cell(
        "step", workload.title, dtype, dropout, timings, absent, saved,
        rank=RANK, tokens=workload.tokens, note=note, flops=flops,
    )  # fmt: skip


def _add_compiled(
    models: dict[str, nn.Module],
    absent: dict[str, str],
    batch: Batch,
    oracle: Step,
    baseline: Step | None,
) -> None:
    """PEFT (in bfloat16 its faster form) and ours under torch.compile; compiled by the gate."""
    torch._dynamo.reset()
    peft = PEFT_NARROW if PEFT_NARROW in models else PEFT
    for name, twin in ((OURS_COMPILED, OURS), (PEFT_COMPILED, peft)):
        if twin not in models:
            absent[name] = absent[twin]
            continue
        model = _compiled(models[twin])
        try:
            hold_step(name, _answer(model, batch), oracle, baseline)
        except AssertionError as error:
            if name == OURS_COMPILED:
                raise
            absent[name] = str(error)  # not ours to repair
            continue
        except RuntimeError as error:  # what the compiler cannot do, it says by this
            absent[name] = f"torch.compile failed: {str(error).splitlines()[0]}"
            continue
        models[name] = model


def _peers(
    base: nn.Module, dropout: float, dtype: str
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    attached = copy.deepcopy(base)
    attach(attached, LoRA(r=RANK, alpha=ALPHA, dropout=dropout))
    peers = {FROZEN: copy.deepcopy(base).requires_grad_(False), OURS: attached}
    absent = {}
    try:
        import peft
    except ImportError:
        absent = dict.fromkeys((PEFT, PEFT_NARROW, ACCELERATED), "peft is not installed")
    else:
        for name in (PEFT, PEFT_NARROW, ACCELERATED):
            if name == PEFT_NARROW and dtype == "f32":
                continue
            config = peft.LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                lora_dropout=dropout,
                target_modules="all-linear",
                **_head(base),
            )
            peers[name] = peft.get_peft_model(
                copy.deepcopy(base), config, autocast_adapter_dtype=name != PEFT_NARROW
            )
        accelerate(peers[ACCELERATED])
    for model in peers.values():
        _fill_adapters(model)
    return peers, absent


def _head(base: nn.Module) -> dict[str, Any]:
    """Only where it is no output embedding is a classifier among PEFT's "all-linear", as ours."""
    return {"fan_in_fan_out": True} if type(base).__name__.startswith("GPT2") else {}


def _fill_adapters(model: nn.Module) -> None:
    """The same values in every peer, which bfloat16 holds; B away from zero puts A to work."""
    for i, (_, parameter) in enumerate(_adapters(model)):
        generator = torch.Generator().manual_seed(i)
        value = torch.randn(parameter.shape, generator=generator) * 0.02
        with torch.no_grad():
            parameter.copy_(value.to(torch.bfloat16))


def _adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters by the name that both APIs share, in its order."""
    named = [
        (name.removeprefix("base_model.model.").replace(".base_layer", ""), p)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    return sorted(named, key=lambda item: item[0])


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    if not any(p.requires_grad for p in model.parameters()):
        batch = _leaf(model, batch)
    loss: Tensor = model(**batch).loss
    return loss


def _leaf(model: nn.Module, batch: Batch) -> Batch:
    """The batch of a model with nothing to train: its input gets the gradient instead."""
    if "pixel_values" in batch:
        return {**batch, "pixel_values": batch["pixel_values"].detach().requires_grad_()}
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]  # transformers' models have it
    inputs = embeddings(batch["input_ids"]).detach().requires_grad_()
    return {"inputs_embeds": inputs, "labels": batch["labels"]}


def _answer(model: nn.Module, batch: Batch) -> Step:
    parameters = [p for _, p in _adapters(model)]
    torch.manual_seed(1)  # the same seeds for the same layers, where masks are ours
    loss = _loss(model, batch)
    grads = torch.autograd.grad(loss, parameters)
    return loss.detach(), [g.double() for g in grads]


def _oracles(
    base: nn.Module, models: dict[str, nn.Module], batch: Batch, dropout: float, dtype: str
) -> tuple[Step, Step | None]:
    """The reference backend in float32, and in bfloat16 what sets the bound."""
    reference = copy.deepcopy(base).float()
    attach(reference, LoRA(r=RANK, alpha=ALPHA, dropout=dropout), backend="reference")
    _fill_adapters(reference)
    wide = {n: t.float() if t.is_floating_point() else t for n, t in batch.items()}
    oracle = _answer(reference, wide)
    if dtype == "f32":
        return oracle, None
    if not dropout and PEFT in models:
        return oracle, _answer(models[PEFT], batch)
    narrow = copy.deepcopy(base)
    attach(narrow, LoRA(r=RANK, alpha=ALPHA, dropout=dropout), backend="reference")
    _fill_adapters(narrow)
    return oracle, _answer(narrow, batch)


def _affordable(workload: Workload, model: nn.Module, dtype: torch.dtype) -> tuple[Workload, str]:
    """The workload, or one with a smaller batch where a step would take too long."""
    if dtype == torch.float32:
        return workload, ""
    short = min(16, workload.length) if workload.vocabulary else workload.length
    expected = _expected(workload.smaller(1, short), model, dtype) * workload.tokens
    if PATIENCE < expected < 8 * PATIENCE:  # so few rows may tell of overheads: ask again
        expected = _expected(workload.smaller(1, workload.length), model, dtype) * workload.tokens
    if expected <= PATIENCE:
        return workload, ""
    rows = int(workload.tokens * PATIENCE / expected)
    batch = max(1, rows // workload.length)
    length = min(workload.length, max(short, rows))
    return workload.smaller(batch, length), (
        f"batch {batch}×{length} instead of {workload.batch}×{workload.length}: a {dtype} step of "
        f"PEFT would take about {expected:.0f} s here"
    )


def _expected(probe: Workload, model: nn.Module, dtype: torch.dtype) -> float:
    """Seconds a token, from a step on few of them."""
    batch = probe.inputs(dtype)
    took = 0.0
    for _ in range(2):  # the first call builds what is kept
        began = time.perf_counter()
        _loss(model, batch).backward()  # type: ignore[no-untyped-call]  # torch's own has no types
        took = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return took / probe.tokens


def _held(model: nn.Module, batch: Batch) -> Iterable[Tensor]:
    return [*model.parameters(), *model.buffers(), *batch.values()]


def _compiled(model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model, dynamic=False)
    return compiled  # type: ignore[no-any-return]  # a module, as it was before


def _stepper(model: nn.Module, batch: Batch) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:  # the frozen base: what its activations cost, with nothing to train

        def frozen_step() -> None:
            _loss(model, batch).backward()  # type: ignore[no-untyped-call]  # torch's own has no types

        return frozen_step
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        _loss(model, batch).backward()  # type: ignore[no-untyped-call]  # torch's own has no types
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
