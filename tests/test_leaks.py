"""What must not show in a row: unseen keys, neighbours, other heads, the order of memory and work.

Where the arithmetic of a row does not depend on what it may not see, the bits must be the same.
"""

import math

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, plain_attention, relative_l1, visible
from strategies import ALIGNS, in_tokens, tokens

import cusparge
from cusparge import BlockMap, Dense, TopCdf, TopK, attention, attention_varlen

BACKENDS = ("cpu", "reference")
POLICIES = [
    pytest.param(Dense(), id="dense"),
    pytest.param(Dense(pv_threshold=1.0), id="stage 2"),
    pytest.param(Dense(quantize=True), id="quantized"),
    pytest.param(TopCdf(0.7, 0.1), id="cdf"),
    pytest.param(TopK(0.4, pv_threshold=1.0, quantize=True), id="topk"),
]


def both(q, k, v, **options):
    return attention(q, k, v, return_lse=True, **options)


def assert_same_rows(got, want, rows, label):
    assert_same_bits(got[0][:, :, rows], want[0][:, :, rows], f"out, {label}")
    assert_same_bits(got[1][:, :, rows], want[1][:, :, rows], f"lse, {label}")


def changed_after(rng, x, token, loudness):
    """Return x with other values after `token`, some of them much louder."""
    changed = x.copy()
    later = changed[:, :, token + 1 :]
    later[...] = rng.standard_normal(later.shape) * rng.choice((1.0, loudness), later.shape)
    return changed


def times(seqlen_k, rng):
    """Return last visible keys: every residue of 128 over a few runs, the edges in each."""
    edges = [t for t in (0, 63, 64, 127, 128, 191, 255, 256) if t < seqlen_k]
    return sorted({*edges, *rng.choice(seqlen_k, 10, replace=False).tolist()})


def rows_up_to(token, seqlen_q, seqlen_k, align):
    """Return how many rows see no key after `token`."""
    offset = seqlen_k - seqlen_q if align == "bottom_right" else 0
    return max(0, min(seqlen_q, token - offset + 1))


# ---- later keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("lengths", [(300, 300), (200, 410), (410, 200)])
@pytest.mark.parametrize("loudness", [3.0, 1e3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_map", [False, True])
def test_later_keys_do_not_show_in_the_bits(rng, align, lengths, loudness, backend, has_map):
    seqlen_q, seqlen_k = lengths
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 1, seqlen_q, seqlen_k, 16)
    options = {"causal": True, "causal_align": align, "backend": backend}
    options["policy"] = Dense(quantize=False)
    if has_map:
        mask = rng.random((1, 2, math.ceil(seqlen_q / 64), math.ceil(seqlen_k / 64))) < 0.7
        options["block_map"] = BlockMap.from_mask(
            mask, seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_q=64
        )
    want = both(q, k, v, **options)
    for token in times(seqlen_k, rng):
        rows = slice(rows_up_to(token, seqlen_q, seqlen_k, align))
        later = [changed_after(rng, x, token, loudness) for x in (k, v)]
        assert_same_rows(both(q, *later, **options), want, rows, f"keys after {token}")


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("pv", [None, 2.0])
def test_not_a_number_later_reaches_no_earlier_row(rng, align, pv):
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 1, 300, 300, 16)
    options = {"causal": True, "causal_align": align, "policy": Dense(pv_threshold=pv)}
    want = both(q, k, v, **options)
    for token in (0, 62, 63, 127, 128, 200):
        for value in (np.nan, np.inf):
            later = [x.copy() for x in (k, v)]
            for x in later:
                x[0, 0, token + 1, 3] = value
            got = both(q, *later, **options)
            if pv is None:
                assert_same_rows(got, want, slice(token + 1), f"{value} at {token + 1}")
            else:  # the tile that holds it is never skipped, for all rows of the block
                assert np.isfinite(got[0][:, :, : token + 1]).all()
                assert np.isfinite(got[1][:, :, : token + 1]).all()
            assert np.isnan(got[0][:, :, token + 1 :]).all()
            assert np.isnan(got[1][:, :, token + 1 :]).all()


