"""The Triton kernels in Triton's interpreter: no GPU needed, nothing said about speed.

In processes of their own: TRITON_INTERPRET must be set before the kernels are first imported.
Mostly in float32, and each kernel in a half type somewhere: the interpreter keeps bfloat16 as
integers, whose products are wrong where rows.py does not mend them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from deltaops.testing import DELTA_LINEAR_CASES, PREFIX_ATTENTION_CASES, ROUTED_CASES

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("interpreted.py")
SHARES = 2
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1"}

pytestmark = pytest.mark.waits


def interpret(share: int) -> subprocess.CompletedProcess[str]:
    # big ones take long to interpret and run on a GPU's tests
    numbers = [
        str(i) for i, case in enumerate(DELTA_LINEAR_CASES) if max(case.m, case.n, case.k) < 500
    ][share::SHARES]
    numbers += [f"prefix:{i}" for i in range(len(PREFIX_ATTENTION_CASES))][share::SHARES]
    numbers += [  # with all that a row's own adapter changes: the mask of S and that of dS
        f"routed:{i}"
        for i, case in enumerate(ROUTED_CASES)
        if case.k < 100 and (case.m < 140 or any(case.activation))
    ][share::SHARES]
    numbers += [f"{kind}:{share}/{SHARES}" for kind in ("rows", "linears")]
    kinds = ("persistent", 3), ("typed", 6), ("decode", 6), ("merged", 6)
    numbers += [f"{kind}:{i}" for kind, n in kinds for i in range(n)][share::SHARES]
    numbers += ["tuning"] if share == 0 else []
    return subprocess.run(
        [sys.executable, "-P", str(SCRIPT), *numbers],
        env=ENVIRONMENT,
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def prepare(ahead: Any, fixtures: set[str]) -> None:
    """Called by tests/conftest.py."""

    def all_shares(folder: Path) -> list[subprocess.CompletedProcess[str]]:
        with ThreadPool(SHARES) as pool:
            return pool.map(interpret, range(SHARES), chunksize=1)

    ahead.start("interpreted", all_shares)


@pytest.mark.parametrize("share", range(SHARES))
def test_kernels_match_fp64_repeat_their_bits_and_move_what_is_modelled(
    ahead: Any, share: int
) -> None:
    result = ahead.result("interpreted")[share]
    assert result.returncode == 0, result.stderr[-3000:]
