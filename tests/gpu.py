"""Run by ``make gpu``: the tests that need a GPU, and then the benchmark, in eight minutes.

Usage: python3 -P tests/gpu.py OUT [SECONDS]

For a machine that is lent once and not for long. Every step is a process of its own with its own
limit, so that one which fails, hangs, dies or loses the GPU's context takes no other with it: the
tests go in shares side by side (most of their time is Triton's compiler), a share whose process is
lost goes on in a new one behind the test that lost it, and so does the benchmark behind its case.
What is known is written as it comes: ``gpu-tests.json`` in OUT after each share, the output of
each step beside it, the benchmark's JSON after each case. Works in a checkout that is not
installed, too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARES = max(1, min(12, (os.cpu_count() or 1) - 2))
FOR_TESTS = 0.6
"""Of the seconds; the benchmark has the rest."""
STARTS = 4
"""Processes that a step may have."""
LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", re.MULTILINE)
OPS = ("delta_linear", "delta_linear_group", "prefix_attention")
"""Whose results the benchmark's JSON lists."""
CONTEXT_LOST = 3
"""What the benchmark returns then."""

PYTHON = (sys.executable, "-P", "-u")
OPTIONS = ("-v", "--tb=short", "--instantly", "--durations=5")
"""Of pytest: the log of a share is read when its process is gone."""


def package_alone() -> Path:
    """A folder with nothing but the package: beside it transformers would find kernels/ and take it
    for Hugging Face's package."""
    folder = ROOT / "build" / "package"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "deltaops"
    if not link.exists():
        link.symlink_to(ROOT / "deltaops")
    return folder


def text(path: Path) -> str:
    """Of a file; what a dying process leaves may be no text."""
    return path.read_text(encoding="utf-8", errors="replace")


def run(command: list[str], log: Path, until: float) -> int | None:
    """The exit code, None where the time was over; what it prints is added to ``log``."""
    environment = dict(os.environ)
    if importlib.util.find_spec("deltaops") is None:  # the installation failed
        environment["PYTHONPATH"] = str(package_alone())
    with log.open("a", encoding="utf-8") as out:
        try:
            found = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, until - time.monotonic()),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
    return found.returncode


def run_share(tests: list[str], log: Path, until: float) -> dict[str, str]:
    """Test → how it went: "DIED" where its process ended in it, "not reached" where the time or the
    starts were over."""
    left, found = tests, dict[str, str]()
    for _ in range(STARTS):
        arguments = log.with_suffix(".txt")
        arguments.write_text("\n".join(left), encoding="utf-8")
        code = run(
            [*PYTHON, "-m", "pytest", *OPTIONS, f"@{arguments}"],
            log,
            until,
        )
        shown = text(log)
        found |= dict(LINE.findall(shown))
        left = [test for test in tests if test not in found]
        if not left or code is None:
            break
        found |= {test: "DIED" for test in left if f"\n{test} " in shown}  # begun, and no result
        left = [test for test in left if test not in found]
        if not left:
            break
    return {test: found.get(test, "not reached") for test in tests}


def run_tests(out: Path, until: float) -> bool:
    """Whether all passed; what is known is written after each share."""
    listed = out / "gpu-collected.log"
    listed.unlink(missing_ok=True)
    files = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in text(p)]
    files.sort(key=lambda name: "/cuda/" not in name)  # the quick ones first
    run([*PYTHON, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", *files], listed, until)
    tests = [x for x in text(listed).splitlines() if "::" in x]
    shares = [tests[i::SHARES] for i in range(SHARES) if tests[i::SHARES]]
    results: dict[str, str] = {}

    def one(number: int) -> dict[str, str]:
        log = out / f"gpu-tests-{number}.log"
        log.unlink(missing_ok=True)
        return run_share(shares[number], log, until)

    with ThreadPool(max(1, len(shares))) as pool:
        for found in pool.imap_unordered(one, range(len(shares)), chunksize=1):
            results |= found
            known = json.dumps(results, indent=1, sort_keys=True)
            (out / "gpu-tests.json").write_text(known + "\n", encoding="utf-8")
    counts = {how: list(results.values()).count(how) for how in sorted({*results.values()})}
    print(f"tests: {counts or 'none was collected'}; {out / 'gpu-tests.json'}", flush=True)
    return bool(tests) and {*results.values()} <= {"PASSED", "SKIPPED"}


def run_benchmark(out: Path, until: float) -> bool:
    """Whether it ended by itself, with right numbers."""
    log, first = out / "gpu-benchmark.log", 0
    log.unlink(missing_ok=True)
    for _ in range(STARTS):
        before = {path: path.stat().st_mtime_ns for path in out.glob("gpu-*.json")}
        seconds = f"{max(0.0, until - time.monotonic() - 45.0):.0f}"  # for the last case
        wanted = ["--out", str(out), "--seconds", seconds, "--first", str(first)]
        code = run([*PYTHON, "-m", "deltaops.measure.gpu", *wanted], log, until)
        if code != CONTEXT_LOST:
            break
        for path in out.glob("gpu-*.json"):
            if path.stat().st_mtime_ns != before.get(path):
                first += sum(len(json.loads(text(path))[op]) for op in OPS)
    for path in out.glob("gpu-nvidia-*.json"):
        run([*PYTHON, "-m", "deltaops.measure.gpu_report", str(path)], log, until + 30.0)
    print(text(log))
    return code == 0


def main(out: str, seconds: str = "470") -> int:
    """The exit code."""
    began, folder = time.monotonic(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    good = run_tests(folder, began + FOR_TESTS * float(seconds))
    measured = run_benchmark(folder, began + float(seconds))
    return 0 if good and measured else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
