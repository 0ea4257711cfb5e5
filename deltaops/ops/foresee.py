"""S of the layers that read y, made in the pass that makes y: a norm's, or a gated product's.

Who calls such an op names the layers that will read its result. Where the backend makes their
S = s · drop(y) Aᵀ on the way (:class:`deltaops.backends.ProducingBackend`), they find it
(:mod:`.made`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from deltaops.backends import Backend, GatedCall, GroupMember, NormBiasCall, ProducingBackend

from .delta_linear import draw_seed, prepare
from .made import Ahead

Readers = Callable[[], Sequence[Any]]
"""Gives the layers (:class:`deltaops.ops.Layer`); asked only where a backend may make their S."""


def foresee(
    y_like: Tensor,
    readers: Readers | None,
    call: NormBiasCall | GatedCall,
    runner: Backend,
    backend: str,
    strict: bool,
) -> Ahead | None:
    """The layers that read the result of ``call``, where ``runner`` makes their S with it.

    Args:
        y_like: a tensor of the result's shape, dtype and device.
        readers: who they are; None for nobody.
        backend: of the readers' calls.
        strict: of the readers' calls.
    """
    # by the name of a method: to ask for all of a protocol costs as much as a small layer
    if readers is None or not hasattr(runner, "produces") or not call.m:
        return None
    runner, device = cast(ProducingBackend, runner), y_like.device
    if not runner.may_produce(call, device) or torch.is_autocast_enabled(device.type):
        return None  # under autocast they read a converted y
    members, random = [], []
    for layer in readers():
        if layer.weight.dim() != 2:
            return None  # sharded, until the layer itself is called
        known = prepare(
            y_like, layer.weight, layer.bias, layer.branches, layer.adapter, backend, strict
        )
        if known is None or known[2] is not None:
            return None
        (plan, draws), operands, _ = known
        members.append(GroupMember(plan, layer.weight, layer.bias, operands, None, None))
        random.append(draws)
    if not members or not runner.produces(call, members):
        return None
    # seeds are drawn last, one layer after the other, as by the layers themselves
    return Ahead(
        runner,
        [
            member._replace(seed=draw_seed(device) if draws else None)
            for member, draws in zip(members, random, strict=True)
        ],
    )
