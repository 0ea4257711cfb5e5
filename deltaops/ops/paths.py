"""Which way a call takes: past the dispatcher, through the registered op, or to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from deltaops.dispatch import LAST_RESORT
from deltaops.errors import DeviceError, NoBackendError

PLAIN = (Tensor, Parameter)
"""Torch's own: a subclass (DTensor, a fake) may know more than our ops."""


def takes_bypass(*tensors: Tensor | None) -> bool:
    """Whether the shortcut past the dispatcher gives the same: eager, and nobody is watching.

    The dispatcher also turns the signs in a view whose memory holds them the other way round.
    """
    return (
        not torch.compiler.is_compiling()
        and all(
            [t is None or (type(t) in PLAIN and not t.is_meta and not t.is_neg()) for t in tensors]
        )
        and not torch._C._len_torch_dispatch_stack()
    )


def transformed(op: str, backend: str, strict: bool) -> bool:
    """Whether a torch.func transform is active: then the reference runs, which they understand.

    Raises: NoBackendError when another backend was asked for.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    if strict or backend not in ("auto", LAST_RESORT):
        raise NoBackendError(
            f"{op}: under torch.func transforms only the reference runs, and "
            f"backend={backend!r}, strict={strict} was asked for. "
            "Pass backend='auto' and strict=False, or leave the transform."
        )
    return True


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is recording and one of the tensors wants a gradient."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def records(*tensors: Tensor | None) -> bool:
    """Whether an ``autograd.Function`` in the place of torch's own calls is to record these:
    autograd does, and neither a compiler, a mode nor a transform looks on."""
    return (
        needs_grad(*tensors)
        and takes_bypass(*tensors)
        and not torch._C._are_functorch_transforms_active()
    )


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast on ``device``; the device "meta" has none, and torch refuses its name."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()  # to enter torch's takes longer than a small product
    return torch.autocast(device.type, enabled=False)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor, *, of: str = "x") -> None:
    """Raise DeviceError unless ``tensor`` is where ``x`` is; the message calls that one ``of``."""
    if tensor.device != x.device:
        raise DeviceError(
            f"{op}: {name} must be on the device of {of}, {x.device}, got {tensor.device}. "
            "Move the model or the input."
        )


def shaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """``fresh``, a contiguous result that nobody else holds, in another shape of as many elements.

    The tensor itself, no view of it: what a Function returns as a view, autograd lets nobody change
    in place.
    """
    return fresh.resize_(shape)
