"""What a run of :mod:`.gpu` measured beside the project's goals: a page and a picture.

    python3 -P -m deltaops.measure.gpu_report benchmarks/results/gpu-….json

A goal is a bound on one ratio of medians of one run, less what the plan grants the case, over the
cases that it names; it is met where the worst of them is. The page says what is missed by how much,
and what was not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaops.files import write_atomically

from .gpu import CASE, OPS
from .gpu_attention import JOINED
from .gpu_subject import COMPILED, DEFAULT, FROZEN, LORA_FUSION, OURS, PEFT, UNSLOTH
from .report import markdown_table

Result = Mapping[str, Any]
SQUARE, WIDE, DEEP = (4096, 4096), (14336, 4096), (4096, 14336)
"""Outputs and inputs of layers."""
FEW = 16


@dataclass(frozen=True)
class Goal:
    """``bound`` on the median of ``above`` over that of ``below``: the most where ``most``."""

    what: str
    above: str
    below: str
    bound: float
    most: bool
    takes: Callable[[Result], bool]
    next: str = ""
    """What is to be tried where it is missed."""
    granted: Callable[[Result], float] = lambda result: 0.0
    """What of a ratio is taken off first."""

    def values(self, results: Sequence[Result]) -> dict[str, float]:
        """Case → its ratio, of those measured."""
        found = {}
        for result in filter(self.takes, results):
            seconds = result["seconds"]
            if self.above in seconds and self.below in seconds:
                ratio = seconds[self.above]["median"] / seconds[self.below]["median"]
                found[title(result)] = ratio - self.granted(result)
        return found

    def met(self, ratio: float) -> bool:
        """Whether a ratio of this size is good enough."""
        return ratio <= self.bound if self.most else ratio >= self.bound


def _layer(
    rows: Callable[[int], bool], shapes: Sequence[tuple[int, int]], rank: int, dropout: float = 0.0
) -> Callable[[Result], bool]:
    def takes(result: Result) -> bool:
        if result["op"] != OPS[0]:
            return False
        m, *layer = result["shape"]
        settings = (result["rank"], result["dropout"]) == (rank, dropout)
        return rows(m) and tuple(layer) in shapes and settings

    return takes


def _op(name: str, dropout: float = 0.0) -> Callable[[Result], bool]:
    return lambda result: result["op"] == name and result.get("dropout", 0.0) == dropout


def _many(m: int) -> bool:
    return m == 8192


def _few(m: int) -> bool:
    return m <= FEW


def _prefix_share(result: Result) -> float:
    """Products with a prefix over those of causal attention without one: each query sees all of
    the prefix, and half of the other keys."""
    length: int = result["shape"][3]
    return float(result["prefix"] / ((length + 1) / 2))


_TRAINED = _layer(_many, [SQUARE], 16)
_DROPPED = _layer(_many, [SQUARE], 16, 0.1)

_DY = "dS is made in a pass over dy before dx; in the launch of dx, as S is in that of y"
_RANKS = (
    "dS and dB are a pass over dy each, since one for both takes longer; dS in the launch of dx"
)
_MASK = (
    "x's mask is made three times, for S, dA and dx, and S and dA go apart from the products: in "
    "their launches, as without a mask. Made once, as bits for dx or for dA, it took as long, and "
    "so it did where idle warps of dx's launch made it ahead: what they calculate slows the tensor "
    "cores"
)
_GROUP = "dS and dB go layer by layer, and S before y: in the launches of dx and y"
_PARTS = "each program adds up S's parts, and A and B are read beside the weight"
_PREFIX = (
    "merging the prefix is a pass over q and y, its gradients one over q, y, dy and dq, and "
    "neither runs at a copy's rate: programs that stay, and load the next rows meanwhile"
)

GOALS = (
    Goal("LoRA r=16, 8192 × 4096²", OURS, FROZEN, 1.07, True, _TRAINED, _DY),
    Goal("LoRA r=64, 8192 × 4096²", OURS, FROZEN, 1.09, True, _layer(_many, [SQUARE], 64), _RANKS),
    Goal(
        *("LoRA r=16, layers of 14336", OURS, FROZEN, 1.045, True),
        *(_layer(_many, [WIDE, DEEP], 16), _DY),
    ),
    Goal(
        *("LoRA r=64, layers of 14336", OURS, FROZEN, 1.055, True),
        *(_layer(_many, [WIDE, DEEP], 64), _DY),
    ),
    Goal("LoRA r=16, dropout 0.1", OURS, FROZEN, 1.09, True, _DROPPED, _MASK),
    Goal("q/k/v and gate/up, as frozen autograd", OURS, FROZEN, 1.0, True, _op(OPS[1]), _GROUP),
    Goal("decoding, 4096², r=16", OURS, FROZEN, 1.1, True, _layer(_few, [SQUARE], 16), _PARTS),
    Goal("decoding, 4096², r=64", OURS, FROZEN, 1.1, True, _layer(_few, [SQUARE], 64), _PARTS),
    Goal("decoding, 14336, r=16", OURS, FROZEN, 1.05, True, _layer(_few, [WIDE, DEEP], 16), _PARTS),
    Goal("decoding, 14336, r=64", OURS, FROZEN, 1.05, True, _layer(_few, [WIDE, DEEP], 64), _PARTS),
    Goal("PEFT, eager, over ours", PEFT, OURS, 1.28, False, _TRAINED),
    Goal("the same with dropout 0.1", PEFT, OURS, 1.38, False, _DROPPED, _MASK),
    Goal("PEFT's default, dropout 0.1, over ours", DEFAULT, OURS, 1.65, False, _DROPPED),
    Goal("PEFT compiled over ours", COMPILED, OURS, 1.2, False, _TRAINED),
    Goal("Unsloth's arithmetic over ours", UNSLOTH, OURS, 1.15, False, _TRAINED),
    Goal("LoRAFusion's plan, dropout 0.1, over ours", LORA_FUSION, OURS, 1.07, False, _DROPPED),
    Goal(
        *("prefix attention, less its share of products", OURS, FROZEN, 1.05, True, _op(OPS[2])),
        *(_PREFIX, _prefix_share),
    ),
    Goal("joined and masked over ours", JOINED, OURS, 1.3, False, _op(OPS[2])),
)
"""The musts of the project's plan for an H200 that this run has cases for. To prefix attention the
plan grants the prefix's own share of the products."""


