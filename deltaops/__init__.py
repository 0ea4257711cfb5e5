"""deltaops: a delta should cost nothing.

    import deltaops
    handle = deltaops.attach(model, deltaops.LoRA(r=16, alpha=32))   # our API
    deltaops.accelerate(peft_model)                                  # or inside a PEFT model

Importing this loads torch and nothing heavier; each name below is loaded when first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Not lazy: the folder backends/ would otherwise take the function's name once it is imported.
from .dispatch import backends

if TYPE_CHECKING:
    from . import errors, jax, memory, numpy, ops, search, strategy
    from .bindings.c import get_cmake_dir, get_include, get_library, get_pkgconfig_dir
    from .methods import (
        IA3,
        Adapter,
        BitFit,
        Combined,
        Compacter,
        IntrinsicAdapter,
        IntrinsicPrompt,
        LNTuning,
        LoRA,
        ParallelAdapter,
        Prefix,
        PrefixPool,
        Prompt,
        PromptPool,
    )
    from .ops import explain
    from .strategy.choices import auxiliary_loss, choices
    from .surgery import accelerate, adapters_by_sample, attach, load, report

__all__ = [
    "IA3",
    "Adapter",
    "BitFit",
    "Combined",
    "Compacter",
    "IntrinsicAdapter",
    "IntrinsicPrompt",
    "LNTuning",
    "LoRA",
    "ParallelAdapter",
    "Prefix",
    "PrefixPool",
    "Prompt",
    "PromptPool",
    "__version__",
    "accelerate",
    "adapters_by_sample",
    "attach",
    "auxiliary_loss",
    "backends",
    "choices",
    "errors",
    "explain",
    "get_cmake_dir",
    "get_include",
    "get_library",
    "get_pkgconfig_dir",
    "jax",
    "load",
    "memory",
    "numpy",
    "ops",
    "report",
    "search",
    "strategy",
]

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "methods",
    "BitFit": "methods",
    "Combined": "methods",
    "Compacter": "methods",
    "IA3": "methods",
    "IntrinsicAdapter": "methods",
    "IntrinsicPrompt": "methods",
    "LNTuning": "methods",
    "LoRA": "methods",
    "ParallelAdapter": "methods",
    "Prefix": "methods",
    "PrefixPool": "methods",
    "Prompt": "methods",
    "PromptPool": "methods",
    "accelerate": "surgery",
    "adapters_by_sample": "surgery",
    "attach": "surgery",
    "auxiliary_loss": "strategy.choices",
    "choices": "strategy.choices",
    "errors": "",
    "explain": "ops",
    "get_cmake_dir": "bindings.c",
    "get_include": "bindings.c",
    "get_library": "bindings.c",
    "get_pkgconfig_dir": "bindings.c",
    "jax": "",
    "load": "surgery",
    "memory": "",
    "numpy": "",
    "ops": "",
    "report": "surgery",
    "search": "",
    "strategy": "",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltaops' has no attribute {name!r}")
    home = _HOMES[name]
    if not home:
        return importlib.import_module(f"deltaops.{name}")
    return getattr(importlib.import_module(f"deltaops.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# In a source checkout kernels/ lies beside this package; installed, it is deltaops/kernels.
_here = Path(__file__).resolve().parent
if (
    not (_here / "kernels").exists()
    and (_here.parent / "kernels" / "__init__.py").exists()
    and (_here.parent / "setup.py").exists()
):
    __path__.append(str(_here.parent))
