"""Prefix tuning: values, positions, and what a prefix may not do unseen."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaops
from deltaops import Prefix
from deltaops.errors import (
    AttachError,
    ConfigError,
    DeltaopsError,
    NoBackendError,
    ShapeError,
)
from deltaops.testing.architectures import ARCHITECTURES, answer, batch, build

from .prefixed import SIZES, P, attached, random, same

transformers = pytest.importorskip("transformers")

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

# --------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer ≥ 1"),
        ({"reparameterised": 1}, "reparameterised must be a bool"),
        ({"encoder_hidden_size": 8}, "there is none. Pass reparameterised=True"),
        ({"reparameterised": True, "encoder_hidden_size": 0.5}, "encoder_hidden_size must be"),
    ],
    ids=str,
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prefix(**settings)


@pytest.mark.parametrize("mlp", [False, True], ids=["", "mlp"])
def test_keys_start_apart_and_values_near_zero(mlp: bool) -> None:
    for name, spread in (("gpt2", 1.0), ("t5", 12**-0.5)):  # T5 has no scale of D^-1/2
        torch.manual_seed(0)
        handle = deltaops.attach(build(name), Prefix(num_virtual_tokens=64, reparameterised=mlp))
        _, state, sites = handle.delta.portable(
            {}, handle.name, handle.state(), handle.places, flat=True
        )
        for site in sites:
            keys, values = state[site.key("prefix_k")], state[site.key("prefix_v")]
            assert keys.shape == values.shape == (2, 64, 12)
            assert 0.8 < keys.std() / spread < 1.2
            assert 0.016 < values.std() < 0.024


# ------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta"])
def test_positions_that_are_used_up_are_an_error(name: str) -> None:
    limits = {"gpt2": {"n_positions": 10}}.get(name, {"max_position_embeddings": 10})
    room = 10 - 1 if name == "roberta" else 10  # of which padding has the first
    model = build(name, **limits)
    with pytest.raises(ConfigError, match="must leave tokens a position"):
        deltaops.attach(model, Prefix(num_virtual_tokens=10, shift_positions=True))
    deltaops.attach(model, Prefix(num_virtual_tokens=P, shift_positions=True))
    ids = torch.full((1, room - P), 5)
    model(input_ids=ids)
    with pytest.raises(ShapeError, match=f"has {room} positions.*Pass at most {room - P}"):
        model(input_ids=torch.full((1, room - P + 1), 5))


def test_positions_that_nothing_says_are_an_error() -> None:
    model = build("vit")
    with pytest.raises(AttachError, match="found no embedding of positions"):
        deltaops.attach(model, Prefix(shift_positions=True))
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@torch.no_grad()  # T5's bias that wants a gradient takes another of torch's programs
def test_disabled_the_model_has_its_own_positions(name: str) -> None:
    before = answer(name, build(name))
    handle = random(
        deltaops.attach(
            build(name), Prefix(shift_positions=True), frozen=False, blocks=False, loss=False
        )
    )
    y = answer(name, handle.model)
    with handle.disabled():
        assert torch.equal(answer(name, handle.model), before)
    assert torch.equal(answer(name, handle.model), y)
    with handle.disabled():
        handle.revert()
    assert torch.equal(answer(name, handle.model), before)


# ------------------------------------------------------------------------------ models and modes


def test_a_model_that_attends_by_itself_is_refused_before_anything_changes() -> None:
    models = [
        transformers.FalconModel(transformers.FalconConfig(**SIZES)),
        transformers.DebertaV2Model(transformers.DebertaV2Config(**SIZES, intermediate_size=40)),
        transformers.Gemma2Model(
            transformers.Gemma2Config(
                **SIZES, intermediate_size=40, num_key_value_heads=1, head_dim=12, pad_token_id=0
            )
        ),
    ]
    for model, message in zip(
        models, ["AttentionInterface", "AttentionInterface", "'sdpa' does"], strict=True
    ):
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        before = model.config._attn_implementation
        with pytest.raises(AttachError, match=message):
            deltaops.attach(model, Prefix())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert model.config._attn_implementation == before
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_each_part_gets_its_own_implementation_back() -> None:
    model = build("t5")
    model.encoder.config._attn_implementation = "eager"
    handle = deltaops.attach(model, Prefix(target_modules="decoder-attention"))
    assert len(handle.sites) == 2
    assert model.encoder.config._attn_implementation == "deltaops"
    handle.revert()
    assert model.encoder.config._attn_implementation == "eager"
    assert model.decoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_models_of_one_config_object_come_and_go_alone(copied: Any) -> None:
    first: Any = build("llama")
    config, before = first.config, answer("llama", first)
    models = [first, type(first)(config).eval()]
    models[1].load_state_dict(first.state_dict())
    handles = [random(deltaops.attach(m, Prefix(num_virtual_tokens=P))) for m in models]
    expected = answer("llama", first)
    twin = copied(first)
    with handles[0].disabled():
        assert torch.equal(answer("llama", models[1]), expected)
    assert torch.equal(answer("llama", first), expected)
    handles[0].revert()
    assert torch.equal(answer("llama", models[1]), expected)
    handles[1].revert()
    assert config._attn_implementation == "sdpa"
    assert all(torch.equal(answer("llama", m), before) for m in models)
    assert torch.equal(answer("llama", twin), expected)
    found = deltaops.surgery.handle_of(twin)
    assert found is not None
    found.revert()
    assert twin.config._attn_implementation == "sdpa"


def test_a_config_of_a_model_with_a_prefix_makes_a_model_without() -> None:
    handle = attached("llama")
    other = type(handle.model)(copy.deepcopy(handle.model.config))
    deltaops.attach(other, Prefix()).revert()
    assert other.config._attn_implementation == "sdpa"


def test_another_implementation_would_leave_the_prefix_out() -> None:
    handle = attached("bert")
    handle.model.set_attn_implementation("eager")
    with pytest.raises(AttachError, match="was set to 'eager'"):
        answer("bert", handle.model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_of_attention_are_refused(name: str) -> None:
    handle = attached(name)
    with pytest.raises(ConfigError, match="cannot return output_attentions"):
        handle.model(**batch(name), output_attentions=True)
    with handle.disabled():
        handle.model(**batch(name), output_attentions=False)
    model = build(name, attn_implementation="eager")
    model.config.output_attentions = True
    with pytest.raises(AttachError, match="has output_attentions=True in its config"):
        deltaops.attach(model, Prefix())


@pytest.mark.parametrize("settings", [{"strict": True}, {"backend": "cpu"}], ids=str)
def test_what_no_backend_takes_raises_where_one_was_asked_for(settings: dict[str, Any]) -> None:
    available = "cpu" in deltaops.backends()
    model = build("bert", attention_probs_dropout_prob=0.5)
    deltaops.attach(model, Prefix(), **settings)
    if available:
        answer("bert", model)
    with pytest.raises(NoBackendError, match="does not take dropout of the weights"):
        answer("bert", model.train())
    model = build("t5")
    deltaops.attach(model, Prefix(), **settings)
    if available:
        answer("t5", model)
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.requires_grad_()
    with pytest.raises(NoBackendError, match="does not take a bias that wants a gradient"):
        answer("t5", model)


def test_a_named_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaops.modules import prefix as module

    seen, real = [], module.prefix_attention
    monkeypatch.setattr(
        module, "prefix_attention", lambda *t, **s: seen.append(s["backend"]) or real(*t, **s)
    )
    model = build("gpt2")
    handle = deltaops.attach(model, Prefix(), backend="reference", frozen=False, blocks=False)
    answer("gpt2", model)
    assert seen == ["reference"] * 2
    rows = [row for row in deltaops.report(model).rows if row.kind == "prefix"]
    assert [(row.path, row.backend) for row in rows] == [(p, "reference") for p in handle.sites]
    with handle.disabled():
        assert {r.backend for r in deltaops.report(model).rows if r.kind == "prefix"} == {"torch"}


@pytest.mark.parametrize("mlp", [False, True], ids=["", "mlp"])
@pytest.mark.parametrize("shift", [False, True], ids=["", "shifted"])
def test_generation_with_shared_heads_padding_and_a_cache(mlp: bool, shift: bool) -> None:
    model: Any = build("llama", head="ForCausalLM", num_attention_heads=4, num_key_value_heads=2)
    random(
        deltaops.attach(
            model, Prefix(num_virtual_tokens=P, reparameterised=mlp, shift_positions=shift)
        )
    )
    given = {"input_ids": torch.tensor([[0, 0, 3, 40], [5, 17, 3, 40]])}
    given["attention_mask"] = (given["input_ids"] > 0).long()
    found = [
        model.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None, **how)
        for how in ({"use_cache": False}, {}, {"cache_implementation": "static"})
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_bias_of_t5_that_wants_a_gradient_is_told() -> None:
    handle = attached("t5")
    model = handle.model.train()

    def told() -> dict[str, tuple[str, str]]:
        rows = deltaops.report(model).rows
        return {r.path: (r.backend, r.reason) for r in rows if r.path in handle.sites}

    first = "encoder.block.0.layer.0.SelfAttention"
    assert "wants a gradient" not in str(told())
    cross = {why for path, (_, why) in told().items() if path.endswith("EncDecAttention")}
    assert "torch where a bias" not in str(cross)
    model.get_submodule(first).relative_attention_bias.requires_grad_()
    assert told()[first][0] == "torch"
    assert "its relative_attention_bias is trained" in told()[first][1]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_a_gradient_of_t5s_bias_that_nobody_reads_keeps_no_attention_from_the_op(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaops.modules import prefix as module

    seen, real = [], module.prefix_attention
    monkeypatch.setattr(module, "prefix_attention", lambda *t, **s: seen.append(1) or real(*t, **s))
    handle = attached("t5")
    model, found = handle.model.train(), []
    model.enable_input_require_grads()
    for passes in (1, 2):  # the blocks run again for their gradients
        y = answer("t5", model)
        y.square().mean().backward()
        assert len(seen) == passes * len(handle.sites)
        found.append([y, *(p.grad for p in handle.parameters())])
        seen.clear()
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # else the zeros want no gradient, and nothing is tested
        assert model.decoder.block[0].layer[1].EncDecAttention.gradient_checkpointing
    assert all(same(*pair) for pair in zip(*found, strict=True))


def test_t5_generates_the_same_with_a_cache() -> None:
    model = attached("t5", "ForConditionalGeneration").model
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    given = {"input_ids": torch.tensor([[9, 17, 3, 40], [5, 17, 3, 40]])}
    found = [model.generate(**given, max_new_tokens=4, use_cache=cache) for cache in (False, True)]
    assert torch.equal(*found)
    assert model(**given, labels=torch.tensor([[3], [4]])).loss.isfinite()  # one key, too


def test_a_pickle_runs_in_a_fresh_process(tmp_path: Path) -> None:
    handle = attached("bert", reparameterised=True, shift_positions=True)
    answer("bert", handle.model)  # what the MLP computed is a node, and stays behind
    expected = answer("bert", handle.model).detach()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(handle.model))
    program = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "from deltaops.testing.architectures import answer\n"
        "torch.save(answer('bert', model).detach(), sys.argv[2])\n"
    )
    files = [str(tmp_path / "model.pkl"), str(tmp_path / "y.pt")]
    command = [sys.executable, "-c", program, *files]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert same(torch.load(files[1]), expected)


def test_a_copy_has_a_prefix_of_its_own() -> None:
    handle = attached("llama", reparameterised=True)
    expected = answer("llama", handle.model)
    twin = copy.deepcopy(handle.model)
    found = deltaops.surgery.handle_of(twin)
    assert found is not None
    found.revert()
    assert torch.equal(answer("llama", handle.model), expected)
    assert not any(m._forward_pre_hooks for m in twin.modules())


def test_a_second_delta_and_a_taken_name_are_refused() -> None:
    handle = attached("llama", "ForCausalLM")
    with pytest.raises(AttachError, match="has a delta already"):
        deltaops.attach(handle.model.model, Prefix())
    model = build("bert")
    model.prefix_encoder = nn.Identity()
    with pytest.raises(AttachError, match="must have no 'prefix_encoder' yet"):
        deltaops.attach(model, Prefix(reparameterised=True))
    assert isinstance(model.prefix_encoder, nn.Identity)
    assert model.config._attn_implementation == "sdpa"


def test_it_is_not_merged_and_every_size_is_shown() -> None:
    handle = attached("gpt2", reparameterised=True, encoder_hidden_size=5)
    with pytest.raises(DeltaopsError, match="part of no weight"):
        handle.merge()
    tree = str(handle)
    sizes = P * 24 + 5 * 24 + 5 + 96 * 5 + 96
    assert f"+{sizes:,}" in tree
    assert "trained: 797" in tree
