"""Another package's backend: installed beside ours, found, chosen, held to the shipped checks."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from deltaops.backends import registered
from deltaops.errors import BuildError

backends = sys.modules["deltaops.backends"]  # the attribute of deltaops is a function

MODULE = '''
import torch
from deltaops.reference import delta_linear

class Halves:
    """The reference for float16, which the native core does not take, and for nothing else."""

    name = "halves"
    forward = staticmethod(delta_linear.forward)
    backward = staticmethod(delta_linear.backward)

    def unavailable(self): return None
    def unsupported(self, call):
        if call.op != "delta_linear": return f"has no {call.op}"
        return None if call.dtype == torch.float16 else f"takes float16, not {call.dtype}"
    def outrun(self, call): return None

class Wide(Halves):
    """As ours are held to: float32."""
    name = "wide"
    def unsupported(self, call):
        return None if call.op == "delta_linear" and call.dtype == torch.float32 else "float32 only"
'''

USE = """
import torch, deltaops
from deltaops.ops import Branch, delta_linear
print(*deltaops.backends())
x, w, a, b = (torch.randn(s).half() for s in ((3, 5), (4, 5), (2, 5), (4, 2)))
print(deltaops.explain(x, w, None, [Branch(a, b)]).chosen)
print(deltaops.explain(x.float(), w.float(), None, [Branch(a.float(), b.float())]).chosen)
a.requires_grad_()
delta_linear(x, w, None, [Branch(a, b)]).sum().backward()
print(a.grad.dtype)
from deltaops.testing import conformance
from third_party import Wide
done = [c.run(Wide()) for c in conformance.checks(["delta_linear"])[:30] if not c.refused(Wide())]
print(len(done))
"""


def package(folder: Path, entry: str) -> None:
    """What pip leaves of a package with one module and one entry point."""
    folder.joinpath("third_party.py").write_text(MODULE, encoding="utf-8")
    info = folder / "third_party-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    info.joinpath("entry_points.txt").write_text(f"[deltaops.backends]\n{entry}\n")


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_package_registers_a_backend_and_passes_the_checks(tmp_path: Path) -> None:
    package(tmp_path, "halves = third_party:Halves")
    run = python(USE, tmp_path)
    assert run.returncode == 0, run.stderr
    names, half, single, dtype, checked = run.stdout.splitlines()
    assert names.split() == ["cpu", "triton", "halves", "reference"]
    assert (half, single, dtype) == ("halves", "cpu", "torch.float16")
    assert int(checked) >= 5


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("cpu", "deltaops.backends.cpu:CpuBackend", "must have a name of its own"),
        ("mine", "deltaops.backends.cpu:CpuBackend", "must have a name of its own"),
        (
            "mine",
            "builtins:object",
            "must have a name of its own that its object has too, got None",
        ),
        ("mine", "deltaops.backends.cpu:Nothing", "must load, and raised AttributeError"),
    ],
)
def test_one_that_cannot_be_used_is_named(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = EntryPoint(name, value, backends.GROUP)
    monkeypatch.setattr(backends, "entry_points", lambda group: [entry])
    with pytest.raises(BuildError, match=said):
        registered.__wrapped__()
