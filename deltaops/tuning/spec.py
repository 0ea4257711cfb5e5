"""``--delta lora:r=16,alpha=32`` → a delta's configuration, by the fields of its class.

spec    = part ["+" part …] | the name of a preset, such as MAM   (several on one model)
part    = method [":" option "=" value {"," option "=" value}]
value   = number | true | false | text
        | item "+" item …               (a list)
        | name ":" number "+" …         (a mapping, such as rank_pattern)

A "+" begins a part where the name of a method follows it, and else is inside of a list.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from deltaops.errors import ConfigError


def methods() -> dict[str, type[Any]]:
    """Name on the command line → configuration class."""
    from deltaops.methods import METHODS

    return dict(METHODS)


def parse_delta(spec: str, **defaults: Any) -> Any:
    """The configuration that ``spec`` describes.

    Args:
        spec: such as ``lora:r=16,alpha=32,target_modules=q_proj+v_proj``, or ``lora:r=8+bitfit``.
            A list without a value, ``target_modules=``, is empty.
        defaults: fields to set where ``spec`` does not name them.
    Raises: ConfigError for an unknown method, option or value, with the nearest names.
    """
    from deltaops.methods.combined import Combined, combined, preset

    if spec.strip().lower() in {name.lower() for name in _alone()}:
        found = preset(spec)
        parts: dict[str, Any] = dict(found.by_name)
        parts = {name: dataclasses.replace(part, **defaults) for name, part in parts.items()}
        return Combined(parts, found.gated)
    parts_of_spec = _parts(spec)
    if len(parts_of_spec) > 1:
        return combined(*(_parse_one(part, defaults) for part in parts_of_spec))
    return _parse_one(spec, defaults)


def _alone() -> list[str]:
    """Names of presets; of those with a "+" the parts are methods, which say the same."""
    from deltaops.methods.combined import PRESETS

    return [name for name in PRESETS if "+" not in name]


def _parts(spec: str) -> list[str]:
    """``spec`` split where a method's name follows a "+"."""
    found: list[str] = []
    known = methods()
    for piece in spec.split("+"):
        if not found or piece.partition(":")[0].strip().lower() in known:
            found.append(piece)
        else:
            found[-1] += f"+{piece}"
    return found


def _parse_one(spec: str, defaults: dict[str, Any]) -> Any:

    name, _, rest = spec.partition(":")
    known = methods()
    if name.strip().lower() not in known:
        raise ConfigError(
            f"--delta {spec!r}: no method {name!r}{_nearest(name, known)}. "
            f"Known: {', '.join(known)}; and by themselves {', '.join(_alone())}."
        )
    config = known[name.strip().lower()]
    fields = {f.name: f for f in dataclasses.fields(config) if f.init}
    values = dict(defaults)
    for part in filter(None, (p.strip() for p in rest.split(","))):
        option, equals, value = (p.strip() for p in part.partition("="))
        kinds = str(fields[option].type).split("|") if option in fields else []
        if equals and not value and any(kind.strip().startswith("tuple") for kind in kinds):
            values[option] = []
            continue
        if not equals or not value:
            raise ConfigError(f"--delta {spec!r}: expected option=value, got {part!r}.")
        if option not in fields:
            raise ConfigError(
                f"--delta {spec!r}: {name} has no option {option!r}{_nearest(option, fields)}. "
                f"Known: {', '.join(fields)}."
            )
        values[option] = _value(value, str(fields[option].type), f"--delta {spec!r}: {option}")
    return config(**values)


def _value(text: str, annotation: str, subject: str) -> Any:
    """``text`` as the field's annotation wants it; annotations are strings by PEP 563."""
    kinds = {kind.strip() for kind in annotation.split("|")}
    if text.lower() in {"none", "null"} and "None" in kinds:
        return None
    if "bool" in kinds and text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind, convert in (("int", int), ("float", float)):
        if kind in kinds:
            try:
                return convert(text)
            except ValueError:
                continue
    parts = [part for part in text.split("+") if part]
    if any(kind.startswith("Mapping") for kind in kinds):
        pairs = [part.rpartition(":") for part in parts]
        return {key: _number(value, subject) for key, _, value in pairs}
    is_list = any(k.startswith(("Sequence", "list", "tuple", "Iterable")) for k in kinds)
    if is_list and ("+" in text or "str" not in kinds):
        whole = any(kind.startswith("tuple[int") for kind in kinds)
        return [_number(part, subject) for part in parts] if whole else parts
    if "str" in kinds:
        return text
    raise ConfigError(f"{subject} must be {annotation}, got {text!r}.")


def _number(text: str, subject: str) -> float:
    """An integer where ``text`` is one."""
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    raise ConfigError(
        f"{subject} must hold numbers, got {text!r}. Write 0+1, or q_proj:16+k_proj:8."
    )


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
