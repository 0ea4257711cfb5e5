"""What every op of the backend needs: Triton's kernels, the tensor's GPU, and what it is."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .targets import Target

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether this process runs Triton's kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    """Whether Triton can be imported."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ModuleNotFoundError:  # an import hook may refuse it: then it is as good as absent
        return False


def kernels(name: str) -> ModuleType:
    """The module ``name`` of ``kernels/``; Triton is imported with it."""
    return importlib.import_module(f"deltaops.kernels.{name}")


def device_of(tensor: Tensor) -> torch.cuda.device | nullcontext[None]:
    """Kernels go to the tensor's own GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability(tensor: Tensor) -> int:
    """As in 90 for sm_90."""
    if _stand_in is not None:
        return _stand_in.capability
    if not tensor.is_cuda:
        return 0  # the interpreter: the smallest tiles
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def multiprocessors(device: torch.device | str) -> int:
    """Of that GPU; one in the interpreter."""
    if _stand_in is not None:
        return _stand_in.multiprocessors
    if torch.device(device).type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Launches inside run beside those that follow, until :func:`together` is called."""
    if device.type != "cuda":
        yield
        return
    side = _side_stream(device.index)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


def together(device: torch.device) -> None:
    """What is launched from here on waits for what :func:`aside` has launched."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_stream(device.index))


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(torch.device("cuda", index))  # type: ignore[no-untyped-call]  # torch's own has no types


def persists(device: torch.device | str) -> bool:
    """Whether the persistent kernels run there: NVIDIA's Hopper and data-centre Blackwell, and the
    interpreter."""
    return _is_of(device, kernels("configs").PERSISTENT)


def has_room_beside(device: torch.device | str) -> bool:
    """Whether dA can go beside a persistent dx there: Hopper, and the interpreter."""
    return _is_of(device, kernels("configs").BESIDE)


def _is_of(device: torch.device | str, wanted: tuple[int, ...]) -> bool:
    """Whether that GPU is NVIDIA's, of one of these capabilities; or the interpreter."""
    if _stand_in is not None:
        return not _stand_in.amd and _stand_in.capability in wanted
    found = torch.device(device)
    if found.type != "cuda" or torch.version.hip is not None:
        return interpreting()
    major, minor = torch.cuda.get_device_capability(found)
    return 10 * major + minor in wanted


def gpu(device: torch.device | str = "cuda") -> str | None:
    """The name of a GPU as its driver has it, of "cuda" the current one's; None of what is none."""
    if _stand_in is not None:
        return _stand_in.name
    found = torch.device(device)
    if found.type != "cuda":
        return None
    return _name(torch.cuda.current_device() if found.index is None else found.index)


@cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


_stand_in: Target | None = None


def standing_in_for() -> Target | None:
    """The GPU that is not there, inside :func:`standing_in`."""
    return _stand_in


@contextmanager
def standing_in(target: Target) -> Iterator[None]:
    """Tensors on "meta" are taken for tensors on ``target``: what would be launched can then be
    compiled or counted where there is no such GPU. For one thread; nothing may run meanwhile."""
    global _stand_in
    precision: Any = kernels("precision")
    before = _stand_in, precision.AMD
    _stand_in, precision.AMD = target, target.amd
    try:
        yield
    finally:
        _stand_in, precision.AMD = before
