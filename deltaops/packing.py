"""Copies of frozen weights in the order in which the CPU core reads them, kept between calls.

A weight is packed at its second use, once for the forward pass and once more (transposed) for the
gradient of x; until then, and where the policy says no, the core packs panels on the way. Both give
the same bits.

An entry belongs to the memory of a weight, not to a tensor object: views and aliases (Conv1D's
transpose, what a compiled graph passes) find it again. It is dropped when that memory is freed and
made again when the weight changed: torch's version counter tells, and for writes through ``.data``,
which that does not see, a fingerprint of some elements.

Under autocast a weight is used in another dtype. It is converted once, and the converted weight is
kept beside the packed copies, by the same rules; it has an entry and packed copies of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from deltaops.errors import ConfigError
from deltaops.memory import available

Policy = Literal["auto", "always", "never"]

SMALLEST = 1 << 14
"""Elements below which packing on the way costs next to nothing."""

_SHARE_OF_MEMORY = 0.25
_LOOKS = 16
"""Of a sweep at entries and policies, for each that was new since the last one."""


class Layout(NamedTuple):
    """How a weight ``[N, K]`` lies in memory."""

    pointer: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int
    dtype: int

    @classmethod
    def of(cls, weight: Tensor, dtype: int) -> Layout:
        """The layout of ``weight``; ``dtype`` as the core numbers them."""
        (rows, cols), (row_stride, col_stride) = weight.shape, weight.stride()
        return cls(weight.data_ptr(), rows, cols, row_stride, col_stride, dtype)

    @property
    def transposed(self) -> Layout:
        """The same memory as ``[K, N]``."""
        return Layout(
            self.pointer, self.cols, self.rows, self.col_stride, self.row_stride, self.dtype
        )


@dataclass
class _Entry:
    """What is known of one layout of one weight."""

    storage: StorageWeakRef
    version: int
    fingerprint: int
    uses: int = 0
    packed: dict[bool, Tensor] = field(default_factory=dict)  # by "transposed"
    converted: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.packed.values(), *self.converted.values()))

    def expired(self) -> bool:
        return bool(self.storage.expired())  # type: ignore[no-untyped-call]  # torch's own has no types


class Packing:
    """All packed weights of the process. Safe to use from several threads.

    Experts are thousands of weights: what is done for each of them walks over no others. Entries
    whose weight is gone are looked for now and then, and when memory is wanted.
    """

    def __init__(self) -> None:
        self._entries: dict[Layout, _Entry] = {}
        self._layouts: dict[int, set[Layout]] = {}  # of the entries, by data_ptr
        self._total = 0  # bytes of all entries
        self._added = 0  # entries and policies since the last sweep
        self._policies: dict[int, tuple[StorageWeakRef, Policy]] = {}  # by data_ptr
        self._lock = threading.Lock()
        self._budget: int | None = None

    def set_policy(self, weight: Tensor, policy: Policy) -> None:
        """Say for one weight whether it may be packed.

        Args:
            policy: "auto" packs while all copies stay below a quarter of the memory that was
                available when the first was made; "always" packs; "never" does not. What there is
                is dropped.
        Raises: ConfigError for another word.
        """
        check_policy(policy)
        with self._lock:
            self._sweep_sometimes()
            self._policies.pop(weight.data_ptr(), None)
            if policy != "auto":
                self._policies[weight.data_ptr()] = (_reference(weight), policy)
            # what was kept by the other rule is made again, or not; so for its converted weights
            self._forget(weight.data_ptr())

    def keep_policy(self, weight: Tensor, policy: Policy) -> None:
        """:meth:`set_policy` where it differs: for each call of a layer, whose weight may have been
        moved or copied since. Not in a compiled graph, which keeps what stood when it was made.
        """
        if not torch.compiler.is_compiling() and self._policy(weight.data_ptr()) != policy:
            self.set_policy(weight, policy)

    def policy(self, weight: Tensor) -> Policy:
        """What :meth:`set_policy` said of ``weight``."""
        return self._policy(weight.data_ptr())

    def packed(
        self, core: ModuleType, weight: Tensor, layout: Layout, transposed: bool, threads: int
    ) -> Tensor | None:
        """The packed weight (``transposed``: for the gradient of x), or None where there is none.

        Args:
            core: the native module.
            layout: of ``weight``, as the forward pass sees it.
        """
        if layout.rows * layout.cols < SMALLEST:
            return None
        entry = self._entries.get(layout)
        if entry is None or entry.expired():
            self._remember(core, weight, layout)
            return None
        self._renew(entry, layout, _version(weight), core.fingerprint(*layout))
        found = entry.packed.get(transposed)
        if found is not None:
            return found
        entry.uses += 1
        if entry.uses < 2 and not transposed and self._policy(layout.pointer) != "always":
            return None
        return self._pack(core, entry, layout, transposed, threads)

    def converted(
        self, core: ModuleType, weight: Tensor, layout: Layout, dtype: torch.dtype
    ) -> Tensor:
        """``weight`` in ``dtype``, without a gradient: the kept one where the policy allows.

        Args:
            core: the native module.
            layout: of ``weight``.
        """
        policy = self._policy(layout.pointer)
        entry = self._entries.get(layout)
        if entry is None or entry.expired():
            entry = self._remember(core, weight, layout)
        else:
            self._renew(entry, layout, _version(weight), core.fingerprint(*layout))
        found = None if entry is None else entry.converted.get(dtype)
        if found is not None:
            return found
        # neither an inference tensor nor a part of a graph: it outlives both
        with torch.inference_mode(False), torch.no_grad():
            made = weight.to(dtype)
        if policy != "auto":
            self.set_policy(made, policy)
        if entry is not None:
            with self._lock:
                if policy == "always" or self._fits(made.nbytes):
                    self._keep(entry, layout, entry.converted, dtype, made)
        return made

    def bytes(self, weight: Tensor) -> int:
        """What is packed and converted of ``weight`` now, in bytes."""
        return self.bytes_of([weight])

    def bytes_of(self, weights: Iterable[Tensor]) -> int:
        """:meth:`bytes` of all of them together."""
        with self._lock:
            self._sweep()
            return sum(self._bytes(weight.data_ptr()) for weight in weights)

    def clear(self) -> None:
        """Forget every packed weight; policies stay."""
        with self._lock:
            self._entries.clear()
            self._layouts.clear()
            self._total = 0

    # ------------------------------------------------------------------------------- details

    def _policy(self, pointer: int) -> Policy:
        found = self._policies.get(pointer)
        if found is None or found[0].expired():  # type: ignore[no-untyped-call]  # torch's own has no types
            return "auto"
        return found[1]

    def _bytes(self, pointer: int) -> int:
        entries = [self._entries[layout] for layout in self._layouts.get(pointer, ())]
        converted = [t.data_ptr() for e in entries for t in e.converted.values()]
        return sum(e.bytes for e in entries) + sum(map(self._bytes, converted))

    def _remember(self, core: ModuleType, weight: Tensor, layout: Layout) -> _Entry | None:
        if self._policy(layout.pointer) == "never":
            return None
        entry = _Entry(_reference(weight), _version(weight), core.fingerprint(*layout))
        with self._lock:
            self._sweep_sometimes()
            self._drop(layout)
            self._entries[layout] = entry
            self._layouts.setdefault(layout.pointer, set()).add(layout)
        return entry

    def _renew(self, entry: _Entry, layout: Layout, version: int, fingerprint: int) -> None:
        """Drop what was made of the weight as it was before."""
        if entry.version == version and entry.fingerprint == fingerprint:
            return
        with self._lock:
            if self._entries.get(layout) is entry:  # no other thread dropped it
                self._total -= entry.bytes
            entry.packed, entry.converted = {}, {}
            entry.version, entry.fingerprint = version, fingerprint

    def _keep(
        self, entry: _Entry, layout: Layout, among: dict[Any, Tensor], key: object, made: Tensor
    ) -> None:
        """Put ``made`` into one of the entry's two mappings. With the lock held."""
        if self._entries.get(layout) is entry:  # no other thread dropped it
            before = among.get(key)
            self._total += made.nbytes - (0 if before is None else before.nbytes)
        among[key] = made

    def _drop(self, layout: Layout) -> None:
        """The entry of ``layout``, if there is one. With the lock held."""
        entry = self._entries.pop(layout, None)
        if entry is None:
            return
        self._total -= entry.bytes
        alike = self._layouts[layout.pointer]
        alike.discard(layout)
        if not alike:
            del self._layouts[layout.pointer]

    def _forget(self, pointer: int) -> None:
        """The entries of a weight and of what it was converted to. With the lock held."""
        for layout in list(self._layouts.get(pointer, ())):
            converted = [t.data_ptr() for t in self._entries[layout].converted.values()]
            self._drop(layout)
            for other in converted:
                self._forget(other)

    def _fits(self, size: int) -> bool:
        """Whether "auto" may keep as many bytes more. With the lock held."""
        if self._total + size > self.budget:
            self._sweep()
        return self._total + size <= self.budget

    def _pack(
        self, core: ModuleType, entry: _Entry, layout: Layout, transposed: bool, threads: int
    ) -> Tensor | None:
        wanted = layout.transposed if transposed else layout
        size = core.packed_bytes(*wanted)
        with self._lock:
            if self._policy(layout.pointer) == "auto" and not self._fits(size):
                return None
            # not torch.empty under inference mode: the entry outlives the block
            with torch.inference_mode(False):
                memory = torch.empty(size, dtype=torch.uint8)
            core.pack_weight(*wanted, memory.data_ptr(), size, threads)
            self._keep(entry, layout, entry.packed, transposed, memory)
        return memory

    @property
    def budget(self) -> int:
        """Bytes that "auto" may use: a quarter of what was available when this was first asked."""
        if self._budget is None:
            self._budget = int(available() * _SHARE_OF_MEMORY)
        return self._budget

    def _sweep_sometimes(self) -> None:
        """For each new entry or policy: at once while there are few. With the lock held."""
        self._added += 1
        if _LOOKS * self._added >= len(self._entries) + len(self._policies):
            self._sweep()

    def _sweep(self) -> None:
        """Drop what is of weights that are gone. With the lock held."""
        self._added = 0
        # again, since with an entry its converted weights go, which have entries too
        while expired := [x for x, entry in self._entries.items() if entry.expired()]:
            for layout in expired:
                self._drop(layout)
        for pointer, (reference, _) in list(self._policies.items()):
            if reference.expired():  # type: ignore[no-untyped-call]  # torch's own has no types
                del self._policies[pointer]


PACKING = Packing()
"""The one of this process."""


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _reference(weight: Tensor) -> StorageWeakRef:
    return StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]  # torch's own has no types


def check_policy(policy: str) -> None:
    """Raises: ConfigError unless ``policy`` is one of the three words."""
    if policy not in get_args(Policy):
        raise ConfigError(
            f"pack must be one of {', '.join(get_args(Policy))}, got {policy!r}. 'auto' packs "
            "frozen weights while memory allows."
        )
