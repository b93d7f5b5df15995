"""The keys and values of one sequence and head, ready for matrix products, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cusparge._arrays import HostArray
from cusparge._arrays.view import to_float
from cusparge._cpu.rounding import KEY_GROUP, int8_round_trip, power_of_two_scale, round_e4m3
from cusparge._types import BLOCK_K, num_blocks

__all__ = ["Floats", "KeySource", "needs_float64", "scan"]

Floats = npt.NDArray[Any]  # float32, or float64 where float32 would overflow

_ROWS = 4096  # tokens per step of a scan: half a megabyte at head_dim 32, two at 128


#: Magnitudes of a whole tensor beyond these make squares, products or sums leave float32's range.
_SMALLEST, _LARGEST = 1e-25, 1e15


def needs_float64(largest: float) -> bool:
    """Tell whether a tensor of that magnitude needs float64 arithmetic."""
    return largest > _LARGEST or 0.0 < largest < _SMALLEST


@dataclass(frozen=True)
class Scan:
    """What one pass over a (tokens, head_dim) tensor tells, non-finite elements counted as 0."""

    largest: float  # magnitude
    bad_rows: npt.NDArray[np.intp]  # ascending, those with an element that is not finite
    total: npt.NDArray[np.float64]  # (head_dim,), the sum over tokens
    largest_per_channel: npt.NDArray[np.float64]  # (head_dim,)


def scan(array: HostArray, *, total: bool = False, per_channel: bool = False) -> Scan:
    """Read a tensor once, in steps; sums and maxima per channel only where they are asked for."""
    tokens, head_dim = array.shape
    work = np.float64 if array.dtype == "float64" else np.float32
    largest = 0.0
    sums, channels = np.zeros(head_dim), np.zeros(head_dim)
    bad: list[npt.NDArray[np.intp]] = []
    for start in range(0, tokens, _ROWS):
        # Contiguous, as sums may depend on the strides that BLAS sees: equal bytes, equal bits.
        part = np.ascontiguousarray(
            to_float(array.with_data(array.data[start : start + _ROWS]), work)
        )
        low, high = float(part.min()), float(part.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = np.isfinite(part)
            bad.append(np.flatnonzero(~finite.all(axis=1)) + start)
            part = np.where(finite, part, work(0))
            low, high = float(part.min()), float(part.max())
        largest = max(largest, -low, high)
        if per_channel:
            np.maximum(channels, np.abs(part).max(axis=0), out=channels)
        if total:
            sums += _sum_tokens(part if largest < 1e30 else part.astype(np.float64))
    none = np.empty(0, np.intp)
    return Scan(largest, np.concatenate(bad) if bad else none, sums, channels)


def _sum_tokens(rows: Floats) -> npt.NDArray[np.float64]:
    """Sum over tokens: 64 at a time in the rows' precision, by BLAS, and then in float64."""
    whole = len(rows) // BLOCK_K * BLOCK_K
    blocks = rows[:whole].reshape(-1, BLOCK_K, rows.shape[1])
    sums = np.matmul(np.ones((1, BLOCK_K), rows.dtype), blocks)
    total: npt.NDArray[np.float64] = sums.sum(axis=(0, 1), dtype=np.float64)
    total += rows[whole:].sum(axis=0, dtype=np.float64)
    return total


