"""Which deltas are thought of for a task, and what speaks for and against each.

A candidate's score is in percent of the best: what its method reached in the sources that say so of
such a model, each over the best in the same source, and then a few points for what the task and the
model are like. Every number has its source beside it; where that is a rule of thumb, it says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltaops.methods import METHODS, Adapter, Combined, Delta
from deltaops.methods.combined import combined, preset

from .features import BOTH, DECODER, ENCODER, ModelFeatures, TaskFeatures


@dataclass(frozen=True)
class Source:
    """Figures of one study: kind of candidate → what it reached, more being better."""

    title: str
    families: tuple[str, ...]
    best: float
    values: dict[str, float]


DING = Source(
    "Ding et al. 2023 (arXiv 2203.06904), RoBERTa-large, mean of 8 tasks",
    (ENCODER, BOTH),
    87.4,
    {"adapter": 87.4, "adapter+bitfit": 87.1, "bitfit": 86.6, "prompt": 77.7},
)
PEFT = Source(
    "PEFT's runs of Llama-3.2-3B on MetaMathQA, GSM8K accuracy (their BEFT for BitFit)",
    (DECODER,),
    47.8,
    {"lora": 47.8, "prefix": 41.6, "prompt": 34.3, "bitfit": 32.1},
)
OURS = Source(
    "deltaops compare, MiniLM on banking77 (benchmarks/results)",
    (ENCODER, BOTH),
    92.4,
    {
        "lora": 90.8, "parallel": 90.7, "adapter": 89.4, "pfeiffer": 87.7, "ia3": 85.3,
        "lntuning": 80.7, "prefix": 79.9, "bitfit": 79.6, "prompt": 70.6,
    },
)  # fmt: skip
SOURCES = (DING, PEFT, OURS)
THUMB = "a rule of thumb of ours"
HE = "He et al. 2022 (arXiv 2110.04366)"
MAO = "Mao et al. 2022 (arXiv 2110.07577)"
FEW, MANY = 1000, 10_000
"""Examples below which, and from which on."""
SPLIT, UNKNOWN = 2.0, 0.01
"""Tokens a word, and share of unknown tokens, from which on the vocabulary is another's."""
LIGHT, HEAVY = 0.002, 0.02
"""Of the model's parameters, what trains little and what trains much."""
PROMPT = 20
REDUCTION = Adapter().reduction_factor


@dataclass(frozen=True)
class Reason:
    """One thing that speaks for a candidate (points > 0) or against it."""

    text: str
    source: str
    points: float = 0.0


@dataclass(frozen=True)
class Idea:
    """A candidate before it is looked at on the model."""

    parts: Mapping[str, Mapping[str, Any]] | str
    """Kind of each delta → its settings, where they differ from the defaults; or a preset."""
    reasons: tuple[Reason, ...]

    @property
    def spec(self) -> str:
        """As ``deltaops tune --delta`` takes it."""
        if isinstance(self.parts, str):
            return self.parts
        return "+".join(
            kind + ":" * bool(settings) + ",".join(f"{k}={_told(v)}" for k, v in settings.items())
            for kind, settings in self.parts.items()
        )

    def delta(self, saved: Sequence[str]) -> Delta | Combined:
        """The delta, which trains the modules ``saved`` whole beside."""
        if isinstance(self.parts, str):
            found = preset(self.parts)
            changed = {
                name: replace(part, modules_to_save=tuple(saved))  # type: ignore[type-var]  # every method is a dataclass
                for name, part in found.by_name.items()
            }
            return Combined(changed, found.gated)
        methods: Mapping[str, Any] = METHODS  # whose settings are not those of all
        made = [
            methods[kind](**settings, modules_to_save=tuple(saved))
            for kind, settings in self.parts.items()
        ]
        return made[0] if len(made) == 1 else combined(*made)

    @property
    def score(self) -> float:
        """In percent of the best."""
        return sum(reason.points for reason in self.reasons)


def rank_of(examples: int) -> int:
    """Of a LoRA: more examples, more to learn."""
    return 4 if examples < FEW else 8 if examples < MANY else 16


