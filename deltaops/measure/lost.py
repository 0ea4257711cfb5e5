"""Where we lose: every cell in which another peer is faster or holds less, by how much."""

from __future__ import annotations

from . import cell as names
from .cell import Results

OURS = (names.OURS, names.OURS_COMPILED, names.ACCELERATED)


def lost(results: Results) -> list[str]:
    """One line a loss, the largest first; empty where we lose nowhere."""
    found: list[tuple[float, str]] = []
    for c in results.cells:
        best = c.best(*OURS)
        own = c.ratio(names.OWN_FROZEN, names.FROZEN)
        if own is not None and own > 1 and not c.dropout:
            found.append(
                (own, f"{c.group} {c.label}: our frozen layer takes {own:.2f}× of torch's")
            )
        if best is None:
            continue
        rivals = [names.FROZEN] if c.group in ("gemm", "call") else []
        for peer in (*rivals, *names.PEERS_OF_OTHERS):
            value = c.ratio(best, peer)
            if value is not None and value > 1:
                found.append((value, f"{c.group} {c.label}: {peer} is {value:.2f}× as fast"))
        for peer, size in c.saved.items():
            mine = c.saved.get(names.OURS)
            if peer in names.PEERS_OF_OTHERS and mine is not None and 0 < size < mine:
                found.append(
                    (mine / size, f"{c.group} {c.label}: {peer} holds {size} bytes, ours {mine}")
                )
    return [line for _, line in sorted(found, key=lambda f: -f[0])]
