"""One op per place of a model that a delta binds to."""

from .cross_entropy import cross_entropy
from .delta_linear import Branch, delta_linear, explain

__all__ = ["Branch", "cross_entropy", "delta_linear", "explain"]