def results_of(content: Mapping[str, Any]) -> list[Result]:
    """All cases of a run that have times, each with its op."""
    listed = [{**result, "op": op} for op in OPS for result in content[op]]
    return [result for result in listed if result["seconds"]]


def title(result: Result) -> str:
    """Shape and settings in short."""
    parts = ["+".join(map(str, p)) if isinstance(p, list) else str(p) for p in result["shape"]]
    if "prefix" in result:
        return f"{'×'.join(parts)} P={result['prefix']}"
    dropout = f" p={result['dropout']:g}" if result["dropout"] else ""
    return f"{'×'.join(parts)} r={result['rank']}{dropout}"


def markdown(content: Mapping[str, Any], picture: str) -> str:
    """The page."""
    machine, results = content["machine"], results_of(content)
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    best = machine["ceilings"]
    lines = [
        f"# deltaops on {machine['gpu']}",
        "",
        f"{machine['date'][:10]}, {versions}. In this run the library's product of 8192³ does "
        f"{best['operations_per_second'] / 1e12:.0f} TFLOP/s, a copy moves "
        f"{best['copy_bytes_per_second'] / 1e12:.2f} TB/s. Written by `python3 -P -m "
        "deltaops.measure.gpu_report` from the JSON of the same name, which `python3 -P -m "
        "deltaops.measure.gpu` measured: CUDA graphs, in turns, medians, each case held to float64 "
        "first. bf16.",
        "",
        f"![Time over the frozen layer's, for each case]({picture})",
        "",
        "## Goals",
        "",
        *_goals(results),
        "",
        "## All cases",
        "",
        "Microseconds, forward and backward from 17 rows on. Ours over frozen: 1 is a delta that "
        "costs nothing. The others are theirs over ours.",
        "",
        *_cases(results),
    ]
    plans: dict[str, list[str]] = {}
    for result in results:
        if result["plan"]:
            plans.setdefault(result["plan"].partition(":")[0], []).append(title(result))
    lines += ["", "## Plans", "", *(f"- {plan}: {'; '.join(c)}" for plan, c in plans.items())]
    left = [
        f"- {title({**one, 'op': op})}: {one['left_out'][CASE]}"
        for op in OPS
        for one in content[op]
        if not one["seconds"]
    ]
    if content["not_reached"]:
        left.append(f"- the time was over before {'; '.join(content['not_reached'])}")
    return "\n".join([*lines, *(["", "## Not measured", "", *left] if left else [])]) + "\n"


