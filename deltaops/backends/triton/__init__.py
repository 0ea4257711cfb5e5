"""Backend ``triton``: the kernels of ``kernels/`` on a GPU. float32, float16 and bfloat16.

One file for each op, as in :mod:`deltaops.reference`. With TRITON_INTERPRET=1 it also takes CPU
tensors, slowly: for tests, after the native core.
"""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
