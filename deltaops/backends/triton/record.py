"""What the backend launches, written down: of Triton kernels, and of torch's own for its products.

With tensors on "meta" and a GPU standing in (:func:`core.standing_in`) nothing needs to be there to
run it; in Triton's interpreter the launches can run as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import core


class Launch(NamedTuple):
    """One kernel, as it was started."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By the names of the kernel's parameters; of torch's ops "reads" and "writes", tensors."""
    options: dict[str, Any]
    """num_warps and num_stages."""


@contextmanager
def recording(*, execute: bool = False) -> Iterator[list[Launch]]:
    """The launches of the block, in their order, once it is left. For one thread.

    Args:
        execute: run them too, in Triton's interpreter; else none is.
    """
    launches: list[Launch] = []
    kind = _kernel_class()
    run = kind.run

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False))
        given |= {name: value for name, value in kwargs.items() if name in names}
        options = {name: value for name, value in kwargs.items() if name not in names}
        launches.append(Launch(kernel.__name__, tuple(grid), given, options))
        if execute:
            run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    kind.run = note
    try:
        with _Library(launches):
            yield launches
    finally:
        kind.run = run


def _kernel_class() -> Any:
    if core.interpreting():
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction
    from triton.runtime.jit import JITFunction

    return JITFunction


class _Library(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    """Notes torch's ops that move something: no views, no new memory."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own has no types
        self.launches = launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        schema = func._schema
        returned = [r for r in schema.returns if r.alias_info is not None]
        view = any(not r.alias_info.is_write for r in returned)
        shaped = torch.Tag.inplace_view in func.tags  # as_strided_: no element is touched
        if view or shaped or schema.name.startswith(("aten::empty", "aten::new_empty")):
            return out
        reads, writes = [], []
        for i, parameter in enumerate(schema.arguments):
            value = args[i] if i < len(args) else given.get(parameter.name)
            if not isinstance(value, Tensor):
                continue
            written = parameter.alias_info is not None and parameter.alias_info.is_write
            if written:
                writes.append(value)
            if not parameter.is_out:
                reads.append(value)
        if not writes and isinstance(out, Tensor):
            writes.append(out)
        if writes:
            name = schema.name.replace("aten::", "torch.")
            self.launches.append(Launch(name, (), {"reads": reads, "writes": writes}, {}))
        return out
