"""Run by hand: all variants of all kernels compiled for one GPU, and what the gate says of them.

Usage: python -P tests/kernels/every_variant.py TARGET [AREA …] [--seconds S] [--out FOLDER]

    TARGET   sm_80, sm_89, sm_90, sm_100 or gfx942
    AREA     gemms, passes, persistent, beside, decode, published, linears, attention, merged, rows;
             all without one.
             AREA:I/N is every N-th call of it, from the I-th on: a piece of a long run.
    S        after these nothing more is compiled, and what is left is counted; 0: what is known
    FOLDER   gets triton-variants.json and .md, the counts of all areas: benchmarks/results

test_ahead_of_time.py compiles in CI what ahead.py, linears_ahead.py and rows_ahead.py list; this
goes on to every row of the tables with every count of rank lanes, every set of gradients, mask,
bias, norm and type: some 2200 variants for each of NVIDIA's, a quarter of a second each on an idle
processor. Prints each problem, and the count of what was compiled; the exit code is 1 where there
is one. What was found is kept in build/every-variant, so a run that is cut off goes on where it
ended, and after a change only what it touches is compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deltaops.kernels import configs
from triton import knobs
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_key

from deltaops.backends.triton import core
from deltaops.backends.triton.targets import TARGETS, Target

sys.path.append(str(Path(__file__).parent))
import ahead
import linears_ahead
import rows_ahead
import sweep_summary
import test_ahead_of_time as limits

FOUND = Path(__file__).parents[2] / "build" / "every-variant"
"""What was found of each: a run that was cut off goes on where it ended."""
HALF, FULL = torch.bfloat16, torch.float32
TYPES = ((HALF, HALF), (HALF, FULL), (FULL, FULL))
ROWS = (8, 64, 512, 8192)
"""One for each row of the GEMM tables."""
RANKS = (8, 16, 24, 32, 64, 128, 256)
Call = Callable[[], None]


def gemms() -> Iterator[Call]:
    """y and dx of ``delta_linear``, their rank lanes filled and not, by every row of the tables."""
    for m, ranks, (dtype, adapter), dropout in itertools.product(
        ROWS, ((8,), (24,), (128,), (3, 100)), TYPES, (0.0, 0.1)
    ):
        yield partial(ahead.launch, ahead.Setting(m, ranks, dtype, adapter, dropout))
    for (dtype, adapter), conv1d, bias in itertools.product(TYPES, (False, True), (False, True)):
        for n, k in ((1003, 4001), (4096, 4096)):
            one = ahead.Setting(8192, (16,), dtype, adapter, 0.1, n, k, conv1d, bias)
            yield partial(ahead.launch, one)


def passes() -> Iterator[Call]:
    """S, dS, dB, db and dA, of every count of rank lanes, in every set that can be wanted."""
    for rank, (dtype, adapter), n in itertools.product(RANKS, TYPES, (96, 4096, 1003)):
        for wanted, bias in itertools.product(("x", "a", "b", "xb", "xab"), (False, True)):
            one = ahead.Setting(8192, (rank,), dtype, adapter, n=n, bias=bias, wanted=wanted)
            yield partial(ahead.launch, one)
        for m in ROWS:
            yield partial(ahead.launch, ahead.Setting(m, (rank,), dtype, adapter, 0.1, n))
    for rank, (dtype, adapter), kind, routed in itertools.product(
        RANKS, TYPES, ("relu", "gelu", "gelu_tanh", "silu"), (False, True)
    ):
        one = ahead.Setting(512, (rank,), dtype, adapter, routed=routed, activation=kind)
        yield partial(ahead.launch, one)


def persistent() -> Iterator[Call]:
    """Where tensor descriptors take the call."""
    for m, rank, dtype, dropout, bias in itertools.product(
        (256, 512, 8192), (8, 64, 128), (HALF, torch.float16), (0.0, 0.1), (False, True)
    ):
        yield partial(ahead.launch, ahead.Setting(m, (rank,), dtype, dtype, dropout, bias=bias))


def beside() -> Iterator[Call]:
    """dA on the multiprocessors that a persistent dx leaves over, of every count of rank lanes."""
    for rank, dtype in itertools.product((8, 16, 24, 32, 64, 128), (HALF, torch.float16)):
        yield partial(ahead.launch, ahead.Setting(8192, (rank,), dtype, dtype))


def decode() -> Iterator[Call]:
    """Of few rows, with S made within and beside."""
    for m, rank, dtype, (n, k), conv1d in itertools.product(
        (1, 16), (8, 16, 24, 64), (HALF, FULL), ((4096, 4096), (14336, 4096), (1003, 4001)),
        (False, True),
    ):  # fmt: skip
        one = ahead.Setting(m, (rank,), dtype, dtype, n=n, k=k, conv1d=conv1d, bias=rank > 16)
        yield partial(ahead.launch, one)


def published() -> Iterator[Call]:
    """The kernels of the baselines."""
    kernels, precision = core.kernels("stored_dropout"), core.kernels("precision")
    for m, rank, dtype in itertools.product(ROWS, RANKS, (HALF, FULL)):

        def call(m: int = m, rank: int = rank, dtype: torch.dtype = dtype) -> None:
            def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.empty(*shape, dtype=dtype, device="meta")

            x, a, s = empty(m, 4096), empty(rank, 4096), empty(m, rank, dtype=FULL)
            seed = empty(1, dtype=torch.int64)
            _, keep = kernels.drop_and_project(x, a, s, scaling=2.0, dropout=0.1, seed=seed)
            kernels.stored_grad_input(
                x, empty(4096, 4096), s, a, keep, dropout=0.1,
                precision=precision.rank_precision(dtype, [a]), capability=core.capability(x),
            )  # fmt: skip

        yield call


def linears() -> Iterator[Call]:
    """Groups, the norms of DoRA, quantised weights."""
    for m, ranks, types, dropout in itertools.product(
        ROWS, ((16, 16, 16), (32, 32, 32), (64, 64), (64, 32, 16), (3, 13, 16)), TYPES, (0.0, 0.1)
    ):
        widths = (4096, 1024, 1024)[: len(ranks)]
        yield linears_ahead.Group(m, ranks, *types, dropout, widths)
        if ranks[0] == 3:
            yield linears_ahead.Group(m, ranks, *types, dropout, rows=(1003, 400, 33), k=4001)
    for rank, types in itertools.product(RANKS, TYPES):
        yield linears_ahead.DoraNorm(rank, *types)
        yield linears_ahead.DoraNorm(rank, *types, n=1003, k=4001)
    for m, nf4, rank, types in itertools.product((8, 512), (False, True), (3, 64), TYPES):
        yield linears_ahead.Quantized(m, nf4, rank, *types)
        yield linears_ahead.Quantized(m, nf4, rank, *types, n=1003)


def attention() -> Iterator[Call]:
    """Every count of a head's lanes, filled and not, where 16 divides rows and lengths, and not."""
    for d, (dtype, prefix), causal, masked in itertools.product(
        (256, 128, 64, 32, 16, 80, 200, 100, 60, 30, 15), TYPES, (False, True), (False, True)
    ):
        one = ahead.Attention(d, dtype, prefix, causal=causal, masked=masked)
        odd = dataclasses.replace(one, length=1001, heads=(6, 3))
        usual, other = (odd, one) if d % 16 else (one, odd)
        for call in (usual, other) if causal and masked else (usual,):
            if call.supported():
                yield partial(ahead.launch_attention, call)


