"""Attention one key head after another, so that long work shows how far it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

import cusparge
from cusparge.cli.files import Inputs
from cusparge.cli.ui import Ui

__all__ = ["Result", "attention_by_head"]

_THRESHOLDS = ("cdf_threshold", "sim_threshold", "keep", "pv_threshold")


@dataclasses.dataclass(frozen=True)
class Result:
    """What `cusparge.attention` returns for all heads.

    Without lengths and stage 2, all heads of a call have equally many blocks, so that a share of
    the whole is the mean of the heads' shares.
    """

    out: npt.NDArray[Any]
    lse: npt.NDArray[np.float32]
    sparsity_per_head: npt.NDArray[np.float64]  # (B, Hq)
    qk_sparsity: float
    pv_sparsity: float

    @property
    def sparsity(self) -> float:
        """Share of all block products not computed."""
        return (self.qk_sparsity + self.pv_sparsity) / 2


def attention_by_head(
    inputs: Inputs, policy: cusparge.Policy, ui: Ui, options: dict[str, Any]
) -> Result:
    """Compute attention with a progress bar; inputs that do not fit raise as in one call."""
    axis = 1 if options.get("layout", "HND") == "HND" else 2
    q, k, v = inputs.q, inputs.k, inputs.v
    if not _fits(q, k, v, policy, axis):
        parts = [_call((q, k, v), policy, options)]
        return _joined(parts, axis)
    ratio = q.shape[axis] // k.shape[axis]
    parts = []
    with ui.progress("heads", k.shape[axis]) as advance:
        for kv_head in range(k.shape[axis]):
            mine = slice(kv_head * ratio, (kv_head + 1) * ratio)
            thresholds: dict[str, Any] = {
                name: value[mine]
                for name in _THRESHOLDS
                if isinstance(value := getattr(policy, name, None), tuple)
            }
            heads = slice(kv_head, kv_head + 1)
            arrays = (
                _of_heads(q, axis, mine),
                _of_heads(k, axis, heads),
                _of_heads(v, axis, heads),
            )
            parts.append(_call(arrays, dataclasses.replace(policy, **thresholds), options))
            advance()
    return _joined(parts, axis)


def _of_heads(array: npt.NDArray[Any], axis: int, heads: slice) -> npt.NDArray[Any]:
    return array[(slice(None),) * axis + (heads,)]


def _fits(q: Any, k: Any, v: Any, policy: Any, axis: int) -> bool:
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape:
        return False
    heads_q, heads_kv = q.shape[axis], k.shape[axis]
    if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv:
        return False
    given = (getattr(policy, name, None) for name in _THRESHOLDS)
    return all(not isinstance(value, tuple) or len(value) == heads_q for value in given)


def _call(arrays: tuple[Any, ...], policy: cusparge.Policy, options: dict[str, Any]) -> Any:
    return cusparge.attention(*arrays, policy=policy, return_lse=True, return_stats=True, **options)


def _joined(parts: list[Any], axis: int) -> Result:
    outs, sums, stats = zip(*parts, strict=True)
    return Result(
        outs[0] if len(outs) == 1 else np.concatenate(outs, axis=axis),
        sums[0] if len(sums) == 1 else np.concatenate(sums, axis=1),
        np.concatenate([part.sparsity_per_head for part in stats], axis=1),
        float(np.mean([part.qk_sparsity for part in stats])),
        float(np.mean([part.pv_sparsity for part in stats])),
    )
