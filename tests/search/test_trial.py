"""One candidate: all that it trains learns, and is counted."""

from __future__ import annotations

import pytest

import deltaops
from deltaops import LoRA
from deltaops.methods import Combined, Delta, parts_of
from deltaops.methods.combined import preset
from deltaops.search.candidate import Candidate
from deltaops.search.trainer import by_layer, groups
from deltaops.testing.architectures import build


@pytest.mark.parametrize(
    "delta",
    [preset("UniPELT"), LoRA(r=2, target_modules="key-value", modules_to_save=("pooler",))],
    ids=["gates", "modules trained whole"],
)
def test_everything_that_trains_has_a_rate_and_is_counted(delta: Delta | Combined) -> None:
    rates = tuple((part, 0.01) for part in parts_of(delta))
    handle = deltaops.attach(build("bert", hidden_size=48), delta)
    trained = groups(handle, Candidate(delta, rates, 4, "linear", 0.1))
    found = [id(p) for group in trained for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in handle.parameters())
    assert sum(by_layer(handle).values()) == sum(p.numel() for p in handle.parameters())
