"""Intrinsic prompts: decoded once in each pass, from a seed or from a decoder's file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import IntrinsicPrompt, Prompt
from deltaops.errors import CheckpointError, ConfigError, TargetError
from deltaops.methods.decoder import FACTS, START, TENSORS, Sizes, read_tensors, write_decoder
from deltaops.surgery.files import MANIFEST
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import HIDDEN, answer, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

SIZES = Sizes(intrinsic_dim=3, num_virtual_tokens=4, width=HIDDEN, hidden=6)


def decoder(folder: Path, sizes: Sizes = SIZES) -> dict[str, Tensor]:
    """Some decoder's tensors, also in ``folder``."""
    tensors = {name: torch.randn(shape) * 0.3 for name, shape in sizes.shapes().items()}
    write_decoder(folder, sizes, tensors, {"tasks": []})
    return tensors


def spoil(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps(facts | changes))


# ------------------------------------------------------------------------------------ fitted


def test_a_fitted_decoders_prompt_is_its_formula(tmp_path: Path) -> None:
    t = decoder(tmp_path)
    model, twin = build("gpt2"), build("gpt2")
    handle = deltaops.attach(model, IntrinsicPrompt(decoder=str(tmp_path)))
    (z,) = handle.parameters()
    assert torch.equal(z, t[START])
    inner = torch.tanh(t["first.weight"] @ t[START] + t["first.bias"])
    rows = (t["second.weight"] @ inner + t["second.bias"]).view(4, HIDDEN)
    full = deltaops.attach(twin, Prompt(num_virtual_tokens=4))
    (prompt,) = full.parameters()
    with torch.no_grad():
        prompt.copy_(rows)
    y, expected = answer("gpt2", model), answer("gpt2", twin)
    assert relative_error(y, expected) < 16 * bound(0.0, torch.float32)
    (y.square().mean() + expected.square().mean()).backward()
    assert prompt.grad is not None
    slope = 1 - inner.square()
    chain = t["first.weight"].T @ (slope * (t["second.weight"].T @ prompt.grad.flatten()))
    torch.testing.assert_close(z.grad, chain, rtol=1e-4, atol=1e-8)


def test_it_is_decoded_once_for_the_whole_batch_and_every_layer() -> None:
    model: Any = build("bert").train()
    model.gradient_checkpointing_enable()
    deltaops.attach(model, IntrinsicPrompt())
    calls: list[int] = []
    inner = model.prompt_encoder["default"].decoder
    inner.register_forward_hook(lambda *_: calls.append(1))
    answer("bert", model).sum().backward()
    assert calls == [1]


def test_an_adapter_holds_the_numbers_and_which_decoder_they_are_for(tmp_path: Path) -> None:
    decoder(tmp_path / "decoder")
    model = build("llama")
    handle = deltaops.attach(model, IntrinsicPrompt(decoder=str(tmp_path / "decoder")))
    with torch.no_grad():
        next(handle.parameters()).add_(0.5)
    handle.save(tmp_path / "adapter")
    assert {k: v.shape for k, v in handle.state().items()} == {"intrinsic": (3,)}
    assert not any("decoder" in key for key in model.state_dict())
    twin = build("llama")
    loaded = deltaops.load(twin, tmp_path / "adapter")
    assert loaded.delta == handle.delta
    assert torch.equal(answer("llama", twin), answer("llama", model))
    decoder(tmp_path / "decoder")  # another one, in its place
    with pytest.raises(CheckpointError, match="holds another decoder than the one"):
        deltaops.load(build("llama"), tmp_path / "adapter")
    (tmp_path / "decoder").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="holds no decoder that can be read"):
        deltaops.load(build("llama"), tmp_path / "adapter")


