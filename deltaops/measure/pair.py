"""A method's model beside its eager form: from the same values, through one gate, timed in turns.

Both are held to float64 first: in float32 by a fixed number of roundings, in bfloat16 ours by what
eager torch is off, and eager torch to being the same function.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaops.surgery import Handle, attach
from deltaops.tuning.loop import make_optimizer

from .cell import EAGER, OURS
from .eager import eager_twin, missing
from .gate import Step, hold_same, hold_step
from .interleave import Timing, interleaved
from .saved import saved_bytes

Peer = tuple[nn.Module, list[nn.Parameter]]
"""A model, whose call gives a ``loss``, and what it trains."""
Batch = Mapping[str, Tensor]
PAIRED = 5
"""Rounds of all peers at least, however short the time: a ratio of fewer says little."""


@dataclass(frozen=True)
class Taken:
    """What steps took, each by peer."""

    timings: dict[str, Timing]
    saved: dict[str, int]
    """Bytes that a forward pass holds for the backward pass."""
    state: dict[str, int]
    """Bytes of gradients and of the optimizer's moments."""


def held_pair(
    base: nn.Module, handle: Handle, batch: Batch, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Ours and eager torch's, which have passed the gate.

    Args:
        base: the model without the delta; left as it is.
        handle: of the delta, attached to another copy of ``base``; its values are moved.
        batch: what the models are called with.
        dtype: of ``base``, and of all that eager torch trains.
    Returns: the peers, and why there is no eager one where none is.
    Raises: AssertionError where a loss or gradient is off.
    """
    away_from_start(handle, dtype)
    # handle.parameters() come in the order of handle.state()
    peers: dict[str, Peer] = {OURS: (handle.model, list(handle.parameters()))}
    reason = missing(handle.delta)
    if reason is None:
        oracle = _oracle(*eager_twin(base, handle, torch.float64), batch)
        twin, leaves = eager_twin(base, handle, dtype)
        peers[EAGER] = twin, list(leaves.values())
    else:
        oracle = _oracle(*_reference_twin(base, handle, torch.float64), batch)
    baseline = None
    if dtype is not torch.float32:
        usual = peers.get(EAGER)
        if usual is None:
            narrow, leaves = _reference_twin(base, handle, dtype)
            usual = narrow, list(leaves.values())
        baseline = answer(*usual, batch)
        hold_same(EAGER, baseline, oracle)
    for name, peer in peers.items():
        hold_step(name, answer(*peer, batch), oracle, baseline)
    return peers, {} if reason is None else {EAGER: reason}


def time_steps(
    peers: Mapping[str, Peer],
    batch: Batch,
    *,
    rounds: int,
    seconds: float = float("inf"),
    on_round: Callable[[], object] = lambda: None,
) -> Taken:
    """Forward, backward and the optimizer of each peer, in turns; see :func:`interleaved`."""
    saved = {
        name: saved_bytes(
            lambda m=model: m(**batch).loss,  # type: ignore[misc]  # a default in a lambda
            [*model.parameters(), *model.buffers(), *trained, *batch.values()],
        )
        for name, (model, trained) in peers.items()
    }
    optimizers = {name: timed_optimizer(trained) for name, (_, trained) in peers.items()}
    steps = {name: stepper(model, optimizers[name], batch) for name, (model, _) in peers.items()}
    timings = interleaved(steps, rounds=rounds, seconds=seconds, paired=PAIRED, on_round=on_round)
    return Taken(timings, saved, {name: _state_bytes(one) for name, one in optimizers.items()})


def timed_optimizer(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """That of every peer."""
    return make_optimizer([{"params": trained}], 1e-4)


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Callable[[], None]:
    """A call that takes one step."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()

    return step


def away_from_start(handle: Handle, dtype: torch.dtype = torch.float32) -> None:
    """Random offsets, to values that ``dtype`` holds: a B of zeros would hide A from the gate."""
    with torch.no_grad():
        for i, parameter in enumerate(handle.parameters()):
            generator = torch.Generator().manual_seed(i)
            moved = parameter + torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(moved.to(dtype))


def answer(model: nn.Module, trained: list[nn.Parameter], batch: Batch) -> Step:
    """Loss and gradients."""
    loss: Tensor = model(**batch).loss
    # an encoder may have parts that its last states do not come from
    grads = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return loss.detach(), [g.double() for g in grads]


# --------------------------------------------------------------------------------------- details


def _oracle(model: nn.Module, trained: dict[str, nn.Parameter], batch: Batch) -> Step:
    return answer(model, list(trained.values()), batch)


def _reference_twin(
    base: nn.Module, handle: Handle, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """As :func:`eager_twin`, by the reference ops: for what has no eager form."""
    twin = copy.deepcopy(base).to(dtype)
    other = attach(twin, handle.delta, backend="reference", blocks=False)
    with torch.no_grad():
        for mine, value in zip(other.parameters(), handle.parameters(), strict=True):
            mine.copy_(value)
    return twin, dict(zip(other.state(), other.parameters(), strict=True))


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of gradients and of all that the optimizer keeps, after a step."""
    found = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            kept = [p.grad, *optimizer.state[p].values()]
            found += sum(t.nbytes for t in kept if isinstance(t, Tensor))
    return found
