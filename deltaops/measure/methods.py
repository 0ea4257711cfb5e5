"""A training step of one method, fused against eager torch, on a model with random weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from deltaops.errors import AttachError, TargetError
from deltaops.surgery import attach
from deltaops.tuning.spec import parse_delta

from .cases import DTYPES
from .cell import EAGER, OURS, Cell
from .compare.contenders import Contender, contenders
from .compare.reader import HEAD
from .difference import difference
from .pair import held_pair, stepper, time_steps, timed_optimizer
from .workloads import Workload

NAMES = tuple(name for name, line in contenders().items() if line.spec)
"""Of the methods, as ``deltaops compare`` has them."""


def measure_method(
    contender: Contender,
    workload: Workload,
    dtype: str,
    *,
    rounds: int = 15,
    seconds: float = float("inf"),
) -> Cell:
    """Gate, then time; where eager torch is the faster one, look for where, too.

    Args:
        contender: the method with its settings.
        workload: of :data:`deltaops.measure.workloads.READERS`.
        dtype: of the model, "f32" or "bf16"; eager torch keeps all in it, ours trains in float32.
        rounds: at most.
        seconds: for the timing, both peers together.
    Raises: AssertionError where a loss or gradient is off; nothing was timed then.
    """
    kind = DTYPES[dtype]
    torch.manual_seed(0)
    base = workload.build().to(kind)
    base.train()
    cell = Cell(
        "method", contender.title, dtype, 0.0, {}, tokens=workload.tokens, model=workload.title
    )
    try:
        handle = attach(copy.deepcopy(base), parse_delta(contender.spec, modules_to_save=(HEAD,)))
    except (AttachError, TargetError) as error:  # an architecture that cannot have the method
        return replace(cell, absent={OURS: str(error)})
    batch = workload.inputs(kind)
    peers, absent = held_pair(base, handle, batch, kind)
    taken = time_steps(peers, batch, rounds=rounds, seconds=seconds)
    cell = replace(cell, timings=taken.timings, absent=absent, saved=taken.saved)
    ratio = cell.ratio(EAGER, OURS)
    if ratio is None or ratio >= 1:
        return cell
    steps = {
        name: stepper(model, timed_optimizer(trained), batch)
        for name, (model, trained) in peers.items()
    }
    return replace(cell, note=difference(steps[OURS], steps[EAGER]))
