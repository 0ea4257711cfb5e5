"""Blocks between the linear layers of a transformers model on one op each: RMSNorm, the gated MLP.

More than a hundred model families have the same two programs under names of their own. A class is
recognized by its ``forward``: compiled, it is the one of Llama's class, and that one, run on small
numbers, computes what our op does. Anything else is left alone.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import nn

from deltaops.dispatch import LAST_RESORT, explain_call
from deltaops.modules import Block, GatedMlpBlock, RmsNormBlock, activation_of, block_class
from deltaops.reference.gated import forward as gated
from deltaops.reference.norm_bias import forward as norm_bias


def swap_blocks(model: nn.Module, backend: str, strict: bool) -> None:
    """Let every block of ``model`` that we know run on its op; again, for other settings."""
    for module in model.modules():
        mixin = _mixin(module)
        if mixin is None:
            continue
        module.__dict__["backend"] = backend
        module.__dict__["strict"] = strict
        if not isinstance(module, Block):  # the class comes last: until then it runs as it was
            module.__class__ = block_class(mixin, type(module))


def restore_blocks(model: nn.Module) -> None:
    """Undo :func:`swap_blocks`; what it did not touch stays."""
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = module.base_class  # type: ignore[assignment]  # its class of before
            for name in ("backend", "strict"):
                module.__dict__.pop(name, None)


def block_rows(model: nn.Module, tokens: int) -> Iterator[tuple[str, str, str, str]]:
    """A report's rows of blocks: path, kind, what runs it, why."""
    for path, module in model.named_modules():
        if isinstance(module, Block):
            told = explain_call(module.call(tokens), module.backend)
            eager = told.chosen == LAST_RESORT and module.backend != LAST_RESORT
            yield path, module.kind, "torch" if eager else told.chosen or "none", told.reason


def _mixin(module: nn.Module) -> type[Block] | None:
    """What ``module`` becomes, or is; None for all but the blocks that we know."""
    if isinstance(module, Block):
        return module.mixin
    if "forward" in module.__dict__ or "transformers.modeling_utils" not in sys.modules:
        return None  # its forward is replaced already, or nothing here is of transformers
    code = _program(type(module))
    for mixin, program in _known().items():
        if code is not None and _same(code, program):
            return None if mixin is GatedMlpBlock and not _activated(module) else mixin
    return None


def _activated(module: Any) -> bool:
    return activation_of(module.act_fn) is not None


def _program(kind: type[nn.Module]) -> CodeType | None:
    return getattr(inspect.unwrap(kind.forward), "__code__", None)


def _same(a: CodeType, b: CodeType) -> bool:
    """Whether two functions do the same, whatever they and their variables are called.

    Line numbers and names of variables are left out; attributes, constants and operations are not.
    """
    return (a.co_code, a.co_names, a.co_consts, a.co_argcount, a.co_freevars) == (
        b.co_code, b.co_names, b.co_consts, b.co_argcount, b.co_freevars,
    )  # fmt: skip


@cache
def _known() -> dict[type[Block], CodeType]:
    """Mixin → the program that it stands for, where this version of transformers computes it."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    found: dict[type[Block], CodeType] = {}
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, weight = torch.randn(5, 6, dtype=torch.float32), torch.randn(6)
        norm = LlamaRMSNorm(6, eps=0.1).float()
        norm.weight.copy_(weight)
        config = LlamaConfig(hidden_size=6, intermediate_size=6, num_attention_heads=1)
        mlp = LlamaMLP(config).float()  # type: ignore[no-untyped-call]
        norm_of, mlp_of = _program(LlamaRMSNorm), _program(LlamaMLP)
        expected, _ = norm_bias(x, norm.weight, None, 0.1, "rms")
        if norm_of is not None and torch.allclose(norm(x), expected, atol=1e-6):
            found[RmsNormBlock] = norm_of
        product = gated(mlp.gate_proj(x), mlp.up_proj(x), "silu")
        if mlp_of is not None and torch.allclose(mlp(x), mlp.down_proj(product), atol=1e-6):
            found[GatedMlpBlock] = mlp_of
    return found
