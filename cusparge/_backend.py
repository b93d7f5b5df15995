"""Which backend computes a call: by where the arrays live, or by the caller's word."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cusparge import reference
from cusparge._arrays import Device, HostArray
from cusparge._arrays.view import finite_max, from_float, to_float
from cusparge._cpu import CpuBackend
from cusparge._types import BlockMap, Counts, Problem, no_gpu_yet
from cusparge.errors import DeviceError

__all__ = ["Backend", "backend_for"]


class Backend(Protocol):
    """What a backend offers. Arrays are (B, H, S, D), or (H, tokens, D) where packed."""

    name: str

    def attention(
        self,
        problem: Problem,
        q: HostArray,
        k: HostArray,
        v: HostArray,
        block_map: BlockMap | None,
        out: HostArray,
        lse: npt.NDArray[np.float32] | None,
    ) -> Counts:
        """Write `out` and `lse`."""

    def predict(
        self, problem: Problem, q: HostArray, k: HostArray, mask: npt.NDArray[np.bool_]
    ) -> int:
        """Write the block mask (zeros on entry); return how many blocks are reachable."""


class ReferenceBackend:
    """The float64 oracle behind the public call."""

    name = "reference"

    def attention(
        self,
        problem: Problem,
        q: HostArray,
        k: HostArray,
        v: HostArray,
        block_map: BlockMap | None,
        out: HostArray,
        lse: npt.NDArray[np.float32] | None,
    ) -> Counts:
        """Write `out` and `lse`."""
        q64, k64, v64 = (to_float(array, np.float64) for array in (q, k, v))
        options: dict[str, Any] = {
            "policy": problem.policy,
            "causal": problem.causal_offsets is not None,
            "causal_align": problem.causal_align,
            "sm_scale": problem.sm_scale,
            "return_lse": True,
            "return_stats": True,
        }
        if problem.packed:
            edges_q = [0, *(span[1] for span in problem.spans)]
            edges_k = [0, *(span[3] for span in problem.spans)]
            q64, k64, v64 = (array.swapaxes(0, 1) for array in (q64, k64, v64))
            values, sums, stats = reference.attention_varlen(
                q64, k64, v64, edges_q, edges_k, **options
            )
            values = values.swapaxes(0, 1)
        else:
            lengths = [span[3] for span in problem.spans]
            values, sums, stats = reference.attention(
                q64, k64, v64, block_map=block_map, seqlens_k=lengths, **options
            )
        limit = finite_max(problem.dtype)
        with np.errstate(over="ignore", under="ignore"):
            from_float(np.clip(values, -limit, limit), out)
            if lse is not None:
                lse[...] = sums
        return Counts(stats.reachable, stats.selected, stats.selected_rows, stats.skipped_rows)

    def predict(
        self, problem: Problem, q: HostArray, k: HostArray, mask: npt.NDArray[np.bool_]
    ) -> int:
        """Write the block mask."""
        lengths = [span[3] for span in problem.spans]
        causality: dict[str, Any] = {
            "causal": problem.causal_offsets is not None,
            "causal_align": problem.causal_align,
        }
        mask[...] = reference.block_map(
            to_float(q, np.float64),
            to_float(k, np.float64),
            policy=problem.policy,
            sm_scale=problem.sm_scale,
            seqlens_k=lengths,
            **causality,
        )
        reachable = sum(
            int(
                reference.reachable_blocks(
                    problem.seqlen_q, problem.seqlen_k, valid_k=length, **causality
                ).sum()
            )
            for length in lengths
        )
        return reachable * problem.num_heads_q


_BACKENDS: dict[str, Backend] = {"cpu": CpuBackend(), "reference": ReferenceBackend()}


def backend_for(name: str, device: Device) -> Backend:
    """Return the backend called `name`, or the one of `device` for "auto"."""
    if device.kind != "cpu":
        raise no_gpu_yet("q", device)
    if name == "cuda":
        raise DeviceError(
            'backend="cuda" was asked for host arrays, and this version of cusparge has no GPU '
            'backend yet: use backend="auto" or "cpu".'
        )
    return _BACKENDS["cpu" if name == "auto" else name]
