"""The GPUs that the kernels are compiled for and counted on, whether one is here or not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        name: as its compiler calls it.
        capability: as torch gives it, 10 · major + minor.
        shared: bytes of shared memory (AMD: LDS) that one block may have. The compilers do not
            check it.
        multiprocessors: of the usual card: A100, L40S, H100 SXM, B200, MI300X.
    """

    name: str
    capability: int
    shared: int
    multiprocessors: int

    @property
    def amd(self) -> bool:
        """Whether it is compiled by AMD's backend."""
        return self.name.startswith("gfx")


TARGETS = {
    target.name: target
    for target in (
        # CUDA C++ Programming Guide, technical specifications per compute capability
        Target("sm_80", 80, 163 * 1024, 108),
        Target("sm_89", 89, 99 * 1024, 142),
        Target("sm_90", 90, 227 * 1024, 132),
        Target("sm_100", 100, 227 * 1024, 148),
        # AMD Instinct MI300 CDNA3 ISA reference guide, LDS
        Target("gfx942", 94, 64 * 1024, 304),
    )
}