@pytest.mark.parametrize("fitted", [False, True], ids=["random", "fitted"])
def test_a_flat_file_is_a_prompt_of_pefts(fitted: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    decoder(tmp_path / "decoder")
    model = build("gpt2", head="ForSequenceClassification")
    handle = deltaops.attach(
        model,
        IntrinsicPrompt(
            decoder=str(tmp_path / "decoder") if fitted else None, modules_to_save=["score"]
        ),
    )
    with torch.no_grad():
        next(handle.parameters()).add_(0.5)
        model.score.weight.mul_(2.0)
    handle.save(tmp_path / "flat", flat=True)
    ids = torch.tensor([[5, 17, 3, 40], [8, 9, 30, 2]])
    y = model(input_ids=ids).logits
    theirs = peft.PeftModel.from_pretrained(
        build("gpt2", head="ForSequenceClassification"), tmp_path / "flat"
    )
    assert relative_error(theirs.eval()(input_ids=ids).logits, y) < 16 * bound(0.0, torch.float32)
    loaded = deltaops.load(build("gpt2", head="ForSequenceClassification"), tmp_path / "flat")
    assert isinstance(loaded.delta, Prompt)
    assert torch.equal(loaded.model(input_ids=ids).logits, y)


def test_sizes_are_the_decoders(tmp_path: Path) -> None:
    decoder(tmp_path)
    delta = IntrinsicPrompt(decoder=str(tmp_path), intrinsic_dim=3)
    assert (delta.dimension, delta.length) == (3, 4)
    with pytest.raises(ConfigError, match=r"intrinsic_dim must be the decoder's 3, got 5"):
        IntrinsicPrompt(decoder=str(tmp_path), intrinsic_dim=5)
    with pytest.raises(ConfigError, match=r"num_virtual_tokens must be the decoder's 4, got 20"):
        IntrinsicPrompt(decoder=str(tmp_path), num_virtual_tokens=20)


def test_a_decoder_of_another_width_is_refused(tmp_path: Path) -> None:
    decoder(tmp_path, SIZES._replace(width=8))
    with pytest.raises(TargetError, match=f"embeddings are {HIDDEN} wide, and the decoder makes 8"):
        deltaops.attach(build("gpt2"), IntrinsicPrompt(decoder=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "must have format='deltaops-decoder' and version=1"),
        ({"version": 2}, "version=1"),
        ({"of": "lora"}, "must be of='prompt' or 'adapter', got 'lora'"),
        ({"width": 0}, "width must be an integer ≥ 1, got 0"),
        ({"hidden": True}, "hidden must be an integer"),
        ({"hidden": 7}, r"decoder\.safetensors holds other tensors"),
        ({"digest": "0"}, r"decoder\.safetensors holds other tensors"),
    ],
    ids=str,
)
def test_a_broken_decoder_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    decoder(tmp_path)
    spoil(tmp_path, **changes)
    model = build("gpt2")
    before = [type(m) for m in model.modules()]
    with pytest.raises(CheckpointError, match=message):
        deltaops.attach(model, IntrinsicPrompt(decoder=str(tmp_path)))
    assert [type(m) for m in model.modules()] == before


def test_a_torn_decoder_is_refused(tmp_path: Path) -> None:
    decoder(tmp_path)
    held = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(held[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(tmp_path)
    (tmp_path / FACTS).write_text("{")
    with pytest.raises(CheckpointError, match="holds no decoder that can be read"):
        IntrinsicPrompt(decoder=str(tmp_path))


# ------------------------------------------------------------------------------------ random


def test_a_random_projection_is_of_its_seed_alone(tmp_path: Path) -> None:
    model = build("gpt2")
    handle = deltaops.attach(model, IntrinsicPrompt(seed=3))
    with torch.no_grad():
        next(handle.parameters()).copy_(torch.linspace(-1, 1, 5))
    handle.save(tmp_path)
    assert "projection" not in (tmp_path / MANIFEST).read_text()
    expected = answer("gpt2", model)
    program = (
        "import sys, torch, deltaops;"
        "from deltaops.testing.architectures import answer, build;"
        "model = build('gpt2'); torch.manual_seed(99); deltaops.load(model, sys.argv[1]);"
        "torch.save(model.prompt_encoder['default'](), sys.argv[2])"
    )
    out = tmp_path / "prompt.pt"
    subprocess.run([sys.executable, "-P", "-c", program, str(tmp_path), str(out)], check=True)
    made: Any = model.get_submodule("prompt_encoder.default")
    assert torch.equal(torch.load(out), made().detach())
    other = build("gpt2")
    with torch.no_grad():
        (z,) = deltaops.attach(other, IntrinsicPrompt(seed=4)).parameters()
        z.copy_(torch.linspace(-1, 1, 5))
    assert not torch.equal(answer("gpt2", other), expected)


def test_it_starts_as_tokens_and_moves_on_their_scale() -> None:
    model: Any = build("gpt2")
    table = model.wte.weight.detach().clone()
    (z,) = deltaops.attach(model, IntrinsicPrompt(intrinsic_dim=50)).parameters()
    prompt = model.prompt_encoder["default"]
    start = prompt().detach()
    assert all(bool((table == row).all(1).any()) for row in start)
    with torch.no_grad():
        z.copy_(torch.randn(50))
    moved = (prompt().detach() - start).std() / table.std()
    assert 0.7 < float(moved) < 1.4


def test_it_says_that_nothing_was_fitted(tmp_path: Path) -> None:
    model: nn.Module = build("gpt2")
    handle = deltaops.attach(model, IntrinsicPrompt())
    words = "a fixed random projection, made from its seed and not stored"
    assert f"), decoded by {words}" in str(handle)
    assert any(words in row.reason for row in deltaops.report(model).rows)
    decoder(tmp_path)
    fitted = IntrinsicPrompt(decoder=tmp_path)
    assert fitted == IntrinsicPrompt(decoder=str(tmp_path))
    assert "random" not in repr(fitted)
    other = build("gpt2")
    deltaops.attach(other, fitted)
    assert any("fitted to the prompts" in row.reason for row in deltaops.report(other).rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intrinsic_dim": -1}, "intrinsic_dim must be an integer ≥ 1"),
        ({"intrinsic_dim": 0}, "intrinsic_dim must be an integer ≥ 1"),
        ({"num_virtual_tokens": 1.5}, "num_virtual_tokens must be an integer ≥ 1"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer ≥ 1"),
        ({"seed": -1}, "seed must be an integer ≥ 0"),
        ({"seed": 2**63}, "seed must be an integer ≥ 0 and below 2⁶³"),
        ({"decoder": 3}, "decoder must be the path of a folder"),
        ({"layers_to_transform": [0]}, "before the first layer"),
    ],
    ids=str,
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IntrinsicPrompt(**settings)
