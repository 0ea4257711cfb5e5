"""What a delta would cost, before it is tuned: parameters, memory and seconds a step.

Trained parameters are counted from the plan: exactly what attaching would train.

Memory for the backward pass is a + b·B + c·B·T + d·B·T² bytes: what a forward pass holds grows with
the samples (a prompt's positions), the tokens, and their pairs where an attention keeps its
weights. Four small passes with the delta attached say a to d; the batch that is asked for is not
run. Gradients and AdamW's two moments are three times the trained tensors.

Seconds are products over the rate at which this machine does such products, and bytes over the
rate at which it copies: 2·K·N operations a token in each linear layer and 4·T·d in each attention,
forward; the same again backward for dx (frozen weights have no gradient of their own), and 6 a
token for each entry of a delta's matrices. What is moved is taken as each layer's input and output,
twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.methods import Combined, Delta, parts_of
from deltaops.methods.base import MODEL
from deltaops.ops import delta_linear
from deltaops.surgery import attach
from deltaops.surgery.anatomy import anatomy, is_linear
from deltaops.surgery.plan import Plan

from .held import saved_bytes

PROBE_ROWS = 2
"""Samples of the small passes."""
_MOMENTS = 3
"""Copies of what is trained: a gradient, and AdamW's moments."""
_CALLS = 20
"""Of what is timed at least: on a busy machine, most of them wait."""


@dataclass(frozen=True)
class Shape:
    """Of a step: samples and tokens of each."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Rates:
    """What this machine does, measured for the model's layers and dtype."""

    operations: float
    """Multiplications and additions a second, in products of the model's layers."""
    bytes: float
    """Copied a second, read and written together."""


@dataclass(frozen=True)
class Work:
    """Of a forward pass of the frozen model, for one token but for attention."""

    operations: float
    moved: float
    """Bytes."""
    attention: float
    """Operations for a pair of tokens, all attentions together."""


@dataclass(frozen=True)
class Cost:
    """Predicted, for one step."""

    trained: int
    """Parameters, exactly; modules trained whole included."""
    state: int
    """Bytes of gradients and moments."""
    held: int
    """Bytes that the forward pass holds for the backward pass."""
    seconds: float
    """By the rates of a moment: while other work runs beside, they say little."""
    frozen_seconds: float
    """Of the frozen model's forward pass."""


