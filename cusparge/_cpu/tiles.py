"""Attention of one query block over its chosen key blocks.

Scores are kept transposed, (keys, rows): BLAS multiplies K by Qᵀ faster than Q by Kᵀ, and maxima
and shifts per row then run along contiguous memory. They are in log2 units, because log2(e) is
folded into the queries.

`attend` is the plain path. It needs no running maximum: softmax may be shifted by any number that
neither overflows nor loses everything, and the largest score over the first key of each block is
such a number, since the true maximum is at least that. `attend_online` is the online softmax tile
by tile in a fixed order (section 3.3), which stage 2 and the quantized rules are defined by.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cusparge._cpu.rounding import round_e4m3
from cusparge._cpu.scratch import scratch
from cusparge._cpu.source import Floats, KeySource
from cusparge._types import BLOCK_K, BLOCK_Q

__all__ = ["P_OFFSET", "RowBlock", "attend", "attend_online"]

Index = npt.NDArray[np.intp]

#: Key blocks per step: 1,024 scores by 128 rows of float32 stay in the second-level cache.
_STEP_BLOCKS = 16

#: Quantized weights are e4m3 values of 2^8 · p, so that small ones keep their digits.
P_OFFSET = 8.0

#: Sums of weights beyond this say that a row's shift was far too small; the online path takes over.
_LARGEST_SUM = 2.0**64


@dataclass(frozen=True)
class RowBlock:
    """The rows of one query block.

    Attributes
    ----------
    queries : (head_dim, rows)
        Transposed, times sm_scale · log2(e).
    limits : (rows,) or None
        The last key that each row may see; None without causality.
    unmasked : int
        Key blocks below this one are seen whole by every row, tail and `halves` aside.
    halves : (key blocks, 2) bool, or None
        Which of the two groups of 64 rows a caller's map lets see each key block.
    """

    queries: Floats
    limits: Index | None
    unmasked: int
    halves: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Result:
    """Unnormalised output and softmax sums: out = weighted / total, LSE = shift + log2(total)."""

    weighted: Floats  # (rows, head_dim)
    total: Floats  # (rows,), 0 for a row without keys
    shift: Floats  # (rows,)
    skipped: int  # tiles whose P·V product stage 2 left out


def _hide(scores: Floats, chosen: Index, rows: RowBlock, tokens: int) -> None:
    """Set scores of pairs that may not be seen to -inf; `scores` is (blocks, 64, rows)."""
    if rows.limits is not None:
        for i in np.flatnonzero(chosen >= rows.unmasked):
            key = chosen[i] * BLOCK_K + np.arange(BLOCK_K)
            scores[i][key[:, None] > rows.limits] = -np.inf
    if rows.halves is not None:
        seen = rows.halves[chosen]
        scores[~seen[:, 0], :, : BLOCK_Q // 2] = -np.inf
        scores[~seen[:, 1], :, BLOCK_Q // 2 :] = -np.inf
    if tokens % BLOCK_K:
        scores[chosen == tokens // BLOCK_K, tokens % BLOCK_K :] = -np.inf


def _steps(chosen: Index) -> list[Index]:
    """Cut a list of blocks into even steps."""
    if len(chosen) <= _STEP_BLOCKS:
        return [chosen]
    count = -(-len(chosen) // _STEP_BLOCKS)
    edges = [len(chosen) * i // count for i in range(count + 1)]
    return [chosen[start:stop] for start, stop in itertools.pairwise(edges)]


def _shift(source: KeySource, chosen: Index, rows: RowBlock) -> Floats | None:
    """Return per row a score that it reaches, or None where no block is seen by all rows."""
    whole = chosen
    if whole[-1] >= rows.unmasked or whole[-1] == _tail(source):
        whole = chosen[(chosen < rows.unmasked) & (chosen != _tail(source))]
    if rows.halves is not None:
        whole = whole[rows.halves[whole].all(axis=1)]
    if not len(whole):
        return None
    shift: Floats = (source.first_keys(whole, rows.queries.dtype) @ rows.queries).max(axis=0)
    return shift


def attend(source: KeySource, chosen: Index, rows: RowBlock) -> Result:
    """Attention over the ascending blocks `chosen`, in the inputs' precision, without stage 2."""
    shift = _shift(source, chosen, rows)
    if shift is None:
        return attend_online(source, chosen, rows, pv_log2=None, quantized=False)
    work = rows.queries.dtype
    head_dim, num_rows = rows.queries.shape
    weighted = np.empty((num_rows, head_dim), work)
    total = np.zeros(num_rows, work)
    more = scratch.get("more", weighted.shape, work)
    for number, step in enumerate(_steps(chosen)):
        size = len(step) * BLOCK_K
        buffer = scratch.get("keys", (_STEP_BLOCKS * BLOCK_K * head_dim,), work)
        keys = source.keys(step, buffer).reshape(size, head_dim)
        scores = scratch.get("scores", (size, num_rows), work)
        np.matmul(keys, rows.queries, out=scores)
        scores -= shift
        if step[-1] >= rows.unmasked or rows.halves is not None or step[-1] == _tail(source):
            _hide(scores.reshape(len(step), BLOCK_K, num_rows), step, rows, source.tokens)
        _exp2(scores)
        total += _ones(size, work) @ scores
        buffer = scratch.get("values", (_STEP_BLOCKS * BLOCK_K * head_dim,), work)
        values = source.values(step, buffer).reshape(size, head_dim)
        np.matmul(scores.T, values, out=more if number else weighted)
        if number:
            weighted += more
    far = ~(total < _LARGEST_SUM)  # NaN as well
    if far.any():  # row by row: what one row holds must not show in the bits of another
        exact = attend_online(source, chosen, rows, pv_log2=None, quantized=False)
        weighted[far], total[far] = exact.weighted[far], exact.total[far]
        shift = np.where(far, exact.shift, shift)
    return Result(weighted, total, shift, 0)


