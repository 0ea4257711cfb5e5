"""Blocks around the linear layers of a transformers model on one op each.

RMSNorm and the gated MLP: more than a hundred model families have Llama's programs for them under
names of their own. So a class is recognized by its program: compiled, it is the one of Llama's, and
that one, run on small numbers, computes what our op does. An attention is recognized by the
functions that it calls, of which the same is asked. Anything else is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from deltaops.modules import (
    APART,
    READERS,
    ActivationBlock,
    AttentionBlock,
    BiasedNorm,
    Block,
    GatedMlpBlock,
    OwnLossModel,
    Program,
    RmsNormBlock,
    activation_of,
    named_activation,
    program_of,
    projections,
    stand_ins,
)
from deltaops.reference.gated import forward as gated
from deltaops.reference.norm_bias import forward as norm_bias

NEXT = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
"""In a decoder layer of Llama's family: a norm, and what reads it."""


def swap_blocks(model: nn.Module, backend: str, strict: bool) -> None:
    """Let every block of ``model`` that we know run on its op; again, for other settings."""
    within: set[nn.Module] = set()
    for module in model.modules():
        mixin = _mixin(module)
        if mixin is None or module in within:
            continue
        if mixin is GatedMlpBlock:
            within.add(module.act_fn)  # type: ignore[arg-type]  # a module; the block computes it
        base = module.base_class if isinstance(module, Block) else type(module)
        module.__dict__["backend"] = backend
        module.__dict__["strict"] = strict
        # the class comes last: until then the module runs as it was
        module.__class__ = mixin.over(base, backend, strict)
    for module in model.modules():
        for norm, after in NEXT:
            _name_readers(module._modules.get(norm), module._modules.get(after))


def _name_readers(norm: nn.Module | None, after: nn.Module | None) -> None:
    """Tell a norm that the first layers of ``after`` read what it gives. Where a model's program
    has it otherwise, S is made in vain."""
    if not isinstance(norm, RmsNormBlock) or after is None:
        return
    is_mlp = isinstance(after, GatedMlpBlock)
    places = (after.gate_proj, after.up_proj) if is_mlp else tuple(projections(after))
    if places:
        norm.__dict__[READERS] = places


def restore_blocks(model: nn.Module) -> None:
    """Undo :func:`swap_blocks`; what it did not touch stays."""
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = module.base_class  # type: ignore[assignment]  # its class of before
            for name in ("backend", "strict", APART, READERS):
                module.__dict__.pop(name, None)


def block_rows(model: nn.Module, tokens: int) -> Iterator[tuple[str, str, str, str]]:
    """A report's rows of blocks: path, kind, what runs it, why."""
    for path, module in model.named_modules():
        if isinstance(module, ActivationBlock):
            parent = model.get_submodule(path.rpartition(".")[0])
            yield path, module.kind, *module.told_beside(parent, tokens)
        elif isinstance(module, Block) and not isinstance(module, OwnLossModel):  # a row of losses
            yield path, module.kind, *module.told(tokens)


# ------------------------------------------------------------------------------- recognition


def _mixin(module: Any) -> type[Block] | None:
    """What ``module`` becomes, or is; None for all but the blocks that we know."""
    if isinstance(module, Block) and module.mixin is not BiasedNorm:
        return module.mixin
    otherwise = BiasedNorm if isinstance(module, Block) else None
    kind = module.base_class if isinstance(module, Block) else type(module)
    if "forward" in module.__dict__ or "transformers.modeling_utils" not in sys.modules:
        return otherwise  # its forward is replaced already, or nothing here is of transformers
    if named_activation(module) in ("gelu", "gelu_tanh"):
        return ActivationBlock
    forward = kind.forward
    program = program_of(forward)
    if program is None:
        return otherwise
    mixin = _known().get(program, otherwise)
    if mixin is GatedMlpBlock and activation_of(module.act_fn) is None:
        return None
    if mixin is None and not forward.__code__.co_freevars and stand_ins(forward, "auto", False):
        return AttentionBlock
    return mixin


@cache
def _known() -> dict[Program | None, type[Block]]:
    """Programs, as far as they compute our ops in this version of transformers."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.llama.configuration_llama import LlamaConfig

    found: dict[Program | None, type[Block]] = {}
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, weight = torch.randn(5, 6, dtype=torch.float32), torch.randn(6)
        norm = llama.LlamaRMSNorm(6, eps=0.1).float()
        norm.weight.copy_(weight)
        if torch.allclose(norm(x), norm_bias(x, norm.weight, None, 0.1, "rms")[0], atol=1e-6):
            found[program_of(llama.LlamaRMSNorm.forward)] = RmsNormBlock
        config = LlamaConfig(hidden_size=6, intermediate_size=6, num_attention_heads=1)
        mlp = llama.LlamaMLP(config).float()  # type: ignore[no-untyped-call]  # transformers' has no types
        product = gated(mlp.gate_proj(x), mlp.up_proj(x), "silu")
        if torch.allclose(mlp(x), mlp.down_proj(product), atol=1e-6):
            found[program_of(llama.LlamaMLP.forward)] = GatedMlpBlock
    found.pop(None, None)
    return found