def batch_of(model: nn.Module, ids: Tensor, shape: Shape, labels: int | None) -> dict[str, Tensor]:
    """A batch of ``shape`` for ``model``.

    Args:
        ids: tokens of the task, repeated as far as needed, int64 ``[any]``.
        labels: how many classes; None for a language model, whose labels are its tokens.
    """
    count = shape.rows * shape.tokens
    end = _end_of(model) if labels is not None else None
    ids = ids if end is None else ids[ids != end]
    rows = ids.repeat(-(-count // len(ids)))[:count].view(shape.rows, shape.tokens)
    if end is not None:
        rows[:, -1] = end
    device = next(model.parameters()).device
    target = rows if labels is None else torch.arange(shape.rows) % labels
    found = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": target}
    return {name: tensor.to(device) for name, tensor in found.items()}


def trained_by(plan: Plan) -> tuple[int, int]:
    """Parameters, and bytes of them, that applying ``plan`` trains."""
    found = list(plan.tensors())
    saved = {id(p): p for path in plan.saved for p in plan.model.get_submodule(path).parameters()}
    parts = parts_of(plan.delta)
    count = size = 0
    for site, _, shape in found:
        numbers = torch.Size(shape).numel()
        count += numbers
        size += numbers * _width(plan.model, parts[site.part])
    for parameter in saved.values():
        count += parameter.numel()
        size += parameter.numel() * parameter.element_size()
    return count, size


def held_by(model: nn.Module, delta: Delta | Combined, batch: Mapping[str, Tensor]) -> int:
    """Bytes that a forward pass of ``model`` with ``delta`` holds; it is as it was after that."""
    handle = attach(model, delta)
    training = [m for m in model.modules() if m.training]
    try:
        model.train()
        known = [*model.parameters(), *model.buffers(), *batch.values()]
        return saved_bytes(lambda: loss_of(model(**batch)), known)
    finally:
        model.eval()
        for module in training:
            module.training = True
        handle.revert()


def loss_of(out: Any) -> Tensor:
    """A scalar that everything has a part in: the loss, where there is one."""
    loss = getattr(out, "loss", None)
    found: Tensor = out[0].float().mean() if loss is None else loss
    return found


def predict_held(
    model: nn.Module, delta: Delta | Combined, ids: Tensor, shape: Shape, labels: int | None
) -> int:
    """Bytes that a step of ``shape`` would hold, from four small passes."""
    lengths = sorted({max(1, shape.tokens * quarter // 4) for quarter in (1, 2, 3)})
    probes = [Shape(1, lengths[-1]), *(Shape(PROBE_ROWS, length) for length in lengths)]
    # a step of three tokens or fewer has fewer lengths, and no more terms than probes
    known = [_terms(probe)[: len(probes)] for probe in probes]
    held = [held_by(model, delta, batch_of(model, ids, probe, labels)) for probe in probes]
    found = torch.linalg.solve(
        torch.tensor(known, dtype=torch.float64), torch.tensor(held, dtype=torch.float64)
    )
    asked = torch.tensor(_terms(shape)[: len(probes)], dtype=torch.float64)
    return max(0, round(float(found @ asked)))


def _terms(shape: Shape) -> list[float]:
    """What the bytes of a step are a sum of."""
    b, t = float(shape.rows), float(shape.tokens)
    return [1.0, b, b * t, b * t * t]


def work_of(model: nn.Module, ids: Tensor, labels: int | None, tokens: int) -> Work:
    """By one small pass of the frozen model, whose layers tell what they read."""
    counted = [0.0, 0.0]

    def tell(layer: Any, args: tuple[Any, ...], named: dict[str, Any], made: Tensor) -> None:
        given = args[0] if args else named["input"]
        inner, outer = given.shape[-1], made.shape[-1]
        rows = given.numel() // inner
        counted[0] += 2.0 * rows * inner * outer
        counted[1] += 2.0 * rows * (inner + outer) * given.element_size()

    hooks = [
        m.register_forward_hook(tell, with_kwargs=True) for m in model.modules() if is_linear(m)
    ]
    shape = Shape(1, tokens)
    try:
        with torch.no_grad():
            model(**batch_of(model, ids, shape, labels))
    finally:
        for hook in hooks:
            hook.remove()
    widths = [_width_of(model, a.output) for block in anatomy(model) for a in block.attentions]
    return Work(counted[0] / tokens, counted[1] / tokens, 4.0 * sum(widths))


def rates_of(model: nn.Module, shape: Shape, seconds: float = 0.1) -> Rates:
    """Products of the model's widest common layer on as many rows, and copies; each ``seconds``."""
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    weight = (
        max(layers, key=lambda m: min(m.weight.shape)).weight.detach()
        if layers
        else torch.randn(768, 768)
    )
    x = torch.randn(
        shape.rows * shape.tokens, weight.shape[1], dtype=weight.dtype, device=weight.device
    )
    block = torch.empty(1 << 24, dtype=torch.uint8, device=weight.device)
    other = torch.empty_like(block)
    product = _fastest(lambda: delta_linear(x, weight), seconds, weight.device)
    copied = _fastest(lambda: other.copy_(block), seconds, weight.device)
    return Rates(2.0 * x.shape[0] * weight.numel() / product, 2.0 * block.numel() / copied)


def predict(
    model: nn.Module,
    plan: Plan,
    ids: Tensor,
    shape: Shape,
    labels: int | None,
    work: Work,
    rates: Rates,
) -> Cost:
    """The whole of it; ``model`` is as it was after that."""
    trained, size = trained_by(plan)
    held = predict_held(model, plan.delta, ids, shape, labels)
    more = sum(_positions(part) for part in parts_of(plan.delta).values())
    again = any(getattr(part, "query", "") == "states" for part in parts_of(plan.delta).values())
    tokens = shape.rows * (shape.tokens + more)
    pairs = shape.rows * (shape.tokens + more) ** 2
    frozen = _seconds(work, rates, shape.rows * shape.tokens, shape.rows * shape.tokens**2)
    passes = 2 * _seconds(work, rates, tokens, pairs)
    # what is of the whole model, a prefix's MLP, makes its vectors once in each pass
    matrices = sum(
        torch.Size(shape).numel()
        for site, _, shape in plan.tensors()
        if len(shape) == 2 and site.place != MODEL
    )
    delta = 6.0 * matrices * (0 if more else tokens) / rates.operations
    step = _MOMENTS * 3 * size / rates.bytes
    return Cost(
        trained, _MOMENTS * size, held, passes + delta + step + (frozen if again else 0.0), frozen
    )


# --------------------------------------------------------------------------------------- details


def _seconds(work: Work, rates: Rates, tokens: int, pairs: int) -> float:
    operations = work.operations * tokens + work.attention * pairs
    return operations / rates.operations + work.moved * tokens / rates.bytes


def _positions(delta: Delta) -> int:
    """What a delta puts before each sample, in the stack itself."""
    if delta.kind == "prompt-pool":
        return int(delta.top_k * delta.length)  # type: ignore[attr-defined]  # of that kind
    if delta.kind in ("prompt", "intrinsic-prompt"):
        return int(delta.num_virtual_tokens)  # type: ignore[attr-defined]  # of these kinds
    return 0


def _end_of(model: Any) -> int | None:
    """The token at whose one place an encoder–decoder reads the class of a text; None of others."""
    config = getattr(model, "config", None)
    end = getattr(config, "eos_token_id", None)
    return end if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) else None


def _width(model: nn.Module, delta: Delta) -> int:
    """Bytes of an entry of what ``delta`` trains."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    wide = getattr(delta, "autocast_adapter_dtype", True) and weight.element_size() < 4
    return 4 if wide else weight.element_size()


def _width_of(model: nn.Module, path: str) -> int:
    layer: Any = model.get_submodule(path)
    return int(layer.weight.shape[0] if hasattr(layer, "nf") else layer.weight.shape[1])


def _fastest(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Seconds of the fastest call of ``run`` within so many, until the device has done it."""

    def call() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    best, calls, began = float("inf"), 0, time.perf_counter()
    while calls < _CALLS or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best
