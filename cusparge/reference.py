r"""SpargeAttn in float64 NumPy: the statement of the rules that every backend is tested against.

Written to be read beside the paper (SpargeAttn, arXiv:2502.18137). One call of `attention` is

1. **Selective token compression** (`block_scores`). Q is cut into blocks of 128 rows, K into
   blocks of 64. Every block is replaced by its mean (`pool_blocks`), and the softmax of the
   pooled scores estimates how much attention a query block pays to a key block. A mean speaks
   for its block only where the tokens are alike (`self_similarity`); blocks that are not are
   *fix* blocks: they take no part in the estimate and are always computed.
2. **Masking of the first stage** (`block_map`). Per query block the heaviest key blocks are
   kept: the fewest that reach a share of the estimated mass (`top_cdf_count`), or a fixed share
   of the blocks in sight (`top_k_count`). Blocks that are not kept cost neither Q·K nor P·V.
3. **Sparse FlashAttention with masking of the second stage** (`_attend_rows`). An online softmax
   walks over the kept tiles. Where no row of a group comes within ``pv_threshold`` of its
   running maximum, the tile's P·V product is dropped as well.
4. **Combined with SageAttention** (`quantize_queries`, `quantize_keys`, `quantize_values`). K
   loses its token mean, Q and K become int8, P and V become e4m3 (or float16). It happens only
   where ``policy.quantize`` is True; everything else here is float64.

All index rules (ties, tails, causality, padding) are those of the library's documentation; they
are stated at the function that applies them. The loops over batch, head and query block are
plain on purpose. Nothing of the library is imported but its error class, and policies and block
maps are recognised by their attributes, so that no code is shared with what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cusparge.errors import InvalidArgumentError

BLOCK_Q = 128  # rows of a query block
BLOCK_K = 64  # keys of a key block
MASK_ROWS = 64  # rows of the finest mask a caller may give
KEY_GROUP = 16  # consecutive keys that share one int8 scale: two n-tiles of a tensor-core product
WEIGHT_ONE = 2**20  # integer weight of the best block; integer sums do not depend on their order
P_SCALE = 256.0  # P in [0, 1] is moved up by 2^8, near the top of e4m3, and exact in the LSE
E4M3_MAX = 448.0
F16_MAX = 65504.0
LN2 = math.log(2.0)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class _DefaultPolicy:
    """What ``policy=None`` means: the documented defaults of ``TopCdf()``."""

    cdf_threshold: float = 0.98
    sim_threshold: float = 0.3
    pv_threshold: float | None = None
    rule: str = "reach"
    sink_blocks: int = 0
    local_blocks: int = 0
    quantize: bool | None = None


@dataclass(frozen=True)
class AttentionStats:
    """How much work was left out, in total and per head; 0 where there was none to do."""

    sparsity: float  # share of all Q·K and P·V block products: the mean of the next two
    qk_sparsity: float  # 1 - selected / reachable: the first stage alone
    pv_sparsity: float  # 1 - (1 - qk_sparsity) * (1 - skipped_rows / selected_rows): both stages
    sparsity_per_head: FloatArray  # this and all that follow: (batch, num_heads_q)
    qk_sparsity_per_head: FloatArray
    pv_sparsity_per_head: FloatArray
    reachable: IntArray  # blocks of 128 x 64 that hold an allowed pair
    selected: IntArray  # those of them that were computed
    selected_rows: IntArray  # their rows, summed (a tail block has fewer than 128)
    skipped_rows: IntArray  # the part of these whose P·V the second stage dropped


@dataclass(frozen=True)
class BlockScores:
    """All that the first stage knows before it selects, for every (batch, head, q block, k block).

    `weights` over their sum are the pooled softmax. A row that takes all its reachable blocks
    (`Dense`, a fix row, or no candidate left) has no candidates.
    """

    reachable: BoolArray  # holds a pair that causality, padding and the lengths allow
    forced: BoolArray  # diagonal, sink and local blocks, where reachable
    candidates: BoolArray  # reachable and no fix column
    scores: FloatArray  # natural-log units, -inf where no candidate
    weights: IntArray  # floor(2**20 * exp(score - row maximum))
    sim_q: FloatArray  # (batch, head, q block)
    sim_k: FloatArray  # (batch, head, k block), after smoothing
    takes_all: BoolArray  # (batch, head, q block)


# ---- which pairs are allowed -------------------------------------------------------------------


@dataclass(frozen=True)
class Visibility:
    """The (query, key) pairs of one sequence that lengths, padding and causality allow."""

    seqlen_q: int
    seqlen_k: int
    valid_k: int  # keys in front of the right padding
    offset: int | None = None  # row i sees keys j <= i + offset; None without causality

    def pairs(self, rows: IntArray, keys: IntArray) -> BoolArray:
        """Return which of the given rows may see which of the given keys."""
        seen = np.broadcast_to(keys < self.valid_k, (rows.size, keys.size))
        if self.offset is None:
            return seen
        return seen & (keys <= rows[:, None] + self.offset)

    def blocks(self, block_q: int = BLOCK_Q) -> BoolArray:
        """Return the blocks of ``block_q`` rows by 64 keys that hold at least one such pair."""
        last_row = _block_ends(self.seqlen_q, block_q) - 1
        first_key = np.arange(_num_blocks(self.seqlen_k, BLOCK_K)) * BLOCK_K
        # The last row sees most, the first key is seen most: if this pair is not allowed, none is.
        return self.pairs(last_row, first_key)


def reachable_blocks(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    causal_align: str = "bottom_right",
    valid_k: int | None = None,
    block_q: int = BLOCK_Q,
) -> BoolArray:
    """Return the (num_blocks_q, num_blocks_k) map of blocks that hold an allowed pair."""
    offset = _causal_offset(seqlen_q, seqlen_k, causal, causal_align)
    valid = seqlen_k if valid_k is None else valid_k
    return Visibility(seqlen_q, seqlen_k, valid, offset).blocks(block_q)


def forced_blocks(vis: Visibility, sink_blocks: int, local_blocks: int) -> BoolArray:
    """Return the reachable blocks that are computed whatever their score.

    Under causality these are the blocks holding some row's own diagonal key ``row + offset``, so
    that no row is left without keys. `sink_blocks` adds the first columns; `local_blocks` = n
    widens the diagonal band by n - 1 blocks to the left, and to the right without causality.
    """
    ends = _block_ends(vis.seqlen_q, BLOCK_Q)
    starts = np.arange(ends.size) * BLOCK_Q
    offset = vis.offset or 0
    first = ((starts + offset) // BLOCK_K)[:, None]
    last = ((ends - 1 + offset) // BLOCK_K)[:, None]
    column = np.arange(_num_blocks(vis.seqlen_k, BLOCK_K))
    forced = np.broadcast_to(column < sink_blocks, (ends.size, column.size))
    if vis.offset is not None:
        forced = forced | ((first <= column) & (column <= last))
    if local_blocks > 0:
        reach = local_blocks - 1
        right = last if vis.offset is not None else last + reach
        forced = forced | ((first - reach <= column) & (column <= right))
    return forced & vis.blocks()


# ---- stage 1: selective token compression ------------------------------------------------------


def smooth_keys(k: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the real keys of one head less their token mean, and the mean.

    It shifts every row of scores by a constant, which softmax does not see. A non-finite element
    counts as 0 in the mean and in the result; the count of tokens stays.
    """
    mean = _finite(k).sum(axis=0) / max(len(k), 1)
    return np.where(np.isfinite(k), k - mean, 0.0), mean


