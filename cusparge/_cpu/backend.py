"""The order of work on the CPU: sequences and heads into groups, groups into panels of rows.

A *group* is one sequence with one key head: its keys are scanned, pooled and, where their memory
cannot be used as it lies, converted. A *panel* is a few query blocks of one query head: its blocks
are chosen and computed. Panels are the work items of the threads, so that few heads or uneven
sparsity still keep all of them busy. Nothing here grows with seqlen_q × seqlen_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from cusparge._arrays import HostArray
from cusparge._arrays.view import finite_max, from_float, to_float
from cusparge._cpu import threads, tiles
from cusparge._cpu.rounding import int8_round_trip
from cusparge._cpu.source import Floats, KeySource, needs_float64, scan
from cusparge._cpu.stage1 import Pooled, Reach, head_rule, pool, pool_keys, select
from cusparge._types import BLOCK_K, BLOCK_Q, BlockMap, Counts, Problem, num_blocks

__all__ = ["CpuBackend"]

#: What a thread may keep of converted heads and pooled blocks, in bytes.
_KEEP_BYTES = 40 * 2**20

#: Pairs of blocks in a panel at the most: their scores and orders stay within 32 MB.
_PANEL_PAIRS = 2**18

_LOG2_E = math.log2(math.e)

#: Scores beyond this could overflow float32 on their way: float64 is used.
_LARGE_SCORE = 1e30


@dataclass
class _Group:
    """One sequence with one key head."""

    sequence: int
    kv_head: int
    k: HostArray
    v: HostArray
    source: KeySource | None = None
    pooled: Pooled | None = None


@dataclass(frozen=True)
class _Panel:
    """A few query blocks of one query head, ready to be computed."""

    group: _Group
    source: KeySource
    reach: Reach
    head: int
    blocks: npt.NDArray[np.intp]
    rows: Floats  # cleared of non-finite elements
    scaled: Floats  # (blocks, head_dim, 128), times sm_scale · log2(e), of int8 codes if quantized
    bad_rows: npt.NDArray[np.intp]  # rows of the panel with a non-finite element


@dataclass(frozen=True)
class _PanelCounts:
    """What one panel adds to `Counts`."""

    sequence: int
    head: int
    reachable: int
    selected: int
    selected_rows: int
    skipped_rows: int


class CpuBackend:
    """Block-sparse attention in float32 on host memory."""

    name = "cpu"

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
        """Write `out` and `lse`; arrays are (B, H, S, D), or (H, S, D) where packed."""
        run = _Run(problem, q, k, v, block_map=block_map, out=out, lse=lse)
        run.all()
        return run.counts

    def predict(
        self, problem: Problem, q: HostArray, k: HostArray, mask: npt.NDArray[np.bool_]
    ) -> int:
        """Write the block mask and return how many blocks are reachable."""
        run = _Run(problem, q, k, k, mask_out=mask)
        run.all()
        return int(run.counts.reachable.sum())


class _Run:
    """One call."""

    def __init__(
        self,
        problem: Problem,
        q: HostArray,
        k: HostArray,
        v: HostArray,
        *,
        block_map: BlockMap | None = None,
        out: HostArray | None = None,
        lse: npt.NDArray[np.float32] | None = None,
        mask_out: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self.problem = problem
        self.arrays = (q, k, v)
        self.block_map = block_map
        self.out = out
        self.lse = lse
        self.mask_out = mask_out
        self.quantized = problem.policy.quantize is True and out is not None
        self.rules = [head_rule(problem.policy, head) for head in range(problem.num_heads_q)]
        # By the problem alone: a panel's arithmetic must not depend on the number of threads. Large
        # panels spend less on choosing blocks; eight of them or more keep threads busy.
        every = sum(num_blocks(stop - start, BLOCK_Q) for start, stop, _, _ in problem.spans)
        widest = max((stop - start for _, _, start, stop in problem.spans), default=0) // BLOCK_K
        self.panel_blocks = min(max(every * problem.num_heads_q // 8, 4), 32)
        # Choosing holds some fifteen numbers for each pair of blocks in a panel.
        self.panel_blocks = max(min(self.panel_blocks, _PANEL_PAIRS // max(widest, 1)), 1)
        self.counts = Counts.zeros(problem.batch, problem.num_heads_q)

    # -- views of one sequence ---------------------------------------------------------------

    def _head(self, array: HostArray, sequence: int, head: int, start: int, stop: int) -> HostArray:
        data = array.data if self.problem.packed else array.data[sequence]
        return array.with_data(data[head, start:stop])

    def _lse_of(self, sequence: int, head: int) -> npt.NDArray[np.float32] | None:
        if self.lse is None:
            return None
        start, stop = self.problem.spans[sequence][:2]
        rows = self.lse if self.problem.packed else self.lse[sequence]
        return rows[head, start:stop]

    def _reach(self, sequence: int) -> Reach:
        q_start, q_stop, k_start, k_stop = self.problem.spans[sequence]
        offsets = self.problem.causal_offsets
        return Reach(q_stop - q_start, k_stop - k_start, offsets[sequence] if offsets else None)

    # -- the order of work ---------------------------------------------------------------------

    def all(self) -> None:
        """Do everything: waves of groups, each wave's keys first and then its panels."""
        num_threads = threads.num_threads()
        groups = []
        for sequence, (_, _, start, stop) in enumerate(self.problem.spans):
            for kv_head in range(self.problem.num_heads_kv if self.problem.num_heads_q else 0):
                k = self._head(self.arrays[1], sequence, kv_head, start, stop)
                v = self._head(self.arrays[2], sequence, kv_head, start, stop)
                groups.append(_Group(sequence, kv_head, k, v))
        budget = num_threads * _KEEP_BYTES
        with threads.single_threaded_blas():
            for wave in _waves(groups, budget):
                threads.run([partial(self._prepare, group, budget) for group in wave], num_threads)
                panels: list[Callable[[], _PanelCounts]] = []
                for group in wave:
                    panels.extend(self._panels(group))
                for panel in threads.run(panels, num_threads):
                    at = panel.sequence, panel.head
                    self.counts.reachable[at] += panel.reachable
                    self.counts.selected[at] += panel.selected
                    self.counts.selected_rows[at] += panel.selected_rows
                    self.counts.skipped_rows[at] += panel.skipped_rows
                for group in wave:
                    group.source = group.pooled = None

    def _prepare(self, group: _Group, budget: int) -> None:
        """Scan, pool and convert one head's keys and values."""
        needs_map = self.block_map is None and any(
            self.rules[head].kind != "dense" for head in self._query_heads(group)
        )
        source = KeySource(group.k, group.v, need_v=self.out is not None, quantized=self.quantized)
        if needs_map:
            group.pooled = pool_keys(source, np.float64 if source.wide else np.float32)
        if self.out is not None and not source.wide and source.kept_bytes() <= budget:
            source.keep()
        group.source = source

    def _query_heads(self, group: _Group) -> range:
        ratio = self.problem.num_heads_q // self.problem.num_heads_kv
        return range(group.kv_head * ratio, (group.kv_head + 1) * ratio)

    def _panels(self, group: _Group) -> list[Callable[[], _PanelCounts]]:
        """Return the work items of one group, those with most keys (under causality) first."""
        reach = self._reach(group.sequence)
        total = num_blocks(reach.seqlen_q, BLOCK_Q)
        size = self.panel_blocks
        starts = range(0, total, size)
        return [
            partial(self._panel, group, reach, head, np.arange(start, min(start + size, total)))
            for start in reversed(starts)
            for head in self._query_heads(group)
        ]

    # -- one panel -----------------------------------------------------------------------------

    def _panel(
        self, group: _Group, reach: Reach, head: int, blocks: npt.NDArray[np.intp]
    ) -> _PanelCounts:
        """Choose the key blocks of a panel, and compute its query blocks."""
        panel = self._load(group, reach, head, blocks)
        chosen, top, halves = self._choose(panel)
        sizes = np.minimum((blocks + 1) * BLOCK_Q, reach.seqlen_q) - blocks * BLOCK_Q
        skipped_rows = 0
        if self.mask_out is not None:
            mask = self.mask_out[group.sequence, head]
            mask[blocks[0] : blocks[-1] + 1, : chosen.shape[1]] = chosen
        else:
            with np.errstate(all="ignore"):  # masked scores are -inf, and weights may vanish
                for i, size in enumerate(sizes.tolist()):
                    fine = None if halves is None else halves[i]
                    index = chosen[i].nonzero()[0]
                    skipped_rows += size * self._block(panel, i, index, int(top[i]), fine)
        selected = chosen.sum(axis=1)
        return _PanelCounts(
            group.sequence,
            head,
            int(reach.reachable(blocks).sum()),
            int(selected.sum()),
            int((selected * sizes).sum()),
            skipped_rows,
        )

    def _load(self, group: _Group, reach: Reach, head: int, blocks: npt.NDArray[np.intp]) -> _Panel:
        """Read a panel's queries in the precision they need."""
        source, problem = group.source, self.problem
        assert source is not None
        start, stop = int(blocks[0]) * BLOCK_Q, reach.rows(int(blocks[-1]))[1]
        q_start = problem.spans[group.sequence][0]
        queries = self._head(self.arrays[0], group.sequence, head, q_start + start, q_start + stop)
        seen = scan(queries)
        scale = abs(problem.sm_scale)
        wide = (
            source.wide
            or any(map(needs_float64, (seen.largest, scale, seen.largest * scale)))
            or seen.largest * source.largest_k * problem.head_dim * scale > _LARGE_SCORE
        )
        work = np.float64 if wide else np.float32
        rows = np.ascontiguousarray(to_float(queries, work))
        if len(seen.bad_rows):
            rows = np.where(np.isfinite(rows), rows, work(0))
        scaled = np.empty((len(blocks), problem.head_dim, BLOCK_Q), work)
        if self.out is not None:  # stage 1 alone needs the rows as they are
            self._scale(rows, scaled)
        return _Panel(group, source, reach, head, blocks, rows, scaled, seen.bad_rows)

    def _scale(self, rows: Floats, scaled: Floats) -> None:
        """Write each block's rows transposed, times sm_scale · log2(e), as int8 codes if asked."""
        if self.quantized:
            rows = rows.copy()
            int8_round_trip(rows, axes=(1,))
        factor = rows.dtype.type(self.problem.sm_scale * _LOG2_E)
        for i, block in enumerate(scaled):
            part = rows[i * BLOCK_Q : (i + 1) * BLOCK_Q]
            np.multiply(part.T, factor, out=block[:, : len(part)])

    def _choose(
        self, panel: _Panel
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp], npt.NDArray[np.bool_] | None]:
        """Return the chosen key blocks, the first to visit, and a caller's 64-row halves."""
        reach, blocks, head = panel.reach, panel.blocks, panel.head
        total = panel.source.num_blocks
        no_top = np.full(len(blocks), -1, np.intp)
        allowed = np.arange(total) < reach.reachable(blocks)[:, None]
        if self.block_map is not None:
            wanted, halves = _rows_of_map(self.block_map, panel.group.sequence, head, blocks, total)
            if halves is not None:  # a half block that lies in the future is not computed for it
                seen = reach.reachable_by_halves(blocks)
                halves &= np.arange(total)[:, None] < seen[:, None, :]
                wanted = np.asarray(halves.any(axis=2))
            return allowed & wanted, no_top, halves
        rule = self.rules[head]
        if rule.kind == "dense":
            return allowed, no_top, None
        assert panel.group.pooled is not None
        queries = _pool_queries(panel.rows, panel.bad_rows)
        chosen, top = select(
            rule, queries, panel.group.pooled, blocks, reach, self.problem.sm_scale
        )
        return chosen, top, None

    def _block(
        self,
        panel: _Panel,
        number: int,
        chosen: npt.NDArray[np.intp],
        top: int,
        halves: npt.NDArray[np.bool_] | None,
    ) -> int:
        """Compute one query block and write its rows; return the tiles that stage 2 skipped."""
        source, reach, rule = panel.source, panel.reach, self.rules[panel.head]
        block = int(panel.blocks[number])
        first, last = reach.rows(block)
        start = int(panel.blocks[0]) * BLOCK_Q
        mine = slice(first - start, last - start)
        if not len(chosen):
            self._write(panel, first, np.zeros_like(panel.rows[mine]), None)
            return 0
        limits = None if reach.offset is None else np.arange(first, last) + reach.offset
        queries = panel.scaled[number, :, : last - first]
        rows = tiles.RowBlock(queries, limits, reach.unmasked(block), halves)
        if self.quantized or rule.pv_log2 is not None:
            order = chosen
            if rule.pv_log2 is not None and top >= 0:
                order = np.concatenate([[top], chosen[chosen != top]])
            result = tiles.attend_online(
                source, order, rows, pv_log2=rule.pv_log2, quantized=self.quantized
            )
        else:
            result = tiles.attend(source, chosen, rows)
        lse = None if self.lse is None else self._log_sum(panel, mine, result)
        values, total = result.weighted, result.total
        empty = total == 0
        values /= np.where(empty, total.dtype.type(1), total)[:, None]
        if len(panel.bad_rows) or len(source.bad_keys):
            bad = np.isin(np.arange(first, last) - start, panel.bad_rows)
            bad |= _rows_that_see(source.bad_keys, chosen, rows)
            bad &= ~empty
            values[bad] = np.nan
            if lse is not None:
                lse[bad] = np.nan
        if self.quantized:  # codes round up: the largest V may come out beyond the dtype's range
            limit = min(finite_max(self.problem.dtype), float(np.finfo(values.dtype).max))
            np.clip(values, -limit, limit, out=values)
        self._write(panel, first, values, lse)
        return result.skipped

    def _log_sum(self, panel: _Panel, mine: slice, result: tiles.Result) -> Floats:
        """Return the natural log of the sums of exp(score), -inf where no key was computed."""
        work = result.total.dtype.type
        lse: Floats = (result.shift + np.log2(result.total)) * work(math.log(2.0))
        if self.quantized:  # scores were those of K less its mean
            mean = panel.source.mean.astype(work)
            lse += (panel.rows[mine] @ mean) * work(self.problem.sm_scale)
        return lse

    def _write(self, panel: _Panel, first: int, values: Floats, lse: Floats | None) -> None:
        assert self.out is not None
        sequence, head = panel.group.sequence, panel.head
        start = self.problem.spans[sequence][0] + first
        from_float(values, self._head(self.out, sequence, head, start, start + len(values)))
        rows = self._lse_of(sequence, head)
        if rows is not None:
            rows[first : first + len(values)] = -np.inf if lse is None else lse


