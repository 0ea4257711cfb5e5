"""An attention module of transformers whose rotary embedding and attention run as one op each.

What computes them are globals of transformers' files, shared by all models of a family. So the
subclass runs the module's own program, every instruction of it, with ours under those names and all
other globals as they were when the class was made. A program that hands what the embedding gives
straight to what attends runs on two others where it has no cache: there one op does both.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import nn

from deltaops.backends import AttentionCall, Call, RotaryCall

from .attention_functions import BIAS, ROTARY, SDPA, TABLE, stand_ins, stand_ins_in_one, words
from .block import Block, subclass, told
from .handed import given_cache, hands_over
from .prefix import NAME, heads_of, number, reads_prefix, told_of_prefix
from .sharing import sharing

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
"""What attention modules call the layers that read the same tokens."""

OTHERS = ("key_value_states", "encoder_hidden_states")
"""What attention modules call other tokens that they are given for keys and values."""


def projections(module: nn.Module) -> list[Any]:
    """Those layers of an attention; empty where they are not found."""
    modules = module._modules
    for names in PROJECTIONS:
        if all([name in modules for name in names]):
            return [modules[name] for name in names]
    return []


class AttentionBlock(Block):
    """An attention that turns its queries and keys as Llama does, asks transformers' table for the
    function that attends, or does both."""

    kind = "attention"
    on_ours: Any
    """The module's program on our functions."""
    in_one: Any
    """The same on those that turn where they attend; None where the program does not let them."""
    ours: frozenset[str]
    """The globals of it that are ours."""

    @classmethod
    def over(cls, base: type[nn.Module], backend: str, strict: bool) -> type[Block]:
        """See :class:`Block`. The settings are in the class: ``rotate`` sees no module."""
        program: Any = base.forward
        ours = stand_ins(program, backend, strict)
        in_one = None
        if len(ours) == len((ROTARY, TABLE)) and hands_over(program, ROTARY, TABLE):
            in_one = _on(program, stand_ins_in_one(ours))
        return subclass(
            cls, base, (backend, strict),
            on_ours=_on(program, ours), in_one=in_one, ours=frozenset(ours),
        )  # fmt: skip

    def told(self, tokens: int) -> tuple[str, str]:
        """See :class:`Block`; ``tokens`` in one sequence."""
        # of a projection: a prefix may have another dtype
        weight = next(p for child in self.children() for p in child.parameters())
        device, dtype, config = weight.device.type, weight.dtype, getattr(self, "config", None)
        heads = heads_of(self)
        width = number(self, "head_dim", "attention_head_size") or 64
        shared = max(heads // (number(self, "num_key_value_groups") or 1), 1)
        found: dict[str, tuple[str, str]] = {}
        if ROTARY in self.ours:
            call: Call = RotaryCall(device, dtype, dtype, 1, heads, tokens, width)
            found["rotary"] = told(call, self.backend)
        implementation = getattr(config, "_attn_implementation", None)
        if reads_prefix(self):
            found["attention"] = told_of_prefix(self, tokens)
        elif TABLE in self.ours and BIAS in words(self.on_ours.__code__):
            found["attention"] = "torch", "by transformers: a bias is added to the scores"
        elif TABLE in self.ours and implementation in (SDPA, NAME):
            causal = bool(getattr(self, "is_causal", True))
            sizes = 1, heads, shared, tokens, tokens, width
            call = AttentionCall(device, dtype, *sizes, False, causal)
            found["attention"] = told(call, self.backend)
        elif TABLE in self.ours:
            why = f"by transformers: ours stands in for {SDPA!r}, and this is {implementation!r}"
            found["attention"] = "torch", why
        backends = [backend for backend, _ in found.values()]
        names: dict[str, list[str]] = {}
        for name, (_, reason) in found.items():
            names.setdefault(reason, []).append(name)
        reasons = [f"{' and '.join(those)} {reason}" for reason, those in names.items()]
        return max(backends, key=lambda name: name != "torch"), "; ".join(reasons)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own ``forward`` takes and gives."""
        if torch.compiler.is_compiling():  # the compiler looks globals up by the name of the file
            return super().forward(*args, **kwargs)
        run = self.on_ours
        if self.in_one is not None and not given_cache(self.in_one.__func__, args, kwargs):
            run = self.in_one
        if any([kwargs.get(name) is not None for name in OTHERS]):
            # to try would be seen: a checkpoint compares what two passes save
            return run(*args, **kwargs)
        with sharing(self, projections(self)):
            return run(*args, **kwargs)


def _on(program: Any, ours: dict[str, Any]) -> FunctionType:
    """The program with ours in the place of what it calls."""
    run = FunctionType(
        program.__code__, program.__globals__ | ours, program.__name__, program.__defaults__
    )
    run.__kwdefaults__ = program.__kwdefaults__
    return run
