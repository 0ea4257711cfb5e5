"""A model's output and the gradients of its delta, held to the same delta in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer


def loss_of(y: Tensor) -> Tensor:
    """Some number that every output has a part in; without it, a norm's output sums to nothing."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return (y * weights).mean()


def grad_of(tensor: Tensor) -> Tensor:
    """T5's last feed-forward of the encoder, for one, may have parameters that nothing reads."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def assert_like_plain(
    name: str,
    base: nn.Module,
    y: Tensor,
    state: dict[str, Tensor],
    apply: Callable[[nn.Module, dict[str, Tensor]], object],
) -> None:
    """Hold ``y`` and the gradients in ``state``, of :func:`loss_of`, to the delta in float64.

    Args:
        name: of the architecture.
        base: without the delta; copied.
        y: the output with the delta, after ``loss_of(y).backward()``.
        state: ``handle.state()``.
        apply: lets a copy of ``base`` compute by hooks what the delta does, from such a state.
    """

    def plainly(dtype: torch.dtype) -> list[Tensor]:
        plain = copy.deepcopy(base).requires_grad_(False).to(dtype)
        leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in state.items()}
        apply(plain, leaves)
        out = answer(name, plain)
        loss_of(out).backward()
        return [out, _grads(leaves)]

    for ours, baseline, exact in zip(
        [y, _grads(state)], plainly(torch.float32), plainly(torch.float64), strict=True
    ):
        assert relative_error(ours, exact) < 4 * bound(
            relative_error(baseline, exact), torch.float32
        )


def _grads(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad_of(t).flatten() for t in state.values()])
