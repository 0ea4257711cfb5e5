"""Delta methods, one file each; see :mod:`deltaops.methods.base` for what they all are."""

from .adapter import Adapter
from .base import Binding, Delta, Promise, Site
from .bitfit import BitFit
from .combined import PRESETS, Combined, as_delta, parts_of
from .compacter import Compacter
from .ia3 import IA3
from .intrinsic_adapter import IntrinsicAdapter
from .intrinsic_prompt import IntrinsicPrompt
from .ln_tuning import LNTuning
from .lora import LoRA
from .parallel_adapter import ParallelAdapter
from .prefix import Prefix
from .prefix_pool import PrefixPool
from .prompt import Prompt
from .prompt_pool import PromptPool
from .targets import ALL_LINEAR

__all__ = [
    "ALL_LINEAR",
    "IA3",
    "METHODS",
    "PRESETS",
    "Adapter",
    "Binding",
    "BitFit",
    "Combined",
    "Compacter",
    "Delta",
    "IntrinsicAdapter",
    "IntrinsicPrompt",
    "LNTuning",
    "LoRA",
    "ParallelAdapter",
    "Prefix",
    "PrefixPool",
    "Promise",
    "Prompt",
    "PromptPool",
    "Site",
    "as_delta",
    "parts_of",
]

_ALL: tuple[type[Delta], ...] = (
    LoRA, Adapter, Compacter, ParallelAdapter, Prefix, Prompt, IntrinsicPrompt, BitFit, IA3,
    LNTuning, IntrinsicAdapter, PromptPool, PrefixPool,
)  # fmt: skip

METHODS: dict[str, type[Delta]] = {method.kind: method for method in _ALL}
"""By the name that files and the command line use."""
