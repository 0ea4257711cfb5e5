"""``deltaops.report``: a line for every layer that a delta or an acceleration touched, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from torch import nn

from deltaops.backends import DeltaLinearCall
from deltaops.backends.calls import weight_layout
from deltaops.dispatch import explain_call
from deltaops.errors import AttachError
from deltaops.memory import idle
from deltaops.methods import parts_of
from deltaops.methods.base import ATTENTION, EMBEDDING, NORM, ROUTER, STACK
from deltaops.modules import (
    PREFIX_POOL,
    Block,
    DeltaEmbedding,
    DeltaExperts,
    DeltaPlace,
    DeltaRouter,
    LinearPlace,
    PooledPrefixes,
    PromptedStack,
    holds_experts,
    told_of_prefix,
)
from deltaops.packing import PACKING

from .blocks import block_rows
from .experts import unlike_experts
from .losses import loss_rows
from .record import read
from .tree import WHOLE

TOKENS = 1024
"""Rows of the input that a report assumes where the caller names none."""


NOT_YET = "not accelerated: call deltaops.accelerate(model)"


class Row(NamedTuple):
    """One module."""

    path: str
    kind: str
    """A method's, such as "lora"; or "frozen", "peft lora", "norm", "gated mlp", "activation",
    "attention", "loss", "left alone"."""
    backend: str
    """What runs it now: a backend's name, or "peft", "torch" where the op does not."""
    reason: str
    packed: int = 0
    """Bytes of the copies of its weight that are kept, packed or (under autocast) converted; see
    ``attach``'s pack."""


