"""An attention module of transformers whose rotary embedding runs as one op.

The function :data:`NAME` is a global of transformers' file, shared by all models of a family. So
the subclass runs the module's own program, every instruction of it, with our function under that
name and all other globals as they were when the class was made.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.backends import RotaryCall
from deltaops.ops import rotary

from .block import Block, plain, subclass, takes
from .sharing import sharing

NAME = "apply_rotary_pos_emb"
"""``(q, k, cos, sin, unsqueeze_dim=1)`` → both turned."""


PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
"""What attention modules call the layers that read the same tokens."""


def projections(module: nn.Module) -> list[Any]:
    """Those layers of an attention; empty where they are not found."""
    modules = module._modules
    for names in PROJECTIONS:
        if all([name in modules for name in names]):
            return [modules[name] for name in names]
    return []


class RotaryBlock(Block):
    """An attention that turns its queries and keys as Llama does."""

    kind = "rotary"
    turned: Any
    """The module's program on our function."""

    @classmethod
    def over(cls, base: type[nn.Module], backend: str, strict: bool) -> type[Block]:
        """See :class:`Block`. The settings are in the class: the function sees no module."""
        program: Any = base.forward
        ours = partial(rotate, program.__globals__[NAME], backend, strict)
        turned = FunctionType(
            program.__code__, {**program.__globals__, NAME: ours}, program.__name__,
            program.__defaults__,
        )  # fmt: skip
        turned.__kwdefaults__ = program.__kwdefaults__
        return subclass(cls, base, (backend, strict), turned=turned)

    def call(self, tokens: int) -> RotaryCall:
        """See :class:`Block`."""
        weight = next(self.parameters())
        width: Any = getattr(self, "head_dim", 64)
        return RotaryCall(weight.device.type, weight.dtype, weight.dtype, 1, 1, tokens, width)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own ``forward`` takes and gives."""
        if torch.compiler.is_compiling():  # the compiler looks globals up by the name of the file
            return super().forward(*args, **kwargs)
        with sharing(self, projections(self)):
            return self.turned(*args, **kwargs)


def rotate(
    theirs: Any,
    backend: str,
    strict: bool,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *rest: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    """``theirs(q, k, cos, sin)``, by :func:`deltaops.ops.rotary` where that computes the same.

    Args:
        theirs: transformers' function, for all other calls.
        backend: passed to the op.
        strict: passed to the op.
        q: queries ``[B, H, L, D]``.
        k: keys; of fewer heads where they are shared.
        cos: ``[B or 1, L, D]``.
        sin: as ``cos``.
        *rest: asks for another layout.
        **named: as ``rest``.
    """
    if rest or named or not (_fits(q, cos, sin) and _fits(k, cos, sin)):
        out: tuple[Tensor, Tensor] = theirs(q, k, cos, sin, *rest, **named)
        return out
    call = RotaryCall("cpu" if q.is_cpu else q.device.type, q.dtype, cos.dtype, *q.shape)
    if not takes(call, backend, strict):
        out = theirs(q, k, cos, sin)
        return out
    turned = [rotary(x, cos, sin, backend=backend, strict=strict) for x in (q, k)]
    return turned[0], turned[1]


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the op takes these; of two dtypes transformers' result has the wider one."""
    if not plain(x, cos, sin) or x.dim() != 4 or cos.dim() != 3:
        return False
    if cos.dtype is not x.dtype or sin.shape != cos.shape:
        return False
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return False
    batch, _, length, width = x.shape
    return width % 2 == 0 and cos.shape[0] in (1, batch) and cos.shape[1:] == (length, width)