def merged() -> Iterator[Call]:
    """A prefix merged into torch's attention, of every count of a head's lanes."""
    types = ((HALF, HALF), (HALF, FULL), (torch.float16, torch.float16))
    for d, (dtype, prefix), causal, length in itertools.product(
        (256, 128, 64, 32, 16, 80, 200), types, (False, True), (512, 1001)
    ):
        one = ahead.Attention(d, dtype, prefix, causal=causal, masked=False, length=length)
        if one.supported():
            yield partial(ahead.launch_merged, one)


def rows() -> Iterator[Call]:
    """Adapters, norms, gated products, rotations and prompts."""
    for m, rank, types, norm in itertools.product(
        (8, 512, 2048, 8192), (8, 16, 32, 64, 128, 256), TYPES, ("none", "layer", "rms")
    ):
        yield rows_ahead.Adapter(m, 4096, rank, *types, norm=norm)
    for m, rank, types, activation in itertools.product(
        (8, 8191), (13, 30, 60, 100), TYPES, ("relu", "gelu", "gelu_tanh", "silu")
    ):
        yield rows_ahead.Adapter(m, 4001, rank, *types, activation=activation, padding=3)
        yield rows_ahead.Adapter(m, 4096, rank, *types, activation=activation, bare=True)
    for k, types, norm in itertools.product(
        (16, 100, 768, 1024, 2048, 4096, 8192, 14336), TYPES, ("layer", "rms", "none")
    ):
        yield rows_ahead.Norm(8192, k, *types, norm=norm)
    for dtype, activation in itertools.product((HALF, FULL), ("relu", "gelu", "gelu_tanh", "silu")):
        yield rows_ahead.Gated(8192, 14336, dtype, activation)
    for d, (dtype, tables) in itertools.product((32, 64, 80, 128, 256), TYPES):
        yield rows_ahead.Rotary(d, dtype, tables)
    for d, (dtype, prompt) in itertools.product((64, 768, 4001, 4096), TYPES):
        yield rows_ahead.Prompt(d, dtype, prompt)


