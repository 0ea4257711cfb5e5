"""Compiles, for a GPU that is elsewhere, what the tests that need one will launch there.

Usage: TRITON_CACHE_DIR=/a/path python3 -P tests/gpu_ahead.py [ARGUMENTS OF PYTEST …]

Most of the time of `make gpu` is Triton's compiler, and a GPU's time is dear. Where the same
versions of Python, torch and Triton are installed as on its machine, this fills a cache for sm_90
that travels there, to the same path, since it names its files by it. The tests run on the CPU's
tensors with a driver that compiles and launches nothing, so what they compare is left uncompared:
their outcomes mean nothing here, but that an error before a launch is one there, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

ROOT = Path(__file__).resolve().parents[1]
TARGET = "sm_90"


class Utilities:
    """What Triton asks of a driver once it has compiled."""

    def load_binary(self, *binary: object) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and threads at most, of which none is looked at."""
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Those of an H100 or H200 that are asked for."""
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    """Launches nothing."""

    def __init__(self, *compiled: object) -> None: ...

    def __call__(self, *launch: object) -> None: ...


class AbsentDriver:
    """Of the target, as far as Triton needs one to compile."""

    utils, launcher_cls = Utilities(), Launcher

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", int(TARGET.removeprefix("sm_")), 32)


class OnTheCpu(TorchFunctionMode):
    """Tensors for "cuda" are made on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        given = {name: here(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(here, args), **given)


def here(value: Any) -> Any:
    """The CPU instead of a GPU."""
    named = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return "cpu" if named else value


class Absent:
    """The plugin: from its start on a GPU seems to be there."""

    def pytest_configure(self, config: pytest.Config) -> None:
        """Before a test module is imported."""
        import deltaops.testing
        from deltaops.backends.triton import TritonBackend, core
        from deltaops.backends.triton.targets import TARGETS

        driver.set_active(AbsentDriver())
        one: Any = torch.cuda
        one.is_available, one.device_count = lambda: True, lambda: 1
        one.get_device_capability, one.synchronize = lambda *a: (9, 0), lambda *a: None
        self.standing_in = core.standing_in(TARGETS[TARGET])
        self.standing_in.__enter__()
        backend: Any = TritonBackend
        refuses = backend.unsupported
        backend.unavailable = lambda self: None
        backend.unsupported = lambda self, call: refuses(self, call._replace(device="cuda"))
        unchecked: Any = deltaops.testing
        unchecked.assert_accurate = lambda *a: None
        same: Any = torch
        same.equal = lambda *a: True
        OnTheCpu().__enter__()


def main(arguments: list[str]) -> int:
    """The exit code of pytest."""
    if "TRITON_CACHE_DIR" not in os.environ:
        print(__doc__, file=sys.stderr)
        return 2
    files = [str(p) for p in sorted((ROOT / "tests" / "backends").glob("test_gpu*.py"))]
    given = ["-m", "gpu", "-q", "--tb=line", *(arguments or files)]
    return int(pytest.main(given, plugins=[Absent()]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
