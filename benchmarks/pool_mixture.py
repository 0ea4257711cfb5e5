"""A pool of prompts beside one prompt of the same total size, on a mixture of two tasks.

    python -P benchmarks/pool_mixture.py --train banking77-train.csv --test banking77-test.csv \\
        --out benchmarks/results

Both tasks are questions with intents and answer with the same labels: task B's intents are called
by the names of task A's, one by one, so that what B has to learn is against what A is right with.
Nothing tells them apart but the questions. MiniLM reads, and a text belongs to the label whose name
the untouched encoder puts nearest; nothing trains but the prompts (and keys). Every contender gets
the same batches of both tasks for the same number of steps. Where --rates names several, each is
tried on held-out training texts with a seed that no result has.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import deltaops
from deltaops.files import write_json
from deltaops.measure import machine
from deltaops.measure.store import slug
from deltaops.strategy.choices import choices
from deltaops.tuning.encoder import MINILM, encoder_folder, load_encoder
from deltaops.tuning.loop import Schedule, evaluate, make_optimizer, train
from deltaops.tuning.read import Columns, Example, read_examples
from deltaops.tuning.sentence import NamedClasses, name_vectors
from deltaops.tuning.spec import parse_delta
from deltaops.tuning.tokens import Order, TokenSet, label_texts, load_tokenizer

TASKS = ("A", "B")
CONTENDERS = {
    "pool, by states": "prompt-pool:size={size},length={length},top_k={k},query=states",
    "one prompt, P = {total}": "prompt:num_virtual_tokens={total}",
    "pool, by embeddings": "prompt-pool:size={size},length={length},top_k={k}",
}
SEED_OF_RATES = 100


@dataclass(frozen=True)
class Mixture:
    """Texts of both tasks, tokenized."""

    train: TokenSet
    held: TokenSet
    tests: tuple[TokenSet, TokenSet]
    names: torch.Tensor


@dataclass(frozen=True)
class Result:
    """One run."""

    contender: str
    seed: int
    rate: float
    accuracy: tuple[float, float]
    """By task, as shares."""
    loss: float
    """Of the last step."""
    seconds: float
    usage: list[list[int]] | None
    """By task, how often each prompt of a pool was chosen for the test texts."""


def mixture(arguments: argparse.Namespace, encoder: nn.Module, tokenizer: object) -> Mixture:
    """Intents 0 … n − 1 and n … 2n − 1 of every third in the file's order of names."""
    columns, n = Columns("text", "category"), arguments.intents
    files = [read_examples(str(p), columns) for p in (arguments.train, arguments.test)]
    found = sorted({e.label for e in files[0] if e.label is not None})[:: arguments.every][: 2 * n]
    if len(found) < 2 * n:
        raise SystemExit(f"{arguments.train} has {len(found)} intents, expected {2 * n}.")
    called = {label: found[i % n] for i, label in enumerate(found)}
    task = {label: int(i >= n) for i, label in enumerate(found)}
    rows = [[e for e in part if e.label in called] for part in files]
    examples = [Example(e.text, called[e.label], e.line) for part in rows for e in part if e.label]
    data, labels = label_texts(examples, tokenizer, arguments.seq_len)

    def pick(where: Sequence[int]) -> TokenSet:
        assert data.classes is not None
        return TokenSet([data.ids[i] for i in where], data.classes[list(where)], data.pad)

    cut = len(rows[0])
    fit, held = pick(range(cut)).split(0.1, 0)
    assert held is not None
    tests = tuple(
        pick([cut + i for i, e in enumerate(rows[1]) if task[str(e.label)] == t]) for t in (0, 1)
    )
    return Mixture(fit, held, (tests[0], tests[1]), name_vectors(encoder, tokenizer, labels))


def learn(
    spec: str, rate: float, seed: int, steps: int, batch: int, encoder: nn.Module, data: Mixture
) -> tuple[NamedClasses, float]:
    """A trained model and its last loss."""
    torch.manual_seed(seed)
    model = NamedClasses(copy.deepcopy(encoder), data.names)
    handle = deltaops.attach(model, parse_delta(spec))
    losses: list[float] = []
    train(
        model, data.train, Order(len(data.train), batch, seed),
        make_optimizer(handle.parameter_groups(rate), rate), Schedule(steps, rate),
        on_step=lambda point: losses.append(point.loss),
    )  # fmt: skip
    return model, losses[-1]


def accuracy(model: nn.Module, data: TokenSet) -> float:
    found = evaluate(model, data, 64)
    assert found is not None
    return found["accuracy"]


