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
from typing import Any, NamedTuple

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


class _Computed(NamedTuple):
    """What a pass computed."""

    rows: Tensor
    without_gradient: set[int]
    """The first rows of attentions that read it where gradients are off."""


class Rows:
    """The rows that one stack of blocks reads; also the hook before and after its forward pass.

    Every pass computes them anew, those of inference too: a write to ``.data`` leaves no trace by
    which to tell that they are still right. A step of generation so costs the products with Down
    and Up once; a flat file (``handle.save(path, flat=True)``) has no such cost.
    """

    def __init__(self, encoder: PrefixEncoder, start: int, stop: int) -> None:
        self.encoder = encoder
        self.start = start
        self.stop = stop
        self.active = True
        self._of_pass: _Computed | None = None
        """Of the pass that runs."""
        self._of_graph: _Computed | None = None
        """Of the last pass with gradients, for blocks that its backward pass runs again."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what was computed, which can be neither copied nor pickled while it is a node."""
        return self.__dict__ | {"_of_pass": None, "_of_graph": None}

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Compute them for the pass that begins."""
        if not self.active or torch.compiler.is_compiling():
            return
        self._of_pass = _Computed(self.encoder(self.start, self.stop), set())
        if self._of_pass.rows.requires_grad:
            self._of_graph = self._of_pass

    def end(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forget those of the pass that ends, also by an error; its backward pass has its own."""
        if not torch.compiler.is_compiling():
            self._of_pass = None

    def current(self, first: int, size: int) -> Tensor:
        """``size`` rows from ``first``, ``[P, size]``: of this pass, or anew where none is.

        A compiler has them computed in each layer, and then joins what is the same. So has a
        reentrant checkpoint, whose blocks run without gradients first and then, one after the
        other, backward: each needs a graph of its own, since the first would free a shared one.
        """
        kept = None if torch.compiler.is_compiling() else self._kept()
        if kept is None or not self._serves(kept, first):
            anew: Tensor = self.encoder(self.start + first, self.start + first + size)
            return anew
        if kept.rows.requires_grad and not torch.is_grad_enabled():
            kept.without_gradient.add(first)
        return kept.rows[:, first : first + size]

    def _kept(self) -> _Computed | None:
        if self._of_pass is not None:
            return self._of_pass
        runs_backward = torch._C._current_graph_task_id() != -1
        return self._of_graph if runs_backward else None

    def _serves(self, kept: _Computed, first: int) -> bool:
        """Whether a gradient can pass where one is due, and autograd takes them at all."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters()):
            return kept.rows.requires_grad and first not in kept.without_gradient
        return torch.is_inference_mode_enabled() or not kept.rows.is_inference()


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
    stack.register_forward_hook(rows.end, always_call=True)
    return rows
