"""What all places of a stack of blocks read, computed once in each pass.

A small module computes rows ``[P, R]``, of which every place reads its own part. A pass through a
stack of blocks computes the part of that stack once, before the first block, so that gradient
checkpointing, which runs blocks again, does not compute it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backward import backward_runs, check_backward_runs


class _Computed(NamedTuple):
    """What a pass computed."""

    parts: dict[int, Tensor]
    """By their first row. Split at once: slices would each give back a gradient of all rows."""
    without_gradient: set[int]
    """The first rows of places that read them where gradients are off; all passes share it."""

    @property
    def any(self) -> Tensor:
        """One of the parts, which all have or lack a gradient alike."""
        return next(iter(self.parts.values()))


class Rows:
    """The rows that one stack of blocks reads; also the hook before and after its forward pass.

    Every pass computes them anew, those of inference too: a write to ``.data`` leaves no trace by
    which to tell that they are still right. A step of generation so costs what makes the rows
    once; a flat file (``handle.save(path, flat=True)``) has no such cost.
    """

    def __init__(self, source: nn.Module, start: int) -> None:
        """Those from ``start`` on; ``source(start, stop)`` computes ``[P, stop − start]``."""
        self.source = source
        self.start = start
        self.sizes: list[int] = []
        """Of the places' parts, one after the other."""
        self.active = True
        self._of_pass: _Computed | None = None
        """Of the pass that runs."""
        self._of_graph: _Computed | None = None
        """Of the last pass with gradients, for blocks that its backward pass runs again."""

    @property
    def stop(self) -> int:
        """Where the last part ends."""
        return self.start + sum(self.sizes)

    def join(self, size: int) -> int:
        """Have one more place read the next ``size`` rows; returns the first, from ``start``."""
        first = sum(self.sizes)
        self.sizes.append(size)
        return first

    def __getstate__(self) -> dict[str, Any]:
        """Without what was computed, which can be neither copied nor pickled while it is a node."""
        return self.__dict__ | {"_of_pass": None, "_of_graph": None}

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Compute them for the pass that begins."""
        if not self.active or torch.compiler.is_compiling():
            return
        # shared: one backward pass may be that of several passes, some of them without checkpoints
        read = set() if self._of_graph is None else self._of_graph.without_gradient
        self._of_pass = _Computed(self.compute(), read)
        if self._of_pass.any.requires_grad:
            self._of_graph = self._of_pass

    def compute(self) -> dict[int, Tensor]:
        """What a pass reads: the parts ``[P, size]`` by where their places joined."""
        parts = self.source(self.start, self.stop).split(self.sizes, dim=1)
        firsts = accumulate(self.sizes[:-1], initial=0)
        return dict(zip(firsts, parts, strict=True))

    def end(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forget those of the pass that ends, also by an error; its backward pass has its own."""
        if not torch.compiler.is_compiling():
            self._of_pass = None

    def current(self, first: int, size: int) -> Tensor:
        """The rows of the place that joined at ``first``, ``[P, size]``: of this pass, or anew.

        A compiler has them computed in each layer, and then joins what is the same. So has a
        reentrant checkpoint, whose blocks run without gradients first and then, one after the
        other, backward: each needs a graph of its own, since the first would free a shared one.
        """
        kept = None if torch.compiler.is_compiling() else self._kept()
        if kept is None or not self._serves(kept, first):
            anew: Tensor = self.source(self.start + first, self.start + first + size)
            return anew
        if kept.any.requires_grad and not torch.is_grad_enabled():
            kept.without_gradient.add(first)
        return kept.parts[first]

    def _kept(self) -> _Computed | None:
        if self._of_pass is not None:
            return self._of_pass
        if not backward_runs():
            # a block is run by itself, and so will be the checkpoint's that runs it again
            self._of_graph = None
        return self._of_graph

    def _serves(self, kept: _Computed, first: int) -> bool:
        """Whether a gradient can pass where one is due, and autograd takes them at all."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.source.parameters()):
            return kept.any.requires_grad and first not in kept.without_gradient
        return torch.is_inference_mode_enabled() or not kept.any.is_inference()


def stack_around(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    """What has the outermost list of modules on the ``path``: a whole encoder or decoder."""
    parts = path.split(".")
    above = [".".join(parts[:depth]) for depth in range(len(parts))]
    lists = [place for place in above if isinstance(modules[place], nn.ModuleList)]
    return modules[lists[0].rpartition(".")[0] if lists else ""]


def rows_of(source: nn.Module, modules: Mapping[str, nn.Module], path: str) -> Rows:
    """Those of the stack around the module at ``path`` that the last place joined, or new ones.

    Raises: AttachError in a torch that does not tell a block that is run again.
    """
    check_backward_runs()
    stack = stack_around(modules, path)
    known = {
        hook.stop: (hook, module)
        for module in modules.values()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, Rows) and hook.source is source
    }
    last = max(known, default=0)
    if last in known and known[last][1] is stack:
        return known[last][0]
    rows = Rows(source, last)
    stack.register_forward_pre_hook(rows)
    stack.register_forward_hook(rows.end, always_call=True)
    return rows
