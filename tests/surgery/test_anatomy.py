"""What the rules find in each architecture, written down by hand once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaops
from deltaops.errors import TargetError
from deltaops.surgery.anatomy import anatomy, resolve
from deltaops.testing.architectures import ARCHITECTURES, BLOCKS, HIDDEN, build

_BERT = (
    "encoder.layer.{}",
    [("attention.self.key", "attention.self.value", "attention.output.dense")],
    (["intermediate.dense"], "output.dense"),
    2,
)
_LLAMA = (
    "layers.{}",
    [("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")],
    (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
    2,
)
_T5_SELF = ("layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.0.SelfAttention.o")
_T5_CROSS = (
    "layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v", "layer.1.EncDecAttention.o"
)  # fmt: skip
EXPECTED = {
    "bert": [_BERT],
    "roberta": [_BERT],
    "distilbert": [
        (
            "transformer.layer.{}",
            [("attention.k_lin", "attention.v_lin", "attention.out_lin")],
            (["ffn.lin1"], "ffn.lin2"),
            2,
        )
    ],
    "gpt2": [("h.{}", [("attn.c_attn", "attn.c_proj")], (["mlp.c_fc"], "mlp.c_proj"), 2)],
    "llama": [_LLAMA],
    "qwen3": [(*_LLAMA[:3], 4)],
    "t5": [
        (
            "encoder.block.{}",
            [_T5_SELF],
            (
                ["layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"],
                "layer.1.DenseReluDense.wo",
            ),
            2,
        ),
        (
            "decoder.block.{}",
            [_T5_SELF, _T5_CROSS],
            (
                ["layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"],
                "layer.2.DenseReluDense.wo",
            ),
            3,
        ),
    ],
    "vit": [
        (
            "layers.{}",
            [("attention.k_proj", "attention.v_proj", "attention.o_proj")],
            (["mlp.fc1"], "mlp.fc2"),
            2,
        )
    ],
    "clip vision": [
        (
            "encoder.layers.{}",
            [("self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")],
            (["mlp.fc1"], "mlp.fc2"),
            2,
        )
    ],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_read(name: str) -> None:
    found = {block.path: block for block in anatomy(build(name))}
    stacks = EXPECTED[name]
    assert len(found) == BLOCKS * len(stacks)
    for pattern, attentions, (inputs, output), norms in stacks:
        for i in range(BLOCKS):
            root = pattern.format(i)
            block = found[root]
            assert block.missing == ""
            assert len(block.norms) == norms
            assert block.feed_forward is not None
            assert block.feed_forward.inputs == tuple(f"{root}.{p}" for p in inputs)
            assert block.feed_forward.output == f"{root}.{output}"
            for expected, attention in zip(attentions, block.attentions, strict=True):
                *projections, out = (f"{root}.{p}" for p in expected)
                fused = len(projections) == 1
                keys = [attention.fused] if fused else [attention.key, attention.value]
                assert keys == projections
                assert attention.output == out


def test_roles_stand_for_modules() -> None:
    model = build("t5")
    found = resolve(model, ("attention-output", "feed-forward"))
    assert len(found) == 2 * BLOCKS + 3 * BLOCKS
    entries = {path: hit.entry for path, hit in found.items() if hit.role == "feed-forward"}
    assert entries["decoder.block.1.layer.2.DenseReluDense.wo"].endswith("DenseReluDense.wi_0")


def test_a_gpt2_with_cross_attention_has_two() -> None:
    (block, _) = anatomy(build("gpt2", add_cross_attention=True))
    assert [a.path for a in block.attentions] == ["h.0.attn", "h.0.crossattention"]
    assert [a.output for a in block.attentions] == ["h.0.attn.c_proj", "h.0.crossattention.c_proj"]


def test_stages_that_list_blocks_are_no_blocks() -> None:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4
    )
    blocks = anatomy(SwinModel(config))
    assert [block.path for block in blocks] == [
        f"encoder.layers.{path}" for path in ("0.blocks.0", "1.blocks.0", "1.blocks.1")
    ]
    assert all(block.feed_forward is not None for block in blocks)


def test_what_is_no_transformer_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    with pytest.raises(
        TargetError, match=r"no list of blocks with an attention.*Sequential.*2 lin"
    ):
        resolve(model, ("attention-output",))


def test_a_mixture_of_experts_has_no_feed_forward() -> None:
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        vocab_size=60, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = MixtralModel(config)
    with pytest.raises(TargetError, match=r"'layers\.0\.self_attn'; layers\.0\.mlp\.experts holds"):
        resolve(model, ("feed-forward-output",))
    assert len(resolve(model, ("attention-output",))) == 1


def test_blocks_that_are_left_out_are_told() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeModel

    config = Qwen2MoeConfig(
        vocab_size=60, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, mlp_only_layers=[0],
    )  # fmt: skip
    handle = deltaops.attach(Qwen2MoeModel(config), deltaops.ParallelAdapter())
    assert handle.sites == ("layers.0.mlp.down_proj",)
    assert "left alone: no feed-forward: layers.1.mlp.experts holds experts" in str(handle)


def test_an_output_that_is_registered_first_is_no_projection() -> None:
    from transformers import Phi3Config, Phi3Model

    config = Phi3Config(
        vocab_size=60, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    (block,) = anatomy(Phi3Model(config))
    assert block.attentions[0].output == "layers.0.self_attn.o_proj"
    assert block.attentions[0].fused == "layers.0.self_attn.qkv_proj"
    assert block.feed_forward is not None
    assert block.feed_forward.inputs == ("layers.0.mlp.gate_up_proj",)


def test_experts_in_a_list_are_no_feed_forward() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

    model = nn.Sequential(nn.ModuleList([Experts()]))
    (block,) = anatomy(model)
    assert block.attentions[0].fused == "0.0.attention.qkv"
    assert block.feed_forward is None
    assert "0.0.experts holds experts" in block.missing


def test_a_role_is_a_target_of_any_method_and_layers_can_be_chosen() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"model": build("gpt2")})
    delta = deltaops.LoRA(r=2, target_modules=["attention-output"], layers_to_transform=[1])
    handle = deltaops.attach(model, delta)
    assert handle.sites == ("model.h.1.attn.c_proj",)