def test_enormous_later_values_move_earlier_rows_by_rounding_only(rng):
    # Beyond 1e15 the CPU computes the whole sequence in float64, where its sums could overflow.
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 1, 300, 300, 16)
    want = both(q, k, v, causal=True, policy=Dense())
    for token in (0, 127, 200):
        later = [changed_after(rng, x, token, 1e16) for x in (k, v)]
        got = both(q, *later, causal=True, policy=Dense())
        for one, other in zip(got, want, strict=True):
            assert_close(one[:, :, : token + 1], other[:, :, : token + 1], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pv", [None, 2.0])
@pytest.mark.parametrize("quantize", [False, True])
def test_later_keys_stay_within_rounding_of_a_sparse_map(rng, backend, pv, quantize):
    # Quantized, the mean of K is that of all tokens: other codes for K and so for P, whose error
    # is 3.8 % of white V on its own, twice that between two at most where rows are averaged.
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 2, 300, 300, 32)
    policy = TopK(0.5, pv_threshold=pv, quantize=quantize)
    kept = cusparge.predict_block_map(q, k, policy=policy, causal=True)
    options = {"causal": True, "block_map": kept, "policy": policy, "backend": backend}
    want = both(q, k, v, **options)
    for token in times(300, rng):
        rows = slice(token + 1)
        got = both(q, *(changed_after(rng, x, token, 3.0) for x in (k, v)), **options)
        if quantize and pv is None:
            if token >= 63:
                error = relative_l1(got[0][:, :, rows], want[0][:, :, rows])
                assert error <= 0.076, (token, error)
            assert_close(got[1][:, :, rows], want[1][:, :, rows], atol=0.3)
        elif not quantize:
            if pv is not None:  # rows of one block decide together: later rows have a vote
                rows = slice((token + 1) // 128 * 128)
            assert_same_rows(got, want, rows, f"keys after {token}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pv", [None, 2.0])
def test_louder_later_values_leave_the_codes_of_earlier_ones(rng, backend, pv):
    # Scales of V are powers of two: only subnormal codes move, one value in a hundred by 1/1000.
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 2, 300, 300, 32)
    options = {"causal": True, "policy": Dense(pv, quantize=True), "backend": backend}
    want = both(q, k, v, **options)
    for token in times(300, rng)[::3]:
        rows = slice(token + 1)
        loud = v.copy()
        loud[:, :, token + 1 :] *= 100
        got = both(q, k, loud, **options)
        assert_same_bits(got[1], want[1], f"lse, values after {token}")
        error = relative_l1(got[0][:, :, rows], want[0][:, :, rows])
        assert error <= 1e-3, (token, error)


