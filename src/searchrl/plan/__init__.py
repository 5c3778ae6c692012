"""What a run needs before anything loads: memory of each rank by phase, tokens and steps; if it fits.

``memory`` has the formulas, ``machine`` what there is, ``fit`` the verdict and what would make a plan fit,
``report`` what people read.
"""

from searchrl.plan.fit import check_fits
from searchrl.plan.machine import main_memory
from searchrl.plan.memory import GIB, MemoryPlan, Phase, Residency, plan_memory, residency
from searchrl.plan.report import MEMORY_COLUMNS, describe, memory_rows, summary
from searchrl.plan.tokens import TokenPlan, plan_tokens

__all__ = [
    "GIB",
    "MEMORY_COLUMNS",
    "MemoryPlan",
    "Phase",
    "Residency",
    "TokenPlan",
    "check_fits",
    "describe",
    "main_memory",
    "memory_rows",
    "plan_memory",
    "plan_tokens",
    "residency",
    "summary",
]
