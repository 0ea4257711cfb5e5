"""What a figure must name to mean anything: processor, threads, instruction set, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "triton", "numpy")


def processor() -> str:
    """The processor's name as the system gives it, with its family and model where a hypervisor
    shortens the name to the brand: of two "AMD EPYC" one may be twice as fast as the other.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n", 1)[0]
        facts = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in first.splitlines())
        }
        name = facts.get("model name", "")
        if name and not re.search(r"\d", name) and "cpu family" in facts:
            return f"{name} (family {facts['cpu family']}, model {facts.get('model', '?')})"
        if name:
            return name
    return platform.processor() or platform.machine()


def features() -> set[str]:
    """The processor's feature flags as Linux names them; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    return set()


def bf16_instructions() -> bool:
    """Whether products of bfloat16 need no widening here."""
    return bool(features() & {"avx512_bf16", "amx_bf16", "bf16"})


def versions() -> dict[str, str]:
    """Package → installed version, of those that are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """The machine and this run, as JSON."""
    from deltaops import __version__
    from deltaops.backends.cpu import native

    core = native()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": core if isinstance(core, str) else core.isa(),
        "bf16_instructions": bf16_instructions(),
        "deltaops": __version__,
        "versions": versions(),
    }
