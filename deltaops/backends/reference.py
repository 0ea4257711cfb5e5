"""Backend ``reference``: eager torch on any device and any floating dtype. The last resort."""

from __future__ import annotations

from deltaops.reference import delta_linear

from .base import DeltaLinearCall


class ReferenceBackend:
    """The specification itself, run as it is written."""

    name = "reference"
    forward = staticmethod(delta_linear.forward)
    backward = staticmethod(delta_linear.backward)

    def unavailable(self) -> str | None:
        """Always there."""
        return None

    def unsupported(self, call: DeltaLinearCall) -> str | None:
        """Takes every floating dtype on every device that torch has."""
        return None
