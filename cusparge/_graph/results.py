"""What the public calls return, eagerly and in a trace. Traced itself."""

from __future__ import annotations

from typing import Any

from cusparge._types import AttentionStats

__all__ = ["results"]


def results(out: Any, lse: Any, counts: Any, return_lse: bool, return_stats: bool) -> Any:
    """Return what was asked for, in the documented order."""
    wanted = [out]
    if return_lse:
        wanted.append(lse)
    if return_stats:
        wanted.append(AttentionStats(counts))
    return wanted[0] if len(wanted) == 1 else tuple(wanted)
