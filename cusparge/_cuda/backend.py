"""What the GPU computes: plans for the shapes of a call."""

from __future__ import annotations

from typing import Any

from cusparge._cuda.params import Plan
from cusparge._cuda.pooling import pool_plan

__all__ = ["pool_plan_of"]


def pool_plan_of(x: Any, block: int, smooth: bool, has_lengths: bool) -> Plan:
    """Return the plan for an array (B, H, S, D), of which the shape and strides alone are read."""
    return pool_plan(x.dtype, x.shape, x.strides[:3], block, smooth, has_lengths)
