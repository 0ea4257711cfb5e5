"""``--delta``: every method and every kind of value that one can have."""

from __future__ import annotations

from typing import Any

import pytest

from deltaops import (
    IA3,
    Adapter,
    BitFit,
    Compacter,
    IntrinsicAdapter,
    IntrinsicPrompt,
    LNTuning,
    LoRA,
    ParallelAdapter,
    Prefix,
    Prompt,
    PromptPool,
)
from deltaops.errors import ConfigError
from deltaops.tuning.spec import parse_delta


@pytest.mark.parametrize(
    ("spec", "delta"),
    [
        ("lora", LoRA()),
        ("LoRA:r=16,alpha=32,use_dora=true", LoRA(r=16, alpha=32, use_dora=True)),
        ("lora:target_modules=q_proj+v_proj", LoRA(target_modules=["q_proj", "v_proj"])),
        (
            "lora:target_modules=q_proj+,layers_to_transform=0+1",
            LoRA(target_modules=["q_proj"], layers_to_transform=[0, 1]),
        ),
        (
            "lora:rank_pattern=q_proj:16+k_proj:4,alpha_pattern=q_proj:0.5",
            LoRA(rank_pattern={"q_proj": 16, "k_proj": 4}, alpha_pattern={"q_proj": 0.5}),
        ),
        ("lora:init_lora_weights=pissa_niter_4", LoRA(init_lora_weights="pissa_niter_4")),
        ("lora:init_lora_weights=true", LoRA()),
        (
            "lora:target_modules=,target_parameters=a+b",
            LoRA(target_modules=[], target_parameters=["a", "b"]),
        ),
        ("adapter:style=pfeiffer,size=8", Adapter(style="pfeiffer", size=8)),
        ("adapter:size=none,layer_norm=true", Adapter(layer_norm=True)),
        (
            "compacter:phm_dim=2,shared_phm_rule=false",
            Compacter(phm_dim=2, shared_phm_rule=False),
        ),
        ("parallel:scaling=1", ParallelAdapter(scaling=1.0)),
        ("bitfit:create_missing=false", BitFit(create_missing=False)),
        ("ia3:feedforward_modules=down_proj+", IA3(feedforward_modules=["down_proj"])),
        ("lntuning", LNTuning()),
        ("prefix:num_virtual_tokens=8,reparameterised=true", Prefix(8, reparameterised=True)),
        ("prompt-pool:size=4,top_k=2,query=states", PromptPool(4, top_k=2, query="states")),
        ("intrinsic-prompt:intrinsic_dim=3,seed=2", IntrinsicPrompt(intrinsic_dim=3, seed=2)),
        ("intrinsic-adapter:intrinsic_dim=3,size=4", IntrinsicAdapter(intrinsic_dim=3, size=4)),
        ("prompt:num_virtual_tokens=8", Prompt(num_virtual_tokens=8)),
        ("prompt:prompt_tuning_init=12+40", Prompt(prompt_tuning_init=[12, 40])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spec_says_a_delta(spec: str, delta: Any) -> None:
    assert parse_delta(spec) == delta


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lorra:r=4", "no method 'lorra' .did you mean lora"),
        ("mam+bitfit", "by themselves MAM, UniPELT, all"),
        ("lora:rnk=4", "lora has no option 'rnk'"),
        ("lora:r", "expected option=value, got 'r'"),
        ("lora:r=", "expected option=value, got 'r='"),
        ("lora:target_modules=", "target_modules is empty"),
        ("lora:r=many", "r must be int, got 'many'"),
        ("lora:rank_pattern=q_proj", "rank_pattern must hold numbers, got 'q_proj'"),
        ("lora:rank_pattern=8", "rank_pattern must map names"),
        ("lora:target_modules=q+,layers_to_transform=first", "must hold numbers, got 'first'"),
    ],
)
def test_a_wrong_spec_is_refused_with_what_is_known(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_delta(spec)
