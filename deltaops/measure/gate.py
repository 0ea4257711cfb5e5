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
LEAF = {torch.float32: SAME_FUNCTION, torch.bfloat16: 0.5}
"""What a single gradient may be off, for its own size: one unit whose sign a rounding turns moves a
small leaf far, and in bfloat16 there are many; one that is missing is off by 1."""
VANISHING, ROUNDINGS = 1e-10, 4
"""A gradient of the oracle's that is smaller than this part of all of them is zero in exact
arithmetic: it is held to so many roundings of all."""


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
    """Hold a model's loss and gradients to those of the reference, all together and each leaf's.

    Args:
        name: of the peer, for the message.
        found: its loss and gradients.
        expected: those of the oracle.
        baseline: in bfloat16, those of a peer in bfloat16, which sets the bound as for layers; None
            in float32, where a fixed number of roundings does.
    Raises: AssertionError.
    """
    usual = baseline or expected
    for what, got, oracle, one, fixed in (
        ("loss", found[0], expected[0], usual[0], LOSS_BOUND),
        ("gradients", _flat(found), _flat(expected), _flat(usual), GRADIENT_BOUND),
    ):
        off = relative_error(got, oracle)
        limit = bound(relative_error(one, oracle), torch.bfloat16) if baseline else fixed
        if not off <= limit:
            raise AssertionError(
                f"{name}: {what} off by {off:.1e} (bound {limit:.1e}); nothing was timed"
            )
    _hold_leaves(name, found, expected, torch.bfloat16 if baseline else torch.float32)


def hold_same(name: str, found: Step, expected: Step) -> None:
    """Hold a bfloat16 peer of others to computing the same function. Raises: AssertionError."""
    for what, got, oracle in (
        ("loss", found[0], expected[0]),
        ("gradients", _flat(found), _flat(expected)),
    ):
        off = relative_error(got, oracle)
        if not off <= SAME_FUNCTION:
            raise AssertionError(
                f"{name}: {what} off by {off:.1e}, so it computes something else; nothing was timed"
            )
    _hold_leaves(name, found, expected, torch.bfloat16)


def _hold_leaves(name: str, found: Step, expected: Step, dtype: torch.dtype) -> None:
    """Small ones vanish in the norm of all; one that is left out is off by all of itself."""
    if len(found[1]) != len(expected[1]):
        raise AssertionError(
            f"{name}: {len(found[1])} gradients, the oracle has {len(expected[1])}; "
            "nothing was timed"
        )
    whole = float(torch.linalg.vector_norm(_flat(expected)))
    for i, (got, oracle) in enumerate(zip(found[1], expected[1], strict=True)):
        size = float(torch.linalg.vector_norm(oracle))
        if size <= VANISHING * whole:  # of a key's bias: only roundings are left of it
            off = float(torch.linalg.vector_norm(got - oracle)) / (whole or 1.0)
            limit = ROUNDINGS * torch.finfo(dtype).eps
        else:
            off, limit = relative_error(got, oracle), LEAF[dtype]
        if not off <= limit:
            raise AssertionError(
                f"{name}: gradients off by {off:.1e} (bound {limit:.1e}) in leaf {i} of "
                f"{len(found[1])}, {list(got.shape)}, so it computes something else; "
                "nothing was timed"
            )


def _flat(step: Step) -> Tensor:
    return torch.cat([g.flatten().double() for g in step[1]])


Step = tuple[Tensor, list[Tensor]]
"""Loss and gradients, a leaf each."""