def ideas(task: TaskFeatures, model: ModelFeatures) -> Iterator[Idea]:
    """Every candidate for such a model, with the reasons that need no look at its cost."""
    r = rank_of(task.examples)
    lora: dict[str, Any] = {"r": r, "alpha": 2 * r}
    size = Reason(f"r = {r} for {task.examples:,} examples", THUMB)
    foreign = task.pieces >= SPLIT or task.unknown >= UNKNOWN
    length = {"num_virtual_tokens": PROMPT}
    # the default is a sixteenth, which must leave no rest
    inner = {} if model.hidden % REDUCTION == 0 else {"size": max(1, model.hidden // REDUCTION)}
    for name, parts in (
        ("lora", {"lora": lora}), ("adapter", {"adapter": inner}),
        ("pfeiffer", {"adapter": {"style": "pfeiffer", **inner}}), ("parallel", {"parallel": {}}),
        ("adapter+bitfit", {"adapter": inner, "bitfit": {}}), ("bitfit", {"bitfit": {}}),
        ("ia3", {"ia3": {}}), ("lntuning", {"lntuning": {}}), ("prefix", {"prefix": length}),
        ("prompt", {"prompt": length}),
    ):  # fmt: skip
        found = list(_figures(name, model.family))
        if name == "lora":
            found.append(size)
            if foreign and model.embedding is not None:
                lora["target_modules"] = ["all-linear", model.embedding]
                found.append(_embeddings(task))
        if name == "bitfit" and model.biased < 0.5:
            text = f"{1 - model.biased:.0%} of the linear layers have no bias: all of it is new"
            found.append(Reason(text, "the model", -2.0))
        if name == "prompt":
            share = PROMPT / max(1.0, task.mean_tokens)
            text = f"{PROMPT} positions more beside {task.mean_tokens:.0f} tokens of a text"
            found.append(Reason(text, "the data", -min(5.0, 5.0 * share)))
        yield Idea(parts, tuple(found))
    best = max(OURS.values.values()) / OURS.best * 100
    if model.family != DECODER and task.examples >= MANY:
        text = "prefix and parallel adapter together come near full tuning at 6.7 % of parameters"
        yield Idea("MAM", (Reason(text, HE, best),))
    if model.family == ENCODER and task.examples < FEW:
        text = "gates over several deltas: +1 to +4 % over the best single one, most with few texts"
        yield Idea("UniPELT", (Reason(text, MAO, best + 1.0),))


def by_size(trained: int, task: TaskFeatures, model: ModelFeatures) -> Reason | None:
    """What the number of trained parameters says, beside that of the examples."""
    share = trained / max(1, model.parameters)
    told = f"trains {share:.2%} of the parameters on {task.examples:,} examples"
    if task.examples < FEW and share <= LIGHT:
        return Reason(told, THUMB, 4.0)
    if task.examples < FEW and share >= HEAVY:
        return Reason(told, THUMB, -4.0)
    if task.examples >= MANY and share <= LIGHT:
        return Reason(f"{told}: little room for much to learn", THUMB, -3.0)
    return None


def _embeddings(task: TaskFeatures) -> Reason:
    told = f"{task.pieces:.2f} tokens a word and {task.unknown:.1%} unknown"
    return Reason(f"{told}: the embeddings learn too", THUMB, 1.0)


def _figures(name: str, family: str) -> Iterator[Reason]:
    """Of a pair that one source has: that of its first part, and what the other adds there."""
    first = name.partition("+")[0]
    yield _figure(first, family)
    if first != name:
        both, alone = DING.values[name], DING.values[first]
        told = f"{both:g} with {name.partition('+')[2]} beside it, {alone:g} without"
        yield Reason(told, DING.title, 100 * (both - alone) / DING.best)


def _figure(name: str, family: str) -> Reason:
    """The mean over the sources of such models; of others, less five points, if there is none."""
    known = [s for s in SOURCES if family in s.families and name in s.values]
    elsewhere = [s for s in SOURCES if name in s.values]
    sources = known or elsewhere
    shares = [100 * s.values[name] / s.best for s in sources]
    points = sum(shares) / len(shares)
    told = " and ".join(f"{s.values[name]:g} of the best's {s.best:g}" for s in sources)
    where = "; ".join(s.title for s in sources)
    if known:
        return Reason(told, where, points)
    return Reason(f"{told}, and none is known of a model that is a {family}", where, points - 5.0)


def _told(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