class KeySource:
    """Keys and values of one sequence and key head.

    Blocks come out in `work` precision with non-finite elements cleared and, where `quantized`,
    as the values that the int8 and e4m3 codes stand for. float32 memory is used where it lies; any
    other is converted once if `keep` allows it, else again for each use.

    Attributes
    ----------
    mean : (head_dim,) float64
        Mean of K over its tokens, non-finite elements counted as 0.
    wide : bool
        Magnitudes need float64 arithmetic.
    bad_keys : (n,) intp
        Ascending tokens with a non-finite element in K or V; rows that see one become NaN.
    """

    def __init__(self, k: HostArray, v: HostArray, *, need_v: bool, quantized: bool) -> None:
        self._raw = (k, v)
        self.tokens, self.head_dim = k.shape
        self.num_blocks = num_blocks(self.tokens, BLOCK_K)
        keys = scan(k, total=True)
        self.mean = keys.total / max(self.tokens, 1)
        self.largest_k = keys.largest
        self.bad_in_k = keys.bad_rows
        self.bad_keys = keys.bad_rows
        self.largest_v = 0.0
        self.quantized = quantized
        self._has_bad = (bool(len(keys.bad_rows)), False)
        if need_v:
            values = scan(v, per_channel=quantized)
            self.largest_v = values.largest
            self._has_bad = (bool(len(keys.bad_rows)), bool(len(values.bad_rows)))
            if any(self._has_bad):
                self.bad_keys = np.union1d(keys.bad_rows, values.bad_rows)
            if quantized:
                self._v_scale = power_of_two_scale(values.largest_per_channel)
        self.wide = needs_float64(self.largest_k) or needs_float64(self.largest_v)
        self._blocks: list[Floats | None] = [None, None]
        self._tails: list[Floats | None] = [None, None]
        self._direct = [False, False]
        for which in (0, 1):
            array = self._raw[which]
            if array.dtype != "float32" or quantized or self._has_bad[which]:
                continue
            if self.tokens >= BLOCK_K:
                self._adopt(which, array.data)

    def _adopt(self, which: int, rows: Floats) -> None:
        """Serve blocks from float32 `rows`."""
        whole = self.tokens // BLOCK_K
        self._blocks[which] = _in_blocks(rows, whole)
        if whole < self.num_blocks:
            tail = np.zeros((BLOCK_K, self.head_dim), np.float32)
            tail[: self.tokens - whole * BLOCK_K] = rows[whole * BLOCK_K :]
            self._tails[which] = tail
        # Only rows that lie as a copy of them would give BLAS the very same operands.
        self._direct[which] = bool(
            rows.flags.aligned and rows.strides == (self.head_dim * rows.itemsize, rows.itemsize)
        )

    def kept_bytes(self) -> int:
        """Return what `keep` would allocate."""
        missing = sum(blocks is None for blocks in self._blocks)
        return missing * self.num_blocks * BLOCK_K * self.head_dim * 4

    def keep(self) -> None:
        """Convert the whole head to float32 now, for all query blocks that will use it."""
        for which in (0, 1):
            if self._blocks[which] is None:
                rows = np.zeros((self.num_blocks * BLOCK_K, self.head_dim), np.float32)
                blocks = rows.reshape(self.num_blocks, BLOCK_K, self.head_dim)
                for start in range(0, self.num_blocks, _ROWS // BLOCK_K):
                    index = np.arange(start, min(start + _ROWS // BLOCK_K, self.num_blocks))
                    blocks[index[0] : index[-1] + 1] = self._convert(which, index, np.float32)
                self._blocks[which] = blocks
                self._direct[which] = True

    def drop(self) -> None:
        """Forget what `keep` made."""
        self._blocks = [None, None]

    def keys(self, index: npt.NDArray[np.intp], scratch: Floats) -> Floats:
        """Return the keys of the blocks `index`, (len(index), 64, head_dim), padded with 0.

        The result may lie in `scratch` or in the caller's memory: it is not to be written to.
        """
        return self._load(0, index, scratch)

    def values(self, index: npt.NDArray[np.intp], scratch: Floats) -> Floats:
        """Return the values of the blocks `index`, as `keys` does."""
        return self._load(1, index, scratch)

    def first_keys(self, index: npt.NDArray[np.intp], work: Any) -> Floats:
        """Return the first key of each block, (len(index), head_dim); blocks must be full ones."""
        blocks = self._blocks[0]
        if blocks is not None and work == np.float32:
            rows: Floats = blocks[index, 0]
            return rows
        return self._convert(0, index, work, first=True)[:, 0]

    def raw_keys(self, start: int, stop: int, work: Any) -> Floats:
        """Return K of the tokens start to stop as given, cleared of non-finite elements.

        May be a view of the caller's memory: not to be written to.
        """
        array = self._raw[0]
        part = to_float(array.with_data(array.data[start:stop]), work)
        if self._has_bad[0]:
            part = np.where(np.isfinite(part), part, part.dtype.type(0))
        return part

    def _load(self, which: int, index: npt.NDArray[np.intp], scratch: Floats) -> Floats:
        blocks = self._blocks[which]
        if blocks is None or scratch.dtype != np.float32:
            return self._convert(which, index, scratch.dtype)
        first, last, count = int(index[0]), int(index[-1]), len(index)
        has_tail = self._tails[which] is not None and bool((index == len(blocks)).any())
        if self._direct[which] and last - first + 1 == count and not has_tail:
            if count <= 2 or bool((index[1:] - index[:-1] == 1).all()):
                return blocks[first : last + 1]
        out: Floats = scratch[: count * BLOCK_K * self.head_dim].reshape(
            count, BLOCK_K, self.head_dim
        )
        if blocks.flags.c_contiguous:
            blocks.take(index, axis=0, out=out, mode="clip")
        else:  # take would copy all of a strided array first
            out[...] = blocks[np.minimum(index, len(blocks) - 1)]
        if has_tail:
            out[index == len(blocks)] = self._tails[which]
        return out

    def _convert(
        self, which: int, index: npt.NDArray[np.intp], work: Any, *, first: bool = False
    ) -> Floats:
        """Convert blocks from the caller's memory; with `first`, the first key of each alone."""
        array = self._raw[which]
        length = 1 if first and not self.quantized else BLOCK_K
        whole = self.tokens // BLOCK_K
        out = np.zeros((len(index), length, self.head_dim), work)
        inside = index < whole
        if whole and inside.any():
            raw = _in_blocks(array.data, whole)[index[inside], :length]
            out[inside] = to_float(array.with_data(raw), work)
        if not inside.all():
            tail = array.with_data(array.data[whole * BLOCK_K :][:length])
            out[~inside, : tail.shape[0]] = to_float(tail, work)
        bad = ~np.isfinite(out) if self._has_bad[which] else None
        if bad is not None:
            out[bad] = 0
        if self.quantized and which == 0:
            out -= self.mean.astype(work)
            if bad is not None:  # what was not finite has code 0, mean or not
                out[bad] = 0
            out[~inside, self.tokens - whole * BLOCK_K :] = 0
            int8_round_trip(out.reshape(len(index), -1, KEY_GROUP, self.head_dim), axes=(2, 3))
        elif self.quantized:
            smallest = np.finfo(work).smallest_subnormal  # the scale must not round to 0
            scale = np.maximum(self._v_scale, smallest).astype(work)
            codes = (out / scale).astype(np.float32, copy=False)
            round_e4m3(codes)
            np.multiply(codes, scale, out=out)
        return out


def _in_blocks(rows: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """View (tokens, head_dim) as (count, 64, head_dim), whatever the stride between tokens."""
    step = rows.strides[0]
    return np.lib.stride_tricks.as_strided(
        rows,
        shape=(count, BLOCK_K, rows.shape[1]),
        strides=(BLOCK_K * step, step, rows.strides[1]),
        writeable=False,
    )
