"""Several deltas on one model.      LoRA(r=8) + Adapter() + BitFit()

Each part is a delta with a name, plans its own places, and has its own parameters. What meets on
one linear layer runs as one op: ranks of branches concatenate, a trained bias is the layer's.
Around the op come, in this order, gains, an adapter beside the sub-layer, adapters after it.
Source: the designs of :data:`PRESETS`, each named there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from deltaops.errors import ConfigError

from .adapter import Adapter
from .base import Delta
from .bitfit import BitFit
from .lora import LoRA
from .parallel_adapter import ParallelAdapter
from .prefix import Prefix
from .targets import ATTENTION_OUTPUT, FEED_FORWARD, FEED_FORWARD_OUTPUT, ROLES, check_flags

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
_WORDS: dict[str, tuple[tuple[type[Delta], str], ...]] = {
    "mlp": ((ParallelAdapter, FEED_FORWARD), (Adapter, FEED_FORWARD_OUTPUT)),
    "attention": ((Adapter, ATTENTION_OUTPUT),),
}
"""Words for places → the role that they are for a method; names of modules to all others."""


@dataclass(frozen=True, repr=False)
class Combined:
    """Deltas with names, in order; also made by ``+``, and what :func:`deltaops.attach` takes.

    Args:
        parts: name → delta, where the names are yours; a sequence of deltas, each named by its
            method ("lora", the next "lora2").
        gated: a learned gate on every part at every module, which sees the input: UniPELT's, for
            encoders; see :mod:`deltaops.modules.gate`.
    Raises: ConfigError.

    ``modules_to_save`` of one part are trained beside all of them, once.
    """

    parts: Mapping[str, Delta] | Iterable[Delta] | tuple[tuple[str, Delta], ...]
    gated: bool = False

    kind: ClassVar[str] = "combined"

    def __post_init__(self) -> None:
        """Check and name the parts."""
        parts = _saved_once(_pairs(self.parts))
        object.__setattr__(self, "parts", parts)  # the dataclass is frozen; this is its start
        check_flags(self, "gated")

    def __repr__(self) -> str:
        """The parts, with the names that are not their methods'."""
        shown = " + ".join(
            repr(delta) if name == delta.kind else f"{delta!r}.named({name!r})"
            for name, delta in self.by_name.items()
        )
        return f"({shown}).with_gates()" if self.gated else shown

    def with_gates(self) -> Combined:
        """The same parts, each through gates."""
        return replace(self, gated=True)

    def __add__(self, other: Delta | Combined) -> Combined:
        """This and one more, or those of another combination."""
        return combined(self, other)

    def __radd__(self, other: Delta) -> Combined:
        """One more, first."""
        return combined(other, self)

    @property
    def by_name(self) -> dict[str, Delta]:
        """Name → delta."""
        return dict(self.parts)  # type: ignore[arg-type]  # pairs once made

    def settings(self) -> list[dict[str, Any]]:
        """Every part with its name, as JSON can hold it; for our own manifest."""
        return [
            {"name": name, "method": delta.kind, "settings": delta.settings()}
            for name, delta in self.by_name.items()
        ]


def combined(*deltas: Delta | Combined) -> Combined:
    """All of ``deltas``; a name that is taken gets the next free number.

    Raises: ConfigError for what is no delta.
    """
    found: dict[str, Delta] = {}
    for delta in deltas:
        if isinstance(delta, Combined):
            pairs = delta.by_name
        elif isinstance(delta, Delta):
            pairs = {delta.kind: delta}
        else:
            raise ConfigError(
                "Combined: expected deltas such as deltaops.LoRA(r=16), got "
                f"{type(delta).__name__}."
            )
        for name, part in pairs.items():
            found[_free(name, found)] = part
    return Combined(found, any(isinstance(one, Combined) and one.gated for one in deltas))


def parts_of(delta: Delta | Combined) -> dict[str, Delta]:
    """Name → delta; a single delta has no name."""
    return delta.by_name if isinstance(delta, Combined) else {"": delta}


def as_delta(wish: Any) -> Delta | Combined:
    """What ``attach`` was asked for, as deltas.

    Args:
        wish: a delta or several joined by ``+``; a sequence of such; a mapping from places to
            deltas, ``{"query|value": LoRA(), "mlp": ParallelAdapter(512)}``, whose keys are roles,
            "mlp", "attention" or names of modules, several with "|" between them, or a regular
            expression for whole paths; a name in :data:`PRESETS`.
    Raises: ConfigError.
    """
    if isinstance(wish, (Delta, Combined)):
        return wish
    if isinstance(wish, str):
        return preset(wish)
    if isinstance(wish, Mapping):
        return combined(*(_at(place, delta) for place, delta in wish.items()))
    if isinstance(wish, (list, tuple)) and wish:
        return combined(*wish)
    raise ConfigError(
        f"attach: expected a delta such as deltaops.LoRA(r=16), got {type(wish).__name__}. Join "
        "several with +, or pass a list or a mapping from places to deltas."
    )


