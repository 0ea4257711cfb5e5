"""Parts by name."""

from __future__ import annotations

import pytest

from deltaops.errors import ConfigError
from deltaops.strategy import PARTS, Controller, Monitor, parse_parts

from .conftest import Watcher


def test_names_and_options_make_parts() -> None:
    spec = "monitor:every=5,places=false+freeze-dead:share=0.02+warm-in:part=lora,steps=20,levels=4"
    assert [repr(part) for part in parse_parts(spec)] == [
        "Monitor(every=5, places=False, noise=True, rank=True)",
        "FreezeDead(share=0.02, rows=5)",
        "WarmIn('lora', 20, start=0, levels=4)",
    ]
    (part,) = Controller(["monitor:every=7"]).parts
    assert isinstance(part, Monitor)
    assert part.every == 7


def test_others_add_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "mine", lambda: Watcher(lambda run: (), "mine"))
    assert [part.name for part in parse_parts("monitor+mine")] == ["monitor", "mine"]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("moniter", r"no part 'moniter' \(did you mean monitor\?\)"),
        ("monitor:evry=5", r"no option 'evry' \(did you mean every\?\)"),
        ("monitor:every", "expected option=value"),
        ("monitor:every=often", "every must be int"),
        ("warm-in:steps=5", "warm-in needs part="),
        ("monitor+", "no part|monitor"),
        ("freeze-dead:share=3", "share must be in"),
    ],
)
def test_what_is_no_part_is_told(spec: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_parts(spec)
