"""``nn.DataParallel`` is refused: its replicas have no parameters.

It calls a method of each module, of torch's own under a private name, and gives what that returns
views of the parameters as plain attributes. Places read their parameters where they are held, and
what passes between them belongs to one model. Without a device to replicate to, it calls nothing.
"""

from __future__ import annotations

from typing import Any, Never

from deltaops.errors import AttachError


def refuse_replicas(self: Any) -> Never:
    """Raises: AttachError."""
    kind = getattr(type(self), "base_class", type(self))
    raise AttachError(
        f"nn.DataParallel cannot replicate a {kind.__name__} that deltaops runs: replicas have no "
        "parameters of their own. Use torch.nn.parallel.DistributedDataParallel, with one process "
        "for each device, or handle.revert() (accelerate's report.revert()) first."
    )