# ---- padding, neighbours, other heads ------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("align", [None, *ALIGNS])
def test_padding_does_not_show_in_the_bits(rng, backend, policy, align):
    q, k, v = tokens(int(rng.integers(2**32)), 3, 2, 1, 200, 300, 16)
    lengths = [int(rng.integers(1, 300)), 0, 64 * int(rng.integers(1, 5))]
    options = {"policy": policy, "backend": backend, "seqlens_k": lengths}
    if align is not None:
        options |= {"causal": True, "causal_align": align}
    want = both(q, k, v, **options)
    for filling in (0.0, 1e30, np.nan, np.inf):
        padded = [x.copy() for x in (k, v)]
        for b, length in enumerate(lengths):
            for x in padded:
                x[b, :, length:] = filling
        assert_same_rows(both(q, *padded, **options), want, slice(None), f"padding {filling}")
    assert (want[0][1] == 0).all()
    assert np.isneginf(want[1][1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("filling", [1.0, 1e3, np.nan])
def test_neighbours_in_a_pack_do_not_show_in_the_bits(rng, backend, policy, filling):
    lengths_q, lengths_k = [70, 129, 1, 200], [65, 200, 130, 63]
    ends_q, ends_k = np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 1, sum(lengths_q), sum(lengths_k), 16)
    q, k, v = (x[0].swapaxes(0, 1).copy() for x in (q, k, v))
    options = {"policy": policy, "backend": backend, "causal": True, "return_lse": True}
    out, lse = attention_varlen(q, k, v, ends_q, ends_k, **options)
    for b in range(4):
        rows, keys = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        others = []
        for x, own in ((q, rows), (k, keys), (v, keys)):
            other = (filling * rng.standard_normal(x.shape)).astype(np.float32)
            other[own] = x[own]
            others.append(other)
        got = attention_varlen(*others, ends_q, ends_k, **options)
        assert_same_bits(got[0][rows], out[rows], f"out of sequence {b}")
        assert_same_bits(got[1][:, rows], lse[:, rows], f"lse of sequence {b}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("filling", [1.0, 1e3, np.nan])
def test_heads_and_batch_entries_do_not_show_in_each_other(rng, backend, policy, filling):
    q, k, v = tokens(int(rng.integers(2**32)), 2, 4, 2, 129, 200, 16)
    options = {"policy": policy, "backend": backend, "causal": True}
    want = both(q, k, v, **options)
    for b, h in np.ndindex(2, 4):
        others = []
        for x, head in ((q, h), (k, h // 2), (v, h // 2)):
            other = (filling * rng.standard_normal(x.shape)).astype(np.float32)
            other[b, head] = x[b, head]
            others.append(other)
        got = both(*others, **options)
        assert_same_bits(got[0][b, h], want[0][b, h], f"out of sequence {b}, head {h}")
        assert_same_bits(got[1][b, h], want[1][b, h], f"lse of sequence {b}, head {h}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "policy",
    [Dense(), TopCdf(0.7, 0.2), TopK(0.5, pv_threshold=1.0), TopK(0.5, quantize=True)],
)
def test_packed_sequences_are_those_alone_bit_for_bit(rng, causal, policy):
    lengths_q = [1, 130, 0, 64, 300, 5, 17]
    lengths_k = [65, 200, 9, 0, 300, 1, 128]
    q = rng.standard_normal((sum(lengths_q), 4, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, sum(lengths_k), 2, 16)).astype(np.float32)
    ends_q, ends_k = (np.cumsum([0, *n]).astype(np.int32) for n in (lengths_q, lengths_k))
    options = {"policy": policy, "causal": causal, "return_lse": True, "return_stats": True}
    out, lse, stats = attention_varlen(q, k, v, ends_q, ends_k, **options)
    assert out.shape == q.shape
    assert lse.shape == (4, len(q))
    for b in range(len(lengths_q)):
        rows, keys = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        alone = attention(q[None, rows], k[None, keys], v[None, keys], layout="NHD", **options)
        assert_same_bits(out[rows], alone[0][0], f"sequence {b}")
        assert_same_bits(lse[:, rows], alone[1][0], f"lse of sequence {b}")
        for name in ("qk_sparsity", "pv_sparsity", "sparsity"):
            of_one = getattr(alone[2], f"{name}_per_head")[0]
            np.testing.assert_array_equal(getattr(stats, f"{name}_per_head")[b], of_one)


def strided(x, how):
    """Return the same values, elsewhere in memory."""
    if how == "wide":
        wide = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan, x.dtype)
        wide[..., :-3] = x
        return wide[..., :-3]
    if how == "backwards":
        return np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1]
    if how == "tokens first":
        return np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3)
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


@pytest.mark.parametrize("how", ["wide", "backwards", "tokens first", "NHD"])
@pytest.mark.parametrize("dim", [1, 3, 8, 64])
@pytest.mark.parametrize(
    "policy", [Dense(), TopK(0.5, pv_threshold=1.0), TopCdf(0.6, 0.1), TopK(0.5, quantize=True)]
)
def test_memory_order_does_not_show_in_the_bits(seed, how, dim, policy):
    arrays = tokens(seed, 2, 4, 2, 300, 515, dim)
    want = attention(*arrays, policy=policy, causal=True, return_lse=True)
    got = attention(*(strided(x, how) for x in arrays), policy=policy, causal=True, return_lse=True)
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1], want[1])
    swapped = [x.swapaxes(1, 2) for x in arrays]
    got = attention(*swapped, policy=policy, causal=True, return_lse=True, layout="NHD")
    assert_same_bits(got[0].swapaxes(1, 2), want[0])
    assert_same_bits(got[1], want[1])


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("policy", [Dense(), TopK(0.5), TopK(0.5, quantize=True)])
def test_tokens_that_share_memory_are_those_apart(rng, step, policy):
    line = rng.standard_normal(600).astype(np.float32)
    size = line.itemsize
    x = np.lib.stride_tricks.as_strided(line, (1, 2, 300, 40), (0, 0, step * size, size))
    want = both(x.copy(), x.copy(), x.copy(), policy=policy, causal=True)
    assert_same_rows(both(x, x, x, policy=policy, causal=True), want, slice(None), "shared")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("policy", POLICIES)