def pool_blocks(x: FloatArray, block: int) -> FloatArray:
    """Return the mean token of every block; a tail block divides by its own count."""
    return _block_sums(x, block) / _block_counts(len(x), block)[:, None]


def self_similarity(x: FloatArray, block: int) -> FloatArray:
    r"""Return the mean cosine similarity among the tokens of every block, in [0, 1].

    The mean over all n² entries of :math:`U U^T`, where the rows of U are the unit tokens, is
    :math:`\|\frac1n\sum_t u_t\|^2`: identical tokens give 1, n orthogonal ones 1/n. A zero token
    has no direction and counts as similar to none; a block of zeros has identical tokens: 1.
    """
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    similarity = np.square(pool_blocks(unit, block)).sum(axis=-1)
    is_zero = _block_sums(norm, block)[:, 0] == 0
    return np.where(is_zero, 1.0, np.minimum(similarity, 1.0))  # rounding must not pass 1


def block_scores(q: ArrayLike, k: ArrayLike, *, policy: Any = None, **options: Any) -> BlockScores:
    r"""Score every key block for every query block; parameters as in `block_map`.

    .. math:: \hat S_{ij} = \text{scale}\cdot\bar q_i\cdot\bar k_j + \ln(n_j / 64)

    with block means over real tokens, K smoothed first, and n_j the real keys of block j: the
    softmax of a row estimates the *mass* of a block, and a short block holds less.
    """
    return _score(_problem(q, k, k, **options), _DefaultPolicy() if policy is None else policy)


