"""Seconds a step of a contender, beside eager torch and full tuning, after a gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from deltaops.measure.cell import EAGER, OURS, Cell
from deltaops.measure.pair import Peer, held_pair, time_steps
from deltaops.tuning.tokens import Order

from .build import set_up
from .contenders import FULL, Contender
from .lines import Settings
from .reader import Material

FULL_TUNING = "full tuning"
"""The peer that every step is also timed against."""


def take_time(
    contender: Contender,
    material: Material,
    settings: Settings,
    seed: int,
    rounds: int,
    tick: Callable[[], object] = lambda: None,
) -> tuple[Cell, dict[str, int]]:
    """Gate, then seconds a step of ours, of eager torch and of full tuning, in turns.

    Args:
        contender: one that trains.
        material: the encoder, and the texts whose first batch is taken.
        settings: of the table.
        seed: decides start values and batch.
        rounds: how often each peer's step is timed.
        tick: called after each round, and once before.
    Returns: the cell, and the bytes of gradients and moments by peer.
    Raises: AssertionError where a loss or gradient is off; nothing was timed then.
    """
    order = Order(len(material.train), settings.batch_size, seed)
    batch = material.train.batch(order.rows(0))
    peers, absent = _peers(contender, material, seed, batch)
    taken = time_steps(peers, batch, rounds=rounds, on_round=tick)
    rows, length = batch["input_ids"].shape
    return Cell(
        "method", f"{contender.title}, {rows}×{length}", "f32", 0.0, taken.timings, absent,
        taken.saved, tokens=rows * length,
    ), taken.state  # fmt: skip


def _peers(
    contender: Contender, material: Material, seed: int, batch: dict[str, Tensor]
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Models to time; ours and eager torch's have passed the gate. The rest with its reason."""
    full, _ = set_up(replace(contender, name=FULL, spec=""), material, seed)
    model, handle = set_up(contender, material, seed)
    peers: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    if handle is None:
        absent[OURS] = "there is no delta to compute"
        if contender.name != FULL:
            peers[EAGER] = model, [p for p in model.parameters() if p.requires_grad]
    else:
        peers, absent = held_pair(material.reader(seed), handle, batch)
    peers[FULL_TUNING] = full, list(full.parameters())
    for m, _ in peers.values():
        m.train()
    return peers, absent
