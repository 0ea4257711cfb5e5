"""Experts of a mixture whose forward is Mixtral's, under any name.

More than fifty model families of transformers have Mixtral's program for their experts. So a class
is recognized by its program, as blocks are: compiled, it is the one of Mixtral's, and that one, run
on small numbers, computes what our reference does. Layouts and biases of another kind are refused
with what was found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaops.modules import DOWN, GATE_UP, DeltaExperts, Program, program_of
from deltaops.reference.experts import forward as reference

WANTED = f"{GATE_UP} [E, 2·I, H] and {DOWN} [E, H, I]"


def unlike_experts(module: Any) -> str | None:
    """Why a module of experts cannot have a delta, in words; None when it can.

    Args:
        module: one for which :func:`deltaops.modules.holds_experts` holds.
    """
    kind = module.base_class if isinstance(module, DeltaExperts) else type(module)
    own = {name: p for name, p in module._parameters.items() if p is not None}
    listed = ", ".join(f"{name} {list(p.shape)}" for name, p in own.items())
    found = f"{kind.__name__} has {listed}"
    if set(own) != {GATE_UP, DOWN}:
        return f"{found}; a delta needs experts of {WANTED} alone, without biases"
    if getattr(module, "is_transposed", False):
        return f"{found}, each transposed; a delta needs {WANTED}"
    up, down = own[GATE_UP].shape, own[DOWN].shape
    if len(up) != 3 or len(down) != 3 or up != (down[0], 2 * down[2], down[1]) or 0 in up:
        return f"{found}; a delta needs {WANTED}"
    if getattr(module, "_is_expert_parallel", False):
        return f"{found}, which are some of all: the others are on other devices"
    known = _mixtral() if "transformers.modeling_utils" in sys.modules else None
    if isinstance(known, str):
        return f"{found}, and there is nothing to compare that with: {known}"
    if known is None or _outer(kind) != known.outer or _inner(kind) != known.inner:
        return f"{found}, and computes something else with them than Mixtral's experts do"
    own_gate = vars(module).get("_apply_gate", getattr(kind, "_apply_gate", None))
    if own_gate is not known.gate:
        return f"{found}, and has a gate of its own, which is not Mixtral's"
    return None


class _Known(NamedTuple):
    """Of Mixtral's experts in this version of transformers."""

    outer: Any
    """The code that chooses among transformers' ways to compute them, all to the same end."""
    inner: Program
    gate: Any


def _outer(kind: type[nn.Module]) -> Any:
    return getattr(kind.forward, "__code__", None)


def _inner(kind: type[nn.Module]) -> Program | None:
    return program_of(getattr(kind.forward, "__wrapped__", None))


_cache: dict[type[nn.Module], _Known] = {}


def _mixtral() -> _Known | str:
    """Of this version of transformers; in words why there is nothing to compare with.

    Only what was found is kept: what went wrong once may go well later.
    """
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    if MixtralExperts not in _cache:
        inner = getattr(MixtralExperts.forward, "__wrapped__", None)
        program = program_of(inner)
        if inner is None or program is None:
            return "of Mixtral's experts in this transformers no program can be read"
        # modes, autocast and the default device belong to a thread: here none of the caller's act
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(_tried, inner).result()
        if error is not None:
            return error
        gate = getattr(MixtralExperts, "_apply_gate", None)  # transformers' decorator puts it there
        _cache[MixtralExperts] = _Known(_outer(MixtralExperts), program, gate)
    return _cache[MixtralExperts]


def _tried(forward: Callable[..., Tensor]) -> str | None:
    """Run Mixtral's program on small numbers: in words why that is not our reference, or None.

    On a bare object: what makes a module's parameters (accelerate's empty weights) may be patched.
    """
    random = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device="cpu", dtype=torch.float32)

    up, down = drawn(3, 10, 6), drawn(3, 6, 5)
    bare = SimpleNamespace(
        num_experts=3, hidden_dim=6, intermediate_dim=5, gate_up_proj=up, down_proj=down,
        act_fn=nn.SiLU(),
    )  # fmt: skip
    x, weights, index = drawn(7, 6), drawn(7, 2), drawn(7, 3).topk(2).indices
    try:
        y = forward(bare, x, index, weights)
    except Exception as error:  # of whatever transformers does there: told, not hidden
        return f"Mixtral's experts could not be tried: {type(error).__name__}: {error}"
    if not torch.allclose(y, reference(x, index, weights, up, down), atol=1e-5, rtol=1e-4):
        return "Mixtral's experts compute something else in this transformers"
    return None
