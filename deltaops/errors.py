"""Every error that deltaops raises on purpose, each also an instance of Python's closest built-in.

A message names the subject, what was expected, what was found and what to do about it.
"""

from __future__ import annotations


class DeltaopsError(Exception):
    """Base of all of them: ``except deltaops.errors.DeltaopsError`` catches the lot."""


class ShapeError(DeltaopsError, ValueError):
    """Tensors whose shapes do not fit together."""


class DtypeError(DeltaopsError, TypeError):
    """A tensor of a dtype that the operation cannot take."""


class LayoutError(DeltaopsError, ValueError):
    """Memory that the operation cannot use as it lies: strided, misaligned, read-only, shared."""


class DeviceError(DeltaopsError, ValueError):
    """Tensors on different devices, or on one that cannot run the operation."""


class GradientError(DeltaopsError, RuntimeError):
    """A gradient that is not defined here: of a frozen weight, or of second order."""


class NoBackendError(DeltaopsError, RuntimeError):
    """No backend can run the call; the message lists each with its reason."""


class TargetError(DeltaopsError, ValueError):
    """Module names that match nothing, or nothing that the delta can bind to."""


class AttachError(DeltaopsError, RuntimeError):
    """A change to a model that its present state does not allow (attached twice, merged, …)."""


class ConfigError(DeltaopsError, ValueError):
    """A delta's configuration with a value out of range, or a combination that means nothing."""


class CheckpointError(DeltaopsError, ValueError):
    """A checkpoint that is damaged, foreign, unsafe, or does not fit the model."""


class DataError(DeltaopsError, ValueError):
    """A data file with broken lines, missing columns, or nothing in it."""


class BuildError(DeltaopsError, RuntimeError):
    """A compiled part that is missing or does not fit this package."""