def _goals(results: Sequence[Result]) -> list[str]:
    rows = []
    for goal in GOALS:
        values = goal.values(results)
        if not values:
            rows.append((goal.what, _bound(goal), "—", "not measured"))
            continue
        worst = max(values, key=lambda case: values[case] * (1 if goal.most else -1))
        said = "met" if goal.met(values[worst]) else f"missed at {worst}. {goal.next}".strip()
        span = sorted({f"{value:.3f}" for value in values.values()})
        rows.append((goal.what, _bound(goal), " to ".join({span[0]: 0, span[-1]: 0}), said))
    return markdown_table(("what", "must", "value", "met, or what is next"), rows)


def _bound(goal: Goal) -> str:
    return f"{'≤' if goal.most else '≥'} {goal.bound:g}"


def _cases(results: Sequence[Result]) -> list[str]:
    others = (PEFT, DEFAULT, COMPILED, UNSLOTH, LORA_FUSION, JOINED)
    rows = []
    for result in results:
        medians = {name: t["median"] for name, t in result["seconds"].items()}
        ours, low, high = (result["seconds"][OURS][k] for k in ("median", "low", "high"))
        rows.append(
            (
                title(result),
                f"{1e6 * medians[FROZEN]:.1f}",
                f"{1e6 * ours:.1f} ({1e6 * low:.1f}–{1e6 * high:.1f})",
                f"{ours / medians[FROZEN]:.3f}",
                *(f"{medians[n] / ours:.2f}" if n in medians else "—" for n in others),
            )
        )
    return markdown_table(("case", FROZEN, "ours (quartiles)", "ours / frozen", *others), rows)


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """A PNG: each case's time over the frozen layer's, ours beside PEFT's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = results_of(content)
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(results)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ax: Any = figure.subplots()
    drawn = (
        (OURS, "#2457a7"), (COMPILED, "#d9b48a"), (PEFT, "#c08a4a"), (JOINED, "#8f8f8f"),
    )  # fmt: skip
    for name, colour in drawn:
        some = [(i, r["seconds"]) for i, r in enumerate(results) if name in r["seconds"]]
        at = [seconds[name]["median"] / seconds[FROZEN]["median"] for _, seconds in some]
        ax.scatter(at, [i for i, _ in some], 26, color=colour, label=name, zorder=3)
    ax.axvline(1.0, color="#555555", linewidth=1)
    ax.set_yticks(range(len(results)), [title(result) for result in results])
    ax.invert_yaxis()
    ax.set_xlabel("time over that of the frozen layer (median); 1 is a delta that costs nothing")
    ax.set_title(f"{content['machine']['gpu']}, bf16", loc="left", fontsize=10)
    ax.grid(axis="x", color="#e4e4e4", zorder=0)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, ncols=len(drawn), loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path, format="png")


def write(source: Path) -> Path:
    """The page and the picture beside the JSON ``source``; returns the page's path."""
    content = json.loads(source.read_text(encoding="utf-8"))
    picture, page = source.with_suffix(".png"), source.with_suffix(".md")
    text = markdown(content, picture.name)
    write_atomically(picture, lambda to: draw(to, content))
    write_atomically(page, lambda to: to.write_text(text, encoding="utf-8"))
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -P -m deltaops.measure.gpu_report")
    parser.add_argument("json", type=Path, help="what deltaops.measure.gpu wrote")
    print(f"wrote {write(parser.parse_args(arguments).json)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