def test_memory_for_converted_keys_does_not_show_in_the_bits(monkeypatch, seed, dtype, policy):
    arrays = [x.astype(dtype) for x in tokens(seed, 3, 4, 2, 300, 1100, 40)]
    want = both(*arrays, policy=policy, causal=True)
    monkeypatch.setattr("cusparge._cpu.backend._KEEP_BYTES", 1)  # converted at each use
    assert_same_rows(both(*arrays, policy=policy, causal=True), want, slice(None), "no memory")


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_neither_repetition_nor_threads_show_in_the_bits(monkeypatch, seed, threads):
    arrays = tokens(seed, 2, 4, 2, 515, 515, 40)
    policy = TopCdf(0.8, 0.2, pv_threshold=2.0)
    want = attention(*arrays, policy=policy, return_lse=True)
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", threads)
    for _ in range(2):
        got = attention(*arrays, policy=policy, return_lse=True)
        assert_same_bits(got[0], want[0])
        assert_same_bits(got[1], want[1])


# ---- rows without keys ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", [TopCdf(0.3, -1), TopCdf(0.3, 0.3), TopK(0.05)], ids=str)
def test_local_attention_leaves_no_row_without_keys(rng, backend, policy):
    # Queries look just ahead of where they stand: without a rule for the diagonal, the chosen
    # blocks of many rows would lie in their future.
    seqlen = 1024
    angle = np.linspace(0, 2 * np.pi, seqlen)[:, None] * np.arange(1, 9)
    k = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)[None, None].astype(np.float32)
    q = 4 * np.roll(k, -48, axis=2) + 0.1 * rng.standard_normal(k.shape).astype(np.float32)
    v = rng.standard_normal(k.shape).astype(np.float32)
    options = {"policy": policy, "causal": True, "backend": backend}
    kept = cusparge.predict_block_map(q, k, **options)
    seen = in_tokens(kept.mask, seqlen, seqlen) & visible(seqlen, seqlen, causal=True)
    assert seen.any(axis=-1).all()
    assert kept.sparsity > 0.3
    out, lse = both(q, k, v, **options)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert_close(out, plain_attention(q, k, v, seen=seen)[0], atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_before_the_first_key_are_empty_whatever_the_keys_hold(rng, backend, policy):
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 2, 400, 150, 16)
    k[:, :, 0], v[:, :, 0] = 1e4, np.nan
    out, lse = both(q, k, v, policy=policy, causal=True, backend=backend)
    assert (out[:, :, :250] == 0).all()
    assert np.isneginf(lse[:, :, :250]).all()
    if isinstance(policy, Dense):
        assert np.isnan(out[:, :, 250:]).all()
