"""Whether a backward pass runs in this thread, which torch says under a private name only.

A block that a checkpoint runs again, inside of the backward pass, is to read what its own forward
pass computed; one that is called by itself, outside, is to compute anew. Nothing public tells the
two apart with that guarantee: a hook on what the stack returned does not see a backward pass that
begins at one of its hidden states, and a node of autograd says when a gradient passed it but not
that none will. ``torch.utils.checkpoint`` asks under the same name; it stands here alone, so that a
torch without it is refused where a delta is attached and not misread later.
"""

from __future__ import annotations

from typing import Any

import torch

from deltaops.errors import AttachError

_NAME = "_current_graph_task_id"
_OUTSIDE = -1


def backward_runs() -> bool:
    """Whether this thread is inside of a backward pass."""
    ask: Any = getattr(torch._C, _NAME)
    return bool(ask() != _OUTSIDE)


def check_backward_runs() -> None:
    """Raises: AttachError where this torch does not say whether a backward pass runs."""
    ask: Any = getattr(torch._C, _NAME, None)
    found = ask() if callable(ask) else None
    if type(found) is not int:
        raise AttachError(
            f"a delta whose rows are computed once in a pass needs torch._C.{_NAME}() to tell a "
            f"block that a checkpoint runs again, and torch {torch.__version__} has "
            f"{'none' if ask is None else f'one that returns {found!r}'}. Install a torch that "
            "deltaops was tested with (2.11 to 2.13)."
        )
