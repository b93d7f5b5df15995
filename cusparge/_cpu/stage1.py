"""Stage 1 on the CPU: which key blocks each query block computes (arXiv:2502.18137, section 3.2).

Pooled vectors are sums in the inputs' precision; scores, softmax and shares are float64, so that
the blocks chosen are those of the float64 oracle except where two scores tie within rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cusparge._cpu.scratch import scratch
from cusparge._cpu.source import Floats, KeySource
from cusparge._types import BLOCK_K, BLOCK_Q, num_blocks
from cusparge.policy import Policy, TopCdf, TopK

__all__ = ["HeadRule", "Pooled", "Reach", "head_rule", "noise_of", "pool", "pool_keys", "select"]

Bools = npt.NDArray[np.bool_]

#: Softmax weights are compared as whole multiples of 2^-20 of the largest: sums of integers do not
#: depend on their order, so every backend finds the same smallest set.
_WEIGHT_UNIT = float(2**20)


@dataclass(frozen=True)
class HeadRule:
    """A policy's thresholds for one query head."""

    kind: str  # "cdf", "topk" or "dense"
    threshold: float  # cdf_threshold or keep
    sim_threshold: float
    within: bool
    sink_blocks: int
    local_blocks: int
    pv_log2: float | None  # pv_threshold in log2 units, None where stage 2 is off


def head_rule(policy: Policy, head: int) -> HeadRule:
    """Return the rule for query head `head`."""

    def of_head(value: Any) -> float:
        return float(value[head] if isinstance(value, tuple) else value)

    pv = None if policy.pv_threshold is None else of_head(policy.pv_threshold) / math.log(2.0)
    if pv is not None and math.isinf(pv):
        pv = None
    kind, threshold, sim = "dense", 1.0, -1.0
    if isinstance(policy, TopCdf):
        kind, threshold = "cdf", of_head(policy.cdf_threshold)
        sim = of_head(policy.sim_threshold)
    elif isinstance(policy, TopK):
        kind, threshold = "topk", of_head(policy.keep)
        sim = of_head(policy.sim_threshold)
    within = isinstance(policy, TopCdf) and policy.rule == "within"
    return HeadRule(kind, threshold, sim, within, policy.sink_blocks, policy.local_blocks, pv)