def attend_online(
    source: KeySource, order: Index, rows: RowBlock, *, pv_log2: float | None, quantized: bool
) -> Result:
    """Online softmax over 64-key tiles in the given order, with stage 2 and quantized weights.

    Stage 2 skips a tile when, in every row that sees a key of it, its largest score lies at least
    `pv_log2` below the maximum so far: then neither sum nor maximum changes. Skipping therefore
    leaves the running maximum as it is, which lets all tiles of a step be decided together.
    """
    work = rows.queries.dtype
    head_dim, num_rows = rows.queries.shape
    weighted = np.zeros((num_rows, head_dim), work)
    total = np.zeros(num_rows, work)
    running = np.full(num_rows, -np.inf, work)
    skipped = 0
    bad_tiles = np.unique(source.bad_keys // BLOCK_K)
    for step in _steps(order) if len(order) else []:
        size = len(step) * BLOCK_K
        buffer = scratch.get("keys", (_STEP_BLOCKS * BLOCK_K * head_dim,), work)
        keys = source.keys(step, buffer).reshape(size, head_dim)
        flat = scratch.get("scores", (size, num_rows), work)
        np.matmul(keys, rows.queries, out=flat)
        scores = flat.reshape(len(step), BLOCK_K, num_rows)
        _hide(scores, step, rows, source.tokens)
        highest = scores.max(axis=1)
        maxima = np.maximum.accumulate(np.concatenate([running[None], highest]), axis=0)
        kept = np.ones(len(step), np.bool_)
        if pv_log2 is not None:
            gain = highest - maxima[:-1]
            gain[np.isnan(gain)] = -np.inf  # -inf minus -inf: the row sees nothing yet
            kept = gain.max(axis=1) + pv_log2 > 0
            kept |= np.isin(step, bad_tiles)
            skipped += len(step) - int(kept.sum())
            if not kept.any():
                continue
        latest = np.where(np.isneginf(maxima[-1]), 0, maxima[-1]).astype(work)
        before = np.exp2(running - latest)
        buffer = scratch.get("values", (_STEP_BLOCKS * BLOCK_K * head_dim,), work)
        values = source.values(step, buffer)
        if not kept.all():
            scores, values = scores[kept], values[kept]
        if quantized:
            weights = _quantized_weights(scores, maxima[1:][kept], latest)
        else:
            scores -= latest
            _exp2(scores)
            weights = scores
        weights = weights.reshape(-1, num_rows)
        total *= before
        total += _ones(len(weights), work) @ weights
        weighted *= before[:, None]
        weighted += weights.T @ values.reshape(len(weights), head_dim)
        running = maxima[-1]
    shift = np.where(np.isneginf(running), 0, running)
    if quantized:
        shift = shift - P_OFFSET
    return Result(weighted, total, shift.astype(work), skipped)


def _quantized_weights(scores: Floats, maxima: Floats, latest: Floats) -> Floats:
    """Return e4m3 weights, each tile's relative to its own running maximum, brought to `latest`."""
    base = np.where(np.isneginf(maxima), 0, maxima).astype(scores.dtype)
    scores -= base[:, None, :]
    scores += scores.dtype.type(P_OFFSET)
    _exp2(scores)
    codes = scores.astype(np.float32, copy=False)
    round_e4m3(codes)
    np.multiply(codes, np.exp2(base - latest)[:, None, :], out=scores)
    return scores


def _tail(source: KeySource) -> int:
    """Return the block that is not full, or -1."""
    return source.tokens // BLOCK_K if source.tokens % BLOCK_K else -1


_ONES = {np.dtype(t): np.ones(_STEP_BLOCKS * BLOCK_K, t) for t in (np.float32, np.float64)}


def _ones(size: int, work: Any) -> Floats:
    return _ONES[np.dtype(work)][:size]


def _has_fast_exp2() -> bool:
    """Tell whether NumPy has a vector exp2: with AVX-512 it takes half the time of exp.

    Without, it takes twice that. Asking the processor instead of a clock keeps results the same
    from run to run.
    """
    for name in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        features = getattr(sys.modules.get(name), "__cpu_features__", None)
        if features is not None:
            return bool(features.get("AVX512_SKX", False))
    return False


_FAST_EXP2 = _has_fast_exp2()


def _exp2(scores: Floats) -> None:
    """Replace scores by 2^scores."""
    if _FAST_EXP2:
        np.exp2(scores, out=scores)
    else:
        scores *= scores.dtype.type(np.log(2.0))
        np.exp(scores, out=scores)
