"""The keys and values of one sequence and head, ready for matrix products, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cusparge._arrays import HostArray
from cusparge._arrays.view import to_float
from cusparge._cpu.rounding import KEY_GROUP, int8_round_trip, power_of_two_scale, round_e4m3
from cusparge._types import BLOCK_K, num_blocks

__all__ = ["Floats", "KeySource", "scan"]

Floats = npt.NDArray[Any]  # float32, or float64 where float32 would overflow

_ROWS = 4096  # tokens per step of a scan: half a megabyte at head_dim 32, two at 128


class Scan:
    """What one pass over a tensor tells: its largest finite magnitude, and rows that are not."""

    def __init__(self, largest: Floats, bad_rows: npt.NDArray[np.intp], total: Floats) -> None:
        self.largest = largest  # (head_dim,) float64
        self.bad_rows = bad_rows
        self.total = total  # (head_dim,) float64, the sum over finite elements


def scan(array: HostArray) -> Scan:
    """Read a (tokens, head_dim) tensor once, in steps."""
    tokens, head_dim = array.shape
    work = np.float64 if array.dtype == "float64" else np.float32
    largest = np.zeros(head_dim)
    total = np.zeros(head_dim)
    bad: list[npt.NDArray[np.intp]] = []
    for start in range(0, tokens, _ROWS):
        part = to_float(array.with_data(array.data[start : start + _ROWS]), work)
        low, high = part.min(axis=0), part.max(axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            finite = np.isfinite(part)
            bad.append(np.flatnonzero(~finite.all(axis=1)) + start)
            part = np.where(finite, part, work(0))
            low, high = part.min(axis=0), part.max(axis=0)
        np.maximum(largest, np.maximum(-low, high), out=largest)
        # Sums of 64 in the input's precision, then float64: exact enough, and twice as fast.
        whole = len(part) // BLOCK_K * BLOCK_K
        exact = np.float64 if largest.max(initial=0.0) > 1e30 else work
        sums = np.add.reduce(part[:whole].reshape(-1, BLOCK_K, head_dim), axis=1, dtype=exact)
        total += sums.sum(axis=0, dtype=np.float64)
        total += part[whole:].sum(axis=0, dtype=np.float64)
    none = np.empty(0, np.intp)
    return Scan(largest, np.concatenate(bad) if bad else none, total)


class KeySource:
    """Keys and values of one sequence and key head.

    Blocks come out in `work` precision with non-finite elements cleared and, where `quantized`,
    as the values that the int8 and e4m3 codes stand for. float32 memory is used where it lies; any
    other is converted once if `keep` allows it, else again for each use.

    Attributes
    ----------
    mean : (head_dim,) float64
        Mean of K over its tokens, non-finite elements counted as 0.
    bad_keys : (n,) intp
        Ascending tokens with a non-finite element in K or V; rows that see one become NaN.
    """

    def __init__(self, k: HostArray, v: HostArray, *, need_v: bool, quantized: bool) -> None:
        self._raw = (k, v)
        self.tokens, self.head_dim = k.shape
        self.num_blocks = num_blocks(self.tokens, BLOCK_K)
        keys = scan(k)
        self.mean = keys.total / max(self.tokens, 1)
        self.largest_k = float(keys.largest.max(initial=0.0))
        self.bad_in_k = keys.bad_rows
        self.bad_keys = keys.bad_rows
        self.largest_v = 0.0
        self.quantized = quantized
        self._has_bad = (bool(len(keys.bad_rows)), False)
        if need_v:
            values = scan(v)
            self.largest_v = float(values.largest.max(initial=0.0))
            self.bad_keys = np.union1d(keys.bad_rows, values.bad_rows)
            self._has_bad = (bool(len(keys.bad_rows)), bool(len(values.bad_rows)))
            if quantized:
                self._v_scale = power_of_two_scale(values.largest)
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
        # BLAS takes rows as they lie when they ascend without overlapping.
        self._direct[which] = bool(
            rows.flags.aligned and rows.strides[0] >= self.head_dim * rows.itemsize
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
        """Return the keys of the blocks `index`, (len(index), 64, head_dim), padded with 0."""
        return self._load(0, index, scratch)

    def values(self, index: npt.NDArray[np.intp], scratch: Floats) -> Floats:
        """Return the values of the blocks `index`, (len(index), 64, head_dim), padded with 0."""
        return self._load(1, index, scratch)

    def first_keys(self, index: npt.NDArray[np.intp], work: Any) -> Floats:
        """Return the first key of each block, (len(index), head_dim)."""
        blocks = self._blocks[0]
        if blocks is not None and work == np.float32:
            rows: Floats = blocks[np.minimum(index, len(blocks) - 1), 0]
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
        consecutive = last - first + 1 == count and bool((np.diff(index) == 1).all())
        has_tail = self._tails[which] is not None and bool((index == len(blocks)).any())
        if consecutive and self._direct[which] and not has_tail:
            return blocks[first : last + 1]
        out: Floats = scratch[: count * BLOCK_K * self.head_dim].reshape(
            count, BLOCK_K, self.head_dim
        )
        if blocks.flags.c_contiguous:
            np.take(blocks, index, axis=0, out=out, mode="clip")
        else:  # np.take would copy all of a strided array first
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
            scale = self._v_scale.astype(work)
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
