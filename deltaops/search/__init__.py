"""Search over deltas and their settings, on one frozen model.

    space → study ⇄ journal
              ↓
    engine → trainer | pack → report

Imports Optuna, which ``pip install deltaops[search]`` brings; ``import deltaops`` does not.
"""

from __future__ import annotations

from .engine import Found, Watch, resume, search
from .settings import Settings
from .space import Space, load_space
from .study import Study

__all__ = ["Found", "Settings", "Space", "Study", "Watch", "load_space", "resume", "search"]
