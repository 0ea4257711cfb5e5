"""A module with adapters by name, each of which is on or off by itself."""

from __future__ import annotations


class Switched:
    """What the places share that can hold several adapters. ``off`` is empty in most calls."""

    off: frozenset[str]
    """Names of the adapters that are disabled, or merged into the weights already."""

    def names(self) -> set[str]:
        """Of all adapters that are bound here, on or off."""
        raise NotImplementedError  # each place says what it holds

    def turn(self, name: str, active: bool) -> None:
        """Switch the adapter ``name`` on or off; again is nothing new."""
        self.__dict__["off"] = self.off - {name} if active else self.off | {name}

    @property
    def delta_active(self) -> bool:
        """Whether any of them is on; setting it switches all of them."""
        return not self.off or not self.names() <= self.off

    @delta_active.setter
    def delta_active(self, active: bool) -> None:
        for name in self.names():
            self.turn(name, active)