def _score(problem: _Problem, policy: Any) -> BlockScores:
    batch, heads, seqlen_q, _ = problem.q.shape
    num_q, num_k = _num_blocks(seqlen_q, BLOCK_Q), _num_blocks(problem.k.shape[2], BLOCK_K)
    grid = (batch, heads, num_q, num_k)
    result = BlockScores(
        reachable=np.zeros(grid, np.bool_),
        forced=np.zeros(grid, np.bool_),
        candidates=np.zeros(grid, np.bool_),
        scores=np.full(grid, -np.inf),
        weights=np.zeros(grid, np.int64),
        sim_q=np.zeros((batch, heads, num_q)),
        sim_k=np.zeros((batch, heads, num_k)),
        takes_all=np.zeros((batch, heads, num_q), np.bool_),
    )
    is_dense = not (hasattr(policy, "cdf_threshold") or hasattr(policy, "keep"))
    sim_threshold = _per_head(getattr(policy, "sim_threshold", -1.0), heads, "sim_threshold")
    for b, h in np.ndindex(batch, heads):
        vis = problem.visibility(b)
        q, k = problem.q[b, h], problem.keys(b, h)
        real = _num_blocks(vis.valid_k, BLOCK_K)  # key blocks beyond are padding, never scored
        smoothed, _ = smooth_keys(k)
        sim_q = self_similarity(_finite(q), BLOCK_Q)
        sim_k = self_similarity(smoothed, BLOCK_K)
        # A block with a NaN or an infinity has no meaningful mean: computed, never estimated.
        fix_q = (sim_q <= sim_threshold[h]) | _block_any(_tainted(q), BLOCK_Q)
        fix_k = (sim_k <= sim_threshold[h]) | _block_any(_tainted(k), BLOCK_K)

        reachable = vis.blocks()
        candidates = reachable.copy()
        candidates[:, :real] &= ~fix_k
        takes_all = fix_q | ~candidates.any(axis=-1) | is_dense
        candidates[takes_all] = False

        pooled = pool_blocks(_finite(q), BLOCK_Q) @ pool_blocks(smoothed, BLOCK_K).T
        scores = np.full((num_q, num_k), -np.inf)
        scores[:, :real] = problem.scale * pooled
        scores[:, :real] += np.log(_block_counts(vis.valid_k, BLOCK_K) / BLOCK_K)
        scores[~candidates] = -np.inf
        top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.floor(WEIGHT_ONE * np.exp(scores - np.where(np.isfinite(top), top, 0.0)))

        result.reachable[b, h] = reachable
        result.forced[b, h] = forced_blocks(vis, policy.sink_blocks, policy.local_blocks)
        result.candidates[b, h] = candidates
        result.scores[b, h] = scores
        result.weights[b, h] = weights.astype(np.int64)
        result.sim_q[b, h] = sim_q
        result.sim_k[b, h, :real] = sim_k
        result.takes_all[b, h] = takes_all
    return result


# ---- stage 1: the mask -------------------------------------------------------------------------


def top_cdf_count(weights: IntArray, cdf_threshold: float, rule: str = "reach") -> int:
    """Return how many blocks to keep of `weights`, sorted heaviest first (at least one).

    ``"reach"``: the fewest whose share of the sum reaches `cdf_threshold`. ``"within"``, the rule
    of the original code: the most whose share does not exceed it. All at a threshold of 1, blocks
    of weight 0 included.
    """
    if cdf_threshold >= 1:
        return weights.size
    share = np.cumsum(weights)
    bar = cdf_threshold * float(share[-1])
    count = int((share <= bar).sum()) if rule == "within" else int((share < bar).sum()) + 1
    return min(max(count, 1), weights.size)


def top_k_count(num_reachable: int, keep: float) -> int:
    """Return ``ceil(keep * num_reachable)``, at least 1, at most all.

    A millionth of slack absorbs decimals without a binary form: a share that was meant to be
    whole is not rounded up to one block more.
    """
    count = math.ceil(keep * num_reachable - 1e-6 * num_reachable)
    return min(max(count, 1), num_reachable)


def block_map(
    q: ArrayLike,
    k: ArrayLike,
    *,
    policy: Any = None,
    causal: bool = False,
    causal_align: str = "bottom_right",
    sm_scale: float | None = None,
    layout: str = "HND",
    seqlens_k: ArrayLike | None = None,
) -> BoolArray:
    """Choose the blocks that are computed: the first stage alone.

    Parameters
    ----------
    q : array, (batch, num_heads_q, seqlen_q, head_dim) in layout "HND"
        Queries.
    k : array, (batch, num_heads_k, seqlen_k, head_dim) in layout "HND"
        Keys; query head h reads head ``h // (num_heads_q // num_heads_k)``.
    policy : object, optional
        With ``cdf_threshold`` (and ``rule``) it is a TopCdf, with ``keep`` a TopK, else Dense.
        Thresholds are floats, or tuples with one value per query head.
    causal, causal_align, sm_scale, layout, seqlens_k
        As in `attention`.

    Returns
    -------
    array of bool, (batch, num_heads_q, ceil(seqlen_q / 128), ceil(seqlen_k / 64))
        Never a block without an allowed pair.

    Raises
    ------
    InvalidArgumentError
        Shapes, lengths or the number of thresholds do not fit together.
    """
    problem = _problem(q, k, k, causal, causal_align, sm_scale, layout, seqlens_k)
    policy = _DefaultPolicy() if policy is None else policy
    return _select(_score(problem, policy), policy)


def _select(scores: BlockScores, policy: Any) -> BoolArray:
    """Apply the policy's rule, row by row, in the canonical order."""
    mask: BoolArray = scores.reachable.copy()
    heads = mask.shape[1]
    name = "cdf_threshold" if hasattr(policy, "cdf_threshold") else "keep"
    share = _per_head(getattr(policy, name, 1.0), heads, name)
    rule = getattr(policy, "rule", "reach")
    for b, h, i in np.ndindex(mask.shape[:3]):
        if scores.takes_all[b, h, i]:
            continue
        weights, forced = scores.weights[b, h, i], scores.forced[b, h, i]
        candidates = np.flatnonzero(scores.candidates[b, h, i])
        order = candidates[np.lexsort((candidates, -weights[candidates]))]  # ties: lower index
        if name == "cdf_threshold":
            chosen = order[: top_cdf_count(weights[order], share[h], rule)]
        else:
            # Forced blocks count among the share that is kept; fix columns come on top of it.
            count = top_k_count(int(scores.reachable[b, h, i].sum()), share[h])
            chosen = order[~forced[order]][: max(0, count - int(forced.sum()))]
        mask[b, h, i] &= forced | ~scores.candidates[b, h, i]  # forced and fix columns stay
        mask[b, h, i, chosen] = True
    return mask


