"""Where deltaops keeps what it can make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: ``$DELTAOPS_CACHE``, else the platform's own place. Not created here."""
    override = os.environ.get("DELTAOPS_CACHE")
    if override:
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "deltaops"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "deltaops"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaops"
