"""T5's bias on the scores: whether anything reads the gradient that it seems to want.

One table makes the bias of a whole stack, or several that stand beside its blocks (UDOP's); cross
attentions share one of zeros. Under gradient checkpointing transformers lets the zeros want a
gradient, and a reentrant checkpoint lets all that its blocks hand on. None but a table's is read,
which the op does not compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import unwrap
from typing import Any

from torch import Tensor, nn

from .rows import stack_around

TABLE = "relative_attention_bias"
"""What T5's first attention of a stack makes the bias of all from."""


def tables_of(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, ...]:
    """What has a table in the stack of blocks around ``path``; nothing in other models.

    Args:
        modules: of the model, by path.
        path: of an attention.
    """
    return tuple(m for m in stack_around(modules, path).modules() if hasattr(m, TABLE))


def trains(holder: Any) -> bool:
    """Whether ``holder`` has a table that is trained."""
    table = getattr(holder, TABLE, None)
    return isinstance(table, nn.Module) and any([p.requires_grad for p in table.parameters()])


def makes_zeros(module: Any) -> bool:
    """Whether the bias of ``module`` can only be the zeros that cross attentions share."""
    crosses = getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)
    if not crosses or getattr(module, "has_relative_attention_bias", True):
        return False
    base = getattr(type(module), "base_class", type(module))
    return {"zeros", "gradient_checkpointing"} <= set(unwrap(base.forward).__code__.co_names)


def without_unread_gradient(bias: Tensor, module: Any, holders: tuple[nn.Module, ...]) -> Tensor:
    """``bias``, detached where nothing reads its gradient.

    Args:
        bias: as ``module`` is given it.
        module: an attention.
        holders: see :func:`tables_of`; none where they are not known.
    """
    if not bias.requires_grad:
        return bias
    unread = makes_zeros(module) or (holders and not any([trains(h) for h in holders]))
    return bias.detach() if unread else bias
