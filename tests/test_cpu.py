"""The CPU backend against the float64 oracle and plain softmax, on awkward shapes.

All memory that NumPy and torch hand out unwritten is poisoned here, results included.

Tolerances follow from float32 arithmetic with unit roundoff u = 2^-24. A score is a sum of D
products, at most ``worst`` = scale · max‖q‖ · max‖k‖ in magnitude; with errors of u/2 on average
and random sign it is off by about sqrt(D) · u/2 · worst, and by a few u · worst from folding the
scale in and from the shift. That is also the relative error of its weight, once in the numerator
and once in the denominator. Sums over the keys add sqrt(Sk) · u. The result is rounded to the
output's dtype.
"""

import math

import numpy as np
import pytest
from compare import assert_close, bits, plain_attention
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    ALIGNS,
    Case,
    allowed_pairs,
    cases,
    examples,
    in_tokens,
    policies,
    tokens,
    without_ties,
)

import cusparge
from cusparge import BlockMap, Dense, TopCdf, TopK, attention, reference

U32 = 2.0**-24
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": U32, "float64": 0.0}
COUNTS = ("qk_sparsity", "pv_sparsity", "sparsity")


def poisoned(make, fill):
    def make_poisoned(*args, **kwargs):
        return fill(make(*args, **kwargs))

    return make_poisoned


def fill_numpy(array):
    if array.dtype.kind in "iu":
        array.fill(0x5A if array.itemsize == 1 else 0x7FC0)  # 0x7FC0 are a bfloat16 NaN's bits
    else:
        array.fill(True if array.dtype.kind == "b" else np.nan)
    return array


@pytest.fixture(autouse=True, scope="module")
def poison():
    """Fill what NumPy and torch allocate unwritten with NaN."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(np, name, poisoned(getattr(np, name), fill_numpy))
        try:
            import torch
        except ImportError:
            pass
        else:
            for name in ("empty", "empty_like"):
                make = getattr(torch, name)
                patch.setattr(
                    torch,
                    name,
                    poisoned(make, lambda x: x.fill_(math.nan) if x.is_floating_point() else x),
                )
        yield


def test_unwritten_memory_is_poisoned():
    assert np.isnan(np.empty(3, np.float32)).all()
    assert np.isnan(np.empty_like(np.zeros(3, np.float16))).all()
    assert (np.empty(3, np.uint16) == 0x7FC0).all()


# ---- tolerances ----------------------------------------------------------------------------------


def worst_score(q, k, sm_scale=None):
    scale = q.shape[-1] ** -0.5 if sm_scale is None else abs(sm_scale)
    longest = (np.linalg.norm(x.astype(np.float64), axis=-1).max(initial=0) for x in (q, k))
    return scale * math.prod(longest)


def score_error(q, k):
    return U32 / 2 * (math.sqrt(q.shape[-1]) + 8) * (worst_score(q, k) + 1)


def assert_matches(got, want, q, k, v, dtype="float32"):
    """Compare (out, lse) with the oracle's, within the bounds derived above."""
    largest = np.abs(v).max(initial=0)
    sums = U32 * (math.sqrt(k.shape[2]) + 8)
    atol = (2 * score_error(q, k) + sums) * largest
    roundoff = ROUNDOFF[dtype]
    # Half of the smallest float16 number for results that underflow.
    assert_close(got[0], want[0], atol=atol + 2.0**-25 * (dtype == "float16"), rtol=roundoff)
    assert_close(got[1], want[1], atol=2 * score_error(q, k) + sums, rtol=2 * U32)


def assert_same_counts(got, want):
    for name in COUNTS:
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=0, atol=1e-12)
        per_head = f"{name}_per_head"
        np.testing.assert_allclose(
            getattr(got, per_head), getattr(want, per_head), rtol=0, atol=1e-12
        )


def both(q, k, v, policy, **options):
    """Return (out, lse, stats) of the CPU and of the oracle."""
    got = attention(
        q, k, v, policy=policy, return_lse=True, return_stats=True, backend="cpu", **options
    )
    arrays = (x.astype(np.float64) for x in (q, k, v))
    want = reference.attention(
        *arrays, policy=policy, return_lse=True, return_stats=True, stage2_rows=128, **options
    )
    return got, want


def check_against_oracle(case, policy, arrays=None):
    q, k, v = arrays or case.arrays
    before = [bits(x).copy() for x in (q, k, v)]
    options = without_ties(q, k, policy, case.options)
    got, want = both(q, k, v, policy, **options)
    for x, bits_before in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(bits(x), bits_before, "an input was written to")
    assert_matches(got[:2], want[:2], *(np.where(np.isfinite(x), x, 0) for x in (q, k, v)))
    assert_same_counts(got[2], want[2])


# ---- everything at once --------------------------------------------------------------------------


@given(st.data(), cases(dims=(1, 8, 40, 72)))
@examples(60)
def test_any_mixture_of_options_agrees_with_the_oracle(data, case):
    policy = data.draw(policies(case.heads, stage2=True))
    check_against_oracle(case, policy)


@pytest.mark.parametrize("dim", [1, 40, 64, 72, 128, 256])
@pytest.mark.parametrize("policy", [TopCdf(0.7, 0.2), TopK(0.4, pv_threshold=1.5)])
def test_head_sizes(seed, dim, policy):
    options = {"causal": True, "seqlens_k": [300]}
    check_against_oracle(Case(seed, 1, 1, 2, 129, 300, dim, options=options), policy)


@pytest.mark.parametrize("seqlen_q", [1, 64, 129, 515])
@pytest.mark.parametrize("seqlen_k", [1, 63, 65, 128, 300])
@pytest.mark.parametrize("align", [None, *ALIGNS])
def test_lengths_and_alignments(seed, seqlen_q, seqlen_k, align):
    options = {} if align is None else {"causal": True, "causal_align": align}
    case = Case(seed, 1, 1, 1, seqlen_q, seqlen_k, 16, "gauss", options)
    for policy in (Dense(), TopK(0.5, pv_threshold=0.7)):
        check_against_oracle(case, policy)


