"""OpenDelta's parallel adapters by its names, computed by hooks as it does, and taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import deltaops
from deltaops.cli import app
from deltaops.errors import CheckpointError
from deltaops.surgery.opendelta import from_opendelta
from deltaops.surgery.opendelta_parallel import ends
from deltaops.testing import relative_error
from deltaops.testing.architectures import HIDDEN, answer, build

WIDTH = 5
Pairs = list[tuple[str, str]]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.2


def adapted(model: nn.Module, pairs: Pairs) -> dict[str, Tensor]:
    """An adapter from what the first of each pair is given to what the second returns, by hooks."""
    found: dict[str, Tensor] = {}
    for start, end in pairs:
        down, d, up, u = drawn(WIDTH, HIDDEN), drawn(WIDTH), drawn(HIDDEN, WIDTH), drawn(HIDDEN)
        seen: list[Tensor] = []

        def before(module: nn.Module, args: Any, seen: list[Tensor] = seen) -> None:
            seen.append(args[0])

        def after(
            module: nn.Module, args: Any, y: Tensor, seen: list[Tensor] = seen,
            of: tuple[Tensor, ...] = (down, d, up, u),
        ) -> Tensor:  # fmt: skip
            down, d, up, u = of
            inner = functional.gelu(seen.pop() @ down.T + d, approximate="tanh")
            return y + inner @ up.T + u

        model.get_submodule(start).register_forward_pre_hook(before)
        model.get_submodule(end).register_forward_hook(after)
        names = ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")
        for name, tensor in zip(names, (down, d, up, u), strict=True):
            found[f"{start}.parallel_adapter.modulelist.{name}"] = tensor
    return found


BLOCKS = range(2)
CASES: dict[str, tuple[str, list[str], Pairs]] = {
    "two layers of bert": (
        "bert",
        ["intermediate.dense", r"[r]layer\.\d+\.output\.dense"],
        [(f"encoder.layer.{i}.intermediate.dense", f"encoder.layer.{i}.output.dense")
         for i in BLOCKS],
    ),
    "a module of gpt2": ("gpt2", ["mlp", "mlp"], [(f"h.{i}.mlp", f"h.{i}.mlp") for i in BLOCKS]),
    "some of llama": ("llama", ["1.mlp", "1.mlp"], [("layers.1.mlp", "layers.1.mlp")]),
    "the decoder of t5": (
        "t5",
        ["decoder.block.0.layer.2.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"],
        [("decoder.block.0.layer.2.DenseReluDense",) * 2],
    ),
    "single layers and a feed-forward": (
        "bert",
        ["query", "query", "0.intermediate.dense", "layer.0.output.dense"],
        [("encoder.layer.0.attention.self.query",) * 2,
         ("encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"),
         ("encoder.layer.1.attention.self.query",) * 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "modules", "pairs"), CASES.values(), ids=CASES)
def test_they_compute_what_the_hooks_compute(name: str, modules: list[str], pairs: Pairs) -> None:
    torch.manual_seed(1)
    twin, model = build(name), build(name)
    config = {"delta_type": "parallel_adapter", "modified_modules": modules}
    assert list(ends(twin, config).items()) == pairs
    tensors = adapted(twin, pairs)
    before, expected = answer(name, model), answer(name, twin)
    handle = from_opendelta(model, config, tensors)
    assert relative_error(answer(name, model), expected) < 1e-5
    assert relative_error(before, expected) > 1e-2
    assert len(handle.sites) == len(pairs)
    handle.revert()
    assert torch.equal(answer(name, model), before)


def test_copies_at_the_other_end_are_the_same_adapter() -> None:
    _, modules, pairs = CASES["two layers of bert"]
    model, config = build("bert"), {"modified_modules": modules}
    tensors = adapted(build("bert"), pairs)
    copies = dict(tensors)
    for start, end in pairs:
        copies |= {k.replace(start, end): t.clone() for k, t in tensors.items() if start in k}
    handle = from_opendelta(model, config, copies)
    assert len(handle.state()) == len(tensors)
    handle.revert()
    changed = copies | {f"{pairs[0][1]}.parallel_adapter.modulelist.down_proj.bias": drawn(WIDTH)}
    with pytest.raises(CheckpointError, match=r"that differ in down_proj.bias, expected one"):
        from_opendelta(model, config, changed)


MLP = {"modified_modules": ["mlp", "mlp"]}
AT = "parallel_adapter.modulelist"
REFUSALS: dict[str, tuple[dict[str, Any], Pairs, dict[str, Tensor], str]] = {
    "no places": ({}, [("h.0.mlp", "h.0.mlp")], {}, "must name modified_modules"),
    "common names": (
        {"modified_modules": ["ff.w1", "ff.w2"], "common_structure": True},
        [("h.0.mlp", "h.0.mlp")], {}, "must name modified_modules",
    ),
    "an odd number": ({"modified_modules": ["mlp"]}, [("h.0.mlp",) * 2], {}, "are pairs, got 1"),
    "no names": ({"modified_modules": [3, 3]}, [("h.0.mlp",) * 2], {}, "must be a list of names"),
    "no regex": (
        {"modified_modules": ["[r](", "[r]("]}, [("h.0.mlp",) * 2], {}, "no regular expression",
    ),
    "an attention": (
        {"modified_modules": ["attn", "attn"]},
        [(f"h.{i}.attn",) * 2 for i in BLOCKS],  # type: ignore[misc]  # two of one are a pair
        {}, "stands around 'h.0.attn', a GPT2Attention; ours stand beside whole feed-forwards",
    ),
    "across": (
        {"modified_modules": ["attn", "mlp"]},
        [(f"h.{i}.attn", f"h.{i}.mlp") for i in BLOCKS],
        {}, "stands from 'h.0.attn' to 'h.0.mlp'",
    ),
    "one is missing": (MLP, [("h.0.mlp",) * 2], {}, "has no parallel adapter at 'h.1.mlp'"),
    "one too many": (
        {"modified_modules": ["0.mlp", "0.mlp"]}, [(f"h.{i}.mlp",) * 2 for i in BLOCKS],  # type: ignore[misc]  # as above
        {}, "at 'h.1.mlp', where modified_modules of its config.json puts none",
    ),
    "scaled": (
        {**MLP, "scaled": 4.0}, [(f"h.{i}.mlp",) * 2 for i in BLOCKS],  # type: ignore[misc]  # as above
        {}, "has scaled=4.0, which none of its versions passes on",
    ),
    "a shape": (
        MLP, [(f"h.{i}.mlp",) * 2 for i in BLOCKS],  # type: ignore[misc]  # as above
        {f"h.0.mlp.{AT}.down_proj.weight": drawn(WIDTH)}, "must have 2 dimensions",
    ),
    "a name": (
        MLP, [(f"h.{i}.mlp",) * 2 for i in BLOCKS],  # type: ignore[misc]  # as above
        {"h.0.mlp.parallel_adapter.gate": drawn(2)}, "has '.gate' in the parallel adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "pairs", "more", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_taken_over_is_told_and_the_model_stays(
    config: dict[str, Any], pairs: Pairs, more: dict[str, Tensor], message: str
) -> None:
    model = build("gpt2")
    kinds, tensors = [type(m) for m in model.modules()], adapted(build("gpt2"), pairs)
    with pytest.raises(CheckpointError, match=message):
        from_opendelta(model, config, tensors | more)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


def test_a_folder_becomes_our_format(tmp_path: Path) -> None:
    torch.manual_seed(1)
    name, modules, pairs = CASES["single layers and a feed-forward"]
    twin, model = build(name), build(name)
    model.save_pretrained(tmp_path / "bert")  # type: ignore[operator]  # transformers'
    source = tmp_path / "od"
    source.mkdir()
    config = {"modified_modules": modules, "backbone_class": "BertModel", "bottleneck_dim": WIDTH}
    (source / "config.json").write_text(json.dumps(config))
    torch.save(adapted(twin, pairs), source / "pytorch_model.bin")
    arguments = ["convert", str(source), str(tmp_path / "out"), "--model", str(tmp_path / "bert")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    deltaops.load(model, tmp_path / "out")
    assert relative_error(answer(name, model), answer(name, twin)) < 1e-5
