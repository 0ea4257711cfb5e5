"""(IA)³: which side of a layer a gain is on, by role and by PEFT's rule for names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import deltaops
from deltaops import IA3
from deltaops.errors import CheckpointError, ConfigError
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, build


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feedforward_modules": [3]}, "feedforward_modules must be module names"),
        ({"feedforward_modules": "(["}, "feedforward_modules=.*does not compile"),
        ({"autocast_adapter_dtype": None}, "must be a bool"),
    ],
    ids=str,
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IA3(**settings)


def test_keys_and_values_have_gains_after_and_feed_forwards_before() -> None:
    shapes = {
        key.removesuffix(".ia3_l").rsplit(".", 1)[-1]: tuple(t.shape)
        for key, t in deltaops.attach(build("llama"), IA3()).state().items()
    }
    assert shapes == {"k_proj": (12, 1), "v_proj": (12, 1), "down_proj": (1, 40)}


def test_a_feed_forward_that_is_named_has_its_gain_before_too() -> None:
    by_role = deltaops.attach(build("llama"), IA3())
    for delta in (
        IA3(target_modules=["k_proj", "v_proj", "down_proj"]),
        IA3(feedforward_modules=["down_proj"]),
        IA3(feedforward_modules=r".*\.down_proj"),
    ):
        state = deltaops.attach(build("llama"), delta).state()
        assert {k: t.shape for k, t in state.items()} == {
            k: t.shape for k, t in by_role.state().items()
        }
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))  # nothing is a feed-forward here
    assert deltaops.attach(model, IA3(target_modules=["0"])).state()["0.ia3_l"].shape == (4, 1)


@pytest.mark.parametrize("forward", [["up_proj", "down_proj"], r".*\.(up|down)_proj"], ids=str)
def test_names_decide_the_side(forward: Any) -> None:
    delta = IA3(target_modules=["k_proj", "up_proj", "down_proj"], feedforward_modules=forward)
    model = build("llama")
    state = deltaops.attach(model, delta).state()
    assert state["layers.0.self_attn.k_proj.ia3_l"].shape == (12, 1)
    assert state["layers.0.mlp.up_proj.ia3_l"].shape == (1, 24)
    answer("llama", model)  # gate and up no longer read the same numbers


def test_a_gain_before_one_of_a_group_is_seen() -> None:
    delta = IA3(target_modules=["up_proj"], feedforward_modules=["up_proj"])
    model = build("llama")
    handle = deltaops.attach(model, delta)
    with torch.no_grad():
        for gain in handle.parameters():
            gain.mul_(2.0)
    applied = answer("llama", model)
    merged = copy.deepcopy(model)
    found = deltaops.surgery.handle_of(merged)
    assert found is not None
    found.merge()
    assert relative_error(applied, answer("llama", merged)) < 16 * bound(0.0, torch.float32)


def test_a_file_that_needs_more_is_refused() -> None:
    config = {"peft_type": "IA3", "target_modules": ["k_proj"], "use_something_new": True}
    with pytest.raises(CheckpointError, match="use_something_new=True"):
        IA3.from_peft(config)
    with pytest.raises(CheckpointError, match="no target_modules"):
        IA3.from_peft({"peft_type": "IA3"})
