"""A reparameterised prefix: all keys and values of a model from one small matrix.

    rows = Up · tanh(Down · e + d) + u      for each of P positions, e [E], Down [C, E], Up [R, C]

The R rows are the keys and values of all attentions, one after the other. Training this instead of
the rows themselves is steadier. A pass through a stack of blocks computes the rows that it reads
once, before the first block, so that gradient checkpointing, which runs blocks again, does not run
it again.
Source: Li and Liang 2021 (arXiv 2101.00190), §4.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .draws import no_autocast


def encode(
    embedding: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor
) -> Tensor:
    """``[P, E], [C, E], [C], [R, C], [R]`` → rows ``[P, R]``."""
    return linear(torch.tanh(linear(embedding, down, down_bias)), up, up_bias)


class PrefixEncoder(nn.Module):
    """The parameters, float32 at best: they are small, and what they compute feeds every layer."""

    def __init__(
        self, embedding: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor
    ) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)
        self.down = nn.Parameter(down)
        self.down_bias = nn.Parameter(down_bias)
        self.up = nn.Parameter(up)
        self.up_bias = nn.Parameter(up_bias)

    def forward(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, ``[P, stop − start]``; autocast does not round them."""
        up: Tensor = self.up
        up_bias: Tensor = self.up_bias
        if stop - start < up.shape[0]:
            up, up_bias = up[start:stop], up_bias[start:stop]
        with no_autocast(self.embedding.device):
            return encode(self.embedding, self.down, self.down_bias, up, up_bias)


class Rows:
    """The rows that one stack of blocks reads; also the hook before its forward pass."""

    def __init__(self, encoder: PrefixEncoder, start: int, stop: int) -> None:
        self.encoder = encoder
        self.start = start
        self.stop = stop
        self.active = True
        self._kept: tuple[Any, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what was computed, which can be neither copied nor pickled while it is a node."""
        return self.__dict__ | {"_kept": None}

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Compute them for the pass that begins; inference does so only where something changed."""
        if not self.active or torch.compiler.is_compiling():
            return
        if self._needs_grad() or self._valid() is None:
            # each training pass has a graph of its own, which its backward pass frees
            self._kept = (self._key(), self.encoder(self.start, self.stop))

    def current(self) -> Tensor:
        """``[P, stop − start]``: what the hook computed, or anew where no hook has been.

        A compiler has it computed in each layer, and then joins what is the same.
        """
        kept = None if torch.compiler.is_compiling() else self._valid()
        if kept is None:
            kept = self.encoder(self.start, self.stop)
        return kept

    def _valid(self) -> Tensor | None:
        """What was computed, if the parameters are still those and a gradient can pass."""
        if self._kept is None or self._kept[0] != self._key():
            return None
        rows = self._kept[1]
        if self._needs_grad() and not rows.requires_grad:
            return None
        return None if rows.is_inference() and not torch.is_inference_mode_enabled() else rows

    def _needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())

    def _key(self) -> tuple[Any, ...]:
        """Changes with the parameters' bits; those made in inference mode have no version."""
        return tuple(
            (p.data_ptr(), p.dtype, object() if p.is_inference() else p._version)
            for p in self.encoder.parameters()
        )


def rows_of(encoder: PrefixEncoder, modules: Mapping[str, nn.Module], path: str) -> Rows:
    """Those of the stack around the module at ``path``; new ones begin where the last ended.

    The stack is what has the outermost list of modules on the path: a whole encoder or decoder.
    """
    parts = path.split(".")
    above = [".".join(parts[:depth]) for depth in range(len(parts))]
    lists = [place for place in above if isinstance(modules[place], nn.ModuleList)]
    stack = modules[lists[0].rpartition(".")[0] if lists else ""]
    for hook in stack._forward_pre_hooks.values():
        if isinstance(hook, Rows):
            return hook
    others = [
        hook
        for module in modules.values()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, Rows) and hook.encoder is encoder
    ]
    start = max((rows.stop for rows in others), default=0)
    rows = Rows(encoder, start, start)
    stack.register_forward_pre_hook(rows)
    return rows
