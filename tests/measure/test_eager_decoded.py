"""The eager form of what a fitted decoder decodes, beside ours and beside its formula."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import deltaops
from deltaops import Adapter, IntrinsicAdapter, IntrinsicPrompt
from deltaops.measure import pair
from deltaops.measure.cell import EAGER, OURS
from deltaops.measure.compare.reader import Reader
from deltaops.measure.eager_decoded import decoding
from deltaops.measure.workloads import Workload
from deltaops.methods import Delta
from deltaops.methods.decoder import AdapterSizes, Sizes, write_decoder
from deltaops.modules import FittedDecoder
from deltaops.testing.architectures import HIDDEN, build


def reader() -> nn.Module:
    return Reader(build("bert"), HIDDEN, 20)


def prompts(folder: Path) -> Delta:
    """A prompt by a decoder that was fitted, with some values."""
    sizes = Sizes(intrinsic_dim=3, num_virtual_tokens=4, width=HIDDEN, hidden=6)
    tensors = {name: torch.randn(shape) * 0.3 for name, shape in sizes.shapes().items()}
    write_decoder(folder, sizes, tensors, {"tasks": []})
    return IntrinsicPrompt(decoder=str(folder))


def adapters(folder: Path) -> Delta:
    """All adapters by a decoder that was fitted, with some values."""
    delta = Adapter("pfeiffer", size=5)
    handle = deltaops.attach(reader(), delta)
    sizes = AdapterSizes(3, sum(p.numel() for p in handle.parameters()), 6)
    tensors = {name: torch.randn(shape) * 0.1 for name, shape in sizes.shapes().items()}
    places = [[site.path, site.out_features] for site in handle.places]
    facts = {"tasks": [], "adapter": delta.settings(), "places": places}
    write_decoder(folder, sizes, tensors, facts)
    return IntrinsicAdapter(decoder=str(folder))


def test_both_pass_the_gate_and_train_three_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = Workload("bert", reader, 60, 3, 8, classes=20).inputs()
    for name, make in (("prompts", prompts), ("adapters", adapters)):
        handle = deltaops.attach(reader(), make(tmp_path / name))
        assert handle.delta.decoder is not None  # type: ignore[attr-defined]  # an intrinsic one
        peers, absent = pair.held_pair(reader(), handle, batch)
        assert absent == {}
        trained = {who: [p.numel() for p in leaves] for who, (_, leaves) in peers.items()}
        assert trained == {OURS: [3], EAGER: [3]}
        twin = peers[EAGER][0]
        assert any(key.endswith("eager_second_weight") for key, _ in twin.named_buffers())


def test_the_eager_form_is_the_formula() -> None:
    torch.manual_seed(0)
    shapes = Sizes(intrinsic_dim=3, num_virtual_tokens=2, width=4, hidden=6).shapes()
    t: dict[str, Tensor] = {name: torch.randn(shape) for name, shape in shapes.items()}
    z, holder = torch.randn(3, dtype=torch.float64), nn.Module()
    found = decoding(FittedDecoder(t, 4), z, holder)()
    t = {name: tensor.double() for name, tensor in t.items()}
    inner = torch.tanh(t["first.weight"] @ z + t["first.bias"])
    torch.testing.assert_close(found, t["second.weight"] @ inner + t["second.bias"])
    assert {b.dtype for b in holder.buffers()} == {torch.float64}
    assert not holder.state_dict()
