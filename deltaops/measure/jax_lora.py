"""A LoRA layer's step in JAX, ours beside plain jax.numpy, both under jit:

    python -m deltaops.measure.jax_lora --out benchmarks/results/jax-lora.md

A step is y and the gradients of x, A and B. Peers are timed in turns after a correctness gate in
the same run: every result of ours must be as near to float64 as jax.numpy's own is, by the
tolerances of deltaops.testing. Speed-ups are medians of ratios, round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaops.bindings.settings import threads
from deltaops.files import write_atomically
from deltaops.testing import bound

from .cases import SHAPES
from .interleave import Timing, interleaved
from .machine import processor

RANK, SCALING = 16, 2.0
PLAIN, OURS, PACKED = "jax.numpy", "deltaops", "deltaops, packed weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[], Any]


def operands(m: int, n: int, k: int, dtype: Any) -> list[Any]:
    """x, W, A, B and the gradient of y; NumPy's, the same each time."""
    draw = np.random.default_rng(0)
    shapes = ((m, k), (n, k), (RANK, k), (n, RANK), (m, n))
    scales = (1.0, k**-0.5, k**-0.5, RANK**-0.5, 1.0)
    return [
        (draw.standard_normal(s) * c).astype(dtype) for s, c in zip(shapes, scales, strict=True)
    ]


def oracle(x: Any, w: Any, a: Any, b: Any, grad: Any) -> list[Any]:
    """y and the gradients of x, A and B in float64."""
    x, w, a, b, grad = (t.astype(np.float64) for t in (x, w, a, b, grad))
    inner = grad @ b
    return [
        x @ w.T + SCALING * (x @ a.T) @ b.T,
        grad @ w + SCALING * inner @ a,
        SCALING * inner.T @ x,
        SCALING * grad.T @ (x @ a.T),
    ]


def steps(given: list[Any]) -> dict[str, Step]:
    """Peer → its compiled step, which ends when the results are there."""
    import jax
    import jax.numpy as jnp

    import deltaops.jax as dj

    x, w, a, b, grad = (jnp.asarray(t) for t in given)

    def plain(x: Any, w: Any, a: Any, b: Any) -> Any:
        return x @ w.T + SCALING * (x @ a.T) @ b.T

    def ours(x: Any, w: Any, a: Any, b: Any) -> Any:
        return dj.delta_linear(x, w, None, [dj.Branch(a, b, SCALING)])

    def step(layer: Callable[..., Any], weight: Any) -> Step:
        @jax.jit
        def both(x: Any, weight: Any, a: Any, b: Any, grad: Any) -> Any:
            y, pull = jax.vjp(lambda x, a, b: layer(x, weight, a, b), x, a, b)
            return y, *pull(grad)

        def run() -> Any:
            return jax.block_until_ready(both(x, weight, a, b, grad))  # type: ignore[no-untyped-call]  # JAX's own has no types

        return run

    packed = dj.pack_weight(w)
    return {PLAIN: step(plain, w), OURS: step(ours, w), PACKED: step(ours, packed)}


def hold(case: str, peers: dict[str, Step], wanted: list[Any], dtype: torch.dtype) -> None:
    """The gate.

    Raises: AssertionError with what is off and by how much.
    """

    def errors(results: Any) -> list[float]:
        pairs = zip(results, wanted, strict=True)
        return [
            float(np.linalg.norm(np.asarray(r, np.float64) - o) / np.linalg.norm(o))
            for r, o in pairs
        ]

    low = errors(peers[PLAIN]())
    for peer in (OURS, PACKED):
        for name, error, reference in zip(
            ("y", "x", "a", "b"), errors(peers[peer]()), low, strict=True
        ):
            if not error <= bound(reference, dtype):
                raise AssertionError(
                    f"{case}: {peer}: {name} is off by {error:.2e}, jax.numpy by {reference:.2e}"
                )


def rows(rounds: int, seconds: float) -> Iterator[tuple[str, dict[str, Timing]]]:
    """Case → timings, after the gate."""
    for name, dtype in DTYPES.items():
        for m, n, k in SHAPES:
            case = f"{name} {m}×{n}×{k}"
            import jax.numpy as jnp

            given = operands(m, n, k, jnp.dtype(name))
            peers = steps(given)
            hold(case, peers, oracle(*given), dtype)
            yield case, interleaved(peers, rounds=rounds, seconds=seconds, paired=5)


def table(timed: Iterator[tuple[str, dict[str, Timing]]], command: str) -> Iterator[str]:
    """The report, a line each."""
    import jax

    yield f"# A LoRA step in JAX {jax.__version__}, rank {RANK}, under jit: {_machine()}"
    yield ""
    yield f"Written by `{command}`: peers in turns, each held to float64 first."
    yield ""
    yield "y and the gradients of x, A and B; M×N×K. Speed-up over jax.numpy: median (quartiles)."
    yield ""
    yield f"| case | {PLAIN}, ms | {OURS}, ms | speed-up | {PACKED}, ms | speed-up |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for case, timings in timed:
        cells = [case, f"{timings[PLAIN].median * 1e3:.2f}"]
        for peer in (OURS, PACKED):
            ratio = timings[PLAIN].over(timings[peer])
            assert ratio is not None  # as many rounds as `paired` says
            cells.append(f"{timings[peer].median * 1e3:.2f}")
            cells.append(f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})")
        yield f"| {' | '.join(cells)} |"


def _machine() -> str:
    from deltaops.backends.cpu.core import core

    return f"{processor()}, {core().isa()}, {threads(None)} threads"


def main() -> None:
    """Measure, print, and write where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=6.0, help="for all rounds of a case")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    command = f"python -m deltaops.measure.jax_lora --rounds {options.rounds}"
    command += f" --seconds {options.seconds:g}"
    lines = []
    for line in table(rows(options.rounds, options.seconds), command):
        print(line, flush=True)
        lines.append(line)
    if options.out:
        text = "\n".join(lines) + "\n"
        write_atomically(options.out, lambda part: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
