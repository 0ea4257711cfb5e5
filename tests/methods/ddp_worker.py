"""One of the processes of ``test_distributed.py``: python ddp_worker.py RANK FOLDER.

Reads ``deltas.pkl`` in the folder, pairs of a name and an architecture → delta; rank 0 leaves
``grads.pt``: for each pair the gradients by the keys of ``handle.state()``.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import deltaops
from deltaops.testing.architectures import HEADS, build, labelled, new_head

WORLD = 2


def gradients(delta: Any, name: str, rank: int | None) -> dict[str, torch.Tensor]:
    """Of the mean loss over the full batch, or through DDP over the rows of ``rank``."""
    model = build(name, head=HEADS[name]).train()
    torch.manual_seed(rank or 0)  # others than rank 0's are overwritten by DDP
    handle = deltaops.attach(model, replace(delta, modules_to_save=new_head(name)))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    batch, run = labelled(name, rows=2 * WORLD), model
    if rank is not None:
        # one that the loss does not depend on would keep its bucket from being averaged
        run = DistributedDataParallel(model, find_unused_parameters=name in ("t5", "clip vision"))
        batch = {k: v.chunk(WORLD)[rank] for k, v in batch.items()}
    run(**batch).loss.backward()
    trained = zip(handle.state(), handle.parameters(), strict=True)
    return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in trained}


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    deltas = pickle.loads((folder / "deltas.pkl").read_bytes())
    found = {pair: gradients(delta, pair[1], rank) for pair, delta in deltas.items()}
    if rank == 0:
        torch.save(found, folder / "grads.pt")
    distributed.barrier()  # neither leaves while the other still talks to it
    distributed.destroy_process_group()
    # at once: the end of an interpreter may meet a thread of gloo's that still runs, which aborts
    # the process ("terminate called without an active exception", seen once)
    sys.stdout.flush()
    os._exit(0)
