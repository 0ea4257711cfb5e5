"""One op per place of a model that a delta binds to."""

from .delta_linear import Branch, delta_linear, explain

__all__ = ["Branch", "delta_linear", "explain"]
