"""What every op of the backend needs: Triton's kernels, the tensor's GPU, and its capability."""

from __future__ import annotations

import importlib
import importlib.util
import os
from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor

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
    if not tensor.is_cuda:
        return 0  # the interpreter: the smallest tiles
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor
