"""The float64 oracle against plain, independent statements of the same rules.

Nothing here calls the oracle's helpers to compute an expected value: softmax is written row by
row, the block map with Gram matrices and `sorted`, e4m3 with a table of all its codes. Where an
exact comparison is impossible, the tolerance says what it is made of.
"""

import itertools
import math
import os
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from cusparge import reference
from cusparge.errors import InvalidArgumentError

LN2 = math.log(2.0)

# float64 sums of at most a few thousand terms of size one, and exponentials of scores below 1e3:
# 1e3 * 2^-53 * a few thousand is 1e-10 at the very worst, 1e-13 in practice.
EXACT = 1e-9


@pytest.fixture
def rng(request):
    """Fresh randomness every run; the printed seed replays it."""
    given = os.environ.get("CUSPARGE_TEST_SEED")
    seed = int(given) if given else int.from_bytes(os.urandom(4), "little")
    print(f"CUSPARGE_TEST_SEED={seed}  # {request.node.name}")
    return np.random.default_rng(seed)


def policy(**fields):
    common = {"pv_threshold": None, "sink_blocks": 0, "local_blocks": 0, "quantize": None}
    return SimpleNamespace(**common | fields)


def top_cdf(tau=0.98, theta=0.3, rule="reach", **fields):
    return policy(cdf_threshold=tau, sim_threshold=theta, rule=rule, **fields)


def top_k(keep=0.5, theta=-1.0, **fields):
    return policy(keep=keep, sim_threshold=theta, **fields)


