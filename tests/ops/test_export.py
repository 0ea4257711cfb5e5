"""Adapted models through torch.export and ONNX: eager torch and onnxruntime give the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltaops
from deltaops.ops import decompositions
from deltaops.testing import architectures

# torch's exporters warn of torch's own code
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")
]
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def adapted(name: str, delta: Any, merged: bool) -> Any:
    """A tiny model whose delta is not at its start, ready to be used."""
    torch.manual_seed(0)
    model = architectures.build(name).eval()
    handle = deltaops.attach(model, delta)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if merged:
        handle.merge()
    return model


class Logits(torch.nn.Module):
    """What is exported: ids in, the first output out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(input_ids=ids)[0]
        return out


LORA = deltaops.LoRA(r=4, target_modules="all-linear")
CASES = [
    ("bert", LORA, False),
    ("bert", LORA, True),
]
IDENTIFIERS = ("lora", "merged")
Exported = tuple[Any, torch.Tensor]


@pytest.fixture(scope="module", params=CASES, ids=IDENTIFIERS)
def exported(request: pytest.FixtureRequest) -> Exported:
    """The program in plain aten, and what eager torch gives."""
    wrapped = Logits(adapted(*request.param))
    with torch.no_grad():
        expected = wrapped(IDS)
        program = torch.export.export(wrapped, (IDS,))
    assert "deltaops" in str(program.graph)
    return program.run_decompositions(decompositions()), expected


def test_export_gives_what_eager_gives(exported: Exported) -> None:
    program, expected = exported
    assert "deltaops" not in str(program.graph)
    torch.testing.assert_close(program.module()(IDS), expected, rtol=1e-4, atol=1e-5)


def test_onnxruntime_gives_what_eager_gives(exported: Exported, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (program, expected), file = exported, tmp_path / "model.onnx"
    torch.onnx.export(program, (IDS,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-3, atol=1e-4)
