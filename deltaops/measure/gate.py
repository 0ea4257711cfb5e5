"""The gate before the timing: numbers are held to an oracle, or nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from deltaops.testing import assert_accurate, bound, relative_error

from .cases import LayerCase

SAME_FUNCTION = 0.05
"""What a peer of others may be off: not ours to certify, but a missing bias, a wrong scale or
another mask is off by more."""

# Two float32 programs that sum in different orders: a few hundred roundings of room, while a wrong
# mask, scale or gradient is off by percents.
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-3


def hold_layer(
    case: LayerCase,
    dropout: float,
    ours: Iterable[Callable[[], list[Tensor]]],
    others: dict[str, Callable[[], list[Tensor]]],
) -> None:
    """Hold our peers to float64 with the same mask, and the others to being the same function.

    Raises: AssertionError, before anything was timed.
    """
    torch.manual_seed(1)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64) if dropout else None
    oracle, baseline = case.answer(torch.float64, dropout, seed), case.answer(None, dropout, seed)
    names = ["y", *(f"grad {name}" for name in case.leaves)]
    where = f"{case.op.name} {'×'.join(map(str, case.shape))} {case.dtype}"
    for run in ours:
        torch.manual_seed(1)
        for name, got, exact, usual in zip(names, run(), oracle, baseline, strict=True):
            assert_accurate(got, exact, usual, f"{where} {name}")
    for peer, run in others.items():
        for name, got, exact in zip(names, run(), oracle, strict=True):
            off = relative_error(got, exact)
            if not off <= SAME_FUNCTION:
                raise AssertionError(
                    f"{peer}, {where} {name}: off by {off:.1e}, so it computes something else"
                )


def hold_step(name: str, found: Step, expected: Step, baseline: Step | None) -> None:
    """Hold a model's loss and gradients to those of the reference.

    Args:
        name: of the peer, for the message.
        found: its loss and flat gradient.
        expected: those of the oracle.
        baseline: in bfloat16, those of a peer in bfloat16, which sets the bound as for layers; None
            in float32, where a fixed number of roundings does.
    Raises: AssertionError.
    """
    for what, got, oracle, usual, fixed in zip(
        ("loss", "gradients"), found, expected, baseline or expected, (LOSS_BOUND, GRADIENT_BOUND),
        strict=True,
    ):  # fmt: skip
        off = relative_error(got, oracle)
        limit = bound(relative_error(usual, oracle), torch.bfloat16) if baseline else fixed
        if not off <= limit:
            raise AssertionError(
                f"{name}: {what} off by {off:.1e} (bound {limit:.1e}); nothing was timed"
            )


def hold_same(name: str, found: Step, expected: Step) -> None:
    """Hold a peer of others to computing the same function. Raises: AssertionError."""
    for what, got, oracle in zip(("loss", "gradients"), found, expected, strict=True):
        off = relative_error(got, oracle)
        if not off <= SAME_FUNCTION:
            raise AssertionError(
                f"{name}: {what} off by {off:.1e}, so it computes something else; nothing was timed"
            )


Step = tuple[Tensor, Tensor]
"""Loss and flat gradient."""