@dataclass(frozen=True)
class Report:
    """What runs each layer and why. Print it, or read ``rows``."""

    model: nn.Module = field(repr=False)
    rows: tuple[Row, ...]

    @property
    def fused(self) -> int:
        """How many rows run on a fused backend."""
        return sum(row.backend not in ("peft", "torch", "reference", "none") for row in self.rows)

    @property
    def packed(self) -> int:
        """Bytes of all packed copies, each weight's counted once."""
        unique: dict[int, int] = {}
        modules = dict(self.model.named_modules())
        for row in self.rows:
            if row.packed:
                weight, _ = modules[row.path].base()
                unique[weight.data_ptr()] = row.packed
        return sum(unique.values())

    def revert(self) -> None:
        """Undo :func:`deltaops.accelerate`: every class as it was.

        Raises: AttachError for what ``deltaops.attach`` bound; its handle reverts that.
        """
        from .accelerate import unaccelerate  # accelerate returns a Report

        if read(self.model) is not None:
            raise AttachError("report.revert: this is deltaops.attach's; call handle.revert().")
        unaccelerate(self.model)

    def __str__(self) -> str:
        if not self.rows:
            return "no layer is touched by deltaops"
        # the same long reason on two hundred lines hides the one that differs
        reasons = list(dict.fromkeys(row.reason for row in self.rows))
        table: list[tuple[str, ...]] = [("module", "kind", "runs on", "packed", "why")]
        table += [
            (
                row.path or WHOLE,
                *row[1:3],
                _megabytes(row.packed),
                f"[{reasons.index(row.reason) + 1}]",
            )
            for row in self.rows
        ]
        if self.packed == 0:
            table = [line[:3] + line[4:] for line in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines += [f"[{i}] {reason}" for i, reason in enumerate(reasons, start=1)]
        if self.packed:
            lines.append(f"packed copies of frozen weights hold {_megabytes(self.packed)}")
        if waiting := idle():
            lines.append(
                f"{_megabytes(waiting)} wait for the next step's outputs; "
                "deltaops.memory.release() gives them back"
            )
        lines.append(f"{self.fused} of {len(self.rows)} layers run on a fused backend")
        return "\n".join(lines)


def report(model: nn.Module, *, tokens: int = TOKENS) -> Report:
    """What runs each layer of ``model`` in its present state, and why.

    Args:
        model: after ``deltaops.attach`` or ``deltaops.accelerate``.
        tokens: rows of the input that a backend is asked about (batch × length).
    """
    return Report(model, tuple(_rows(model, tokens)))


def _rows(model: nn.Module, tokens: int) -> Iterable[Row]:
    inner: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inner:
            continue
        if is_accelerated(module):
            yield _row(path, module, "peft lora", "peft", tokens)
            if hasattr(module, "wrappers"):  # experts: the outermost computes with all of them
                inner.update(module.wrappers())
        elif isinstance(module, DeltaPlace | DeltaExperts) and "delta_kind" in module.__dict__:
            yield _row(path, module, module.delta_kind, "torch", tokens)
        elif isinstance(module, LinearPlace):
            yield _row(path, module, "frozen", "torch", tokens)
        elif type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer"):
            yield Row(path, "left alone", "peft", why_left_alone(module))
    for row in block_rows(model, tokens):
        yield Row(*row)
    for row in loss_rows(model, tokens):
        yield Row(*row)
    record = read(model)
    if record is not None:
        parts = parts_of(record.delta)
        for site in record.sites:
            module, kind = model.get_submodule(site.path), parts[site.part].kind
            if site.place == NORM and not isinstance(module, Block):
                yield Row(site.path, kind, "torch", "a norm of torch's, trained as it is")
            elif site.place == EMBEDDING:
                reason = "it is looked up in torch; its branch is read where the ids point"
                yield Row(site.path, kind, "torch", reason + _off(module))
            elif site.place == ROUTER:
                reason = "its small weight and the branch are summed in torch once a pass"
                yield Row(site.path, kind, "torch", reason + _off(module))
            elif site.place == STACK and PREFIX_POOL in module._modules and kind == "prefix-pool":
                pool = module._modules[PREFIX_POOL]
                assert isinstance(pool, PooledPrefixes)
                off = "" if pool.active else "; the delta is disabled"
                yield Row(site.path, kind, "torch", f"its prefixes are {pool.told}{off}")
            elif isinstance(module, PromptedStack):
                yield Row(site.path, kind, "torch", module.told())
            elif site.place == ATTENTION and not isinstance(module, Block):
                yield Row(site.path, kind, *told_of_prefix(module, tokens))
        for path, reason in record.skipped:
            yield Row(path, "left alone", "torch", reason)


def _row(path: str, module: nn.Module, kind: str, otherwise: str, tokens: int) -> Row:
    reason = module.slow_reason()  # type: ignore[operator]  # every place has it
    if reason is not None:
        return Row(path, kind, otherwise, reason)
    weight, _ = module.base()  # type: ignore[operator]  # every place has it
    branches = module.branches()  # type: ignore[operator]  # every place has it
    call = DeltaLinearCall(
        weight.device.type,
        weight.dtype,
        tuple(b.a.dtype for b in branches),
        tokens,
        weight.shape[0],
        weight.shape[1],
        tuple(b.a.shape[0] for b in branches),
        any(b.dropout for b in branches),
        getattr(module, "layout", None) or weight_layout(weight),
        tuple(b.activation for b in branches if b.activation != "identity"),
        any(b.bias is not None for b in branches),
    )
    explanation = explain_call(call, module.backend)  # type: ignore[arg-type]  # a string on places
    matrices = module.matrices() if hasattr(module, "matrices") else [weight]  # type: ignore[operator]  # of experts
    return Row(
        path,
        kind,
        explanation.chosen or "none",
        explanation.reason + _off(module) + (module.note() if is_quantized(module) else ""),  # type: ignore[operator]  # a method
        PACKING.bytes_of(matrices),
    )


def _off(module: nn.Module) -> str:
    """What is added to the reason of a place."""
    bound = isinstance(module, DeltaPlace | DeltaEmbedding | DeltaExperts | DeltaRouter)
    gated = "; a branch with a gate is added in torch" if getattr(module, "gated", None) else ""
    if not bound or not module.off:
        return gated
    if not module.delta_active:
        return f"{gated}; the delta is disabled or merged"
    off: frozenset[str] = module.off  # type: ignore[assignment]  # every place has it
    return f"{gated}; {', '.join(sorted(off))} is off"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size else ""


def is_accelerated(module: nn.Module) -> bool:
    """Whether ``module`` is a PEFT layer that ``accelerate`` swapped, without importing peft."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" in (  # __name__ is PEFT's on the second
        "deltaops.modules.peft_linear.PeftLoraLinear",
        "deltaops.modules.peft_experts.PeftExperts",
        "deltaops.modules.peft_quantized.PeftLinear4bit",
        "deltaops.modules.peft_quantized.PeftLinear8bit",
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA on a layer of bitsandbytes, accelerated or not."""
    return type(module).__module__ in ("peft.tuners.lora.bnb", "deltaops.modules.peft_quantized")


def why_left_alone(module: nn.Module) -> str:
    """Why ``accelerate`` does not take this PEFT layer, as far as its type and settings say."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__name__}" == "peft.tuners.lora.layer.ParamWrapper":
        return why_not_parameter(module) or NOT_YET
    if is_quantized(module):
        from deltaops.modules.peft_linear import busy
        from deltaops.modules.peft_quantized import never  # bitsandbytes is loaded: it is a layer's

        return never(module.base_layer) or busy(module) or NOT_YET
    if f"{kind.__module__}.{kind.__name__}" != "peft.tuners.lora.layer.Linear":
        return f"{kind.__module__}.{kind.__name__} is not PEFT's LoRA Linear"
    from deltaops.modules.peft_linear import (
        PeftLoraLinear,  # peft is loaded: this is a module of it
    )

    found = PeftLoraLinear._resolve(cast(PeftLoraLinear, module))  # it reads what both classes have
    return found if isinstance(found, str) else NOT_YET


def why_not_parameter(wrapper: nn.Module) -> str | None:
    """Why PEFT's wrapper of a parameter stays as it is; None where those are experts we know."""
    experts: nn.Module = wrapper.get_base_layer()  # type: ignore[operator]  # PEFT's
    if not holds_experts(experts):
        kind = type(experts).__name__
        return f"{wrapper.parameter_name} of {kind} is no parameter of experts: PEFT's forward"
    reason = unlike_experts(experts)
    return None if reason is None else f"{reason}: PEFT's forward"
