"""Deltas chosen as training runs: what watches a run, and what changes its deltas.

    table → parts → {monitor, budget, policy → presets} → named → controller → trainer

``parts`` is the contract: anything that keeps it is a part of a `Controller`.
"""

from .actions import disable, enable, freeze, grow, prune, switch, thaw, weigh
from .budget import Allocation, Importance, ShiftedSigmoid, allocate
from .conditions import above, all_of, at, below, dead, plateau
from .controller import Controller
from .journal import read_log
from .monitor import Monitor, read_rows
from .named import PARTS, parse_parts
from .parts import Action, Part, Run
from .policy import Policy, When
from .presets import DisableUseless, FreezeDead, SwitchOnPlateau, WarmIn
from .table import Row, Table

__all__ = [
    "PARTS",
    "Action",
    "Allocation",
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
    "SwitchOnPlateau",
    "Table",
    "WarmIn",
    "When",
    "above",
    "all_of",
    "allocate",
    "at",
    "below",
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
    "switch",
    "thaw",
    "weigh",
]
