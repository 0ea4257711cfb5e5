"""Experts of a mixture whose forward is Mixtral's, under any name.

More than fifty model families of transformers have Mixtral's program for their experts. So a class
is recognized by its program, as blocks are: compiled, it is the one of Mixtral's, and that one, run
on small numbers, computes what our reference does. Layouts and biases of another kind are refused
with what was found.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

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
    if known is None or _outer(kind) != known.outer or _inner(kind) != known.inner:
        return f"{found}, and computes something else with them than Mixtral's experts do"
    if getattr(kind, "_apply_gate", None) is not known.gate:
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


@cache
def _mixtral() -> _Known | None:
    """None where transformers' Mixtral computes something else."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    inner = _inner(MixtralExperts)
    config = MixtralConfig(hidden_size=6, intermediate_size=5, num_local_experts=3)
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        experts = MixtralExperts(config).float()
        for parameter in experts.parameters():
            parameter.normal_()
        x, weights = torch.randn(7, 6, dtype=torch.float32), torch.rand(7, 2, dtype=torch.float32)
        index = torch.randn(7, 3, dtype=torch.float32).topk(2).indices
        y = reference(x, index, weights, experts.gate_up_proj, experts.down_proj)
        config._experts_implementation = "eager"
        same = torch.allclose(experts(x, index, weights), y, atol=1e-5, rtol=1e-4)
    if inner is None or not same:
        return None
    gate = getattr(MixtralExperts, "_apply_gate", None)  # transformers' decorator puts it there
    return _Known(_outer(MixtralExperts), inner, gate)
