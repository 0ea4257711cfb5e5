"""Prefixes that an MLP computes: once in a pass, under checkpoints, and kept for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltaops
from deltaops import Prefix
from deltaops.modules import prefix_encoder
from deltaops.surgery.files import CONFIG
from deltaops.testing.architectures import answer, build

from .prefixed import attached, logits, same

transformers = pytest.importorskip("transformers")

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_mlp_runs_once_for_a_pass_of_a_stack(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, calls, real = attached(name, reparameterised=True), [], prefix_encoder.encode
    monkeypatch.setattr(prefix_encoder, "encode", lambda *t: calls.append(1) or real(*t))
    handle.model.train()
    handle.model.gradient_checkpointing_enable()
    answer(name, handle.model).square().mean().backward()
    stacks = 2 if name == "t5" else 1
    assert len(calls) == stacks
    with torch.no_grad():
        expected = answer(name, handle.model)
        assert len(calls) == 2 * stacks
        for parameter in handle.parameters():
            parameter.data.mul_(2.0)  # which no version counts
        assert not torch.equal(answer(name, handle.model), expected)
    assert len(calls) == 3 * stacks


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_blocks_that_run_again_have_the_gradients_of_those_that_do_not(
    name: str, reentrant: bool
) -> None:
    handle = attached(name, reparameterised=True)
    model, found = handle.model.train(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        y, again = answer(name, model), answer(name, model)
        with torch.no_grad():
            answer(name, model.eval())  # of which the backward pass may read nothing
        model.train()
        (y.square().mean() + again.mean()).backward()
        found.append([p.grad for p in handle.parameters()])
        model.zero_grad()
    assert all(same(*pair) for pair in zip(*found, strict=True))


def test_a_pass_that_fails_leaves_no_rows_behind() -> None:
    handle = attached("llama", reparameterised=True)
    rows = handle.model.layers[0].self_attn.__dict__["_deltaops_prefix"].encoded.rows
    with pytest.raises(IndexError):
        handle.model(input_ids=torch.tensor([[10**6]]))
    assert rows._of_pass is None
    handle.revert()
    assert not handle.model._forward_hooks


def test_blocks_that_are_called_alone_have_the_present_prefix() -> None:
    handle = attached("llama", reparameterised=True)
    model, attention = handle.model, handle.model.layers[0].self_attn
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    turn = model.rotary_emb(x, torch.arange(5)[None])
    answer("llama", model)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(0.5)
        alone = attention(x, position_embeddings=turn, attention_mask=None)[0]
        answer("llama", model)
        assert torch.equal(alone, attention(x, position_embeddings=turn, attention_mask=None)[0])


def test_training_goes_on_from_a_checkpoint_and_a_flat_one_computes_the_same(
    tmp_path: Path,
) -> None:
    settings = {"reparameterised": True, "shift_positions": True, "task_type": "CAUSAL_LM"}
    handle = attached("gpt2", "LMHeadModel", encoder_hidden_size=5, **settings)

    def step(handle: Any) -> None:
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        logits(handle.model, "gpt2").square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(handle)
    handle.save(tmp_path / "ours")
    handle.save(tmp_path / "flat", flat=True)
    loaded = deltaops.load(build("gpt2", head="LMHeadModel"), tmp_path / "ours")
    flat = deltaops.load(build("gpt2", head="LMHeadModel"), tmp_path / "flat")
    assert (tmp_path / "flat" / CONFIG).exists()
    assert not flat.delta.reparameterised
    assert same(logits(flat.model, "gpt2"), logits(handle.model, "gpt2"))
    for one in (handle, loaded):
        step(one)
    assert all(torch.equal(t, loaded.state()[k]) for k, t in handle.state().items())


def test_a_trained_bias_that_stands_beside_the_blocks_has_its_gradient() -> None:
    """UDOP's, whose first attention has a table as well, which its encoder does not read."""
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.UdopConfig(
        **sizes, vocab_size=60, image_size=32, patch_size=16, max_2d_position_embeddings=64
    )
    model = transformers.UdopEncoderModel(config).eval()
    deltaops.attach(model, Prefix(num_virtual_tokens=3, modules_to_save=["relative_bias"]))
    tables = list(model.encoder.relative_bias.parameters())
    boxes = torch.rand(2, 7, 4).sort(-1)[0]

    def run() -> torch.Tensor:
        y = model(input_ids=torch.arange(1, 15).view(2, 7), bbox=boxes).last_hidden_state
        return 1e3 * y[..., 0].sum()

    run().backward()
    grads = [table.grad.clone() for table in tables]
    assert len(grads) == 3
    slope = float(sum(grad.square().sum() for grad in grads))
    step, values = 0.1 / slope**0.5, []
    with torch.no_grad():
        for move in (step, -2 * step):  # there, and as far to the other side
            for table, grad in zip(tables, grads, strict=True):
                table.add_(grad, alpha=move)
            values.append(float(run()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.05)
