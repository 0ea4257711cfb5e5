"""Bytes held for the backward pass, where the measuring code looks for it."""

from __future__ import annotations

from deltaops.strategy.held import saved_bytes

__all__ = ["saved_bytes"]