@pytest.mark.parametrize(
    "policy", [Dense(), Dense(pv_threshold=4.0), TopK(0.6), TopCdf(0.95, -1, pv_threshold=2.0)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_more_chosen_blocks_than_one_step_takes(seed, policy, causal):
    # A step is 1,024 keys, 16 blocks; of 47 blocks at least 28 are kept.
    case = Case(seed, 1, 1, 1, 128, 3000, 32, options={"causal": causal})
    check_against_oracle(case, policy)


@pytest.mark.parametrize("pv", [0.5, 1.0])
@pytest.mark.parametrize("fields", [{"local_blocks": 4}, {"sink_blocks": 2}])
def test_the_best_chosen_block_goes_first_however_low_its_score(rng, pv, fields):
    # Sharp scores, and a share so small that forced blocks take all of it: those chosen weigh
    # nothing beside the best that is not, and what stage 2 skips depends on which goes first.
    centers = 2.5 * rng.standard_normal((12, 32))
    order = rng.permutation(12)
    q, k = (np.repeat(centers[i], 64, axis=0)[None, None] for i in (order, np.arange(12)))
    q, k = (x + 0.1 * rng.standard_normal(x.shape) for x in (q, k))
    arrays = [x.astype(np.float32) for x in (q, k, rng.standard_normal(k.shape))]
    policy = TopK(0.05, pv_threshold=pv, **fields)
    got, want = both(*arrays, policy, causal=True, sm_scale=1.0)
    assert_same_counts(got[2], want[2])


@given(st.data(), cases(dims=(8, 40)), st.integers(1, 3))
@examples(40)
def test_not_a_number_goes_where_the_oracle_lets_it_go(data, case, count):
    policy = data.draw(policies(case.heads, stage2=True))
    q, k, v = case.arrays
    rng = np.random.default_rng(case.seed)
    for _ in range(count):
        x = (q, k, v)[rng.integers(3)]
        x[tuple(rng.integers(n) for n in x.shape)] = rng.choice((np.nan, np.inf, -np.inf))
    check_against_oracle(case, policy, (q, k, v))


def test_a_tile_with_a_bad_key_is_never_skipped():
    q = np.ones((1, 1, 128, 16), np.float32)
    k, v = np.zeros((2, 1, 1, 320, 16), np.float32)
    k[:, :, :64] = 10
    skipped = attention(q, k, v, policy=Dense(0.0), return_stats=True)[1]
    assert skipped.pv_sparsity == pytest.approx(0.8)
    v[:, :, 200, 3] = np.nan
    got, want = both(q, k, v, Dense(0.0))
    assert got[2].pv_sparsity == pytest.approx(0.6)
    assert_same_counts(got[2], want[2])
    assert np.isnan(got[0]).all()
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize("policy", [Dense(), TopK(0.5, pv_threshold=1.0), TopK(0.5, quantize=True)])
def test_a_row_without_keys_is_empty_whatever_its_query_holds(seed, policy):
    q, k, v = tokens(seed, 2, 2, 2, 300, 200, 16)
    q[0, 0, [5, 99, 250], 3] = np.nan, np.inf, np.nan
    q[1, :, 7] = np.nan
    out, lse = attention(q, k, v, policy=policy, causal=True, seqlens_k=[200, 0], return_lse=True)
    assert (out[0, :, :100] == 0).all()
    assert np.isneginf(lse[0, :, :100]).all()
    assert (out[1] == 0).all()
    assert np.isneginf(lse[1]).all()
    bad = np.isnan(out[0, 0, 100:]).all(axis=-1)
    np.testing.assert_array_equal(np.flatnonzero(bad), [150])
    np.testing.assert_array_equal(np.isnan(out[0, 0, 100:]).any(axis=-1), bad)
    np.testing.assert_array_equal(np.isnan(lse[0, 0, 100:]), bad)


@pytest.mark.parametrize("sizes", [(1e-30, 1e30, 1), (1e18, 1e18, 1e30), (1e3, 1e-6, 1e-30)])
@pytest.mark.parametrize("policy", [Dense(), TopCdf(0.7, 0.1, pv_threshold=2.0), TopK(0.5)])
def test_magnitudes_cancel(seed, sizes, policy):
    plain = tokens(seed, 1, 2, 1, 200, 300, 16)
    q, k, v = (x * np.float32(size) for x, size in zip(plain, sizes, strict=True))
    scale = 0.25 / (sizes[0] * sizes[1])
    got, want = both(q, k, v, policy, causal=True, sm_scale=scale)
    assert_matches((got[0] / sizes[2], got[1]), (want[0] / sizes[2], want[1]), *plain)
    assert_same_counts(got[2], want[2])


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
@pytest.mark.parametrize("policy", [Dense(), TopCdf(0.7, 0.1, pv_threshold=2.0), TopK(0.5)])
def test_scales(seed, scale, policy):
    q, k, v = tokens(seed, 1, 2, 1, 200, 300, 16)
    got, want = both(q, k, v, policy, causal=True, sm_scale=scale)
    assert_matches(got[:2], want[:2], q * np.float32(abs(scale) * 4), k, v)
    assert_same_counts(got[2], want[2])


@pytest.mark.parametrize("policy", [TopCdf(0.6, 0.1), TopK(0.5, pv_threshold=1.0)])
def test_more_query_blocks_than_one_panel_takes(seed, policy):
    options = {"causal": True, "causal_align": "top_left"}
    check_against_oracle(Case(seed, 1, 1, 1, 64 * 128 + 17, 300, 8, options=options), policy)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype(seed, dtype):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    given_arrays = [torch.from_numpy(x).to(kind) for x in tokens(seed, 2, 4, 2, 300, 191, 40)]
    exact = [x.to(torch.float64).numpy() for x in given_arrays]
    for policy in (Dense(), TopK(0.5, pv_threshold=2.0)):
        out, lse = attention(
            *given_arrays, policy=policy, causal=True, causal_align="top_left", return_lse=True
        )
        assert (out.dtype, lse.dtype) == (kind, torch.float32)
        want = reference.attention(
            *exact, policy=policy, causal=True, causal_align="top_left", return_lse=True
        )
        assert_matches((out, lse), want, *exact, dtype=dtype)


@pytest.mark.parametrize("policy", [TopCdf(0.6, -1), TopCdf(0.8, 0.3), TopK(0.3, sink_blocks=1)])
@pytest.mark.parametrize("align", ALIGNS)
def test_the_output_is_plain_softmax_over_the_predicted_tokens(seed, policy, align):
    q, k, v = tokens(seed, 2, 4, 2, 300, 515, 40)
    options = {"causal": True, "causal_align": align, "seqlens_k": [515, 130], "sm_scale": 0.3}
    mask = cusparge.predict_block_map(q, k, policy=policy, **options).mask
    allowed = {n: options[n] for n in ("causal", "causal_align", "seqlens_k")}
    seen = in_tokens(mask, 300, 515) & allowed_pairs(2, 300, 515, **allowed)
    got = attention(q, k, v, policy=policy, return_lse=True, **options)
    scaled = q * (0.3 * 40**0.5)  # for the bound, which takes the default scale
    assert_matches(got, plain_attention(q, k, v, seen=seen, scale=0.3), scaled, k, v)


# ---- the caller's maps ---------------------------------------------------------------------------


@given(
    case=cases(dims=(16,), lengths=(1, 64, 65, 129, 300, 1300)),
    density=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    block_q=st.sampled_from((64, 128)),
    block_k=st.sampled_from((64, 128)),
    pv=st.sampled_from((None, 1.0)),
    shared=st.booleans(),
)
@examples(40)
def test_the_callers_mask_is_law(case, density, block_q, block_k, pv, shared):
    q, k, v = case.arrays
    rng = np.random.default_rng(case.seed)
    heads = 1 if shared else case.heads
    blocks = (math.ceil(case.seqlen_q / block_q), math.ceil(case.seqlen_k / block_k))
    mask = rng.random((case.batch, heads, *blocks)) < density
    lengths = {"seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k}
    block_map = BlockMap.from_mask(mask, **lengths, block_q=block_q, block_k=block_k)
    policy = Dense(pv_threshold=pv)
    got, want = both(q, k, v, policy, block_map=block_map, **case.options)
    assert_matches(got[:2], want[:2], q, k, v)
    assert_same_counts(got[2], want[2])
    if pv is None:
        seen = in_tokens(mask, **lengths, block_q=block_q, block_k=block_k) & case.allowed
        plain = plain_attention(q, k, v, seen=seen)
        assert_matches(got[:2], plain, q, k, v)
        empty = ~np.broadcast_to(seen, (case.batch, case.heads, *seen.shape[2:])).any(axis=-1)
        assert (got[0][empty] == 0).all()
        assert np.isneginf(got[1][empty]).all()


def test_a_kept_half_that_sees_nothing_is_no_computed_block():
    # Rows 0-63 may see keys 0-63 only: block (0, 1) is reachable through its other half, which
    # the mask leaves out.
    x = np.ones((1, 1, 128, 16), np.float32)
    mask = np.array([[[[False, True], [False, False]]]])
    block_map = BlockMap.from_mask(mask, seqlen_q=128, seqlen_k=128, block_q=64)
    got, want = both(x, x, x, Dense(), block_map=block_map, causal=True)
    assert (got[0] == 0).all()
    assert want[2].qk_sparsity == 1
    assert_same_counts(got[2], want[2])


@pytest.mark.parametrize("seqlen_q", [300, 449])
def test_one_mask_in_four_geometries(rng, seqlen_q):
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 2, seqlen_q, 515, 16)
    coarse = rng.random((1, 2, math.ceil(seqlen_q / 128), 5)) < 0.5
    results = []
    for block_q in (64, 128):
        for block_k in (64, 128):
            mask = np.repeat(np.repeat(coarse, 128 // block_q, 2), 128 // block_k, 3)
            mask = mask[:, :, : math.ceil(seqlen_q / block_q), : math.ceil(515 / block_k)]
            block_map = BlockMap.from_mask(
                mask, seqlen_q=seqlen_q, seqlen_k=515, block_q=block_q, block_k=block_k
            )
            results.append(attention(q, k, v, block_map=block_map, causal=True, return_lse=True))
    seen = in_tokens(coarse, seqlen_q, 515, 128, 128) & allowed_pairs(1, seqlen_q, 515, True)
    for got in results:
        assert_matches(got, plain_attention(q, k, v, seen=seen), q, k, v)


# ---- extremes ------------------------------------------------------------------------------------


def test_one_token_repeated_without_memory(rng):
    one = rng.standard_normal((1, 1, 1, 16)).astype(np.float32)
    k, v = (np.broadcast_to(x, (1, 1, 300, 16)) for x in (one, one + 1))
    got = attention(k[:, :, :129], k, v, causal=True, return_lse=True)
    lse = float((one.astype(np.float64) ** 2).sum()) / 4 + np.log(np.arange(172, 301))
    # Sums of equal numbers are off by as many roundings, all of one sign.
    atol = 300 * U32 * (np.abs(v).max() + 1)
    assert_close(got[0], np.broadcast_to(one + 1, got[0].shape), atol=atol)
    assert_close(got[1], lse[None, None], atol=atol + 2 * score_error(k, k))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 0, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)])
@pytest.mark.parametrize("policy", [None, TopK(0.5, quantize=True), Dense(pv_threshold=1.0)])
def test_empty_sizes_are_written_too(shape, policy):
    batch, heads, seqlen_q, seqlen_k = shape
    q = np.ones((batch, heads, seqlen_q, 16), np.float32)
    k = np.ones((batch, heads, seqlen_k, 16), np.float32)
    out, lse, stats = attention(q, k, k, policy=policy, return_lse=True, return_stats=True)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    assert stats.sparsity == 0
