"""Blocks around the linear layers of a transformers model on one op each.

RMSNorm, the gated MLP, and the rotary embedding of an attention: more than a hundred model families
have Llama's programs for them under names of their own. So a class is recognized by its program:
compiled, it is the one of Llama's, and that one, run on small numbers, computes what our op does.
Anything else is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn

from deltaops.dispatch import LAST_RESORT, explain_call
from deltaops.modules import (
    APART,
    ROTARY,
    Block,
    GatedMlpBlock,
    RmsNormBlock,
    RotaryBlock,
    activation_of,
)
from deltaops.reference.gated import forward as gated
from deltaops.reference.norm_bias import forward as norm_bias
from deltaops.reference.rotary import forward as rotary

_Program = tuple[Any, ...]


def swap_blocks(model: nn.Module, backend: str, strict: bool) -> None:
    """Let every block of ``model`` that we know run on its op; again, for other settings."""
    for module in model.modules():
        mixin = _mixin(module)
        if mixin is None:
            continue
        base = module.base_class if isinstance(module, Block) else type(module)
        module.__dict__["backend"] = backend
        module.__dict__["strict"] = strict
        # the class comes last: until then the module runs as it was
        module.__class__ = mixin.over(base, backend, strict)


def restore_blocks(model: nn.Module) -> None:
    """Undo :func:`swap_blocks`; what it did not touch stays."""
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = module.base_class  # type: ignore[assignment]  # its class of before
            for name in ("backend", "strict", APART):
                module.__dict__.pop(name, None)


def block_rows(model: nn.Module, tokens: int) -> Iterator[tuple[str, str, str, str]]:
    """A report's rows of blocks: path, kind, what runs it, why."""
    for path, module in model.named_modules():
        if isinstance(module, Block):
            told = explain_call(module.call(tokens), module.backend)
            eager = told.chosen == LAST_RESORT and module.backend != LAST_RESORT
            yield path, module.kind, "torch" if eager else told.chosen or "none", told.reason


# ------------------------------------------------------------------------------- recognition


def _mixin(module: Any) -> type[Block] | None:
    """What ``module`` becomes, or is; None for all but the blocks that we know."""
    if isinstance(module, Block):
        return module.mixin
    if "forward" in module.__dict__ or "transformers.modeling_utils" not in sys.modules:
        return None  # its forward is replaced already, or nothing here is of transformers
    forward = type(module).forward
    program = _program(forward)
    if program is None:
        return None
    known = _known()
    mixin = known.get(program)
    if mixin is GatedMlpBlock and activation_of(module.act_fn) is None:
        return None
    if mixin is None and ROTARY in forward.__code__.co_names and not forward.__code__.co_freevars:
        return known.get(_rotary_program(forward.__globals__.get(ROTARY)))
    return mixin


def _program(function: Any) -> _Program | None:
    """What a plain function does, whatever it, its file and its variables are called."""
    if type(function) is not FunctionType or hasattr(function, "__wrapped__"):
        return None
    code = function.__code__
    constants = tuple(c for c in code.co_consts if not (c is not None and c == function.__doc__))
    return (code.co_code, code.co_names, constants, code.co_argcount, function.__defaults__)


def _rotary_program(function: Any) -> _Program | None:
    """That of transformers' function, and of the one that it calls."""
    if _program(function) is None:
        return None
    return (_program(function), _program(function.__globals__.get("rotate_half")))


@cache
def _known() -> dict[_Program | None, type[Block]]:
    """Programs, as far as they compute our ops in this version of transformers."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.llama.configuration_llama import LlamaConfig

    found: dict[_Program | None, type[Block]] = {}
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, weight = torch.randn(5, 6, dtype=torch.float32), torch.randn(6)
        norm = llama.LlamaRMSNorm(6, eps=0.1).float()
        norm.weight.copy_(weight)
        if torch.allclose(norm(x), norm_bias(x, norm.weight, None, 0.1, "rms")[0], atol=1e-6):
            found[_program(llama.LlamaRMSNorm.forward)] = RmsNormBlock
        config = LlamaConfig(hidden_size=6, intermediate_size=6, num_attention_heads=1)
        mlp = llama.LlamaMLP(config).float()  # type: ignore[no-untyped-call]  # transformers' has no types
        product = gated(mlp.gate_proj(x), mlp.up_proj(x), "silu")
        if torch.allclose(mlp(x), mlp.down_proj(product), atol=1e-6):
            found[_program(llama.LlamaMLP.forward)] = GatedMlpBlock
        q, k, cos, sin = torch.randn(4, 2, 3, 5, 6, dtype=torch.float32)
        cos, sin = cos[:, 0], sin[:, 0]
        theirs = torch.cat(llama.apply_rotary_pos_emb(q, k, cos, sin))
        ours = torch.cat([rotary(q, cos, sin, False), rotary(k, cos, sin, False)])
        if torch.allclose(theirs, ours, atol=1e-6):
            found[_rotary_program(llama.apply_rotary_pos_emb)] = RotaryBlock
    found.pop(None, None)
    return found
