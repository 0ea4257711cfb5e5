"""What the sequences in a cache of transformers' have chosen: in their order, whoever changes that.

A search by beams reorders a cache, others repeat or drop what is in it. The rows of a choice go
along, so that no sequence goes on with another's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

CHOICE = "_deltaops_prefix_choice"
"""On a cache: what each of its sequences chose."""


def keep_choice(cache: Any, chosen: Tensor) -> None:
    """Keep ``chosen``, a row for each sequence, in a ``cache`` that a stack returns.

    In that of a compiled stack the rows stay in their order.
    """
    setattr(cache, CHOICE, chosen)
    if not torch.compiler.is_compiling() and not isinstance(cache, _Keeper):
        _keeping(cache)


class _Keeper:
    """Mixin of a cache whose choice goes where its sequences go."""

    below: type[Any]
    """The class of before."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]  # the cache's own
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]  # the cache's own
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]  # the cache's own
        chosen: Tensor = getattr(self, CHOICE)
        setattr(self, CHOICE, chosen.repeat_interleave(repeats, 0))

    def _take(self, rows: Tensor) -> None:
        chosen: Tensor = getattr(self, CHOICE)
        setattr(self, CHOICE, chosen[rows.to(chosen.device)])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the class of before; the subclass is made where it is wanted."""
        plain: Any = object.__new__(self.below)
        plain.__dict__.update(self.__dict__)
        return _keeping, (plain,)


def _keeping(cache: Any) -> Any:
    kind: Any = type(cache)
    cache.__class__ = _over(kind)
    return cache


@functools.cache
def _over(base: type[Any]) -> type[Any]:
    """:class:`_Keeper` over exactly ``base``, and called as that is."""
    names: dict[str, Any] = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "below": base
    }  # fmt: skip
    return type(base.__name__, (_Keeper, base), names)
