"""One of the processes of ``test_distributed.py``: python ddp_worker.py RANK FOLDER.

Reads ``deltas.pkl`` in the folder; rank 0 leaves ``grads.pt``: for each method its name → gradients
by the keys of ``handle.state()``.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import deltaops
from deltaops.testing.architectures import build

WORLD = 2


def rows() -> dict[str, torch.Tensor]:
    """The full batch: as many rows for each process."""
    ids = torch.randint(3, 60, (2 * WORLD, 9), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids}


def gradients(delta: Any, rank: int | None) -> dict[str, torch.Tensor]:
    """Of the mean loss over the full batch, or through DDP over the rows of ``rank``."""
    model = build("llama", head="ForCausalLM").train()
    torch.manual_seed(rank or 0)  # others than rank 0's are overwritten by DDP
    handle = deltaops.attach(model, delta)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    batch, run = rows(), model
    if rank is not None:
        run = DistributedDataParallel(model)
        batch = {k: v.chunk(WORLD)[rank] for k, v in batch.items()}
    run(**batch).loss.backward()
    return {k: p.grad for k, p in zip(handle.state(), handle.parameters(), strict=True)}


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    deltas = pickle.loads((folder / "deltas.pkl").read_bytes())
    found = {name: gradients(delta, rank) for name, delta in deltas.items()}
    if rank == 0:
        torch.save(found, folder / "grads.pt")
    distributed.destroy_process_group()
