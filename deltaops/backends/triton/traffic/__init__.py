"""Bytes and operations of a launch, from its grid, its tiles and its tensors.

Two counts of bytes. *Asked* is what the programs load and store, all of them, as they mask it: what
caches and memory serve together, in shares that no count tells. *Once* is each element that the
launch touches, counted once: what memory must move at least, where the caches keep everything
between the programs of a launch and nothing between launches; but where all programs at work walk
over their rows twice, and these rows are more than L2 holds, each walk counts. Operations are those
of the matrix products as they are issued, with their padding.

An entry a kernel, in the files beside this one, says what its programs walk over.
tests/kernels/interpreted.py holds the kernels' entries to the loads and stores that Triton's
interpreter makes, to the byte, in the calls that it runs. Of torch's own products each operand and
result counts once: what happens inside is not known.
"""

from __future__ import annotations

from types import SimpleNamespace

from deltaops.backends.triton.record import Launch
from deltaops.errors import ConfigError

from . import adapters, attention, elementwise, linear
from .tally import ENTRIES, Traffic, distinct

__all__ = ["ENTRIES", "Traffic", "adapters", "attention", "elementwise", "linear", "traffic"]


def traffic(launch: Launch) -> Traffic:
    """Of this launch. Raises: ConfigError for a kernel that has no entry here."""
    found = Traffic(launches=1)
    if launch.kernel.startswith("torch."):
        _library(launch, found)
        return found
    if launch.kernel not in ENTRIES:
        raise ConfigError(
            f"the traffic of {launch.kernel} is not modelled. "
            "Add an entry to deltaops/backends/triton/traffic/."
        )
    ENTRIES[launch.kernel](SimpleNamespace(**launch.arguments), launch.grid, found)
    return found


def _library(launch: Launch, t: Traffic) -> None:
    """torch's own: each tensor once; how its tiles go is the library's business."""
    reads, writes = launch.arguments["reads"], launch.arguments["writes"]
    for read in reads:
        t.load(read, distinct(read), distinct(read))
    for written in writes:
        t.store(written, distinct(written))
    if launch.kernel in ("torch.mm", "torch.addmm", "torch.addmm_"):
        left, right = reads[-2:]
        t.dots(1, left.shape[0], right.shape[1], left.shape[1])
