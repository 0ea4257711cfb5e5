"""Which adapter each sample of a batch has, for the places of an attached model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError

SAMPLES = "_deltaops_samples"
"""In the ``__dict__`` of a place: the :class:`Samples` while its batches are told apart, else None.
It is there all the time, since a compiled place does not hear of a new name."""


def told_apart(model: nn.Module) -> bool:
    """Whether the batches of ``model`` are told apart now."""
    return any(module.__dict__.get(SAMPLES) is not None for module in model.modules())


class Route(NamedTuple):
    """Which of a place's branches a batch needs, by their index, and the rows' numbers among these
    for :func:`deltaops.ops.delta_linear`; None where all rows have the only one."""

    kept: tuple[int, ...]
    adapter: Tensor | None


class Samples:
    """The adapter's name of each sample of the next batches; a name no place knows adds nothing."""

    def __init__(self, names: Sequence[str]) -> None:
        self.tell(names)

    def tell(self, names: Sequence[str]) -> None:
        """The batches from now on have these."""
        self.names = tuple(names)
        self._routes: dict[tuple[Any, ...], Route] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy or pickle of the model is of no open context

    def check(self, x: Tensor) -> None:
        """Raises: ConfigError where x is not ``[samples, ..., K]`` of these samples."""
        if x.dim() < 2 or x.shape[0] != len(self.names):
            raise ConfigError(
                f"adapters_by_sample: a layer was called with {list(x.shape)}, and names has "
                f"{len(self.names)}. Give as many names as the batch has samples; a layer that "
                "sees samples and tokens in one dimension cannot tell them apart."
            )

    def route(self, x: Tensor, branches: tuple[str, ...]) -> Route:
        """For x and the names of a place's branches. Raises: as :meth:`check`."""
        self.check(x)
        if torch.compiler.is_compiling():  # its tensors are of the graph
            return self._made(x, branches)
        key = branches, x.shape[:-1], x.device
        found = self._routes.get(key)
        if found is None:
            with torch.inference_mode(False):  # a later batch may be one of training
                found = self._routes[key] = self._made(x, branches)
        return found

    def _made(self, x: Tensor, branches: tuple[str, ...]) -> Route:
        here = set(self.names)
        kept = tuple([i for i, name in enumerate(branches) if name in here])
        number = {branches[i]: n for n, i in enumerate(kept)}
        numbers = [number.get(name, -1) for name in self.names]
        if not kept or not any(numbers):  # nobody has one, or all have the same
            return Route(kept, None)
        ids = torch.tensor(numbers, dtype=torch.int32, device=x.device)
        by_sample = ids.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
        return Route(kept, by_sample.contiguous())
