"""Stage 1 by its promises: what every block map must be, whatever the data.

Both implementations answer each promise by themselves; only the last tests compare them.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    ALIGNS,
    Case,
    allowed_pairs,
    cases,
    clustered,
    examples,
    in_blocks,
    is_near_tie,
    policies,
    seeds,
    tokens,
)

import cusparge
from cusparge import Dense, TopCdf, TopK, predict_block_map, reference

BACKENDS = ("cpu", "reference")
backends = st.sampled_from(BACKENDS)
POWERS = (64, 128, 256, 512)  # lengths whose mean is exact where the sum is


def block_mask(q, k, policy, backend, **options):
    return predict_block_map(q, k, policy=policy, backend=backend, **options).mask


def mask_of(case, policy, backend):
    q, k, _ = case.arrays
    return block_mask(q, k, policy, backend, **case.options)


def plain_forced(case, sink, local):
    """Blocks that are always computed, token by token: (batch, 1, blocks, key blocks)."""
    causal = case.options.get("causal", False)
    shift = 0
    if causal and case.options.get("causal_align") != "top_left":
        shift = case.seqlen_k - case.seqlen_q
    forced = np.zeros((math.ceil(case.seqlen_q / 128), math.ceil(case.seqlen_k / 64)), bool)
    for i, j in np.ndindex(forced.shape):
        rows = range(128 * i, min(128 * i + 128, case.seqlen_q))
        diagonal = [(row + shift) // 64 for row in rows]
        low, high = diagonal[0], diagonal[-1]
        forced[i, j] = j < sink or (causal and j in diagonal)
        if local:
            forced[i, j] |= low - local + 1 <= j <= (high if causal else high + local - 1)
    return forced & in_blocks(case.allowed)


# ---- every map -----------------------------------------------------------------------------------


@given(st.data(), cases(), backends)
@examples(100)
def test_maps_stay_in_reach_cover_every_row_and_hold_what_is_forced(data, case, backend):
    policy = data.draw(policies(case.heads))
    mask = mask_of(case, policy, backend)
    assert mask.dtype == bool
    blocks = (math.ceil(case.seqlen_q / 128), math.ceil(case.seqlen_k / 64))
    assert mask.shape == (case.batch, case.heads, *blocks)
    assert not (mask & ~in_blocks(case.allowed)).any(), "a block without any allowed pair"

    forced = plain_forced(case, policy.sink_blocks, policy.local_blocks)
    assert mask[np.broadcast_to(forced, mask.shape)].all(), "a diagonal, sink or local block"
    wanting = np.broadcast_to(in_blocks(case.allowed).any(axis=-1), mask.shape[:3])
    assert mask.any(axis=-1)[wanting].all(), "a row of blocks without any"
    tokens_kept = np.repeat(np.repeat(mask, 128, 2)[:, :, : case.seqlen_q], 64, 3)
    kept = tokens_kept[..., : case.seqlen_k] & case.allowed
    covered = kept.any(axis=-1) == case.allowed.any(axis=-1)
    assert covered.all(), "a row that may see keys and has none in a chosen block"


@given(cases(dims=(8,)), st.integers(0, 3), st.integers(0, 3), backends)
@examples(100)
def test_sink_local_and_diagonal_blocks_are_exactly_those_of_the_contract(
    case, sink, local, backend
):
    # A share this small keeps one block, and forced blocks are counted in it.
    policy = TopK(1e-9, sink_blocks=sink, local_blocks=local)
    mask = mask_of(case, policy, backend)
    forced = np.broadcast_to(plain_forced(case, sink, local), mask.shape)
    has_forced = forced.any(axis=-1)
    np.testing.assert_array_equal(mask[has_forced], forced[has_forced])
    reachable = np.broadcast_to(in_blocks(case.allowed).any(axis=-1), has_forced.shape)
    np.testing.assert_array_equal(mask.sum(axis=-1)[~has_forced], reachable[~has_forced])


@given(cases(kinds=("clustered",)), st.integers(1, 20), st.integers(0, 2), backends)
@examples(100)
def test_top_k_keeps_the_ceiling_of_its_share_with_forced_blocks_in_it(
    case, twentieths, sink, backend
):
    mask = mask_of(case, TopK(twentieths / 20, sink_blocks=sink), backend)
    reachable = in_blocks(case.allowed).sum(axis=-1)
    share = np.array([math.ceil(Fraction(twentieths, 20) * int(n)) for n in reachable.flat])
    forced = plain_forced(case, sink, 0).sum(axis=-1)
    want = np.maximum(share.reshape(reachable.shape), forced)
    np.testing.assert_array_equal(mask.sum(axis=-1), np.broadcast_to(want, mask.shape[:3]))


@given(cases(), st.floats(0, 1), st.floats(0, 1), st.sampled_from((-1.0, 0.6)), backends)
@examples(100)
def test_higher_thresholds_give_supersets(case, one, other, theta, backend):
    low, high = sorted((one, other))
    kinds = [lambda x: TopCdf(x, theta), lambda x: TopCdf(x, theta, rule="within")]
    if low > 0:
        kinds.append(lambda x: TopK(x, theta))
    for kind in kinds:
        small, large = (mask_of(case, kind(x), backend) for x in (low, high))
        assert not (small & ~large).any(), kind(low)


@given(cases(), st.floats(0, 1), st.sampled_from((-1.0, 0.6)), backends)
@examples(100)
def test_within_is_reach_less_the_block_that_crosses(case, tau, theta, backend):
    reach = mask_of(case, TopCdf(tau, theta), backend)
    within = mask_of(case, TopCdf(tau, theta, rule="within"), backend)
    assert not (within & ~reach).any()
    assert ((reach ^ within).sum(axis=-1) <= 1).all()


@given(st.data(), cases(kinds=("gauss",)), backends)
@examples(60)
def test_whatever_says_everything_is_dense(data, case, backend):
    theta = data.draw(st.sampled_from((-1.0, 0.3, 0.7)))
    everything = (
        Dense(),
        TopK(1, theta),
        TopCdf(1, theta),
        TopCdf(1, theta, rule="within"),
        TopCdf(0, 1),
        TopK(1e-3, 1),
        TopCdf([1 - i % 2 for i in range(case.heads)], [i % 2 for i in range(case.heads)]),
    )
    want = np.broadcast_to(in_blocks(case.allowed), mask_of(case, Dense(), backend).shape)
    for policy in everything:
        np.testing.assert_array_equal(mask_of(case, policy, backend), want, str(policy))


# ---- what must not matter ------------------------------------------------------------------------


@given(st.data(), cases(), backends)
@examples(60)
def test_permuting_heads_or_batch_permutes_maps(data, case, backend):
    q, k, _ = case.arrays
    policy = data.draw(policies(None))
    want = mask_of(case, policy, backend)
    order = np.array(data.draw(st.permutations(range(case.heads_kv))))
    grouped = q.reshape(case.batch, case.heads_kv, case.ratio, *q.shape[2:])[:, order]
    got = block_mask(grouped.reshape(q.shape), k[:, order], policy, backend, **case.options)
    heads = (order[:, None] * case.ratio + np.arange(case.ratio)).ravel()
    np.testing.assert_array_equal(got, want[:, heads])

    options = dict(case.options)
    if "seqlens_k" in options:
        options["seqlens_k"] = options["seqlens_k"][::-1]
    got = block_mask(q[::-1], k[::-1], policy, backend, **options)
    np.testing.assert_array_equal(got, want[::-1])


@given(st.data(), cases(), backends)
@examples(60)
def test_heads_and_sequences_are_mapped_on_their_own(data, case, backend):
    q, k, _ = case.arrays
    policy = data.draw(policies(case.heads))
    want = mask_of(case, policy, backend)

    def of_head(value, head):
        return value[head] if isinstance(value, tuple) else value

    names = [n for n in ("cdf_threshold", "keep", "sim_threshold") if hasattr(policy, n)]
    for b, h in np.ndindex(want.shape[:2]):
        options = dict(case.options)
        if "seqlens_k" in options:
            options["seqlens_k"] = options["seqlens_k"][b : b + 1]
        fields = {n: of_head(getattr(policy, n), h) for n in names}
        for n in ("sink_blocks", "local_blocks", "rule"):
            if hasattr(policy, n):
                fields[n] = getattr(policy, n)
        kv = h // case.ratio
        one_k = k[b : b + 1, kv : kv + 1]
        got = block_mask(q[b : b + 1, h : h + 1], one_k, type(policy)(**fields), backend, **options)
        np.testing.assert_array_equal(got[0, 0], want[b, h])


@given(seeds, st.sampled_from(POWERS), st.data(), backends)
@examples(60)
def test_adding_one_vector_to_all_keys_changes_nothing(seed, seqlen_k, data, backend):
    # Multiples of 1/8 over a power-of-two length: mean and shift are exact in float32.
    q, k, _ = tokens(seed, 1, 2, 2, 300, seqlen_k, 8, kind="grid")
    policy = data.draw(policies(2))
    shift = np.random.default_rng(seed).integers(-16, 17, (1, 2, 1, 8)).astype(np.float32)
    want = block_mask(q, k, policy, backend, causal=True)
    np.testing.assert_array_equal(block_mask(q, k + shift, policy, backend, causal=True), want)


@given(cases(kinds=("grid",), dims=(16, 40)), st.data(), backends)
@examples(60)
def test_the_dtype_and_where_the_scale_is_do_not_matter(case, data, backend):
    torch = pytest.importorskip("torch")
    q, k, _ = case.arrays
    policy = data.draw(policies(case.heads))
    want = mask_of(case, policy, backend)
    for dtype in (np.float16, np.float64):
        got = block_mask(q.astype(dtype), k.astype(dtype), policy, backend, **case.options)
        np.testing.assert_array_equal(got, want, str(dtype))
    half = [torch.from_numpy(x).to(torch.bfloat16) for x in (q, k)]
    got = block_mask(*half, policy, backend, **case.options)
    np.testing.assert_array_equal(got.numpy(), want, "bfloat16")
    scale = 2 * case.dim**-0.5
    got = block_mask(q / 2, k, policy, backend, sm_scale=scale, **case.options)
    np.testing.assert_array_equal(got, want, "scale doubled, q halved")


@given(cases(), st.integers(0, 515), st.data(), backends)
@examples(60)
def test_padding_is_the_same_as_shorter_arrays(case, length, data, backend):
    q, k, _ = case.arrays
    length = min(length, case.seqlen_k)
    policy = data.draw(policies(case.heads))
    options = {"causal": case.options["causal"], "causal_align": "top_left"}
    padded = block_mask(q, k, policy, backend, seqlens_k=[length] * case.batch, **options)
    want = block_mask(q, k[:, :, :length], policy, backend, **options)
    np.testing.assert_array_equal(padded[..., : want.shape[-1]], want)
    assert not padded[..., want.shape[-1] :].any()


# ---- the rules by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_k", [1, 2, 7, 16, 33])
def test_equal_scores_go_to_the_lowest_blocks(rng, backend, num_k):
    q = (1 + rng.standard_normal((1, 2, 515, 24))).astype(np.float32)
    same = np.full((1, 2, 64 * num_k, 24), 0.7, np.float32)
    repeated = np.tile(rng.standard_normal((1, 2, 64, 24)), (1, 1, num_k, 1)).astype(np.float32)
    for k in (same, repeated):
        for policy in (TopK(0.4), TopCdf(0.4, -1)):
            want = np.arange(num_k) < math.ceil(Fraction(2, 5) * num_k)
            mask = block_mask(q, k, policy, backend)
            np.testing.assert_array_equal(mask, np.broadcast_to(want, mask.shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("policy", "scale", "count"),
    [
        (TopCdf(0.59, -1), 1.0, 1),
        (TopCdf(0.61, -1), 1.0, 2),
        (TopCdf(0.98, -1), 1.0, 2),
        (TopCdf(0.995, -1), 1.0, 3),
        (TopCdf(0.59, -1, rule="within"), 1.0, 1),
        (TopCdf(0.98, -1, rule="within"), 1.0, 1),
        (TopCdf(0.995, -1, rule="within"), 1.0, 2),
        (TopCdf(0.70, -1), 2.0, 1),  # shares become squares: 0.703, 0.297, 0.0002
        (TopCdf(0.71, -1), 2.0, 2),
        (TopCdf(0.9999, -1), 2.0, 3),
        (TopCdf(0.9999, -1, rule="within"), 2.0, 2),
        (TopCdf(0.67, -1), 0.0, 3),  # and a third each
        (TopCdf(0.66, -1, rule="within"), 0.0, 1),
    ],
)
def test_shares_by_hand(backend, policy, scale, count):
    shares = np.array([0.39, 0.60, 0.01])
    k = np.repeat(np.log(shares), 64)[None, None, :, None].astype(np.float32)
    q = np.ones((1, 1, 128, 1), np.float32)
    mask = block_mask(q, k, policy, backend, sm_scale=scale)
    best_first = [0, 1, 2] if scale == 0 else [1, 0, 2]
    np.testing.assert_array_equal(np.flatnonzero(mask), sorted(best_first[:count]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_head_has_its_own_thresholds(rng, backend):
    q = np.repeat(rng.standard_normal((1, 4, 1, 16)), 128, axis=2).astype(np.float32)
    k = np.repeat(rng.standard_normal((1, 4, 8, 16)), 64, axis=2).astype(np.float32)

    def counts(policy):
        return block_mask(q, k, policy, backend).sum(axis=-1)[0, :, 0].tolist()

    assert counts(TopK([0.125, 0.5, 1.0, 0.26])) == [1, 4, 8, 3]
    assert counts(TopK(0.25, [-1, 1, 0.5, 1])) == [2, 8, 2, 8]
    assert counts(TopCdf([0, 1, 1, 0], -1)) == [1, 8, 8, 1]
    assert counts(TopCdf(0, (1, -1, 1, -1))) == [8, 1, 8, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_are_compared_after_their_mean_is_taken_off(rng, backend):
    q = np.ones((1, 1, 256, 64), np.float32)
    k = rng.standard_normal((1, 1, 512, 64)).astype(np.float32)
    assert block_mask(q, k + 10, TopK(0.25, 0.3), backend).all(), "alike only by their mean"


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_similarity_never_fixes_and_only_unlike_blocks_are_fixed(rng, backend):
    q, _ = clustered(rng, (1, 1, 512, 64), noise=0.1, centers=rng.standard_normal((1, 64)))
    k = np.repeat(rng.standard_normal((1, 1, 12, 64)), 64, axis=2).astype(np.float32)
    k[:, :, 64 * 5 : 64 * 6] = rng.standard_normal((64, 64))  # alike to nothing: about 1/64
    off = block_mask(q, k, TopK(0.25), backend)
    assert (off.sum(axis=-1) == 3).all()
    np.testing.assert_array_equal(block_mask(q, k, TopK(0.25, -1e-9), backend), off)
    fixed = block_mask(q, k, TopK(0.25, 0.3), backend)
    assert fixed[..., 5].all(), "a block of unlike keys is a column"
    np.testing.assert_array_equal(fixed.sum(axis=-1), 4)  # and comes on top of the share
    q[:, :, 128:256] = rng.standard_normal((128, 64))
    rows = block_mask(q, k, TopK(0.25, 0.3), backend)
    assert rows[:, :, 1].all(), "a block of unlike queries is a row"
    np.testing.assert_array_equal(rows[:, :, [0, 2, 3]], fixed[:, :, [0, 2, 3]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparsity_is_the_share_of_reachable_blocks_left_out(backend):
    case = Case(3, 2, 1, 2, 300, 515, options={"causal": True, "seqlens_k": [515, 200]})
    q, k, _ = case.arrays
    found = predict_block_map(q, k, policy=TopK(0.5), backend=backend, **case.options)
    reachable = np.broadcast_to(in_blocks(case.allowed), found.mask.shape)
    # Bottom right: rows 0-127, -255, -299 reach keys 342, 470, 514: 6, 8 and 9 blocks of 64, the
    # second sequence its 4. Of these 3, 4 and 5 are kept (the diagonal's 3, 3 and 1 among them).
    assert reachable[0, 0].sum() == 23
    assert found.mask.sum() == 2 * (3 + 4 + 5 + 3 * 2)
    assert found.sparsity == pytest.approx(1 - 36 / (2 * (23 + 12)))
    assert (found.seqlen_q, found.seqlen_k) == (300, 515)


def test_a_map_by_hand_counts_every_block():
    mask = np.zeros((1, 1, 3, 4), bool)
    mask[0, 0, 0, :3] = True
    found = cusparge.BlockMap.from_mask(mask, seqlen_q=300, seqlen_k=256)
    assert found.sparsity == 0.75


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align", ALIGNS)
def test_a_map_that_is_kept_gives_what_its_policy_gives(rng, backend, align):
    q, k, v = tokens(int(rng.integers(2**32)), 2, 4, 2, 300, 515, 40)
    options = {"causal": True, "causal_align": align, "seqlens_k": [515, 70], "backend": backend}
    for policy in (TopCdf(0.7, 0.1), TopK(0.4, local_blocks=2), TopK(0.4, quantize=True)):
        kept = predict_block_map(q, k, policy=policy, **options)
        assert 0 < kept.sparsity < 1
        want = cusparge.attention(
            q, k, v, policy=policy, return_lse=True, return_stats=True, **options
        )
        got = cusparge.attention(
            q,
            k,
            v,
            block_map=kept,
            policy=Dense(quantize=policy.quantize),
            return_lse=True,
            return_stats=True,
            **options,
        )
        assert_same_bits(got[0], want[0])
        assert_same_bits(got[1], want[1])
        assert got[2].sparsity == want[2].sparsity == pytest.approx(kept.sparsity)


# ---- the CPU against the oracle ------------------------------------------------------------------


@given(st.data(), cases(dims=(1, 8, 64, 128), kinds=("clustered", "gauss", "grid")))
@examples(150)
def test_the_cpu_chooses_what_the_oracle_chooses(data, case):
    policy = data.draw(policies(case.heads))
    got = mask_of(case, policy, "cpu")
    q, k, _ = (x.astype(np.float64) for x in case.arrays)
    want = reference.block_map(q, k, policy=policy, **case.options)
    if not (got == want).all():
        scores = reference.block_scores(q, k, policy=policy, **case.options)
        for b, h, i in np.argwhere((got != want).any(axis=-1)):
            rows = got[b, h, i], want[b, h, i]
            assert is_near_tie(scores, policy, b, h, i, *rows), (b, h, i, *rows)


def test_pairs_and_blocks_agree_on_a_case_done_by_hand():
    pairs = allowed_pairs(1, 130, 200, causal=True, causal_align="top_left", seqlens_k=[100])
    np.testing.assert_array_equal(
        in_blocks(pairs)[0, 0], [[True, True, False, False], [True, True, False, False]]
    )