def assert_same(got, want, tol=EXACT):
    """NaN and infinities in the same places, everything else within `tol`."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    finite = np.isfinite(want)
    err = np.abs(got[finite] - want[finite]).max(initial=0.0)
    assert err <= tol, f"off by {err}"


def relative_l1(got, want):
    return np.abs(got - want).sum() / np.abs(want).sum()


# ---- plain statements --------------------------------------------------------------------------


def plain_allowed(seqlen_q, seqlen_k, causal, align="bottom_right", valid=None):
    """(seqlen_q, seqlen_k) bool, one pair at a time."""
    allowed = np.zeros((seqlen_q, seqlen_k), bool)
    valid = seqlen_k if valid is None else valid
    for i, j in itertools.product(range(seqlen_q), range(seqlen_k)):
        limit = i + (seqlen_k - seqlen_q if align == "bottom_right" else 0)
        allowed[i, j] = j < valid and (not causal or j <= limit)
    return allowed


def tokens_of(mask, seqlen_q, seqlen_k, block_q=128):
    """A block mask (..., Tq, Tk) spelled out for every pair of tokens."""
    wide = np.repeat(np.repeat(mask, block_q, axis=-2), 64, axis=-1)
    return wide[..., :seqlen_q, :seqlen_k]


def plain_attention(q, k, v, allowed, scale=None):
    """Softmax attention of one head, row by row."""
    scale = q.shape[1] ** -0.5 if scale is None else scale
    out, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    for i in range(len(q)):
        seen = np.flatnonzero(allowed[i])
        if seen.size:
            s = scale * (k[seen] @ q[i])
            lse[i] = s.max() + math.log(math.fsum(np.exp(s - s.max())))
            out[i] = np.exp(s - lse[i]) @ v[seen]
    return out, lse


def plain_batch(q, k, v, allowed, scale=None):
    """`plain_attention` over batch and heads; `allowed` broadcasts to (B, Hq, Sq, Sk)."""
    batch, heads, seqlen_q, _ = q.shape
    allowed = np.broadcast_to(allowed, (batch, heads, seqlen_q, k.shape[2]))
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b, h in np.ndindex(batch, heads):
        kv = h // (heads // k.shape[1])
        out[b, h], lse[b, h] = plain_attention(q[b, h], k[b, kv], v[b, kv], allowed[b, h], scale)
    return out, lse


def gram_similarity(x):
    """Mean of all n² cosine similarities; zero tokens are similar to none, all zeros are alike."""
    if not x.any():
        return 1.0
    norms = np.sqrt((x * x).sum(axis=1))
    unit = np.array([t / n if n else t for t, n in zip(x, norms, strict=True)])
    return (unit @ unit.T).mean()


def plain_block_map(q, k, pol, allowed, causal, align="bottom_right", valid=None):
    """Stage 1 of one head: the mask, the scores (-inf: none), and the rows too close to call."""
    seqlen_q, seqlen_k = len(q), len(k)
    valid = seqlen_k if valid is None else valid
    num_q, num_k = math.ceil(seqlen_q / 128), math.ceil(seqlen_k / 64)
    smooth = k[:valid] - k[:valid].mean(axis=0) if valid else k[:0]
    offset = seqlen_k - seqlen_q if causal and align == "bottom_right" else 0
    mask = np.zeros((num_q, num_k), bool)
    scores = np.full((num_q, num_k), -np.inf)
    close = np.zeros(num_q, bool)
    for i in range(num_q):
        rows = range(128 * i, min(128 * i + 128, seqlen_q))
        near_diagonal = {(r + offset) // 64 for r in rows}
        low, high = min(near_diagonal), max(near_diagonal)
        forced, fixed, candidates, reachable = set(), set(), [], []
        for j in range(num_k):
            if not allowed[rows.start : rows.stop, 64 * j : 64 * j + 64].any():
                continue
            reachable.append(j)
            if (causal and j in near_diagonal) or j < pol.sink_blocks:
                forced.add(j)
            if pol.local_blocks:
                right = high if causal else high + pol.local_blocks - 1
                if low - pol.local_blocks + 1 <= j <= right:
                    forced.add(j)
            block = smooth[64 * j : 64 * j + 64]
            if gram_similarity(block) <= pol.sim_threshold:
                fixed.add(j)
                continue
            candidates.append(j)
            pooled = q[rows.start : rows.stop].mean(axis=0) @ block.mean(axis=0)
            scores[i, j] = pooled / math.sqrt(q.shape[1]) + math.log(len(block) / 64)
        if not candidates or gram_similarity(q[rows.start : rows.stop]) <= pol.sim_threshold:
            mask[i, reachable] = True
            scores[i] = -np.inf
            continue
        share = np.exp(scores[i] - scores[i].max())
        share /= share.sum()
        order = sorted(candidates, key=lambda j: (-share[j], j))
        running = list(itertools.accumulate(share[j] for j in order))
        if hasattr(pol, "cdf_threshold"):
            tau = pol.cdf_threshold
            # The weights are floors of 20-bit numbers: each loses up to 2^-20 of the largest.
            close[i] = tau < 1 and any(abs(c - tau) < 2e-6 * num_k for c in running)
            if tau >= 1:
                count = len(order)
            elif pol.rule == "reach":
                count = 1 + sum(c < tau for c in running)
            else:
                count = max(1, sum(c <= tau for c in running))
            chosen = order[:count]
        else:
            count = max(1, math.ceil(pol.keep * len(reachable) - 1e-6 * len(reachable)))
            chosen = [j for j in order if j not in forced][: max(0, count - len(forced))]
            values = sorted(share[candidates])
            close[i] = any(b - a < 2e-6 for a, b in itertools.pairwise(values))
        mask[i, sorted({*chosen, *forced, *fixed})] = True
    return mask, scores, close


E4M3_CODES = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)


def table_e4m3(x):
    """Nearest e4m3 number by search among all of them; a tie goes to the even code."""
    x = np.asarray(x, np.float64)
    upper = np.clip(np.searchsorted(E4M3_CODES, np.abs(x)), 1, len(E4M3_CODES) - 1)
    down = np.abs(x) - E4M3_CODES[upper - 1]
    up = E4M3_CODES[upper] - np.abs(x)
    take_upper = (up < down) | ((up == down) & (upper % 2 == 0))
    return np.sign(x) * E4M3_CODES[np.where(take_upper, upper, upper - 1)]


def plain_int8(x):
    """One group: symmetric, 127 codes a side, halves away from zero; returned dequantized."""
    scale = np.abs(x).max() / 127
    return np.sign(x) * np.floor(np.abs(x) / scale + 0.5) * scale if scale else x


def plain_online(q, k, v, allowed, tiles, *, scale, pv=math.inf, rows=128, width=64, round_p=None):
    """Online softmax of one head, one row at a time; returns out, log2 of the sum, skipped rows.

    `tiles` lists the key blocks of every query block in order; `round_p` maps weights to codes.
    """
    round_p = round_p or (lambda p: p)
    out, lse2 = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    skipped = 0
    for i, listed in enumerate(tiles):
        block = range(128 * i, min(128 * i + 128, len(q)))
        for start in range(block.start, block.stop, rows):
            group = range(start, min(start + rows, block.stop))
            state = {r: (-math.inf, 0.0, np.zeros(v.shape[1])) for r in group}
            for t in range(0, len(listed), width // 64):
                step = listed[t : t + width // 64]
                inside = [c for j in step for c in range(64 * j, min(64 * j + 64, len(k)))]
                keys = {r: [c for c in inside if allowed[r, c]] for r in group}
                z = {r: (k[keys[r]] @ q[r]) * scale / LN2 for r in group if keys[r]}
                gain = max((z[r].max() - state[r][0] for r in z), default=-math.inf)
                if pv < math.inf and gain + pv / LN2 <= 0:
                    skipped += len(group) * len(step)
                    continue
                for r in z:
                    m, total, o = state[r]
                    new = max(m, z[r].max())
                    p = round_p(2.0 ** (z[r] - new))
                    state[r] = (new, total * 2 ** (m - new) + p.sum(), o * 2 ** (m - new))
                    state[r] = (*state[r][:2], state[r][2] + p @ v[keys[r]])
            for r in group:
                if state[r][1] > 0:
                    out[r] = state[r][2] / state[r][1]
                    lse2[r] = state[r][0] + math.log2(state[r][1])
    return out, lse2, skipped


# ---- data --------------------------------------------------------------------------------------


def gaussian(rng, seqlen_q, seqlen_k, dim=16, batch=1, heads=1, heads_k=None):
    shape_k = (batch, heads_k or heads, seqlen_k, dim)
    return (
        rng.standard_normal((batch, heads, seqlen_q, dim)),
        rng.standard_normal(shape_k),
        rng.standard_normal(shape_k),
    )


def clustered(rng, seqlen_q, seqlen_k, dim=16, noise=0.5, sharp=2.0, **shape):
    """Runs of tokens around common centres: blocks are alike inside and differ among each other."""
    q, k, v = gaussian(rng, seqlen_q, seqlen_k, dim, **shape)
    centres = sharp * rng.standard_normal((8, dim))
    for x in (q, k):
        runs = rng.integers(0, 8, (*x.shape[:2], x.shape[2] // 64 + 1))
        x *= noise
        x += centres[np.repeat(runs, 64, axis=-1)[..., : x.shape[2]]]
    return q, k, v


SHAPES = [(1, 1), (1, 130), (17, 63), (127, 64), (128, 65), (129, 128), (100, 300), (300, 100)]
CAUSAL = [(False, "bottom_right"), (True, "bottom_right"), (True, "top_left")]


# ---- nothing left out: dense attention ---------------------------------------------------------


@pytest.mark.parametrize(("causal", "align"), CAUSAL)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SHAPES)
def test_policies_that_keep_everything_are_plain_softmax(rng, seqlen_q, seqlen_k, causal, align):
    q, k, v = gaussian(rng, seqlen_q, seqlen_k, batch=2, heads=4, heads_k=2)
    k += 3.0  # a bias that the predictor's smoothing must not leak into the result
    seqlens = rng.integers(0, seqlen_k + 1, 2)
    allowed = np.stack([plain_allowed(seqlen_q, seqlen_k, causal, align, n) for n in seqlens])
    want_out, want_lse = plain_batch(q, k, v, allowed[:, None])
    options = {"causal": causal, "causal_align": align, "seqlens_k": seqlens}
    for keep_all in (policy(), top_cdf(1.0, -1.0), top_k(1.0, 0.3), top_cdf(0.1, 1.0)):
        out, lse, stats = reference.attention(
            q, k, v, policy=keep_all, return_lse=True, return_stats=True, **options
        )
        assert_same(out, want_out)
        assert_same(lse, want_lse)
        assert stats.sparsity == stats.qk_sparsity == stats.pv_sparsity == 0.0
    for got, want in zip(reference.dense(q, k, v, **options), (want_out, want_lse), strict=True):
        assert_same(got, want)


def test_layouts_dtypes_and_scales(rng):
    q, k, v = gaussian(rng, 150, 200, heads=4, heads_k=1)
    q, k, v = (x.astype(np.float16) for x in (q, k, v))
    nhd = [x.swapaxes(1, 2) for x in (q, k, v)]
    allowed = np.ones((150, 200), bool)
    for scale in (None, 0.7, 0.0, -0.4):
        want_out, want_lse = plain_batch(*(x.astype(float) for x in (q, k, v)), allowed, scale)
        out, lse = reference.attention(q, k, v, policy=policy(), sm_scale=scale, return_lse=True)
        assert out.dtype == lse.dtype == np.float64
        assert_same(out, want_out)
        assert_same(lse, want_lse)
        turned, same_lse = reference.attention(
            *nhd, policy=policy(), sm_scale=scale, layout="NHD", return_lse=True
        )
        np.testing.assert_array_equal(turned, out.swapaxes(1, 2))
        np.testing.assert_array_equal(same_lse, lse)


def test_bfloat16_arrays_are_taken_as_they_are(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in gaussian(rng, 40, 70))
    wide = [x.astype(np.float64) for x in (q, k, v)]
    np.testing.assert_array_equal(reference.attention(q, k, v), reference.attention(*wide))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty_sizes(shape):
    batch, heads, seqlen_q, seqlen_k = shape
    q, k = np.ones((batch, heads, seqlen_q, 8)), np.ones((batch, heads, seqlen_k, 8))
    for pol, causal in itertools.product((None, policy(quantize=True), top_k()), (False, True)):
        out, lse, stats = reference.attention(
            q, k, k, policy=pol, causal=causal, return_lse=True, return_stats=True
        )
        assert_same(out, np.zeros(q.shape))
        assert_same(lse, np.full(q.shape[:3], -np.inf))
        assert stats.sparsity == 0.0
        assert stats.sparsity_per_head.shape == (batch, heads)
        mask = reference.block_map(q, k, policy=pol, causal=causal)
        assert mask.shape == (batch, heads, min(seqlen_q, 1), min(seqlen_k, 1))


def test_merging_two_halves_of_the_keys_by_lse(rng):
    q, k, v = gaussian(rng, 140, 333)
    k += 10 * rng.standard_normal(16)  # the halves have different key means
    whole, whole_lse = reference.attention(q, k, v, policy=policy(), return_lse=True)
    parts = [
        reference.attention(q, k[:, :, s], v[:, :, s], policy=policy(), return_lse=True)
        for s in (slice(0, 100), slice(100, None))
    ]
    lse = np.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * np.exp(part - lse)[..., None] for out, part in parts)
    assert_same(lse, whole_lse)
    assert_same(merged, whole)


# ---- stage 1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("causal", "align"), CAUSAL)
def test_block_map_follows_the_rules(rng, causal, align):
    called, partial = 0, 0
    for _ in range(25):
        seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, 900, 2))
        q, k, _ = clustered(rng, seqlen_q, seqlen_k, sharp=rng.uniform(0.2, 2))
        k += 5.0
        valid = int(rng.integers(0, seqlen_k + 1)) if rng.random() < 0.5 else seqlen_k
        bands = {"sink_blocks": int(rng.integers(0, 3)), "local_blocks": int(rng.integers(0, 4))}
        theta = float(rng.choice([-1.0, 0.3, 0.8]))
        allowed = plain_allowed(seqlen_q, seqlen_k, causal, align, valid)
        for pol in (
            top_cdf(float(rng.uniform(0, 1.05)), theta, **bands),
            top_cdf(float(rng.uniform(0, 1.05)), theta, rule="within", **bands),
            top_k(float(rng.uniform(0.01, 1)), theta, **bands),
        ):
            options = {"causal": causal, "causal_align": align, "seqlens_k": [valid]}
            mask = reference.block_map(q, k, policy=pol, **options)[0, 0]
            scores = reference.block_scores(q, k, policy=pol, **options)
            want, want_scores, close = plain_block_map(
                q[0, 0], k[0, 0], pol, allowed, causal, align, valid
            )
            assert_same(scores.scores[0, 0], want_scores)
            np.testing.assert_array_equal(mask[~close], want[~close])
            called += (~close).sum()
            partial += (want != scores.reachable[0, 0]).any(axis=1).sum()
    assert called > 100, "hardly any row was decided: the check above compared nothing"
    assert partial > 10, "hardly any row left a block out: the rules were not put to work"


def one_dimensional(levels, per_block=64):
    """Keys whose pooled softmax for a query of ones has the given shares, block by block."""
    k = np.repeat(np.log(levels), per_block)[None, None, :, None]
    return np.ones((1, 1, 1, 1)), k


def test_hand_computed_shares():
    q, k = one_dimensional([0.60, 0.39, 0.01])
    scores = reference.block_scores(q, k, policy=top_cdf())
    share = scores.weights / scores.weights.sum()
    assert_same(share[0, 0, 0], np.array([0.60, 0.39, 0.01]), 3 * 2.0**-20)

    def chosen(pol):
        return reference.block_map(q, k, policy=pol)[0, 0, 0].tolist()

    assert chosen(top_cdf(0.98)) == [True, True, False]
    assert chosen(top_cdf(0.98, rule="within")) == [True, False, False]
    assert chosen(top_cdf(0.50)) == chosen(top_cdf(0.50, rule="within")) == [True, False, False]
    assert chosen(top_cdf(0.0)) == chosen(top_cdf(0.0, rule="within")) == [True, False, False]
    assert chosen(top_cdf(0.995)) == [True, True, True]
    assert chosen(top_cdf(0.995, rule="within")) == [True, True, False]
    assert chosen(top_cdf(1.0)) == chosen(top_cdf(1.0, rule="within")) == [True, True, True]
    assert chosen(top_k(0.34)) == [True, True, False]
    assert chosen(top_k(0.33)) == [True, False, False]
    assert chosen(top_k(0.01, sink_blocks=0, local_blocks=0)) == [True, False, False]


def test_cdf_counts_at_the_threshold_itself():
    weights = np.array([60, 39, 1, 0])
    count = reference.top_cdf_count
    assert [count(weights, tau) for tau in (0, 0.59, 0.6, 0.61, 0.99, 0.991, 1)] == [
        *(1, 1, 1, 2, 2, 3, 4)
    ]
    assert [count(weights, tau, "within") for tau in (0, 0.59, 0.6, 0.98, 0.99, 0.999, 1)] == [
        *(1, 1, 1, 1, 2, 2, 4)
    ]


def test_cdf_keeps_blocks_without_weight_only_at_one():
    q, k = one_dimensional([1.0, 1e-9, 1e-9])
    for rule in ("reach", "within"):
        assert reference.block_map(q, k, policy=top_cdf(1.0, rule=rule)).sum() == 3
        assert reference.block_map(q, k, policy=top_cdf(0.999999, rule=rule)).sum() == 1


def test_top_k_counts_are_the_ceiling_of_the_decimal_meant():
    assert reference.top_k_count(50, 0.3) == 15
    assert reference.top_k_count(50, float(np.float32(0.3))) == 15  # a shade above 0.3
    assert reference.top_k_count(7, 0.5) == 4
    assert reference.top_k_count(3, 1e-9) == 1
    for blocks, percent in itertools.product(range(1, 300), range(1, 101)):
        meant = math.ceil(Fraction(percent, 100) * blocks)
        assert reference.top_k_count(blocks, percent / 100) == meant


def test_ties_go_to_the_lower_index():
    q, k = one_dimensional([0.2] * 5)
    assert reference.block_map(q, k, policy=top_k(0.5))[0, 0, 0].tolist() == [1, 1, 1, 0, 0]
    assert reference.block_map(q, k, policy=top_cdf(0.4))[0, 0, 0].tolist() == [1, 1, 0, 0, 0]
    q, k = one_dimensional([0.1, 0.2, 0.1, 0.2, 0.1])
    assert reference.block_map(q, k, policy=top_k(0.6))[0, 0, 0].tolist() == [1, 1, 0, 1, 0]


def test_a_short_block_counts_by_its_real_keys():
    q, k = np.ones((1, 1, 3, 4)), np.ones((1, 1, 64 * 2 + 16, 4))
    for valid, counts in ((144, [64, 64, 16]), (100, [64, 36, 0])):
        scores = reference.block_scores(q, k, seqlens_k=[valid]).scores[0, 0, 0]
        assert_same(np.exp(scores) * 64, np.array(counts, float))


def test_similarity_is_the_mean_of_the_gram_matrix(rng):
    x = rng.standard_normal((64 * 3 + 7, 12)) + 0.5
    x[70] = 0  # has no direction
    x[128:192] = 0  # identical tokens
    want = [gram_similarity(x[j : j + 64]) for j in range(0, len(x), 64)]
    got = reference.self_similarity(x, 64)
    assert_same(got, np.array(want), 1e-12)
    assert got[2] == 1.0
    same = np.repeat(rng.standard_normal((40, 1, 12)), 64, axis=1).reshape(-1, 12)
    assert (reference.self_similarity(same, 64) <= 1.0).all()
    assert reference.self_similarity(np.eye(8), 64) == pytest.approx(1 / 8)


def test_a_similarity_equal_to_the_threshold_makes_a_fix_block():
    signs = np.tile([1.0, -1.0], 32)
    k = np.concatenate([signs, 2 * np.ones(64), -2 * np.ones(64)])[None, None, :, None]
    alike, unlike = np.ones((1, 1, 2, 1)), np.array([1.0, -1.0])[None, None, :, None]
    for pol in (top_cdf(0.5, 0.0), top_k(0.1, 0.0)):
        assert reference.block_map(alike, k, policy=pol)[0, 0, 0].tolist() == [True, True, False]
        assert reference.block_map(unlike, k, policy=pol)[0, 0, 0].tolist() == [True, True, True]
    # Tokens that are exactly alike do not escape a threshold of 1.
    assert reference.block_map(alike, k, policy=top_cdf(0.5, 1.0)).all()


def test_similarity_of_keys_is_measured_after_smoothing(rng):
    _, k, _ = gaussian(rng, 1, 256)
    plain = reference.block_scores(k, k).sim_k
    assert_same(reference.block_scores(k, k + 100.0).sim_k, plain, 1e-10)


def test_thresholds_per_head_and_dense_heads(rng):
    q, k, _ = clustered(rng, 300, 700, heads=3)
    mask = reference.block_map(q, k, policy=top_cdf((0.9, 0.3, 0.3), (-1.0, -1.0, 1.0)))
    for h, (tau, theta) in enumerate([(0.9, -1.0), (0.3, -1.0), (0.3, 1.0)]):
        one = reference.block_map(q[:, h, None], k[:, h, None], policy=top_cdf(tau, theta))
        np.testing.assert_array_equal(mask[:, h, None], one)
    assert mask[:, 2].all()
    assert not mask[:, 1].all()


def test_the_predictor_uses_the_scale(rng):
    q, k, _ = clustered(rng, 300, 900)
    plain = reference.block_map(q, k, policy=top_cdf(0.7, -1.0), sm_scale=0.25)
    doubled = reference.block_map(q / 2, k, policy=top_cdf(0.7, -1.0), sm_scale=0.5)
    flat = reference.block_map(q, k, policy=top_cdf(0.7, -1.0), sm_scale=0.001)
    np.testing.assert_array_equal(plain, doubled)
    assert plain.sum() < flat.sum()


def test_no_policy_means_the_documented_defaults(rng):
    q, k, v = clustered(rng, 300, 700)
    np.testing.assert_array_equal(
        reference.block_map(q, k), reference.block_map(q, k, policy=top_cdf(0.98, 0.3))
    )
    out, stats = reference.attention(q, k, v, return_stats=True)
    want, want_stats = reference.attention(q, k, v, policy=top_cdf(0.98, 0.3), return_stats=True)
    np.testing.assert_array_equal(out, want)
    assert stats.sparsity == want_stats.sparsity


def test_causal_top_k_keeps_its_share_of_the_triangle(rng):
    q, k, _ = gaussian(rng, 4096, 4096)
    reachable = reference.reachable_blocks(4096, 4096, causal=True)
    # A row of R blocks keeps ceil(keep * R), at least its 2 diagonal blocks: exact by counting.
    for keep in (0.5, 0.3, 0.1):
        mask = reference.block_map(q, k, policy=top_k(keep), causal=True)[0, 0]
        want = [max(2, math.ceil(keep * r - 1e-9)) for r in reachable.sum(axis=1)]
        assert mask.sum(axis=1).tolist() == want
        assert not (mask & ~reachable).any()


@pytest.mark.parametrize(("causal", "align"), CAUSAL)
def test_no_row_with_keys_is_left_without(rng, causal, align):
    for _ in range(10):
        seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, 700, 2))
        q, k, v = clustered(rng, seqlen_q, seqlen_k, dim=4, sharp=4.0)
        valid = int(rng.integers(0, seqlen_k + 1))
        allowed = plain_allowed(seqlen_q, seqlen_k, causal, align, valid)
        for pol in (top_cdf(0.1, -1.0), top_k(0.01), top_cdf(0.3, 0.6)):
            _, lse = reference.attention(
                *(q, k, v),
                policy=pol,
                causal=causal,
                causal_align=align,
                seqlens_k=[valid],
                return_lse=True,
            )
            np.testing.assert_array_equal(np.isfinite(lse[0, 0]), allowed.any(axis=1))


@pytest.mark.parametrize(("causal", "align"), CAUSAL)
def test_reachable_blocks_hold_an_allowed_pair(rng, causal, align):
    for block_q in (64, 128):
        seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, 500, 2))
        valid = int(rng.integers(0, seqlen_k + 1))
        got = reference.reachable_blocks(
            *(seqlen_q, seqlen_k),
            causal=causal,
            causal_align=align,
            valid_k=valid,
            block_q=block_q,
        )
        allowed = plain_allowed(seqlen_q, seqlen_k, causal, align, valid)
        for i, j in np.ndindex(got.shape):
            block = allowed[block_q * i : block_q * (i + 1), 64 * j : 64 * (j + 1)]
            assert got[i, j] == block.any()
        assert got.shape == (math.ceil(seqlen_q / block_q), math.ceil(seqlen_k / 64))


# ---- attention over some blocks ----------------------------------------------------------------


@pytest.mark.parametrize(("causal", "align"), CAUSAL)
def test_sparse_attention_is_softmax_over_the_kept_tokens(rng, causal, align):
    q, k, v = clustered(rng, 333, 450, batch=2, heads=4, heads_k=2)
    options = {"causal": causal, "causal_align": align, "seqlens_k": [450, 200]}
    pol = top_cdf(0.5, 0.2)
    mask = reference.block_map(q, k, policy=pol, **options)
    allowed = np.stack([plain_allowed(333, 450, causal, align, n) for n in (450, 200)])[:, None]
    want = plain_batch(q, k, v, allowed & tokens_of(mask, 333, 450))
    got = reference.attention(q, k, v, policy=pol, return_lse=True, **options)
    by_map = reference.attention(q, k, v, block_map=mask, return_lse=True, **options)
    plain = reference.dense(q, k, v, block_map=mask, **options)
    _, full_lse = reference.dense(q, k, v, **options)
    for other in (got, by_map, plain):
        assert_same(other[0], want[0])
        assert_same(other[1], want[1])
    assert (got[1] <= full_lse + EXACT).all()
    assert (got[1] < full_lse - 1e-6).any(), "nothing was left out"


def test_the_callers_map_is_law(rng):
    q, k, v = gaussian(rng, 300, 200, batch=2, heads=2)
    allowed = plain_allowed(300, 200, True)
    mask = rng.random((2, 2, 3, 4)) < 0.4
    mask[0, 0, 1] = False  # these rows see nothing, and nothing is forced for them
    rows = rng.random((2, 2, 5, 4)) < 0.4
    for given, tokens in (
        (mask, tokens_of(mask, 300, 200)),
        (mask[:1, :1], tokens_of(mask[:1, :1], 300, 200)),
        (SimpleNamespace(mask=mask), tokens_of(mask, 300, 200)),
        (SimpleNamespace(mask=mask, row_mask=None), tokens_of(mask, 300, 200)),
        (SimpleNamespace(mask=None, row_mask=rows), tokens_of(rows, 300, 200, 64)),
    ):
        want = plain_batch(q, k, v, allowed & tokens)
        out, lse, stats = reference.attention(
            *(q, k, v),
            block_map=given,
            policy=top_cdf(0.3, sink_blocks=2),
            causal=True,
            return_lse=True,
            return_stats=True,
        )
        assert_same(out, want[0])
        assert_same(lse, want[1])
        counted = np.broadcast_to(allowed & tokens, (2, 2, 300, 200))
        for b, h in np.ndindex(2, 2):
            hit = [
                counted[b, h, 128 * i : 128 * i + 128, 64 * j : 64 * j + 64].any()
                for i, j in np.ndindex(3, 4)
            ]
            assert stats.selected[b, h] == sum(hit)
    assert np.isneginf(reference.attention(q, k, v, block_map=mask, return_lse=True)[1]).any()


def test_rows_without_keys_are_zero_and_minus_infinity(rng):
    q, k, v = gaussian(rng, 200, 70, batch=2)
    for pol in (None, policy(quantize=True), top_k(0.2, pv_threshold=1.0, quantize=True)):
        out, lse = reference.attention(
            q, k, v + 9, policy=pol, causal=True, seqlens_k=[70, 0], return_lse=True
        )
        assert (out[0, 0, :130] == 0).all()
        assert np.isneginf(lse[0, 0, :130]).all()
        assert np.isfinite(lse[0, 0, 130:]).all()
        assert (out[1] == 0).all()
        assert np.isneginf(lse[1]).all()


# ---- stage 2 -----------------------------------------------------------------------------------


def plain_tiles(mask, scores=None):
    """Ascending, or the best score first (lowest index at a tie), then ascending."""
    tiles = []
    for i, row in enumerate(mask):
        listed = [int(j) for j in np.flatnonzero(row)]
        scored = [j for j in listed if scores is not None and scores[i, j] > -math.inf]
        if scored:
            best = max(scored, key=lambda j: (scores[i, j], -j))
            listed = [best, *(j for j in listed if j != best)]
        tiles.append(listed)
    return tiles


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_stage_2_follows_the_skip_rule(rng, rows, width):
    skipped_by = dict.fromkeys(("dense", "cdf", "map"), 0)
    for causal in (False, True):
        q, k, v = gaussian(rng, 200, 700)
        # All rows agree, within the noise of the other channels, that one block outweighs the rest.
        levels = rng.uniform(0, 2.5, 11)
        heavy = int(rng.integers(1, 5))
        levels[heavy] = 8
        q[..., 0], k[..., 0] = 4.0, np.repeat(levels, 64)[:700]
        allowed = plain_allowed(200, 700, causal)
        pv = float(rng.uniform(0.5, 2.0))
        options = {"causal": causal, "stage2_rows": rows, "tile_keys": width}
        given = rng.random((1, 1, 2, 11)) < 0.8
        given[..., heavy] = True
        sparse = top_cdf(0.9999, 0.1, pv_threshold=pv)
        _, scores, _ = plain_block_map(q[0, 0], k[0, 0], sparse, allowed, causal)
        reachable = reference.reachable_blocks(200, 700, causal=causal)
        chosen = reference.block_map(q, k, policy=sparse, causal=causal)[0, 0]
        for name, kwargs, mask, tiles in (
            ("dense", {"policy": policy(pv_threshold=pv)}, reachable, plain_tiles(reachable)),
            ("cdf", {"policy": sparse}, chosen, plain_tiles(chosen, scores)),
            (
                "map",
                {"policy": sparse, "block_map": given},
                given[0, 0],
                plain_tiles(given[0, 0] & reachable),
            ),
        ):
            seen = allowed & tokens_of(mask, 200, 700)
            want, lse2, skipped = plain_online(
                *(q[0, 0], k[0, 0], v[0, 0], seen, tiles),
                scale=0.25,
                pv=pv,
                rows=rows,
                width=width,
            )
            out, lse, stats = reference.attention(
                q, k, v, return_lse=True, return_stats=True, **options, **kwargs
            )
            assert stats.skipped_rows == skipped
            assert_same(out[0, 0], want)
            assert_same(lse[0, 0], lse2 * LN2)
            skipped_by[name] += skipped
    assert all(n > 0 for n in skipped_by.values()), f"the rule was not put to work: {skipped_by}"


def test_what_stage_2_skips_is_nested_in_the_threshold(rng):
    q, k, v = clustered(rng, 300, 900)
    plain, plain_lse = reference.attention(q, k, v, policy=policy(), return_lse=True)
    last_skipped, last_lse = math.inf, np.full(plain_lse.shape, -np.inf)
    for pv in (0.0, 0.5, 1, 2, 4, 8, 16, 1e3, math.inf):
        out, lse, stats = reference.attention(
            q, k, v, policy=policy(pv_threshold=pv), return_lse=True, return_stats=True
        )
        assert stats.skipped_rows[0, 0] <= last_skipped
        assert (lse >= last_lse - EXACT).all(), "more was computed, yet the mass fell"
        if last_skipped == math.inf:
            assert stats.skipped_rows[0, 0] > 0, "nothing is skipped at a threshold of 0"
        last_skipped, last_lse = stats.skipped_rows[0, 0], lse
        # Per skipped tile and row at most 64 * exp(-pv) of the kept mass is lost.
        lost = 64 * 15 * math.exp(-pv)
        assert (plain_lse - lse <= math.log1p(lost) + EXACT).all()
        if pv >= 1e3:
            assert stats.skipped_rows[0, 0] == 0
            np.testing.assert_array_equal(out, plain)


def test_stage_2_thresholds_per_head(rng):
    q, k, v = clustered(rng, 200, 600, heads=3)
    pv = (1.0, math.inf, 3.0)
    out, stats = reference.attention(
        q, k, v, policy=top_cdf(0.99, -1.0, pv_threshold=pv), return_stats=True
    )
    for h in range(3):
        one, one_stats = reference.attention(
            *(x[:, h, None] for x in (q, k, v)),
            policy=top_cdf(0.99, -1.0, pv_threshold=pv[h]),
            return_stats=True,
        )
        np.testing.assert_array_equal(out[:, h, None], one)
        assert stats.skipped_rows[0, h] == one_stats.skipped_rows[0, 0]
    assert stats.skipped_rows[0, 1] == 0


def test_the_best_selected_block_goes_first():
    scores = np.array([1.0, 5.0, -np.inf, 5.0, 9.0, 3.0])
    some = np.array([1, 1, 1, 1, 0, 1], bool)
    assert reference.tile_order(some, scores).tolist() == [1, 0, 2, 3, 5]
    assert reference.tile_order(some, None).tolist() == [0, 1, 2, 3, 5]
    fix_only = np.array([0, 0, 1, 0, 0, 0], bool)
    assert reference.tile_order(fix_only, scores).tolist() == [2]
    assert reference.tile_order(~some & False, scores).tolist() == []


# ---- accounting --------------------------------------------------------------------------------


def test_accounting_by_hand():
    # Two query blocks of 128 and 1 rows, four key blocks; scores are q * k, one number a block.
    q = np.ones((1, 1, 129, 1))
    k = np.repeat([5.0, 0.0, 4.9, -3.0], 64)[None, None, :, None]
    v = np.ones_like(k)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 1]], bool)[None, None]
    pol = policy(pv_threshold=2.0)
    _, stats = reference.attention(q, k, v, policy=pol, block_map=mask, return_stats=True)
    assert stats.reachable.item() == 8
    assert stats.selected.item() == 5
    assert stats.selected_rows.item() == 3 * 128 + 2
    assert stats.skipped_rows.item() == 128 + 1  # block 1 for the first 128 rows, 3 for the last
    skip = (128 + 1) / (3 * 128 + 2)
    assert stats.qk_sparsity == pytest.approx(3 / 8)
    assert stats.pv_sparsity == pytest.approx(1 - 5 / 8 * (1 - skip))
    assert stats.sparsity == pytest.approx((stats.qk_sparsity + stats.pv_sparsity) / 2)
    assert stats.sparsity_per_head.item() == pytest.approx(stats.sparsity)
    # Two tiles a step: (0, 1) and (2,), (0, 3); the pair decides by its best, nothing is skipped.
    _, wide = reference.attention(
        q, k, v, policy=pol, block_map=mask, return_stats=True, tile_keys=128
    )
    assert wide.skipped_rows.item() == 0
    _, none = reference.attention(
        q, k, v, policy=pol, block_map=mask, return_stats=True, seqlens_k=[0]
    )
    assert none.sparsity == none.qk_sparsity == none.pv_sparsity == 0.0


def test_accounting_adds_up_over_sequences_of_different_length():
    q, k = np.ones((2, 1, 128, 2)), np.ones((2, 1, 256, 2))
    mask = np.array([1, 0, 0, 0], bool)[None, None, None]
    _, stats = reference.attention(q, k, k, block_map=mask, seqlens_k=[256, 64], return_stats=True)
    assert stats.qk_sparsity_per_head[:, 0].tolist() == [0.75, 0.0]
    assert stats.qk_sparsity == pytest.approx(1 - 2 / 5)


# ---- quantization ------------------------------------------------------------------------------


def test_e4m3_rounding_by_the_table_of_codes(rng):
    assert len(E4M3_CODES) == 127
    assert E4M3_CODES[-1] == 448.0
    np.testing.assert_array_equal(reference.round_e4m3(E4M3_CODES), E4M3_CODES)
    halves = (E4M3_CODES[1:] + E4M3_CODES[:-1]) / 2
    spread = 2.0 ** rng.uniform(-12, 8.8, 20_000)
    x = np.concatenate([halves, np.nextafter(halves, 0), np.nextafter(halves, 1e9), spread])
    np.testing.assert_array_equal(reference.round_e4m3(x), table_e4m3(x))
    np.testing.assert_array_equal(reference.round_e4m3(-x), -table_e4m3(x))
    assert reference.round_e4m3(np.array([500.0, -1e9])).tolist() == [448.0, -448.0]


def test_e4m3_rounding_is_that_of_torch(rng):
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    values = codes.to(torch.float64).numpy()
    values = values[np.isfinite(values)]
    assert values.size == 254  # all but the two NaN
    np.testing.assert_array_equal(np.unique(np.abs(values)), E4M3_CODES)
    scaled = rng.standard_normal(50_000) * 2.0 ** rng.uniform(-12, 6, 50_000)
    x = np.concatenate([values, scaled])
    x = x.astype(np.float32)
    x = x[np.abs(x) <= 448]
    want = torch.from_numpy(x).to(torch.float8_e4m3fn).to(torch.float64).numpy()
    np.testing.assert_array_equal(reference.round_e4m3(x.astype(np.float64)), want)


def test_int8_rounding():
    x = np.array([127.0, 0.5, 1.5, -0.5, -2.5, 0.49, -127.0])
    codes, scale = reference.quantize_int8(x, np.array(127.0))
    assert codes.tolist() == [127, 1, 2, -1, -3, 0, -127]
    assert scale == 1.0
    codes, scale = reference.quantize_int8(np.zeros(3), np.array(0.0))
    assert codes.tolist() == [0, 0, 0]
    assert math.isfinite(scale)


def test_quantized_operands_follow_their_groups(rng):
    x = rng.standard_normal((70, 8)) * 10.0 ** rng.uniform(-3, 3, (70, 1))
    x[5] = 0
    want = np.stack([plain_int8(row) for row in x])
    assert_same(reference.quantize_queries(x), want, 1e-9)
    groups = [plain_int8(x[j : j + 16]) for j in range(0, 70, 16)]
    assert_same(reference.quantize_keys(x), np.concatenate(groups), 1e-9)
    x[:, 3] = 0
    x[:, 4] = 448.0 * np.sign(x[:, 4])  # exactly in range at scale 1
    for name, limit in (("e4m3", 448.0), ("f16", 65504.0)):
        codes, scale = reference.quantize_values(x, name)
        for c in range(8):
            largest = np.abs(x[:, c]).max()
            assert math.frexp(scale[c])[0] == 0.5, "not a power of two"
            if largest:
                assert largest / scale[c] <= limit < 2 * largest / scale[c]
            exact = x[:, c] / scale[c]
            rounded = table_e4m3(exact) if name == "e4m3" else np.float16(exact)
            np.testing.assert_array_equal(codes[:, c], rounded)


@pytest.mark.parametrize("pv_format", ["e4m3", "f16"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("pv", [3.0, math.inf])
def test_quantized_attention_step_by_step(rng, pv, width, pv_format):
    q, k, v = clustered(rng, 180, 270, sharp=1.5)
    k += 7.0
    v[..., 3] *= 1e4
    valid, causal = 250, bool(rng.integers(2))
    pol = top_cdf(0.97, 0.1, quantize=True, pv_threshold=pv)
    options = {"causal": causal, "seqlens_k": [valid]}
    mask = reference.block_map(q, k, policy=pol, **options)[0, 0]
    allowed = plain_allowed(180, 270, causal, valid=valid)
    _, scores, _ = plain_block_map(q[0, 0], k[0, 0], pol, allowed, causal, valid=valid)

    mean = k[0, 0, :valid].mean(axis=0)
    smooth, real_v = k[0, 0, :valid] - mean, v[0, 0, :valid]
    q8 = np.stack([plain_int8(row) for row in q[0, 0]])
    k8 = np.concatenate([plain_int8(smooth[j : j + 16]) for j in range(0, valid, 16)])
    limit = 448 if pv_format == "e4m3" else 65504
    scale = 2.0 ** np.ceil(np.log2(np.abs(real_v).max(axis=0) / limit))
    to_codes = table_e4m3 if pv_format == "e4m3" else lambda x: np.float16(x).astype(float)
    offset = 8 if pv_format == "e4m3" else 0
    out8, lse2, skipped = plain_online(
        *(q8, k8, to_codes(real_v / scale), allowed & tokens_of(mask, 180, 270)),
        plain_tiles(mask, scores if pv < math.inf else None),  # codes of P depend on the order
        scale=0.25,
        pv=pv,
        rows=64,
        width=width,
        round_p=lambda p: to_codes(p * 2**offset),
    )
    out, lse, stats = reference.attention(
        *(q, k, v),
        policy=pol,
        return_lse=True,
        return_stats=True,
        stage2_rows=64,
        tile_keys=width,
        pv_format=pv_format,
        **options,
    )
    # A score off by 1e-15 may move a weight across the middle of two codes: one code in 1e12.
    assert_same(out[0, 0], out8 * scale, 1e-9 * scale.max())
    assert_same(lse[0, 0], (lse2 - offset) * LN2 + 0.25 * q[0, 0] @ mean)
    assert stats.skipped_rows == skipped


def generators(rng):
    """The kinds of data on which 8-bit attention is known to hold or to break."""
    n, d = 1024, 128
    q, k, v = (rng.standard_normal((1, 1, n, d)) for _ in range(3))
    yield "gaussian", q, k, v
    yield "key bias", q, k + 4 * rng.choice([-1, 1], d), v
    loud_q, loud_k = q.copy(), k.copy()
    loud_q[:, :, ::37] *= 5
    loud_k[:, :, ::53] *= 5
    yield "token outliers", loud_q, loud_k, v
    yield ("clusters", *clustered(rng, n, n, d, sharp=1.0))
    yield "heavy tails", q, k, rng.standard_t(3, v.shape)
    yield "value bias", q, k, v + 5 * rng.standard_normal(d)


@pytest.mark.parametrize(("pv_format", "bound"), [("e4m3", 0.05), ("f16", 0.02)])
def test_quantized_error_stays_within_the_known_bounds(rng, pv_format, bound):
    # Measured: 2.5 to 3.8 % relative L1 with e4m3, about 1 % with f16, where V averages to zero.
    for name, q, k, v in generators(rng):
        want, want_lse = reference.dense(q, k, v)
        got, lse = reference.attention(
            q, k, v, policy=policy(quantize=True), return_lse=True, pv_format=pv_format
        )
        cosine = (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want)
        assert relative_l1(got, want) <= bound, name
        assert cosine >= 0.998, name
        assert relative_l1(got, want) > 1e-5, f"{name}: nothing was quantized"
        # A row's LSE moves by no more than its scores do, plus the rounding of P: half of a step
        # is 1/16 of an e4m3 number, and what is flushed to zero adds up to n / 2^18.
        smooth = k[0, 0] - k[0, 0].mean(axis=0)
        q8 = np.stack([plain_int8(row) for row in q[0, 0]])
        k8 = np.concatenate([plain_int8(x) for x in smooth.reshape(-1, 16, 128)])
        moved = np.abs(q8 @ k8.T - q[0, 0] @ smooth.T).max(axis=1) / math.sqrt(128)
        assert (np.abs(lse - want_lse)[0, 0] <= moved + 1 / 16 + len(k8) / 2**18).all(), name


def test_lse_is_that_of_the_keys_as_given(rng):
    q, k, v = gaussian(rng, 140, 500, dim=64)
    k += 10.0 * rng.standard_normal(64)
    _, want = reference.dense(q, k, v)
    shift = np.abs(q[0, 0] @ k[0, 0].mean(axis=0) / 8).max()
    assert shift > 1, "the bias is too small to notice a missing correction"
    for pv_format in ("e4m3", "f16"):
        _, lse = reference.attention(
            q, k, v, policy=policy(quantize=True), return_lse=True, pv_format=pv_format
        )
        # int8 scores are off by a per cent of their spread, e4m3 weights by 1/16 before averaging.
        err = np.abs(lse - want).max()
        assert err <= 0.06


def test_quantization_happens_only_where_asked(rng):
    q, k, v = gaussian(rng, 100, 100)
    plain = reference.attention(q, k, v, policy=policy(quantize=None))
    np.testing.assert_array_equal(
        plain, reference.attention(q, k, v, policy=policy(quantize=False))
    )
    coarse = reference.attention(q, k, v, policy=policy(quantize=True))
    err = np.abs(coarse - plain).max()
    assert err > 1e-4


# ---- non-finite inputs -------------------------------------------------------------------------


def test_a_non_finite_input_reaches_only_the_rows_that_see_it(rng):
    for trial in range(12):
        q, k, v = clustered(rng, 300, 400, batch=2, heads=2, heads_k=1)
        name = "qkv"[trial % 3]
        dirty = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
        x = dirty[name]
        b, h, t, d = (int(rng.integers(n)) for n in x.shape)
        x[b, h, t, d] = rng.choice([np.nan, np.inf, -np.inf])
        causal, valid = bool(rng.integers(2)), [400, 350]
        pol = (
            policy(),
            top_cdf(0.3, -1.0),
            top_k(0.2, pv_threshold=1.0),
            policy(quantize=True, pv_threshold=2.0),
        )[trial // 3]
        options = {"causal": causal, "seqlens_k": valid}
        out, lse = reference.attention(
            *dirty.values(), policy=pol, return_lse=True, stage2_rows=64, **options
        )
        mask = reference.block_map(dirty["q"], dirty["k"], policy=pol, **options)
        allowed = np.stack([plain_allowed(300, 400, causal, valid=n) for n in valid])
        seen = allowed[:, None] & tokens_of(mask, 300, 400)
        want = np.zeros((2, 2, 300), bool)
        if name == "q":
            want[b, h, t] = seen[b, h, t].any()
            assert mask[b, h, t // 128].sum() == (
                reference.reachable_blocks(300, 400, causal=causal, valid_k=valid[b])[
                    t // 128
                ].sum()
            ), "a query block with a NaN takes all"
        else:
            want[b] = seen[b, :, :, t]
        np.testing.assert_array_equal(np.isnan(lse), want)
        np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(want[..., None], out.shape))
        if name == "k" and t < valid[b]:
            first = math.ceil(max(t // 64 * 64 + 100 - 400, 0) / 128) if causal else 0
            assert mask[b, :, min(first + 1, 2) :, t // 64].all(), "a key block with a NaN is fix"
        if trial < 3:  # everything computed in full precision: the other rows do not notice
            clean = reference.attention(q, k, v, policy=pol, **options)
            np.testing.assert_array_equal(out[~want], clean[~want])


def test_a_non_finite_element_counts_as_zero_and_keeps_its_count():
    k = np.array([[1.0, np.nan], [3.0, 4.0]])
    smooth, mean = reference.smooth_keys(k)
    assert mean.tolist() == [2.0, 2.0]
    assert smooth.tolist() == [[-1.0, 0.0], [1.0, 2.0]]


def test_padding_is_not_looked_at(rng):
    q, k, v = gaussian(rng, 200, 300)
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k[:, :, 170:] = np.nan
    dirty_v[:, :, 170:] = np.inf
    for pol in (None, policy(quantize=True), top_k(0.3, 0.2, pv_threshold=1.0)):
        options = {"policy": pol, "seqlens_k": [170], "check_numerics": True}
        got = reference.attention(q, dirty_k, dirty_v, return_lse=True, **options)
        want = reference.attention(q, k, v, return_lse=True, **options)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_an_empty_row_stays_empty_whatever_its_query_holds(rng):
    q, k, v = gaussian(rng, 100, 60)
    q[0, 0, [3, 70]] = np.nan  # row 3 sees no key, row 70 sees some
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert (out[0, 0, 3] == 0).all()
    assert np.isneginf(lse[0, 0, 3])
    assert np.isnan(lse[0, 0, 70])


def test_a_tile_with_a_non_finite_key_is_never_skipped(rng):
    q, k, v = gaussian(rng, 128, 256)
    k[0, 0, :64] = 0
    q[..., 0], k[0, 0, :64, 0] = 5.0, 40.0  # the first tile outweighs all others
    options = {"policy": policy(pv_threshold=1.0), "return_stats": True}
    _, stats = reference.attention(q, k, v, **options)
    assert stats.skipped_rows.item() == 3 * 128
    v[0, 0, 130, 0] = np.nan
    out, stats = reference.attention(q, k, v, **options)
    assert stats.skipped_rows.item() == 2 * 128
    assert np.isnan(out).all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_check_numerics_names_the_tensor(rng, name):
    arrays = dict(zip("qkv", gaussian(rng, 20, 30), strict=True))
    arrays[name][0, 0, 7, 2] = rng.choice([np.nan, np.inf, -np.inf])
    with pytest.raises(InvalidArgumentError, match=f"^{name} holds"):
        reference.attention(**arrays, check_numerics=True)


# ---- packed sequences --------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_computed_one_by_one(rng, causal):
    lengths_q, lengths_k = [130, 0, 1, 200], [70, 5, 0, 300]
    q = rng.standard_normal((331, 4, 8))
    k, v = rng.standard_normal((2, 375, 2, 8))
    ends_q, ends_k = np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])
    for pol in (None, top_k(0.4, pv_threshold=(1.0, 2.0, 3.0, math.inf), quantize=True)):
        out, lse, stats = reference.attention_varlen(
            *(q, k, v, ends_q, ends_k),
            max_seqlen_q=200,
            policy=pol,
            causal=causal,
            return_lse=True,
            return_stats=True,
        )
        assert out.shape == q.shape
        assert lse.shape == (4, 331)
        selected = 0
        for b in range(4):
            of_q, of_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
            want, want_lse, one = reference.attention(
                *(x[s].swapaxes(0, 1)[None] for x, s in ((q, of_q), (k, of_k), (v, of_k))),
                policy=pol,
                causal=causal,
                return_lse=True,
                return_stats=True,
            )
            np.testing.assert_array_equal(out[of_q], want[0].swapaxes(0, 1))
            np.testing.assert_array_equal(lse[:, of_q], want_lse[0])
            np.testing.assert_array_equal(
                stats.pv_sparsity_per_head[b], one.pv_sparsity_per_head[0]
            )
            selected += one.selected.sum()
        assert stats.qk_sparsity == pytest.approx(1 - selected / stats.reachable.sum())


def test_no_packed_sequences_at_all():
    none = np.zeros((0, 2, 8))
    assert reference.attention_varlen(none, none, none, [0], [0]).shape == (0, 2, 8)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": np.ones((1, 3, 9, 4)), "v": np.ones((1, 3, 9, 4))}, "num_heads_q a multiple"),
        ({"k": np.ones((1, 0, 9, 4)), "v": np.ones((1, 0, 9, 4))}, "num_heads_q a multiple"),
        ({"v": np.ones((1, 2, 8, 4))}, "do not fit together"),
        ({"q": np.ones((2, 5, 4))}, "do not fit together"),
        ({"seqlens_k": [10]}, "seqlens_k"),
        ({"seqlens_k": [-1]}, "seqlens_k"),
        ({"seqlens_k": [3, 3]}, "seqlens_k"),
        ({"causal_align": "middle"}, "causal_align"),
        ({"policy": top_cdf((0.1, 0.2, 0.3))}, "cdf_threshold has 3"),
        ({"policy": top_cdf(theta=(0.1,))}, "sim_threshold has 1"),
        ({"policy": policy(pv_threshold=(1.0,) * 4)}, "pv_threshold has 4"),
        ({"block_map": np.ones((1, 2, 1, 2), bool)}, "block_map"),
        ({"block_map": SimpleNamespace(row_mask=np.ones((1, 1, 2, 1), bool))}, "block_map"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    arrays = {"q": np.ones((1, 2, 5, 4)), "k": np.ones((1, 2, 9, 4)), "v": np.ones((1, 2, 9, 4))}
    with pytest.raises(InvalidArgumentError, match=text):
        reference.attention(**arrays | change)


@pytest.mark.parametrize("ends", [[], [[0, 5]], [1, 5], [0, 4], [0, 3, 2, 5]])
def test_ends_that_do_not_rise_from_zero_to_the_total_are_refused(ends):
    x = np.ones((5, 1, 4))
    with pytest.raises(InvalidArgumentError, match="cu_seqlens_k"):
        reference.attention_varlen(x, x, x, [0, 5], ends)
    with pytest.raises(InvalidArgumentError, match="one length"):
        reference.attention_varlen(x, x, x, [0, 5], [0, 2, 5])
