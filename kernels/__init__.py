"""Triton kernels of deltaops. They import triton and torch, and nothing else of deltaops.

Set TRITON_INTERPRET before this package is first imported: ``triton.jit`` looks at it once.
"""

if __name__ != "deltaops.kernels":
    raise ImportError(
        f"the kernels of deltaops were imported as {__name__!r}; import deltaops.kernels instead "
        "(install deltaops, or run from its checkout without putting kernels/ on the path)"
    )

from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""Whether the kernels of this process run in Triton's interpreter, on CPU tensors."""
