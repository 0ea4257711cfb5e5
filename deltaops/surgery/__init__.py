"""Change models by deltas, and change them back: match, plan, apply, revert, merge, files."""

from .accelerate import accelerate
from .arithmetic import Sum, sum_adapters
from .attach import attach
from .by_sample import adapters_by_sample
from .checkpoint import load, save
from .handle import Handle, handle_of
from .plan import Plan, plan
from .report import Report, Row, report
from .resize import Resized, rescale, resize

__all__ = [
    "Handle",
    "Plan",
    "Report",
    "Resized",
    "Row",
    "Sum",
    "accelerate",
    "adapters_by_sample",
    "attach",
    "handle_of",
    "load",
    "plan",
    "report",
    "rescale",
    "resize",
    "save",
    "sum_adapters",
]