def _waves(groups: list[_Group], budget: int) -> list[list[_Group]]:
    """Cut groups into waves whose kept memory stays within `budget`."""
    waves: list[list[_Group]] = []
    used = 0
    for group in groups:
        tokens, head_dim = group.k.shape
        size = tokens * head_dim * 9  # K and V in float32, and their pooled blocks
        if not waves or used + size > budget:
            waves.append([])
            used = 0
        waves[-1].append(group)
        used += size
    return waves


def _pool_queries(rows: Floats, bad_rows: npt.NDArray[np.intp]) -> Pooled:
    """Pool the rows of a panel into blocks of 128."""
    count = num_blocks(len(rows), BLOCK_Q)
    tokens = np.full(count, BLOCK_Q, np.intp)
    tokens[-1] = len(rows) - (count - 1) * BLOCK_Q
    blocks = rows
    if len(rows) < count * BLOCK_Q:
        blocks = np.zeros((count * BLOCK_Q, rows.shape[1]), rows.dtype)
        blocks[: len(rows)] = rows
    bad = np.zeros(count, np.bool_)
    bad[bad_rows // BLOCK_Q] = True
    return pool(blocks.reshape(count, BLOCK_Q, -1), tokens, bad, 0.0)


def _rows_of_map(
    block_map: BlockMap, sequence: int, head: int, blocks: npt.NDArray[np.intp], total: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_] | None]:
    """Return a caller's map for a panel, and (blocks, key blocks, 2) halves where it is fine."""

    def of_head(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        batch, heads = mask.shape[:2]
        rows: npt.NDArray[np.bool_] = mask[sequence if batch > 1 else 0, head if heads > 1 else 0]
        return rows

    chosen = of_head(block_map.host_mask)[blocks, :total]
    if block_map.row_mask is None:
        return chosen, None
    fine = of_head(block_map.row_mask)[:, :total]
    halves = np.zeros((len(blocks), total, 2), np.bool_)
    for half in (0, 1):
        rows = 2 * blocks + half
        inside = rows < len(fine)
        halves[inside, :, half] = fine[rows[inside]]
    return chosen, halves


def _rows_that_see(
    bad_keys: npt.NDArray[np.intp], chosen: npt.NDArray[np.intp], rows: tiles.RowBlock
) -> npt.NDArray[np.bool_]:
    """Tell which rows see one of `bad_keys` in a computed block."""
    num_rows = rows.queries.shape[1]
    seen = np.zeros(num_rows, np.bool_)
    if not len(bad_keys):
        return seen
    bad_keys = bad_keys[np.isin(bad_keys // BLOCK_K, chosen)]
    half_of_row = np.arange(num_rows) // (BLOCK_Q // 2)
    for half in (0, 1):  # whoever sees any bad key sees the first of those its half may see
        mine = bad_keys
        if rows.halves is not None:
            mine = bad_keys[rows.halves[bad_keys // BLOCK_K, half]]
        if len(mine):
            reaches = True if rows.limits is None else rows.limits >= mine[0]
            seen |= (half_of_row == half) & reaches
    return seen
