"""What the backward pass makes a forward pass hold on to, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(run: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that ``run`` saves for its backward pass, each counted once.

    Args:
        run: a forward pass; a backward pass may follow in it.
        known: tensors that are held anyway: inputs, parameters, buffers.
    """
    held = {t.untyped_storage().data_ptr() for t in known}
    found: dict[int, int] = {}
    # Alive, or a later tensor could take the address of an earlier one. Nothing here keeps the
    # tensor itself, be it for a moment: one that its own graph has saved holds that graph for good.
    kept: list[torch.UntypedStorage] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return t.detach()

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(found.values())