def best_rate(
    spec: str, rates: Sequence[float], a: argparse.Namespace, encoder: nn.Module, data: Mixture
) -> float:
    """Of several, by half of the steps."""
    tried: dict[float, float] = {}
    for rate in rates if len(rates) > 1 else ():
        model, _ = learn(spec, rate, SEED_OF_RATES, a.steps // 2, a.batch_size, encoder, data)
        tried[rate] = accuracy(model, data.held)
        print(f"{spec}: rate {rate:g} → {100 * tried[rate]:.1f} % held out", flush=True)
    return max(tried, key=lambda rate: tried[rate]) if tried else rates[0]


def run(
    name: str, spec: str, rate: float, seed: int, a: argparse.Namespace, encoder: nn.Module,
    data: Mixture,
) -> Result:  # fmt: skip
    """One."""
    began = time.perf_counter()
    model, loss = learn(spec, rate, seed, a.steps, a.batch_size, encoder, data)
    seconds = time.perf_counter() - began
    scores, usage = [], []
    for test in data.tests:
        if "pool" in spec:
            choices(model, reset=True)
        scores.append(accuracy(model, test))
        if "pool" in spec:
            usage.append(choices(model).usage.tolist())
    return Result(name, seed, rate, (scores[0], scores[1]), loss, seconds, usage or None)


def told(values: Sequence[float]) -> str:
    """Mean ± standard deviation, in percent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def report(results: list[Result], start: tuple[float, float], command: str, facts: object) -> str:
    """The table, as Markdown."""
    lines = [
        "# A pool of prompts beside one prompt of the same total size", "",
        f"`{command}`", "", f"On {facts}. Accuracy in %, mean ± standard deviation over seeds.", "",
        "| contender | rate | task A | task B | both | s a run |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| frozen | – | {100 * start[0]:.1f} | {100 * start[1]:.1f} | {50 * sum(start):.1f} | – |",
    ]  # fmt: skip
    for name in dict.fromkeys(r.contender for r in results):
        mine = [r for r in results if r.contender == name]
        columns = [[r.accuracy[t] for r in mine] for t in (0, 1)]
        both = [sum(r.accuracy) / 2 for r in mine]
        lines.append(
            f"| {name} | {mine[0].rate:g} | {told(columns[0])} | {told(columns[1])} | "
            f"**{told(both)}** | {statistics.mean(r.seconds for r in mine):.0f} |"
        )
    lines += ["", "Which prompt the test texts chose, seed 0:", ""]
    for r in results:
        if r.usage is not None and r.seed == 0:
            lines += [
                f"- {r.contender}: "
                + "; ".join(f"task {t}: {u}" for t, u in zip(TASKS, r.usage, strict=True))
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="part of a contender's name")
    parser.add_argument("--rates", default="0.03,0.1", help="to try; one is taken as it is")
    for name, default in (
        ("intents", 8), ("every", 3), ("size", 10), ("length", 2), ("top-k", 2), ("steps", 100),
        ("batch-size", 16), ("seq-len", 20), ("seeds", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    folder = encoder_folder(MINILM)
    encoder, _ = load_encoder(folder, MINILM)
    tokenizer = load_tokenizer(folder, encoder.config)
    data = mixture(a, encoder, tokenizer)
    frozen = NamedClasses(copy.deepcopy(encoder), data.names)
    start = accuracy(frozen, data.tests[0]), accuracy(frozen, data.tests[1])
    sizes = {"total": a.size * a.length, "size": a.size, "length": a.length, "k": a.top_k}
    facts = machine.describe()
    where = f"{facts['processor']}, {facts['threads']} threads, torch {torch.__version__}"
    flags = " ".join(
        f"--{k.replace('_', '-')} {Path(v).name if isinstance(v, Path) else v}"
        for k, v in vars(a).items() if v is not None and k not in ("out", "only")
    )  # fmt: skip
    command = f"python -P benchmarks/pool_mixture.py {flags}"
    results: list[Result] = []
    wanted = {
        name.format(**sizes): spec.format(**sizes)
        for name, spec in CONTENDERS.items()
        if a.only is None or a.only in name
    }
    rates = [float(rate) for rate in a.rates.split(",")]
    best = {name: best_rate(spec, rates, a, encoder, data) for name, spec in wanted.items()}
    for seed in range(a.seeds):
        for name, spec in wanted.items():
            results.append(run(name, spec, best[name], seed, a, encoder, data))
            print(json.dumps(asdict(results[-1])), flush=True)
            if a.out is not None:  # what is there is kept, should the rest be stopped
                path = a.out / f"{slug(facts)}-pool-mixture.json"
                write_json(path, {"command": command, "results": [asdict(r) for r in results]})
                path.with_suffix(".md").write_text(report(results, start, command, where))
    print(report(results, start, command, where))


if __name__ == "__main__":
    main()
