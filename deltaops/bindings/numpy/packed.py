"""A frozen weight kept in the orders in which the core reads it."""

from __future__ import annotations

import numpy as np

from deltaops.bindings.settings import threads

from .arrays import Array, address, call, check_oriented, code, core, strides

OP = "PackedWeight"


class PackedWeight:
    """A weight ``[N, K]`` packed once for ``delta_linear``, which takes it in the weight's place.

    Each orientation (y; the gradient of x) is packed when first used, in about as many bytes as the
    weight has in float32 (half where the CPU multiplies bf16). Both give the weight's own bits.

    The weight is held, not copied, and should stay as it is: a look at some of its elements notices
    most changes, and then it is packed again; :meth:`renew` does so at once.

    Args:
        weight: float32 or bfloat16, with rows or columns of adjacent elements.
        num_threads: that pack it; None: all processors.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """

    def __init__(self, weight: Array, *, num_threads: int | None = None) -> None:
        self.weight = check_oriented(OP, "weight", weight, (None, None), None)
        self._threads = threads(num_threads)
        self._packed: dict[bool, tuple[int, str, Array]] = {}  # by "transposed"

    @property
    def nbytes(self) -> int:
        """Of the packed copies that there are."""
        return sum(memory.nbytes for _, _, memory in self._packed.values())

    def renew(self) -> None:
        """Forget the packed copies: the weight was changed."""
        self._packed.clear()

    def memory(self, transposed: bool) -> Array:
        """The packed copy for y, or (``transposed``) for the gradient of x."""
        native, layout = core(), self._layout(False)
        state = (call(native.fingerprint, *layout), native.isa())
        found = self._packed.get(transposed)
        if found is None or found[:2] != state:
            layout = self._layout(transposed)
            size = call(native.packed_bytes, *layout)
            made = np.empty(size, np.uint8)
            call(native.pack_weight, *layout, address(made), size, self._threads)
            found = self._packed[transposed] = (*state, made)
        return found[2]

    def _layout(self, transposed: bool) -> tuple[int, ...]:
        (n, k), (row, column) = self.weight.shape, strides(self.weight)
        own = (k, n, column, row) if transposed else (n, k, row, column)
        return (address(self.weight), *own, code(self.weight) or 0)
