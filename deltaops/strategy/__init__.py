"""Deltas chosen: by a recommendation before training, as training runs, and by the input.

    table → parts → {monitor, budget, policy → presets} → named → controller → trainer

``parts`` is the contract: anything that keeps it is a part of a `Controller`.
"""

from .actions import disable, enable, freeze, grow, prune, switch, thaw, weigh
from .budget import Allocation, Importance, ShiftedSigmoid, allocate
from .choices import Choices, auxiliary_loss, choices
from .conditions import above, all_of, at, below, dead, plateau
from .controller import Controller
from .features import Task
from .journal import read_log
from .monitor import Monitor, read_rows
from .named import PARTS, parse_parts
from .parts import Action, Part, Run
from .policy import Policy, When
from .presets import DisableUseless, FreezeDead, SwitchOnPlateau, WarmIn
from .suggest import Suggestion, suggest
from .table import Row, Table

__all__ = [
    "PARTS",
    "Action",
    "Allocation",
    "Choices",
    "Controller",
    "DisableUseless",
    "FreezeDead",
    "Importance",
    "Monitor",
    "Part",
    "Policy",
    "Row",
    "Run",
    "ShiftedSigmoid",
    "Suggestion",
    "SwitchOnPlateau",
    "Table",
    "Task",
    "WarmIn",
    "When",
    "above",
    "all_of",
    "allocate",
    "at",
    "auxiliary_loss",
    "below",
    "choices",
    "dead",
    "disable",
    "enable",
    "freeze",
    "grow",
    "parse_parts",
    "plateau",
    "prune",
    "read_log",
    "read_rows",
    "suggest",
    "switch",
    "thaw",
    "weigh",
]