class Remembering(ahead.Recorder):
    """Compiles what no earlier run has, with this compiler and of this source, while there is
    time."""

    def __init__(self, target: Target, seconds: float) -> None:
        super().__init__(target)
        self.until = time.monotonic() + seconds
        self.left: list[str] = []  # names of the kernels of what was not reached

    def compile(self, source: ASTSource, options: Any, bound: dict[str, Any]) -> dict[str, Any]:
        """As it was found then, or now; nothing where the time is over."""
        key = get_cache_key(source, self.backend, options, env_vars={})
        path = FOUND / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        if time.monotonic() >= self.until:
            self.left.append(source.fn.__name__)
            return {}
        found = super().compile(source, options, bound)
        half = path.with_suffix(f".{os.getpid()}.tmp")
        half.write_text(json.dumps(found), encoding="utf-8")
        half.replace(path)
        return found


AREAS = {
    f.__name__: f
    for f in (
        gemms,
        passes,
        persistent,
        beside,
        decode,
        published,
        linears,
        attention,
        merged,
        rows,
    )
}


ONLY = {
    "gemms": ("_forward_kernel", "_grad_input_kernel"),
    "passes": (
        "_project_kernel",
        "_grad_up_kernel",
        "_grad_down_kernel",
        "_hidden",
        "_sum_partials_kernel",
    ),
    "persistent": "_persistent",
    "beside": "_beside",
    "decode": "_decode",
    "linears": (
        "_project_group_kernel",
        "_grad_down_group_kernel",
        "_grad_input_kernel",
        "_row_norms",
        "_dequantize_kernel",
        "_forward_quantized_kernel",
        "_grad_input_quantized_kernel",
    ),
}
"""Of an area: how the names of its kernels begin."""


def plans(area: str, target: Target) -> tuple[str, ...]:
    """Which plans the GEMMs go by."""
    if area == "persistent":
        there = not target.amd and target.capability in configs.PERSISTENT
        return ("persistent",) if there else ()
    if area == "beside":
        there = not target.amd and target.capability in configs.BESIDE
        return ("beside",) if there else ()
    if area == "merged" and target.amd:
        return ()  # torch has no such attention there
    if area == "decode":
        return ("decode",)
    return ("fused", "split") if area in ("gemms", "linears") else ("fused",)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("areas", nargs="*", metavar="AREA")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    asked = parser.parse_args(arguments)
    if asked.areas and asked.out is not None:
        parser.error("--out takes the counts of all areas; name none")
    knobs.nvidia.dump_ptxas_log = True
    target = TARGETS[asked.target]
    recorder = Remembering(target, asked.seconds)
    FOUND.mkdir(parents=True, exist_ok=True)
    covered: dict[str, int] = {}
    refused: dict[str, list[str]] = {}
    for wanted in asked.areas or AREAS:
        area, _, share = wanted.partition(":")
        first, step = map(int, (share or "0/1").split("/"))
        before, left = len(recorder.found), len(recorder.left)
        recorder.only = ONLY.get(area, "")
        for plan in plans(area, target):
            with ahead.compiling(recorder, target, plan):
                for call in itertools.islice(AREAS[area](), first, None, step):
                    call()
                    covered[area] = covered.get(area, 0) + 1
        found = [item for item in list(recorder.found.items())[before:] if item[1]]
        for key, kernel in found:
            refused[key] = limits.problems([kernel], target.name)
            for line in refused[key]:
                print(f"{line}\n    {key}", flush=True)
        over = f", {len(recorder.left) - left} left" if len(recorder.left) > left else ""
        print(f"{target.name} {wanted}: {len(found)} variants compiled{over}", flush=True)
    if asked.out is not None:
        pairs = [(kernel, refused[key]) for key, kernel in recorder.found.items() if kernel]
        summary = sweep_summary.of_target(target.name, pairs, recorder.left, covered)
        sweep_summary.write(asked.out, target.name, summary)
    return 1 if any(refused.values()) else 0


if __name__ == "__main__":
    # an empty cache, so that everything is compiled and reported on
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        code = main(sys.argv[1:])
    raise SystemExit(code)