@dataclass(frozen=True)
class Reach:
    """Which blocks causality and the lengths leave to each query block of one sequence.

    `offset` is None without causality; else query i sees key j when j <= i + offset.
    """

    seqlen_q: int
    seqlen_k: int  # valid keys
    offset: int | None

    def rows(self, block: int) -> tuple[int, int]:
        """Return the first row of a query block, and the one after its last."""
        return block * BLOCK_Q, min((block + 1) * BLOCK_Q, self.seqlen_q)

    def reachable(self, blocks: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Return how many key blocks, from the first one on, each query block may see."""
        return self._seen_by(np.minimum((blocks + 1) * BLOCK_Q, self.seqlen_q) - 1)

    def reachable_by_halves(self, blocks: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Return the same for the two groups of 64 rows in each query block, (blocks, 2)."""
        last_row = blocks[:, None] * BLOCK_Q + np.array([BLOCK_Q // 2, BLOCK_Q]) - 1
        return self._seen_by(np.minimum(last_row, self.seqlen_q - 1))

    def _seen_by(self, last_row: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        valid = num_blocks(self.seqlen_k, BLOCK_K)
        if self.offset is None:
            return np.full(last_row.shape, valid, np.intp)
        seen: npt.NDArray[np.intp] = np.clip((last_row + self.offset) // BLOCK_K + 1, 0, valid)
        return seen

    def unmasked(self, block: int) -> int:
        """Return how many key blocks, from the first on, every row of a query block sees whole."""
        if self.offset is None:
            return num_blocks(self.seqlen_k, BLOCK_K)
        seen_by_all = max(0, block * BLOCK_Q + self.offset + 1)
        if seen_by_all >= self.seqlen_k:
            return num_blocks(self.seqlen_k, BLOCK_K)
        return seen_by_all // BLOCK_K

    def diagonal(self, blocks: npt.NDArray[np.intp]) -> tuple[Any, Any]:
        """Return the key blocks that hold the diagonal keys of each one's first and last row."""
        offset = self.offset or 0
        last_row = np.minimum((blocks + 1) * BLOCK_Q, self.seqlen_q) - 1
        return (blocks * BLOCK_Q + offset) // BLOCK_K, (last_row + offset) // BLOCK_K


@dataclass(frozen=True)
class Pooled:
    """Mean-pooled blocks: one vector and one self-similarity each."""

    mean: npt.NDArray[np.float64]  # (blocks, head_dim)
    similarity: npt.NDArray[np.float64]  # (blocks,)
    tokens: npt.NDArray[np.intp]  # (blocks,) real tokens in each
    bad: Bools  # (blocks,) holds a non-finite element


def pool(blocks: Floats, tokens: npt.NDArray[np.intp], bad: Bools, noise: float) -> Pooled:
    """Pool (n, size, head_dim) blocks whose padding is 0.

    Self-similarity is the mean cosine over all pairs of tokens, which is the squared length of
    the mean unit vector: (1/n²) Σ_st u_s·u_t = ‖mean u‖². A zero token has no direction and counts
    in n alone; in an all-zero block all tokens are identical, so it is 1. Tokens shorter than
    `noise` are what rounding left of zero.
    """
    directions = blocks
    if blocks.dtype == np.float64:  # squares of what needs float64 could overflow it as well
        largest = np.abs(blocks).max(axis=2, keepdims=True)
        directions = blocks / np.where(largest > 0, largest, 1)
        noise = 0.0
    squared = np.einsum("btd,btd->bt", directions, directions)
    short = squared <= noise * noise
    tiny = ~short & (squared < 1e-30)
    lengths = np.sqrt(squared)
    if tiny.any():  # squares near float32's smallest number have lost their digits
        lengths[tiny] = np.sqrt(np.square(blocks[tiny], dtype=np.float64).sum(axis=1))
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=~short)
    unit_sum = np.matmul(inverse[:, None, :], directions)[:, 0].astype(np.float64)
    count = np.maximum(tokens, 1).astype(np.float64)
    similarity = np.minimum(np.square(unit_sum / count[:, None]).sum(axis=1), 1.0)
    similarity[short.all(axis=1)] = 1.0
    ones = np.ones((1, blocks.shape[1]), blocks.dtype)  # BLAS sums faster than a reduction
    mean = np.matmul(ones, blocks)[:, 0].astype(np.float64) / count[:, None]
    return Pooled(mean, similarity, tokens, bad)


def noise_of(mean: npt.NDArray[np.float64]) -> float:
    """Return what rounding leaves, at most, of a token that equals the mean it is taken off."""
    largest = float(np.abs(mean).max(initial=0.0))
    if largest == 0.0:
        return 0.0
    return 2.0**-22 * largest * float(np.linalg.norm(mean / largest))  # squares could overflow


def pool_keys(source: KeySource, work: Any) -> Pooled:
    """Pool K with its token mean taken off, block by block, in steps of a few megabytes."""
    total, head_dim = source.num_blocks, source.head_dim
    tokens = np.full(total, BLOCK_K, np.intp)
    if total:
        tokens[-1] = source.tokens - (total - 1) * BLOCK_K
    bad = np.zeros(total, np.bool_)
    bad[source.bad_in_k // BLOCK_K] = True
    mean = source.mean.astype(work)
    noise = noise_of(source.mean)
    step = 64
    parts = []
    for start in range(0, total, step):
        stop = min(start + step, total)
        rows = source.raw_keys(start * BLOCK_K, min(stop * BLOCK_K, source.tokens), work)
        centred = scratch.get("centred", ((stop - start) * BLOCK_K, head_dim), work)
        np.subtract(rows, mean, out=centred[: len(rows)])
        centred[len(rows) :] = 0
        blocks = centred.reshape(stop - start, BLOCK_K, head_dim)
        parts.append(pool(blocks, tokens[start:stop], bad[start:stop], noise))
    if not parts:
        return Pooled(np.zeros((0, head_dim)), np.zeros(0), tokens, bad)
    return Pooled(
        np.concatenate([part.mean for part in parts]),
        np.concatenate([part.similarity for part in parts]),
        tokens,
        bad,
    )


def select(
    rule: HeadRule,
    queries: Pooled,
    keys: Pooled,
    blocks: npt.NDArray[np.intp],
    reach: Reach,
    sm_scale: float,
) -> tuple[Bools, npt.NDArray[np.intp]]:
    """Choose the key blocks of a panel of query blocks.

    Returns
    -------
    chosen : (len(blocks), key blocks) bool
    top : (len(blocks),) intp
        The chosen block with the highest pooled score, -1 where there are no scores: stage 2
        visits it first.
    """
    total = len(keys.tokens)
    column = np.arange(total)
    allowed = column < reach.reachable(blocks)[:, None]
    no_top = np.full(len(blocks), -1, np.intp)
    if rule.kind == "dense" or total == 0:
        return allowed, no_top

    low, high = reach.diagonal(blocks)
    low, high = low[:, None], high[:, None]
    forced = np.broadcast_to(column < rule.sink_blocks, allowed.shape).copy()
    if reach.offset is not None:  # a row's own diagonal key: no row is left without keys
        forced |= (column >= low) & (column <= high)
    if rule.local_blocks:
        after = 0 if reach.offset is not None else rule.local_blocks - 1
        forced |= (column > low - rule.local_blocks) & (column <= high + after)
    forced &= allowed

    fixed = allowed & ((keys.similarity <= rule.sim_threshold) | keys.bad)
    candidates = allowed & ~fixed
    takes_all = (queries.similarity <= rule.sim_threshold) | queries.bad
    takes_all |= ~candidates.any(axis=1)

    scores = sm_scale * (queries.mean @ keys.mean.T) + np.log(keys.tokens / BLOCK_K)
    scores[~candidates] = -np.inf
    highest = scores.max(axis=1, keepdims=True)
    highest[np.isneginf(highest)] = 0.0
    weights = np.floor(_WEIGHT_UNIT * np.exp(scores - highest)).astype(np.int64)
    weights[~candidates] = -1  # after every candidate, even one of weight 0

    if rule.kind == "topk":
        reachable = allowed.sum(axis=1)
        count = np.ceil(rule.threshold * reachable - 1e-6 * reachable).astype(np.int64)
        count = np.clip(count, 1, np.maximum(reachable, 1)) - forced.sum(axis=1)
        order = np.argsort(-np.where(forced, -1, weights), axis=1, kind="stable")
    else:
        order = np.argsort(-weights, axis=1, kind="stable")
        ordered = np.maximum(np.take_along_axis(weights, order, axis=1), 0)
        share = np.cumsum(ordered, axis=1)
        goal = rule.threshold * share[:, -1:]
        if rule.within:
            count = np.maximum((share <= goal).sum(axis=1), 1)
        elif rule.threshold >= 1.0:
            count = np.full(len(blocks), total)
        else:
            count = (share < goal).sum(axis=1) + 1
    picked = np.zeros_like(allowed)
    np.put_along_axis(picked, order, column < count[:, None], axis=1)
    chosen = (picked & candidates) | fixed | forced
    chosen[takes_all] = allowed[takes_all]

    scored = np.where(chosen, scores, -np.inf)  # weights round down to 0 far below the best
    top = np.where(takes_all | np.isneginf(scored.max(axis=1)), -1, scored.argmax(axis=1))
    return chosen, top
