"""An optimizer that follows its parameters: new ones in their places, and what it knows of them.

What an optimizer keeps of a parameter in the parameter's own shape (moments, momentum) is changed
as the parameter was; numbers (a step count) stay. Anything else is refused, since nobody can say
what it would be for the new parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError


class Exchange(NamedTuple):
    """One parameter that another one replaces."""

    label: str
    """For messages."""
    old: nn.Parameter
    new: nn.Parameter | None
    """None: it goes, and nothing comes."""
    carry: Callable[[Tensor], Tensor] | None
    """Old shape → new shape, of what is kept of it; None: the optimizer knows nothing of it yet."""


class Follow:
    """What following ``exchanges`` takes; nothing is changed before :meth:`commit`."""

    def __init__(self, optimizer: torch.optim.Optimizer, exchanges: Iterable[Exchange]) -> None:
        """Find every parameter and make its new state.

        Raises: ConfigError where the optimizer lacks one that is trained, or keeps of it what
            cannot follow.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "resize: LBFGS keeps all parameters in one vector, which cannot follow a new size. "
                "Take another optimizer, such as torch.optim.AdamW."
            )
        self._optimizer = optimizer
        self._moves: list[tuple[Exchange, int, dict[str, Any] | None]] = []
        groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
        for exchange in exchanges:
            found = [i for i, group in enumerate(groups) if id(exchange.old) in group]
            if not found:
                if exchange.old.requires_grad:
                    raise ConfigError(
                        f"resize: the optimizer must hold {exchange.label!r}, which is trained, "
                        "and does not. Make it from handle.parameters() of this handle."
                    )
                continue
            self._moves.append((exchange, found[0], self._carried(exchange)))

    def _carried(self, exchange: Exchange) -> dict[str, Any] | None:
        """What is known of the new parameter."""
        known = self._optimizer.state.get(exchange.old)
        if not known or exchange.new is None or exchange.carry is None:
            return None
        found: dict[str, Any] = {}
        for key, value in known.items():
            if isinstance(value, Tensor) and value.shape == exchange.old.shape:
                found[key] = exchange.carry(value)
            elif isinstance(value, Tensor | list | tuple | dict) and _size(value) != 1:
                raise ConfigError(
                    f"resize: the optimizer's {key!r} of {exchange.label!r} must have the shape "
                    f"of the parameter, {list(exchange.old.shape)}, or be one number, and is "
                    f"{_shown(value)}: {type(self._optimizer).__name__} cannot follow a new size. "
                    "Take one such as torch.optim.AdamW."
                )
            else:
                found[key] = value
        return found

    def commit(self) -> None:
        """Exchange parameters and states; groups keep their settings and their order."""
        for (_, old, new, _), group, state in self._moves:
            self._optimizer.state.pop(old, None)
            parameters = self._optimizer.param_groups[group]["params"]
            at = next(i for i, parameter in enumerate(parameters) if parameter is old)
            if new is None:
                del parameters[at]
                continue
            parameters[at] = new
            if state is not None:
                self._optimizer.state[new] = state


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else -1


def _shown(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
