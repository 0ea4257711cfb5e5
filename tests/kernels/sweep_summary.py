"""What every_variant.py says of a whole run, in few lines: counts by kernel and target.

One JSON for all targets, each run replacing its own, and the same as tables beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import triton

from deltaops import kernels
from deltaops.backends.triton.targets import TARGETS
from deltaops.files import write_atomically, write_json

Found = dict[str, Any]
COUNTS = ("variants", "left", "refused", "spilled", "worst_shared", "matrix_cores")
HEADS = (
    "target", "compiled", "left", "refused", "spilled", "most shared memory, of", "Triton",
    "sources", "command",
)  # fmt: skip


def sources() -> str:
    """A digest of all kernels and of what chooses their configurations."""
    digest = sha256()
    for path in sorted(Path(kernels.__path__[0]).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def of_target(
    name: str,
    found: Iterable[tuple[Found, Sequence[str]]],
    left: Iterable[str],
    covered: dict[str, int],
) -> dict[str, Any]:
    """Of one target: ``found`` pairs what the compiler said of a variant with what the gate refuses
    of it; ``left`` are the kernels of what was not compiled; ``covered`` are calls by area."""
    by_kernel: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    for variant, refused in found:
        of_kernel = by_kernel.setdefault(
            variant["kernel"],
            dict.fromkeys(COUNTS, 0),
        )
        of_kernel["variants"] += 1
        of_kernel["refused"] += bool(refused)
        of_kernel["spilled"] += bool(variant["spills"])
        of_kernel["worst_shared"] = max(of_kernel["worst_shared"], variant["shared"])
        of_kernel["matrix_cores"] += variant["matrix_cores"]
        problems += refused
    for kernel in left:
        by_kernel.setdefault(kernel, dict.fromkeys(COUNTS, 0))["left"] += 1
    return {
        "command": f"python -P tests/kernels/every_variant.py {name} --out benchmarks/results",
        "triton": triton.__version__,
        "kernel_sources": sources(),
        "shared_limit": TARGETS[name].shared,
        "calls": covered,
        "kernels": dict(sorted(by_kernel.items())),
        "problems": sorted(problems),
    }


def write(folder: Path, name: str, summary: dict[str, Any]) -> None:
    """Into the JSON of ``folder``, beside what it has of other targets, and its tables again."""
    path = folder / "triton-variants.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known |= {name: summary}
    known = {target: known[target] for target in TARGETS if target in known}
    write_json(path, known)
    page = tables(known)
    write_atomically(path.with_suffix(".md"), lambda part: part.write_text(page, encoding="utf-8"))


def tables(known: dict[str, dict[str, Any]]) -> str:
    """A page of all targets."""
    without = [target for target in TARGETS if target not in known]
    lines = [
        "# Every variant of the Triton kernels, compiled ahead of time",
        "",
        "Written by `tests/kernels/every_variant.py`; nothing ran on a GPU. A cell: variants, the",
        "most bytes of shared memory, and, where there are any, how many the gate refuses and how",
        "many were left when the time was over. The command compiles those: it goes on from what",
        "`build/every-variant` has, and compiles all where that is empty.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{' --- |' * len(HEADS)}",
    ]
    for target, one in known.items():
        rows = one["kernels"].values()
        sums = [sum(r[k] for r in rows) for k in ("variants", "left", "refused", "spilled")]
        shared = f"{max(r['worst_shared'] for r in rows)}, {one['shared_limit']}"
        facts = *sums, shared, one["triton"], one["kernel_sources"]
        lines.append(f"| {target} | {' | '.join(map(str, facts))} | `{one['command']}` |")
    if without:
        names = ", ".join(without)
        told = f"No run for {names}: of these the lists of the tests alone are compiled."
        lines += ["", told]
    lines += ["", f"| kernel | {' | '.join(known)} |", f"| --- |{' --- |' * len(known)}"]
    for kernel in sorted({kernel for one in known.values() for kernel in one["kernels"]}):
        cells = [_cell(one["kernels"].get(kernel)) for one in known.values()]
        lines.append(f"| {kernel.strip('_')} | {' | '.join(cells)} |")
    for target, one in known.items():
        if one["problems"]:
            lines += ["", f"Refused for {target}:", "", *(f"- {line}" for line in one["problems"])]
    return "\n".join(lines) + "\n"


def _cell(of_kernel: dict[str, int] | None) -> str:
    if of_kernel is None:
        return "—"
    more = "".join(f", {of_kernel[k]} {k}" for k in ("refused", "left") if of_kernel[k])
    return f"{of_kernel['variants']}, {of_kernel['worst_shared']}{more}"
