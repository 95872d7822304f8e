"""Where Q/DQ goes, one rule set for each target."""

from .plan import Plan, plan_tensorrt
from .tensorrt import Placement, PlaceTensorRT

__all__ = ["PlaceTensorRT", "Placement", "Plan", "plan_tensorrt"]
