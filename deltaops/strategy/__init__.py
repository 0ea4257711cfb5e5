"""Deltas chosen: by a recommendation before training, as training runs, and by the input."""

from .choices import Choices, auxiliary_loss, choices
from .features import Task
from .suggest import Suggestion, suggest

__all__ = ["Choices", "Suggestion", "Task", "auxiliary_loss", "choices", "suggest"]
