"""NaN and infinities stay where they belong, and nothing at all gives nothing.

An element that is not finite may reach the rows that see it, and no other.
"No other" is tested by bits: with every block computed the rest of the result must be that of the
same call with 0 in its place, and other batches, heads and sequences never change at all.
"""

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, plain_attention, visible

from cusparge import (
    BlockMap,
    Dense,
    TopCdf,
    TopK,
    attention,
    attention_varlen,
    predict_block_map,
)

nan, inf = np.nan, np.inf
SEQLEN_Q, SEQLEN_K = 200, 270
DENSE = {
    "dense": Dense(),
    "stage 2": Dense(pv_threshold=3.0),
    "quantized": Dense(quantize=True),
    "quantized, stage 2": Dense(quantize=True, pv_threshold=3.0),
    "cdf of 1": TopCdf(1.0),
}
SPARSE = {
    "cdf": TopCdf(0.7),
    "topk": TopK(0.3),
    "quantized": TopCdf(0.7, quantize=True),
    "stage 2": TopK(0.5, pv_threshold=2.0),
}
CAUSAL = {
    "full": {"causal": False},
    "bottom right": {"causal": True},
    "top left": {"causal": True, "causal_align": "top_left"},
}
every_bad = pytest.mark.parametrize("bad", [nan, inf, -inf])
every_name = pytest.mark.parametrize("name", ["q", "k", "v"])


def make(rng, batch=2, heads=4, heads_kv=2, seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, dim=16):
    sizes = {"q": (heads, seqlen_q), "k": (heads_kv, seqlen_k), "v": (heads_kv, seqlen_k)}
    return {
        name: rng.standard_normal((batch, *size, dim), np.float32) for name, size in sizes.items()
    }


def put(arrays, name, at, value):
    changed = dict(arrays)
    changed[name] = arrays[name].copy()
    changed[name][at] = value
    return changed


def seen_by(mode):
    align = CAUSAL[mode].get("causal_align", "bottom_right")
    return visible(SEQLEN_Q, SEQLEN_K, causal=CAUSAL[mode]["causal"], align=align)


def rows_reached(name, at, mode):
    """(batch, heads, rows) bool: the rows that an element at `at` may make NaN."""
    batch, head, token, _ = at
    seen = seen_by(mode)
    reached = np.zeros((2, 4, SEQLEN_Q), bool)
    if name == "q":
        reached[batch, head, token] = seen[token].any()
    else:
        reached[batch, 2 * head : 2 * head + 2] = seen[:, token]
    return reached


def random_place(rng, arrays, name):
    return tuple(int(rng.integers(n)) for n in arrays[name].shape)


@every_bad
@every_name
@pytest.mark.parametrize("policy", DENSE)
@pytest.mark.parametrize("mode", CAUSAL)
def test_it_reaches_the_rows_that_see_it_and_no_other(rng, bad, name, policy, mode):
    arrays, options = make(rng), {"policy": DENSE[policy], "return_lse": True, **CAUSAL[mode]}
    at = random_place(rng, arrays, name)
    out, lse = attention(**put(arrays, name, at, bad), **options)
    want, want_lse = attention(**put(arrays, name, at, 0), **options)
    reached = rows_reached(name, at, mode)
    assert np.isnan(out[reached]).all()
    assert np.isnan(lse[reached]).all()
    out[reached], lse[reached] = want[reached], want_lse[reached]
    assert_same_bits(out, want, f"out, {name}[{at}] = {bad}")
    assert_same_bits(lse, want_lse, f"lse, {name}[{at}] = {bad}")
    assert np.isfinite(want).all()