# ---- quantization, as in SageAttention ---------------------------------------------------------


def quantize_int8(x: FloatArray, largest: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return integer codes in [-127, 127] and their scale: ``x`` is near ``codes * scale``.

    `largest` is the largest magnitude of each group, shaped to broadcast. Halves round away from
    zero. A group of zeros has codes 0 and, by convention, scale 1.
    """
    scale = np.where(largest > 0, largest / 127.0, 1.0)
    scaled = x / scale
    codes = np.sign(scaled) * np.floor(np.abs(scaled) + 0.5)
    return np.clip(codes, -127.0, 127.0), scale


def quantize_queries(q: FloatArray) -> FloatArray:
    """Return the queries of one head as int8 would hold them, one scale per row."""
    codes, scale = quantize_int8(q, np.abs(q).max(axis=-1, keepdims=True, initial=0.0))
    return codes * scale


def quantize_keys(k: FloatArray) -> FloatArray:
    """Return smoothed keys as int8 would hold them, one scale per 16 consecutive real keys."""
    largest = np.abs(k).max(axis=-1, initial=0.0)
    padded = np.pad(largest, (0, -len(k) % KEY_GROUP)).reshape(-1, KEY_GROUP)
    per_key = np.repeat(padded.max(axis=-1), KEY_GROUP)[: len(k), None]
    codes, scale = quantize_int8(k, per_key)
    return codes * scale


def quantize_values(v: FloatArray, pv_format: str = "e4m3") -> tuple[FloatArray, FloatArray]:
    """Return the values of one head as e4m3 (or f16) codes, and a scale per channel.

    The scale is the least power of two that brings the channel's largest magnitude into range:
    codes above the subnormals do not depend on it, so loud later values leave earlier rows alone.
    """
    limit = E4M3_MAX if pv_format == "e4m3" else F16_MAX
    largest = np.abs(v).max(axis=0, initial=0.0)
    mantissa, exponent = np.frexp(largest / limit)
    scale = np.ldexp(1.0, exponent - (mantissa == 0.5))  # 2 ** ceil(log2(largest / limit))
    scale = np.where(largest > 0, scale, 1.0)
    rounded = round_e4m3(v / scale) if pv_format == "e4m3" else round_f16(v / scale)
    return rounded, scale


def round_e4m3(x: FloatArray) -> FloatArray:
    """Round to the nearest e4m3 number (ties to even), saturating at 448.

    Three mantissa bits, normal numbers from 2^-6, steps of 2^-9 below.
    """
    _, exponent = np.frexp(x)  # |x| lies in [2^(exponent - 1), 2^exponent)
    step = np.ldexp(1.0, np.maximum(exponent - 1, -6) - 3)
    rounded: FloatArray = np.rint(x / step) * step
    return np.clip(rounded, -E4M3_MAX, E4M3_MAX)


def round_f16(x: FloatArray) -> FloatArray:
    """Round to the nearest float16 number (ties to even)."""
    return x.astype(np.float16).astype(np.float64)


# ---- stage 2: sparse FlashAttention ------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    """One query head as the inner loop sees it: operands in their final precision."""

    q: FloatArray  # (seqlen_q, head_dim)
    k: FloatArray  # (valid_k, head_dim)
    v: FloatArray  # (valid_k, head_dim), in units of v_scale
    v_scale: FloatArray  # (head_dim,)
    round_p: Callable[[FloatArray], FloatArray]
    p_scale: float  # round_p(p) is near p * p_scale
    lse_shift: FloatArray  # (seqlen_q,), what smoothing took off every score of the row
    tainted_q: BoolArray  # (seqlen_q,), the row holds a NaN or an infinity
    tainted_k: BoolArray  # (valid_k,), the key does, in K or in V


def _head(problem: _Problem, b: int, h: int, quantize: bool, pv_format: str) -> _Head:
    q, k, v = problem.q[b, h], problem.keys(b, h), problem.values(b, h)
    tainted_q, tainted_k = _tainted(q), _tainted(k) | _tainted(v)
    q, v = _finite(q), _finite(v)
    if not quantize:
        ones, zeros = np.ones(v.shape[1]), np.zeros(len(q))
        return _Head(q, _finite(k), v, ones, lambda p: p, 1.0, zeros, tainted_q, tainted_k)
    smoothed, mean = smooth_keys(k)
    codes, v_scale = quantize_values(v, pv_format)
    is_e4m3 = pv_format == "e4m3"
    return _Head(
        q=quantize_queries(q),
        k=quantize_keys(smoothed),
        v=codes,
        v_scale=v_scale,
        round_p=(lambda p: round_e4m3(p * P_SCALE)) if is_e4m3 else round_f16,
        p_scale=P_SCALE if is_e4m3 else 1.0,
        lse_shift=problem.scale * (q @ mean),  # the queries as given, not their codes
        tainted_q=tainted_q,
        tainted_k=tainted_k,
    )


def tile_order(selected: BoolArray, scores: FloatArray | None) -> IntArray:
    """Return the selected key blocks of one query block in the order they are visited.

    Ascending; with `scores`, the selected block of the highest pooled score (lowest index at a
    tie) goes first, which brings the running maximum near its final value at once. Fix
    columns have no score (-inf).
    """
    tiles = np.flatnonzero(selected)
    if scores is None or tiles.size == 0:
        return tiles
    first = tiles[np.argmax(scores[tiles])]  # without any score: the first anyway
    return np.concatenate(([first], tiles[tiles != first]))


def _attend_rows(
    head: _Head,
    rows: IntArray,
    steps: list[IntArray],
    vis: Visibility,
    kept: BoolArray,
    scale_log2: float,
    pv_log2: float,
    group: IntArray,
) -> tuple[FloatArray, FloatArray, int]:
    """Run the online softmax of one query block; return its out, its lse and the skipped rows.

    `rows` are its real rows, `steps` the key blocks of every step in order, `kept` the head's
    mask by 64 rows and 64 keys. Scores are in log2 units, so weights are powers of two. Rows of
    equal `group` decide together whether the P·V of a step is skipped::

        skip  <=>  max over the group's rows of (tile maximum - running maximum) + pv_log2 <= 0

    A skipped tile adds neither to out nor to the row sum, so out stays a weighted mean of what
    was kept. Since pv_log2 >= 0, it cannot have raised the running maximum either. A tile with
    a non-finite key is never skipped.
    """
    top = np.full(rows.size, -np.inf)  # running row maximum m
    total = np.zeros(rows.size)  # running row sum l of the rounded P
    out = np.zeros((rows.size, head.v.shape[1]))
    saw_tainted = np.zeros(rows.size, np.bool_)
    skipped = 0
    for blocks in steps:
        keys = (blocks[:, None] * BLOCK_K + np.arange(BLOCK_K)).ravel()
        keys = keys[keys < len(head.k)]
        seen = vis.pairs(rows, keys) & kept[rows[:, None] // MASK_ROWS, keys // BLOCK_K]
        z = np.where(seen, scale_log2 * (head.q[rows] @ head.k[keys].T), -np.inf)
        tile_top = z.max(axis=-1)

        take = np.ones(rows.size, np.bool_)
        if pv_log2 < np.inf and not head.tainted_k[keys].any():
            # A row that sees no key of the tile has no vote; a row's first keys gain +inf.
            gain = np.full(rows.size, -np.inf)
            np.subtract(tile_top, top, out=gain, where=seen.any(axis=-1))
            for g in np.unique(group):
                members = group == g
                if gain[members].max() + pv_log2 <= 0:
                    take[members] = False
                    skipped += int(members.sum()) * blocks.size

        # For groups that skip, nothing changes: alpha = 1 and p = 0.
        new_top = np.where(take, np.maximum(top, tile_top), top)
        base = np.where(np.isfinite(new_top), new_top, 0.0)
        alpha = np.exp2(top - base)
        p = head.round_p(np.exp2(np.where(take[:, None], z, -np.inf) - base[:, None]))
        total = total * alpha + p.sum(axis=-1)
        out = out * alpha[:, None] + p @ head.v[keys]
        top = new_top
        saw_tainted |= (seen & head.tainted_k[keys]).any(axis=-1)

    empty = np.isneginf(top)
    total = np.where(empty, 1.0, total)
    out = out / total[:, None] * head.v_scale
    lse = np.where(empty, 0.0, top) + np.log2(total / head.p_scale)
    lse = np.where(empty, -np.inf, lse * LN2 + head.lse_shift[rows])
    # Non-finite inputs were cleared above, since 0 * NaN is NaN; the NaN goes where it belongs.
    broken = ~empty & (head.tainted_q[rows] | saw_tainted)
    out[broken], lse[broken] = np.nan, np.nan
    return out, lse, skipped


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    policy: Any = None,
    block_map: Any = None,
    causal: bool = False,
    causal_align: str = "bottom_right",
    sm_scale: float | None = None,
    layout: str = "HND",
    seqlens_k: ArrayLike | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    check_numerics: bool = False,
    stage2_rows: int = BLOCK_Q,
    tile_keys: int = BLOCK_K,
    pv_format: str = "e4m3",
) -> Any:
    """Compute sparse, optionally quantized attention in float64.

    ``out = softmax(sm_scale * q @ k.T) @ v`` over the pairs of tokens in the computed blocks.

    Parameters
    ----------
    q : array, (batch, num_heads_q, seqlen_q, head_dim) in layout "HND"
        Queries, any floating dtype; (batch, seqlen_q, num_heads_q, head_dim) in layout "NHD".
    k, v : array, (batch, num_heads_k, seqlen_k, head_dim) in layout "HND"
        Keys and values. ``num_heads_q`` must be a multiple of ``num_heads_k``.
    policy : object, optional
        What may be skipped, see `block_map`; None is TopCdf with its defaults. Arithmetic is
        quantized only where ``policy.quantize`` is True.
    block_map : array of bool or object, optional
        Blocks chosen by the caller, (batch or 1, num_heads_q or 1, num_blocks_q, num_blocks_k),
        or an object with such a ``mask`` and possibly a ``row_mask`` for 64-row blocks, which
        then holds. Nothing is forced; of `policy` only ``quantize`` and ``pv_threshold`` count.
    causal : bool
        Let row i see keys ``j <= i + seqlen_k - seqlen_q``, or ``j <= i``, by `causal_align`.
    causal_align : {"bottom_right", "top_left"}
        Which corners of the score matrix the causal diagonal joins.
    sm_scale : float, optional
        Factor on the scores, ``head_dim ** -0.5`` by default.
    layout : {"HND", "NHD"}
        Order of the heads and tokens axes.
    seqlens_k : array of int, (batch,), optional
        Real keys of every sequence; those behind them are padding and are not looked at.
    return_lse, return_stats : bool
        Return more than `out`.
    check_numerics : bool
        Refuse NaN and infinity in the inputs, padding aside. Otherwise they make NaN of the rows
        that see them, and of no other.
    stage2_rows : int
        Rows that decide together whether a tile's P·V is skipped.
    tile_keys : {64, 128}
        Keys per step: one block, or two consecutive entries of the list with one decision.
    pv_format : {"e4m3", "f16"}
        Format of P and V where quantized.

    Returns
    -------
    out : array of float64, shape and layout of `q`
        Zero where a row sees no key.
    lse : array of float64, (batch, num_heads_q, seqlen_q), if `return_lse`
        Natural log of the sum of ``exp(score)`` over the computed keys, -inf where there is none.
    stats : AttentionStats, if `return_stats`

    Raises
    ------
    InvalidArgumentError
        Shapes, lengths or the number of thresholds do not fit together, or `check_numerics`
        found something.
    """
    problem = _problem(q, k, v, causal, causal_align, sm_scale, layout, seqlens_k)
    if check_numerics:
        problem.refuse_non_finite()
    policy = _DefaultPolicy() if policy is None else policy
    batch, heads, seqlen_q, _ = problem.q.shape
    width = tile_keys // BLOCK_K
    threshold = math.inf if policy.pv_threshold is None else policy.pv_threshold
    pv_log2 = _per_head(threshold, heads, "pv_threshold") / LN2

    scores = None if block_map is not None else _score(problem, policy)
    if scores is None:
        fine = _caller_mask(block_map, problem)
    else:
        fine = _halve_rows(_select(scores, policy), seqlen_q)

    out = np.zeros(problem.q.shape)
    lse = np.full((batch, heads, seqlen_q), -np.inf)
    counts = np.zeros((4, batch, heads), np.int64)
    for b, h in np.ndindex(batch, heads):
        vis = problem.visibility(b)
        head = _head(problem, b, h, policy.quantize is True, pv_format)
        kept = fine[b, h] & vis.blocks(MASK_ROWS)
        counts[0, b, h] = vis.blocks().sum()
        for i, end in enumerate(_block_ends(seqlen_q, BLOCK_Q)):
            rows = np.arange(i * BLOCK_Q, end)
            row_scores = None
            if scores is not None and pv_log2[h] < np.inf:
                row_scores = scores.scores[b, h, i]
            tiles = tile_order(kept[2 * i : 2 * i + 2].any(axis=0), row_scores)
            out[b, h, rows], lse[b, h, rows], skipped = _attend_rows(
                head,
                rows,
                [tiles[t : t + width] for t in range(0, tiles.size, width)],
                vis,
                kept,
                problem.scale / LN2,
                pv_log2[h],
                (rows - rows[0]) // stage2_rows,
            )
            counts[1:, b, h] += (tiles.size, tiles.size * rows.size, skipped)

    result: list[Any] = [out.swapaxes(1, 2).copy() if layout == "NHD" else out]
    if return_lse:
        result.append(lse)
    if return_stats:
        result.append(_stats(counts))
    return result[0] if len(result) == 1 else tuple(result)


def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """Compute `attention` over packed sequences, each on its own.

    Arrays are (total, num_heads, head_dim); sequence b occupies tokens ``cu_seqlens[b]`` to
    ``cu_seqlens[b + 1]`` of them, and each list rises from 0 to its total. `options` are those of
    `attention` without ``layout``, ``seqlens_k`` and ``block_map``. The maximal lengths serve
    kernels; nothing here depends on them.

    Returns
    -------
    out : array of float64, shape of `q`
    lse : array of float64, (num_heads_q, total_q), if `return_lse`
    stats : AttentionStats, if `return_stats`; one row per sequence
    """
    if taken := {"layout", "seqlens_k", "block_map"} & options.keys():
        raise TypeError(f"attention_varlen takes no {sorted(taken)}")
    q, k, v = _as_float64(q), _as_float64(k), _as_float64(v)
    ends_q = _cu_seqlens(cu_seqlens_q, len(q), "cu_seqlens_q")
    ends_k = _cu_seqlens(cu_seqlens_k, len(k), "cu_seqlens_k")
    if ends_q.size != ends_k.size:
        raise InvalidArgumentError(
            "cu_seqlens_q and cu_seqlens_k must be of one length, one more than there are "
            f"sequences: got {ends_q.size} and {ends_k.size}."
        )
    heads = q.shape[1]
    out = np.zeros(q.shape)
    lse = np.full((heads, len(q)), -np.inf)
    counts = np.zeros((4, ends_q.size - 1, heads), np.int64)
    for b in range(ends_q.size - 1):
        of_q, of_k = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        one_out, one_lse, stats = attention(
            q[None, of_q],
            k[None, of_k],
            v[None, of_k],
            layout="NHD",
            return_lse=True,
            return_stats=True,
            **options,
        )
        out[of_q], lse[:, of_q] = one_out[0], one_lse[0]
        parts = (stats.reachable, stats.selected, stats.selected_rows, stats.skipped_rows)
        counts[:, b] = np.concatenate(parts)
    result: list[Any] = [out, *([lse] if return_lse else []), *([_stats(counts)] * return_stats)]
    return result[0] if len(result) == 1 else tuple(result)


def dense(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, block_map: Any = None, **options: Any
) -> tuple[FloatArray, FloatArray]:
    """Return out and lse the plain way: all scores at once, one softmax, no second stage.

    `options` are the ``causal``, ``causal_align``, ``sm_scale``, ``layout`` and ``seqlens_k`` of
    `attention`; without `block_map` every allowed pair is computed. Finite inputs only.
    """
    problem = _problem(q, k, v, **options)
    batch, heads, seqlen_q, _ = problem.q.shape
    out = np.zeros(problem.q.shape)
    lse = np.full((batch, heads, seqlen_q), -np.inf)
    fine = None if block_map is None else _caller_mask(block_map, problem)
    for b, h in np.ndindex(batch, heads):
        vis = problem.visibility(b)
        rows, keys = np.arange(seqlen_q), np.arange(vis.valid_k)
        seen = vis.pairs(rows, keys)
        if fine is not None:
            seen = seen & fine[b, h][np.ix_(rows // MASK_ROWS, keys // BLOCK_K)]
        scores = np.where(seen, problem.scale * problem.q[b, h] @ problem.keys(b, h).T, -np.inf)
        live = seen.any(axis=-1)
        top = scores[live].max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores[live] - top)
        mass = weights.sum(axis=-1, keepdims=True)
        out[b, h, live] = weights @ problem.values(b, h) / mass
        lse[b, h, live] = (top + np.log(mass))[:, 0]
    return (out.swapaxes(1, 2).copy() if options.get("layout") == "NHD" else out), lse


def _stats(counts: IntArray) -> AttentionStats:
    """Turn (reachable, selected, selected rows, skipped rows) per head into shares."""

    def shares(c: IntArray) -> tuple[FloatArray, FloatArray]:
        kept = np.divide(c[1], c[0], out=np.ones(c.shape[1:]), where=c[0] > 0)
        dropped = np.divide(c[3], c[2], out=np.zeros(c.shape[1:]), where=c[2] > 0)
        return 1 - kept, 1 - kept * (1 - dropped)

    qk, pv = shares(counts)
    qk_all, pv_all = (float(x) for x in shares(counts.sum(axis=(1, 2))))
    return AttentionStats((qk_all + pv_all) / 2, qk_all, pv_all, (qk + pv) / 2, qk, pv, *counts)


# ---- inputs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """One call's arrays in float64, heads before tokens, and the numbers that go with them."""

    q: FloatArray
    k: FloatArray
    v: FloatArray
    valid_k: list[int]
    offset: int | None
    scale: float

    def visibility(self, b: int) -> Visibility:
        return Visibility(self.q.shape[2], self.k.shape[2], self.valid_k[b], self.offset)

    def keys(self, b: int, h: int) -> FloatArray:
        """Return the real keys that query head h reads."""
        return self.k[b, h * self.k.shape[1] // self.q.shape[1], : self.valid_k[b]]

    def values(self, b: int, h: int) -> FloatArray:
        """Return the real values that query head h reads."""
        return self.v[b, h * self.v.shape[1] // self.q.shape[1], : self.valid_k[b]]

    def refuse_non_finite(self) -> None:
        real = np.arange(self.k.shape[2]) < np.array(self.valid_k, np.int64)[:, None, None]
        checks = (("q", _tainted(self.q)), ("k", _tainted(self.k) & real))
        for name, bad in (*checks, ("v", _tainted(self.v) & real)):
            if bad.any():
                raise InvalidArgumentError(
                    f"{name} holds NaN or infinity: got {int(bad.sum())} such tokens; allowed are "
                    "finite values. Mend the input, or pass check_numerics=False."
                )


def _problem(
    q: Any,
    k: Any,
    v: Any,
    causal: bool = False,
    causal_align: str = "bottom_right",
    sm_scale: float | None = None,
    layout: str = "HND",
    seqlens_k: ArrayLike | None = None,
) -> _Problem:
    arrays = [_as_float64(x) for x in (q, k, v)]
    if layout not in ("HND", "NHD") or not isinstance(causal, (bool, np.bool_)):
        raise InvalidArgumentError(
            f"layout or causal is wrong: got {layout!r} and {causal!r}; allowed are 'HND' and "
            "'NHD', and True and False. Pass one of these."
        )
    if layout == "NHD":
        arrays = [x.swapaxes(1, 2) if x.ndim == 4 else x for x in arrays]
    q, k, v = arrays
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[::3] == k.shape[::3]
    if not fits or q.shape[1] % (k.shape[1] or q.shape[1] + 1) != 0:
        raise InvalidArgumentError(
            f"q, k and v do not fit together: got q {q.shape}, k {k.shape}, v {v.shape} (heads "
            "before tokens); allowed are q (batch, num_heads_q, seqlen_q, head_dim) and k, v "
            "(batch, num_heads_k, seqlen_k, head_dim) with num_heads_q a multiple of num_heads_k."
        )
    batch, seqlen_k = k.shape[0], k.shape[2]
    valid = np.full(batch, seqlen_k) if seqlens_k is None else np.asarray(seqlens_k)
    if valid.shape != (batch,) or not ((valid >= 0) & (valid <= seqlen_k)).all():
        raise InvalidArgumentError(
            f"seqlens_k does not fit: got {valid.tolist()}; allowed are {batch} lengths from 0 to "
            f"{seqlen_k}. Give the number of real keys of every sequence."
        )
    if q.shape[3] == 0 or (sm_scale is not None and not abs(sm_scale) < math.inf):
        raise InvalidArgumentError(
            f"head_dim or sm_scale is wrong: got {q.shape[3]} and {sm_scale}; allowed are 1 or "
            "more and a finite number. None takes 1 / sqrt(head_dim)."
        )
    scale = 1.0 / math.sqrt(q.shape[3]) if sm_scale is None else float(sm_scale)
    offset = _causal_offset(q.shape[2], seqlen_k, causal, causal_align)
    return _Problem(q, k, v, [int(n) for n in valid], offset, scale)


def _caller_mask(block_map: Any, problem: _Problem) -> BoolArray:
    """Return the caller's blocks, 64 rows fine, for every batch entry and head."""
    batch, heads, seqlen_q, _ = problem.q.shape
    row_mask = getattr(block_map, "row_mask", None)
    fine = row_mask is not None
    mask = np.asarray(row_mask if fine else getattr(block_map, "mask", block_map), np.bool_)
    rows = _num_blocks(seqlen_q, MASK_ROWS if fine else BLOCK_Q)
    expected = (batch, heads, rows, _num_blocks(problem.k.shape[2], BLOCK_K))
    if mask.ndim != 4 or any(
        got != want and not (axis < 2 and got == 1)
        for axis, (got, want) in enumerate(zip(mask.shape, expected, strict=True))
    ):
        raise InvalidArgumentError(
            f"block_map has the wrong shape: got {mask.shape}; allowed is {expected}, or 1 in "
            "either of the first two places. Build it for these lengths."
        )
    mask = np.broadcast_to(mask, expected)
    return mask if fine else _halve_rows(mask, seqlen_q)


def _halve_rows(mask: BoolArray, seqlen_q: int) -> BoolArray:
    """Rewrite a mask over 128-row blocks as one over 64-row blocks."""
    return np.repeat(mask, 2, axis=2)[:, :, : _num_blocks(seqlen_q, MASK_ROWS)]


def _causal_offset(seqlen_q: int, seqlen_k: int, causal: bool, causal_align: str) -> int | None:
    if causal_align not in ("bottom_right", "top_left"):
        raise InvalidArgumentError(
            f"causal_align is unknown: got {causal_align!r}; allowed are 'bottom_right' and "
            "'top_left'. Choose one of them."
        )
    if not causal:
        return None
    return seqlen_k - seqlen_q if causal_align == "bottom_right" else 0


def _cu_seqlens(ends: ArrayLike, total: int, name: str) -> IntArray:
    array = np.asarray(ends, np.int64)
    is_list = array.ndim == 1 and array.size > 0
    if not is_list or array[0] != 0 or array[-1] != total or (np.diff(array) < 0).any():
        raise InvalidArgumentError(
            f"{name} is no list of ends: got {array.tolist()}; allowed are whole numbers rising "
            f"from 0 to {total}. Give where each sequence begins, and the total last."
        )
    return array


def _per_head(value: Any, heads: int, name: str) -> FloatArray:
    array = np.asarray(value, np.float64)
    if array.ndim > 0 and array.shape != (heads,):
        raise InvalidArgumentError(
            f"{name} has {array.size} values; allowed are one, or one per query head: {heads}. "
            "Give a policy that was made for this layer."
        )
    return np.broadcast_to(array, (heads,))


def _as_float64(x: ArrayLike) -> FloatArray:
    return np.asarray(x).astype(np.float64)


def _finite(x: FloatArray) -> FloatArray:
    return np.where(np.isfinite(x), x, 0.0)


def _tainted(x: FloatArray) -> BoolArray:
    """Return which tokens hold a NaN or an infinity."""
    tainted: BoolArray = np.logical_or.reduce(~np.isfinite(x), axis=-1)
    return tainted


# ---- blocks of tokens: the last one may be short -----------------------------------------------


def _num_blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)


def _block_ends(tokens: int, block: int) -> IntArray:
    return np.minimum((np.arange(_num_blocks(tokens, block)) + 1) * block, tokens)


def _block_counts(tokens: int, block: int) -> IntArray:
    return np.diff(_block_ends(tokens, block), prepend=0)


def _block_sums(x: FloatArray, block: int) -> FloatArray:
    starts = np.arange(0, len(x), block)
    return np.add.reduceat(x, starts, axis=0) if len(x) else x


def _block_any(flags: BoolArray, block: int) -> BoolArray:
    return np.logical_or.reduceat(flags, np.arange(0, len(flags), block)) if len(flags) else flags
