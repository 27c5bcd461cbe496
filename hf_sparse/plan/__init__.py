"""The plan: which lists of keys each query reads, exactly and without an n x n mask."""

from .constraint import Constraint
from .cost import Cost, cost
from .plan import HeadPlan, Plan, make_plan
from .segments import Columns, Segment, Segments

__all__ = ["Columns", "Constraint", "Cost", "HeadPlan", "Plan", "Segment", "Segments", "cost", "make_plan"]