@every_bad
@every_name
@pytest.mark.parametrize("policy", SPARSE)
@pytest.mark.parametrize("mode", CAUSAL)
def test_sparse_maps_take_its_block_and_leave_other_heads_alone(rng, bad, name, policy, mode):
    arrays, options = make(rng), {"policy": SPARSE[policy], "return_lse": True, **CAUSAL[mode]}
    at = random_place(rng, arrays, name)
    dirty = put(arrays, name, at, bad)
    out, lse = attention(**dirty, **options)
    before, before_lse = attention(**arrays, **options)
    zero, zero_lse = attention(**put(arrays, name, at, 0), **options)
    reached = rows_reached(name, at, mode)
    for got, clean, cleared in ((out, before, zero), (lse, before_lse, zero_lse)):
        if name == "v":  # stage 1 does not look at V: its blocks may be left out
            seen = np.isnan(got).reshape(*reached.shape, -1).any(3)
            assert not (seen & ~reached).any()
        else:
            assert np.isnan(got[reached]).all()
            assert np.isfinite(got[~reached & ~np.isneginf(lse)]).all()
        # Heads that do not read this one, bit for bit as before.
        others = np.ones(reached.shape[:2], bool)
        if name == "q":
            others[at[0], at[1]] = False
        else:
            others[at[0], 2 * at[1] : 2 * at[1] + 2] = False
        assert_same_bits(got[others], clean[others])
        # Blocks of 128 rows that can see no part of its block, as with 0.
        for start in (0, 128):
            rows, first_key = slice(start, start + 128), at[2] // 64 * 64
            touched = start <= at[2] < start + 128
            if name != "q":
                touched = seen_by(mode)[rows, first_key : first_key + 64].any()
            if not touched:
                assert_same_bits(got[:, :, rows], cleared[:, :, rows])
    if name != "v":
        mask = predict_block_map(dirty["q"], dirty["k"], policy=SPARSE[policy], **CAUSAL[mode]).mask
        seen = seen_by(mode)
        for i, j in np.ndindex(2, 5):
            reachable = seen[128 * i : 128 * i + 128, 64 * j : 64 * j + 64].any()
            heads = [at[1]] if name == "q" else [2 * at[1], 2 * at[1] + 1]
            if reachable and (i == at[2] // 128 if name == "q" else j == at[2] // 64):
                assert mask[at[0], heads, i, j].all(), "its block was left out"


@every_bad
@every_name
def test_an_all_bad_tensor_is_nan_wherever_a_row_sees_a_key(rng, bad, name):
    arrays = make(rng, seqlen_q=300, seqlen_k=100)
    arrays[name][...] = bad
    for policy in (*DENSE.values(), *SPARSE.values()):
        out, lse = attention(**arrays, policy=policy, causal=True, return_lse=True)
        assert not out[:, :, :200].any()
        assert np.isneginf(lse[:, :, :200]).all()
        assert np.isnan(out[:, :, 200:]).all()
        assert np.isnan(lse[:, :, 200:]).all()


@pytest.mark.parametrize("policy", [*DENSE.values(), *SPARSE.values()])
def test_padding_is_not_looked_at(rng, policy):
    arrays, bad = make(rng), rng.choice([nan, inf, -inf])
    lengths = [int(rng.integers(1, SEQLEN_K)), 0]
    dirty, clean = ({name: x.copy() for name, x in arrays.items()} for _ in range(2))
    for b, name in ((0, "k"), (0, "v"), (1, "k"), (1, "v")):
        dirty[name][b, :, lengths[b] :] = bad
        clean[name][b, :, lengths[b] :] = rng.standard_normal()
    options = {"policy": policy, "seqlens_k": lengths, "return_lse": True}
    for causal in (False, True):
        got = attention(**dirty, **options, causal=causal, check_numerics=True)
        want = attention(**clean, **options, causal=causal)
        assert_same_bits(got[0], want[0])
        assert_same_bits(got[1], want[1])
        assert not got[0][1].any()
        assert np.isneginf(got[1][1]).all()
    if policy.quantize is None and policy.pv_threshold is None and isinstance(policy, Dense):
        seen = np.arange(SEQLEN_K) < np.array(lengths)[:, None, None, None]
        want, want_lse = plain_attention(**arrays, seen=seen)
        out, lse = attention(**dirty, **options)
        assert_close(out, want, atol=1e-5)
        assert_close(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize("policy", [*DENSE.values(), *SPARSE.values()])
def test_packed_sequences_do_not_know_of_each_other(rng, policy):
    edges_q, edges_k = [0, 130, 130, 200, 331, 340], [0, 190, 250, 250, 251, 400]
    arrays = {
        name: rng.standard_normal((edges[-1], heads, 16), np.float32)
        for name, heads, edges in (("q", 4, edges_q), ("k", 2, edges_k), ("v", 2, edges_k))
    }
    arrays["q"][3, 1, 4] = nan
    arrays["k"][20, 0, 3] = inf
    arrays["v"][250, 1, 0] = -inf  # the one key of sequence 3
    arrays["k"][260:] *= 1e20  # loud, and last
    arrays["v"][260:] *= 1e30
    options = {"policy": policy, "causal": True, "return_lse": True}
    out, lse = attention_varlen(**arrays, cu_seqlens_q=edges_q, cu_seqlens_k=edges_k, **options)
    assert lse.shape == (4, edges_q[-1])
    for i in range(5):
        rows, keys = slice(*edges_q[i : i + 2]), slice(*edges_k[i : i + 2])
        alone = {
            name: x[rows if name == "q" else keys].swapaxes(0, 1)[None]
            for name, x in arrays.items()
        }
        want, want_lse = attention(**alone, **options)
        assert_same_bits(out[rows], want[0].swapaxes(0, 1), f"sequence {i}")
        assert_same_bits(lse[:, rows], want_lse[0], f"sequence {i}")
    assert not out[130:200][np.isneginf(lse[0, 130:200])].any()


def test_a_caller_s_map_hides_what_is_not_finite(rng):
    arrays = make(rng)
    mask = np.ones((1, 1, 2, 5), bool)
    mask[..., 1] = False
    block_map = BlockMap.from_mask(mask, seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K)
    for name in ("k", "v"):
        dirty = put(arrays, name, np.s_[:, :, 64:128], nan)
        assert_same_bits(
            attention(**dirty, block_map=block_map), attention(**arrays, block_map=block_map)
        )


# ---- nothing at all ----


@pytest.mark.parametrize("policy", [Dense(), TopCdf(), TopK(), Dense(1.0, quantize=True)])
@pytest.mark.parametrize("empty", ["batch", "heads", "seqlen_q", "seqlen_k"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_calls(rng, policy, empty, layout, causal):
    sizes = {"batch": 2, "heads": 4, "heads_kv": 2, "seqlen_q": 70, "seqlen_k": 90}
    sizes[empty] = 0
    if empty == "heads":
        sizes["heads_kv"] = int(rng.integers(2))
    arrays = make(rng, **sizes)
    if layout == "NHD":
        arrays = {name: x.swapaxes(1, 2) for name, x in arrays.items()}
    options = {"policy": policy, "layout": layout, "causal": causal}
    lengths = [0] * sizes["batch"]
    for seqlens_k in (None, lengths):
        out, lse, stats = attention(
            **arrays,
            **options,
            seqlens_k=seqlens_k,
            return_lse=True,
            return_stats=True,
            check_numerics=True,
        )
        assert out.shape == arrays["q"].shape
        assert lse.shape == (sizes["batch"], sizes["heads"], sizes["seqlen_q"])
        assert not out.any()
        assert np.isneginf(lse).all()
        assert stats.sparsity == stats.qk_sparsity == stats.pv_sparsity == 0
        assert stats.sparsity_per_head.shape == lse.shape[:2]
        block_map = predict_block_map(arrays["q"], arrays["k"], **options, seqlens_k=seqlens_k)
        blocks = -(-sizes["seqlen_q"] // 128), -(-sizes["seqlen_k"] // 64)
        assert block_map.mask.shape == (*lse.shape[:2], *blocks)
        assert block_map.sparsity == 0


@pytest.mark.parametrize("edges", [([0], [0]), ([0, 0], [0, 0]), ([0, 0, 0], [0, 0, 0])])
def test_empty_packed_calls(rng, edges):
    x = np.empty((0, 2, 16), np.float32)
    out, lse = attention_varlen(x, x, x, *edges, return_lse=True)
    assert out.shape == (0, 2, 16)
    assert lse.shape == (2, 0)


@pytest.mark.parametrize("policy", [*DENSE.values(), *SPARSE.values()])
def test_rows_before_the_first_key(rng, policy):
    arrays = make(rng, seqlen_q=300, seqlen_k=130)
    out, lse = attention(**arrays, policy=policy, causal=True, return_lse=True)
    assert not out[:, :, :170].any()
    assert np.isneginf(lse[:, :, :170]).all()
    assert np.isfinite(lse[:, :, 170:]).all()
    assert_close(out[:, :, 170], np.repeat(arrays["v"][:, :, 0], 2, axis=1), rtol=0.07, atol=0.02)
