"""Trees of module paths."""

from __future__ import annotations

from deltaops.surgery.tree import Leaf, draw


def test_alike_numbered_siblings_fold() -> None:
    leaves = [Leaf(f"h.{i}.q", "Linear", "+8") for i in range(3)]
    assert draw(leaves) == "└─ h.[0-2] (× 3)\n   └─ q           Linear  +8"


def test_different_ones_do_not() -> None:
    text = draw([Leaf("h.0.q", "Linear", "+8"), Leaf("h.1.q", "Linear", "+9")])
    assert "[0-1]" not in text
    assert "+8" in text
    assert "+9" in text


def test_gaps_break_the_fold() -> None:
    text = draw([Leaf(f"h.{i}", "Linear", "+8") for i in (0, 1, 3)])
    assert "[0-1]" in text
    assert "× 2" in text
    assert "3" in text


def test_nothing() -> None:
    assert draw([]) == ""
