"""Parts by name, for ``deltaops tune --controller`` and `Controller(["monitor:every=5"])`.

spec    = part ["+" part …]
part    = name [":" option "=" value {"," option "=" value}]

A "+" begins a part where a name of one follows it. Options are the arguments of what makes the
part. Others register theirs: ``PARTS["mine"] = Mine``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from deltaops.errors import ConfigError

from .budget import Importance
from .monitor import Monitor
from .parts import Part
from .presets import DisableUseless, FreezeDead, SwitchOnPlateau, WarmIn

PARTS: dict[str, Callable[..., Part]] = {
    "monitor": Monitor,
    "freeze-dead": FreezeDead,
    "disable-useless": DisableUseless,
    "switch-on-plateau": SwitchOnPlateau,
    "warm-in": WarmIn,
    "importance": Importance,
}
"""Name → what makes the part."""

_CONVERT: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}


def parse_parts(spec: str) -> list[Part]:
    """The parts that ``spec`` describes.

    Args:
        spec: such as ``monitor:every=5+freeze-dead:share=0.02``.
    Raises: ConfigError for an unknown name, option or value, with the nearest.
    """
    pieces: list[str] = []
    for piece in spec.split("+"):
        if not pieces or piece.partition(":")[0].strip() in PARTS:
            pieces.append(piece)
        else:
            pieces[-1] += f"+{piece}"
    return [_part(piece.strip(), spec) for piece in pieces]


def _part(piece: str, spec: str) -> Part:
    name, _, rest = (text.strip() for text in piece.partition(":"))
    if name not in PARTS:
        raise ConfigError(
            f"--controller {spec!r}: no part {name!r}{_nearest(name, PARTS)}. "
            f"Known: {', '.join(PARTS)}."
        )
    known = inspect.signature(PARTS[name]).parameters
    values: dict[str, Any] = {}
    for pair in filter(None, (text.strip() for text in rest.split(","))):
        option, equals, text = (one.strip() for one in pair.partition("="))
        if not equals or not text:
            raise ConfigError(f"--controller {spec!r}: expected option=value, got {pair!r}.")
        if option not in known:
            raise ConfigError(
                f"--controller {spec!r}: {name} has no option {option!r}"
                f"{_nearest(option, known)}. Known: {', '.join(known)}."
            )
        subject = f"--controller {spec!r}: {option}"
        values[option] = _value(text, str(known[option].annotation), subject)
    lacking = [n for n, p in known.items() if p.default is p.empty and n not in values]
    if lacking:
        raise ConfigError(f"--controller {spec!r}: {name} needs {lacking[0]}=.")
    return PARTS[name](**values)


def _value(text: str, annotation: str, subject: str) -> Any:
    """``text`` as the annotation, a string by PEP 563, wants it."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if "None" in kinds and text.lower() == "none":
        return None
    if "bool" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in kinds:
        if kind in _CONVERT:
            try:
                return _CONVERT[kind](text)
            except ValueError:
                continue
    raise ConfigError(f"{subject} must be {annotation}, got {text!r}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
