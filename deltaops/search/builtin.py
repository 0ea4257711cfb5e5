"""The spaces that every search has: ``small``, ``wide`` and ``autopeft``."""

from __future__ import annotations

from itertools import combinations
from typing import Any

_RATE = {"low": 3e-4, "high": 1e-2, "log": True}
_FAST = {"low": 1e-3, "high": 5e-2, "log": True}
_SCALE = {"choices": [1, 2, 4], "of": "r"}
_SIZES = [8, 16, 32, 64]

SMALL: dict[str, Any] = {
    "deltas": {
        "lora": {"r": [4, 8, 16], "alpha": _SCALE, "dropout": [0.0, 0.1], "lr": _RATE},
        "pfeiffer": {"delta": "adapter:style=pfeiffer", "size": [16, 32, 64], "lr": _RATE},
        "bitfit": {"lr": _FAST},
    },
    "batch_size": [8, 16, 32],
}
"""Three methods that always work; for a first look, of 20 to 30 trials."""

WIDE: dict[str, Any] = {
    "deltas": {
        "lora": {
            "r": [2, 4, 8, 16, 32, 64],
            "alpha": _SCALE,
            "use_rslora": [False, True],
            "use_dora": [False, True],
            # DoRA trains lengths that a dropped input would not reach
            "dropout": {"low": 0.0, "high": 0.2, "when": {"use_dora": [False]}},
            "target_modules": [
                "all-linear",
                "key-value",
                "attention-output",
                "feed-forward-output",
            ],
            "lr_ratio": [1.0, 4.0, 16.0],
            "lr": _RATE,
        },
        "houlsby": {"delta": "adapter:style=houlsby", "size": _SIZES, "lr": _RATE},
        "pfeiffer": {"delta": "adapter:style=pfeiffer", "size": _SIZES, "lr": _RATE},
        "parallel": {"size": _SIZES, "scaling": [1.0, 2.0, 4.0], "lr": _RATE},
        "compacter": {"size": _SIZES, "lr": _FAST},
        "prefix": {"num_virtual_tokens": {"low": 4, "high": 32, "log": True}, "lr": _FAST},
        "bitfit": {"lr": _FAST},
        "ia3": {"lr": _FAST},
        "lora+bitfit": {
            "lora.r": [4, 8, 16, 32],
            "lora.alpha": {"choices": [1, 2, 4], "of": "lora.r"},
            "lora.lr": _RATE,
            "bitfit.lr": _FAST,
        },
    },
    "batch_size": [8, 16, 32],
    "schedule": ["linear", "cosine", "constant"],
    "warmup": {"low": 0.0, "high": 0.2},
}
"""Methods, places, sizes and schedules; of 100 trials or more."""

_PARTS = {
    "adapter": ("adapter:style=pfeiffer", "size", _SIZES),
    "parallel": ("parallel", "size", _SIZES),
    "prefix": ("prefix", "num_virtual_tokens", [4, 8, 16, 32]),
}


def _together(names: tuple[str, ...]) -> dict[str, Any]:
    """One configuration's kinds: a size for each, and the layers that all of them are in."""
    found: dict[str, Any] = {"delta": "+".join(_PARTS[name][0] for name in names)}
    for name in names:
        _, option, sizes = _PARTS[name]
        found[option if len(names) == 1 else f"{name}.{option}"] = sizes
    return found | {"layers_to_transform": {"subset": "layers"}, "lr": _RATE}


AUTOPEFT: dict[str, Any] = {
    "deltas": {
        "+".join(names): _together(names)
        for count in (1, 2, 3)
        for names in combinations(_PARTS, count)
    },
    "batch_size": [16, 32],
}
"""Serial adapters, parallel adapters and prefixes, each of its size or left out, in any set of
layers (Zhou et al. 2024, arXiv 2301.12132, §3.1)."""

SPACES = {"small": SMALL, "wide": WIDE, "autopeft": AUTOPEFT}
