"""Token means and pooled blocks on the CPU: what ``kernels_cu/pool.cu`` computes on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cusparge._arrays import HostArray
from cusparge._arrays.view import to_float
from cusparge._cpu.source import needs_float64, scan
from cusparge._cpu.stage1 import noise_of, pool
from cusparge._types import num_blocks

__all__ = ["pool_blocks"]

_STEP = 64  # blocks at a time


def pool_blocks(
    x: HostArray,
    lengths: list[int],
    block: int,
    outputs: dict[str, npt.NDArray[np.float32]],
) -> None:
    """Pool an array (B, H, S, D); the mean is taken off where ``token_mean`` is asked for."""
    batch, heads = x.shape[:2]
    for sequence in range(batch):
        for head in range(heads):
            rows = x.with_data(x.data[sequence, head, : lengths[sequence]])
            where = {name: array[sequence, head] for name, array in outputs.items()}
            _pool_head(rows, block, where)


def _pool_head(rows: HostArray, block: int, out: dict[str, npt.NDArray[np.float32]]) -> None:
    tokens, head_dim = rows.shape
    smooth = "token_mean" in out
    known = scan(rows, total=smooth)
    work: Any = np.float64 if needs_float64(known.largest) else np.float32
    mean = (known.total / max(tokens, 1)).astype(work)
    if smooth:
        out["token_mean"][...] = _in_range(mean)
    noise = noise_of(mean.astype(np.float64)) if smooth else 0.0
    out["block_mean"][...] = 0.0
    out["similarity"][...] = 1.0
    for first in range(0, num_blocks(tokens, block), _STEP):
        last = min(first + _STEP, num_blocks(tokens, block))
        start, stop = first * block, min(last * block, tokens)
        part = to_float(rows.with_data(rows.data[start:stop]), work)
        padded = np.zeros(((last - first) * block, head_dim), work)
        finite = np.isfinite(part)
        padded[: stop - start] = np.where(finite, part - mean if smooth else part, work(0))
        counts = np.full(last - first, block, np.intp)
        counts[-1] = stop - (last - 1) * block
        bad = np.zeros(len(padded), np.bool_)
        bad[: stop - start] = ~finite.all(axis=1)
        bad_blocks: npt.NDArray[np.bool_] = bad.reshape(-1, block).any(axis=1)  # type: ignore[assignment]
        pooled = pool(padded.reshape(last - first, block, head_dim), counts, bad_blocks, noise)
        out["block_mean"][first:last] = _in_range(pooled.mean)
        out["similarity"][first:last] = np.where(bad_blocks, -1.0, pooled.similarity)


def _in_range(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return what float32 can hold of a mean: the largest number for what is beyond it."""
    limit = float(np.finfo(np.float32).max)
    clipped: npt.NDArray[Any] = np.clip(values, -limit, limit)
    return clipped
