"""Search over deltas and their settings, on one frozen model.

    space → study ⇄ journal
              ↓
    engine → trainer | pack → report

Imports Optuna, which ``pip install deltaops[search]`` brings; ``import deltaops`` does not.
"""

from __future__ import annotations

from deltaops.errors import ConfigError

try:
    import optuna as _optuna  # noqa: F401  # before our own files, for one clear message
except ImportError as error:
    raise ConfigError(
        f"deltaops search needs Optuna ({error}). pip install 'deltaops[search]'."
    ) from error

from .engine import Found, Watch, resume, search
from .settings import Settings
from .space import Space, load_space
from .study import Study

__all__ = ["Found", "Settings", "Space", "Study", "Watch", "load_space", "resume", "search"]
