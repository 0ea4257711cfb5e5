"""x and S of the layers that read it in one pass, where x is made: RMSNorm, and SwiGLU.

By the CUDA library (csrc/cuda/ampere/produce.h). It saves the pass over x of :mod:`branches`, and
costs the ranks' products beside the norm's own bytes; where it pays is a matter of measurement: the
plan ``produced`` of :mod:`planner`, which no call gets unmeasured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaops.backends.base import GroupMember
from deltaops.backends.calls import Call, GatedCall, NormBiasCall
from deltaops.backends.plain import thirds
from deltaops.errors import DataError

from . import branches, core, cuda, delta_linear, planner
from .group import TritonDeltaLinear

MOST = 1024
"""Ranks of all layers, those of each branch rounded up to :data:`PASS`:
DELTAOPS_CUDA_MAX_PRODUCED of csrc/include/deltaops_cuda.h."""
PASS = 64


def may_produce(call: Call, device: torch.device) -> bool:
    """See :class:`deltaops.backends.base.ProducingBackend`."""
    return planner.knows_produced(device) and _is_ours(call)


def planned(call: Call) -> str | None:
    """Whether S of the layers that read the result may be made with it, in words; None where not.
    Which of them it is of, each layer's shape decides."""
    try:
        if not may_produce(call, torch.device(call.device)):
            return None
    except DataError as error:
        return f"no plan, a call would raise: {error}"
    return "S of a layer that reads it is made in the same pass where `produced` was the fastest"


def produces(call: Call, readers: Sequence[GroupMember]) -> bool:
    """See :class:`deltaops.backends.base.ProducingBackend`."""
    return takes(call, readers) and all(_is_faster(call, reader) for reader in readers)


def takes(call: Call, readers: Sequence[GroupMember]) -> bool:
    """Whether the kernels can make x and S of all ``readers``."""
    if not _is_ours(call) or not all(_is_taken(call, reader) for reader in readers):
        return False
    ranks = [t.shape[0] for reader in readers for t in thirds(reader.operands)[0]]
    return bool(ranks) and sum(-(-rank // PASS) * PASS for rank in ranks) <= MOST


def _is_ours(call: Call) -> bool:
    """Whether there is a kernel for what makes x."""
    if isinstance(call, NormBiasCall):
        kind = call.norm == "rms" and set(call.parameter_dtypes) <= {call.dtype}
    elif isinstance(call, GatedCall):
        kind = call.activation == "silu" and not call.alone
    else:
        return False
    return kind and call.dtype in cuda.DTYPES and call.m > 0


def _is_taken(call: Call, reader: GroupMember) -> bool:
    """Whether the kernel takes the branches of a layer."""
    a, _, _ = thirds(reader.operands)
    plain = isinstance(reader.plan, TritonDeltaLinear) and reader.adapter is None
    return (
        plain
        and bool(a)
        and a[0].dtype == call.dtype == reader.weight.dtype
        and cuda.takes(*a)
        and cuda.runs_on(a[0].device, "ampere")
    )


def _is_faster(call: Call, reader: GroupMember) -> bool:
    """Whether the plan of the layer's y is ``produced``."""
    plan, operands = reader.plan, thirds(reader.operands)
    assert isinstance(plan, TritonDeltaLinear)
    assert isinstance(call, NormBiasCall | GatedCall)
    # all that is asked of x: it will be contiguous
    x = torch.empty(call.m, reader.weight.shape[1], dtype=call.dtype, device="meta")
    return delta_linear.makes_s_before(x, reader.weight, *operands, plan.dropout, plan.activation)


def norm_and_s(
    x: Tensor, gamma: Tensor | None, eps: float, readers: Sequence[GroupMember]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See :class:`deltaops.backends.base.ProducingBackend`."""
    x = _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.zeros((x.shape[0], 2), dtype=torch.float32, device=x.device)
    s = _room(x, readers)
    with core.device_of(x):
        given = None if gamma is None else gamma.contiguous()
        cuda.rms_norm_and_s(y, stats[:, 1:], x, given, eps, _downs(readers, s))
    return y, stats, s


def gated_and_s(
    gate: Tensor, up: Tensor, readers: Sequence[GroupMember]
) -> tuple[Tensor, list[Tensor]]:
    """See :class:`deltaops.backends.base.ProducingBackend`."""
    gate, up = _rows(gate), _rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    s = _room(y, readers)
    with core.device_of(y):
        cuda.swiglu_and_s(y, gate, up, _downs(readers, s))
    return y, s


def _rows(t: Tensor) -> Tensor:
    """With the elements of a row side by side."""
    return t if cuda.takes(t) else t.contiguous()


def _room(y: Tensor, readers: Sequence[GroupMember]) -> list[Tensor]:
    """For S of each layer."""
    widths = [sum(t.shape[0] for t in thirds(reader.operands)[0]) for reader in readers]
    return [torch.empty((y.shape[0], w), dtype=torch.float32, device=y.device) for w in widths]


def _downs(readers: Sequence[GroupMember], s: Sequence[Tensor]) -> list[cuda.Down]:
    """All branches, as the library wants them."""
    found = []
    for reader, whole in zip(readers, s, strict=True):
        plan, (a, _, _) = reader.plan, thirds(reader.operands)
        assert isinstance(plan, TritonDeltaLinear)
        scaling = branches.project_scaling(plan.scaling, plan.activation)
        pieces = branches.columns(plan.ranks)
        for i, (down, piece) in enumerate(zip(a, pieces, strict=True)):
            found.append(
                cuda.Down(down, whole[:, piece], scaling[i], plan.dropout[i], i, reader.seed)
            )
    return found
