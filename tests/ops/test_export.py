"""Adapted models through torch.export and ONNX: eager torch and onnxruntime give the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltaops
from deltaops import ops
from deltaops.ops import decompositions
from deltaops.testing import architectures

# torch's exporters warn of torch's own code
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")
]
EXAMPLES = {
    "cross_entropy": lambda x: ops.cross_entropy(x[0], torch.tensor([0, -100, 2])),
    "gated": lambda x: ops.gated(x, 2 * x),
    "norm_bias": lambda x: ops.norm_bias(x, x[0, 0], x[0, 1]),
    "bottleneck": lambda x: ops.bottleneck(x, x[0, :2], x[0, :2].T.contiguous(), norm="rms"),
    "delta_linear": lambda x: ops.delta_linear(
        x, x[0], x[0, :, 0], [ops.Branch(x[1, :1], x[1, :, :1])]
    ),
    "rotary": lambda x: ops.rotary(x[None], x[:1], x[:1]),
    "attention": lambda x: ops.attention(x[None], x[None], x[None], causal=True),
    "prefix_attention": lambda x: ops.prefix_attention(x[None], x[None], x[None], x, x),
    "prompt_embedding": lambda x: ops.prompt_embedding(x[0], torch.tensor([[2, 0]]), x[1]),
    "dora_norm": lambda x: ops.dora_norm(x[0], x[1, :1], x[1, :, :1], 2.0),
}
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


def ours(program: Any) -> set[str]:
    """Our ops in it, those in graphs within its graph too: autocast and no_grad make some."""
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    return {target for target in targets if target.startswith("deltaops.")}


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
    assert ours(program)
    return program.run_decompositions(decompositions()), expected


def test_export_gives_what_eager_gives(exported: Exported) -> None:
    program, expected = exported
    assert not ours(program)
    torch.testing.assert_close(program.module()(IDS), expected, rtol=1e-4, atol=1e-5)


def test_onnxruntime_gives_what_eager_gives(exported: Exported, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (program, expected), file = exported, tmp_path / "model.onnx"
    torch.onnx.export(program, (IDS,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-3, atol=1e-4)


class Everything(torch.nn.Module):
    """Each op once."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [example(x) for example in EXAMPLES.values()]


def test_every_op_has_a_decomposition_that_gives_the_same() -> None:
    table = decompositions()
    assert {op.name().removeprefix("deltaops::") for op in table} == set(EXAMPLES)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Everything(), (x,))
    assert ours(program) == {f"deltaops.{name}.default" for name in EXAMPLES}
    plain = program.run_decompositions(table)
    assert not ours(plain)
    torch.testing.assert_close(plain.module()(x), Everything()(x))