def preset(name: str) -> Combined:
    """The combination in :data:`PRESETS`. Raises: ConfigError for an unknown name."""
    known = {key.lower(): make for key, make in PRESETS.items()}
    make = known.get(name.strip().lower())
    if make is None:
        raise ConfigError(
            f"attach: {name!r} names no combination; there are {', '.join(PRESETS)}. Pass deltas "
            "such as LoRA(r=8) + BitFit()."
        )
    return make()


PRESETS: dict[str, Callable[[], Combined]] = {
    # He et al. 2022 (arXiv 2110.04366), §4.6: l = 30 at attentions, half of the width beside
    # feed-forwards, s = 4; the prefix by an MLP of 512, as their code has it
    "MAM": lambda: combined(
        Prefix(num_virtual_tokens=30, reparameterised=True, encoder_hidden_size=512),
        ParallelAdapter(),
    ),
    # Mao et al. 2022 (arXiv 2110.07577), §4.1
    "UniPELT": lambda: combined(
        Prefix(num_virtual_tokens=10), Adapter(style="pfeiffer", reduction_factor=16), _on_qv()
    ).with_gates(),
    "LoRA+BitFit": lambda: combined(LoRA(), BitFit()),
    "all": lambda: combined(LoRA(), Adapter(), Prefix(), BitFit()),
}
"""Combinations by name; any case of letters."""


def _on_qv() -> LoRA:
    """LoRA on queries and values by the names that transformers' models have for them."""
    names = "q_proj|v_proj|q_lin|v_lin|query|value|q|v|c_attn|qkv|query_key_value"
    return LoRA(r=8, alpha=16, target_modules=rf".*\.({names})")


def _pairs(parts: Any) -> tuple[tuple[str, Delta], ...]:
    """Checked names and deltas."""
    if isinstance(parts, Mapping):
        found = tuple(parts.items())
    else:
        listed = tuple(parts) if isinstance(parts, Iterable) else (parts,)
        named = all(isinstance(one, tuple) and len(one) == 2 for one in listed)
        found = listed if named else tuple(combined(*listed).by_name.items())
    if not found:
        raise ConfigError(
            "Combined: expected at least one delta, got none. Pass [LoRA(), BitFit()]."
        )
    for name, delta in found:
        if not isinstance(delta, Delta):
            raise ConfigError(
                f"Combined: the part {name!r} must be a delta such as LoRA(r=16), got "
                f"{type(delta).__name__}."
            )
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"Combined: {name!r} cannot name a part: letters, digits and - only, starting with "
                "a letter. Try 'lora'. (Places of deltas go to attach as a mapping, as they are.)"
            )
    if len({name for name, _ in found}) < len(found):
        names = ", ".join(name for name, _ in found)
        raise ConfigError(f"Combined: parts must have distinct names, got {names}. Rename one.")
    return found


def _saved_once(parts: tuple[tuple[str, Delta], ...]) -> tuple[tuple[str, Delta], ...]:
    """Every part with the modules that any of them trains whole."""
    saved = tuple(dict.fromkeys(name for _, delta in parts for name in delta.modules_to_save))
    return tuple(
        (name, delta if delta.modules_to_save == saved else _with(delta, modules_to_save=saved))
        for name, delta in parts
    )


def _free(name: str, taken: Mapping[str, Delta]) -> str:
    """``name``, or with the first number from 2 on that is free."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name}{number}", number + 1
    return found


def _at(place: Any, delta: Any) -> Delta | Combined:
    """``delta`` with ``place`` for its targets."""
    if not isinstance(delta, Delta) or not isinstance(place, str) or not place:
        raise ConfigError(
            "attach: expected a delta for each place, as {'query|value': LoRA(r=8)}, got "
            f"{place!r}: {type(delta).__name__}."
        )
    (default,) = (f.default for f in fields(delta) if f.name == "target_modules")  # type: ignore[arg-type]  # every method is a dataclass
    if _with(delta, target_modules=default).target_modules != delta.target_modules:
        raise ConfigError(
            f"attach: {place!r} says where {delta!r} goes, and so does its own target_modules. "
            "Leave one of them out."
        )
    names = place.split("|")
    if not all(re.fullmatch(r"[\w.-]+", name) for name in names):
        return _with(delta, target_modules=place)
    return _with(delta, target_modules=[_role(name, delta) for name in names])


def _role(name: str, delta: Delta) -> str:
    if name in ROLES and not (name in _WORDS and isinstance(delta, Adapter)):
        return name
    return next((role for kind, role in _WORDS.get(name, ()) if isinstance(delta, kind)), name)


def _with(delta: Delta, **changed: Any) -> Delta:
    found: Delta = replace(delta, **changed)  # type: ignore[type-var]  # every method is a dataclass
    return found
