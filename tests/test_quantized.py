"""Quantized attention on the CPU: its number formats, the oracle's rules, and what they cost."""

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, plain_attention, relative_l1, visible
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, examples, policies, tokens, without_ties

import cusparge
from cusparge import Dense, TopCdf, TopK, attention, predict_block_map, reference
from cusparge._cpu.rounding import int8_round_trip, power_of_two_scale, round_e4m3

#: Every e4m3 magnitude: eight subnormals of 2^-9, then eight numbers in each binade up to 448.
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)


# ---- number formats ------------------------------------------------------------------------------


def rounded(values):
    values = np.array(values, np.float32)
    round_e4m3(values)
    return values


def test_every_e4m3_number_is_kept_and_every_tie_goes_to_the_even_code():
    for sign in (1, -1):
        np.testing.assert_array_equal(rounded(sign * E4M3), sign * E4M3)
        middle = (E4M3[:-1] + E4M3[1:]) / 2  # exact in float32
        even = np.where(np.arange(middle.size) % 2 == 0, E4M3[:-1], E4M3[1:])
        np.testing.assert_array_equal(rounded(sign * middle), sign * even)
        single = middle.astype(np.float32)
        np.testing.assert_array_equal(
            rounded(sign * np.nextafter(single, np.float32(0))), sign * E4M3[:-1]
        )
        np.testing.assert_array_equal(
            rounded(sign * np.nextafter(single, np.float32(500))), sign * E4M3[1:]
        )


def test_e4m3_is_that_of_torch(rng):
    torch = pytest.importorskip("torch")
    # All float32 whose lower 13 bits are 0 (more than e4m3 and its ties need), and random ones.
    every = (np.arange(2**19, dtype=np.uint32) << 13).view(np.float32)
    every = every[np.abs(every) <= 448]  # NaN fails too
    drawn = np.ldexp(rng.uniform(-1, 1, 200_000), rng.integers(-20, 9, 200_000))
    for values in (every, drawn.astype(np.float32)):
        want = torch.from_numpy(values).to(torch.float8_e4m3fn).to(torch.float32).numpy()
        np.testing.assert_array_equal(rounded(values), want)


def test_int8_codes_round_to_nearest_within_one_step_at_ties(rng):
    for dtype in (np.float32, np.float64):
        # Every quarter of a code, in groups whose largest value is 127 codes of a scale.
        steps = np.arange(-127 * 4, 127 * 4 + 1) / 4
        scale = np.ldexp(rng.uniform(0.5, 1, (50, 1)), rng.integers(-60, 60, (50, 1)))
        values = (steps * scale).astype(dtype)
        got = values.copy()
        int8_round_trip(got, axes=(1,))
        largest = np.abs(values).max(axis=1, keepdims=True).astype(np.float64)
        codes = got / largest * 127
        np.testing.assert_allclose(codes, np.rint(codes), rtol=0, atol=1e-4)
        exact = values.astype(np.float64) / largest * 127
        assert (np.abs(codes - exact) <= 0.5 + 1e-4).all()
        assert np.abs(np.rint(codes)).max() == 127


def test_int8_halves_round_away_from_zero_and_zeros_stay():
    values = np.array([[127.0, 0.5, 1.5, -0.5, -2.5, 0.49, 0.0]], np.float32)
    int8_round_trip(values, axes=(1,))
    np.testing.assert_array_equal(values, [[127, 1, 2, -1, -3, 0, 0]])
    zeros = np.zeros((3, 16, 4), np.float32)
    int8_round_trip(zeros, axes=(1, 2))
    assert (zeros == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scales_are_the_least_powers_of_two_that_hold_the_largest_value(rng, dtype):
    drawn = np.ldexp(rng.uniform(0.5, 1, 2000), rng.integers(-80, 80, 2000)).astype(dtype)
    exact = (448 * 2.0 ** np.arange(-60, 60)).astype(dtype)
    above, below = (np.nextafter(exact, dtype(x)) for x in (np.inf, 0))
    for largest in (drawn, exact, above, below):
        scale = power_of_two_scale(largest).astype(np.float64)
        assert (np.frexp(scale)[0] == 0.5).all()
        assert (largest <= 448 * scale).all()
        assert (largest > 224 * scale).all()
    np.testing.assert_array_equal(power_of_two_scale(np.zeros(3, dtype)), 1)


# ---- against the oracle --------------------------------------------------------------------------


def both(q, k, v, policy, **options):
    if "block_map" not in options:
        options = without_ties(q, k, policy, options)
    options |= {"policy": policy, "return_lse": True, "return_stats": True}
    before = [x.copy() for x in (q, k, v)]
    got = attention(q, k, v, backend="cpu", **options)
    for x, given_x in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(x, given_x, "an input was written to")
    arrays = (x.astype(np.float64) for x in (q, k, v))
    return got, reference.attention(*arrays, stage2_rows=128, **options)


def assert_emulates(got, want, slack=1.0):
    """Compare with the same rules in float64: ten times tighter than the rules' own error.

    float32 differs in its last bits, so that now and then (1 in 100,000 times) what lies near the
    middle of two codes falls to the other one. For a weight it is 1/16 of it, in one row.
    """
    error = relative_l1(got[0], want[0])
    assert error <= 3e-3 * slack, error
    assert_close(got[1], want[1], atol=1 / 16)
    live = np.isfinite(want[1])
    off = np.abs(got[1][live] - want[1][live])
    assert off.sum() <= 3e-4 * slack * off.size, "lse is off on average"
    assert got[2].qk_sparsity == pytest.approx(want[2].qk_sparsity, abs=1e-12)


def is_near_a_tie(q, k, lengths):
    """Tell whether some element of Q or K lies between two int8 codes, as far as float32 can see.

    The other code moves a key's scores, and where that key is a row's maximum, all P of the row:
    their rounding errors are drawn anew.
    """

    def near(x, largest):
        codes = np.abs(x) / np.where(largest > 0, largest, 1) * 127
        return (np.abs(codes % 1 - 0.5) < 3e-5).any()

    for k_of_one, length in zip(k.astype(np.float64), lengths, strict=True):
        centred = k_of_one[:, :length] - k_of_one[:, :length].sum(axis=1, keepdims=True) / (
            length or 1
        )
        for start in range(0, length, 16):
            group = centred[:, start : start + 16]
            if near(group, np.abs(group).max(axis=(1, 2), keepdims=True)):
                return True
    return near(q.astype(np.float64), np.abs(q).max(axis=-1, keepdims=True).astype(np.float64))


@given(st.data(), cases(dims=(8, 40, 64)))
@examples(40)
def test_any_mixture_of_options_emulates_the_oracle(data, case):
    policy = data.draw(policies(case.heads, quantize=True))
    q, k, v = case.arrays
    got, want = both(q, k, v, policy, **case.options)
    # Where a row sees few keys, or few rows are summed, one such event is no longer averaged out.
    assert_close(got[0], want[0], atol=np.abs(v).max() / 16)
    assert_close(got[1], want[1], atol=1 / 16)
    many = (case.allowed.sum(axis=-1) > 16) & (case.allowed.sum() > 2000)
    rows = np.broadcast_to(many, got[1].shape)
    few = [
        (out * rows[..., None], np.where(rows, lse, 0), stats) for out, lse, stats in (got, want)
    ]
    near = is_near_a_tie(q, k, case.options.get("seqlens_k", [case.seqlen_k] * case.batch))
    assert_emulates(*few, slack=10.0 if near else 1.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        Dense(pv_threshold=3.0, quantize=True),
        TopK(0.5, pv_threshold=2.0, quantize=True),
        TopCdf(0.8, 0.1, pv_threshold=1.0, quantize=True),
        TopCdf(0.5, -1, quantize=True),
    ],
)
def test_stage_2_and_the_order_of_tiles_emulate_the_oracle(rng, causal, policy):
    # More than 16 chosen blocks, so that several steps of 1,024 keys are taken.
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 1, 200, 2500, 64)
    got, want = both(q, k, v, policy, causal=causal)
    assert_emulates(got, want)
    # One of 2 * 2 * 40 tiles may fall to the other side of the threshold by rounding.
    assert got[2].pv_sparsity == pytest.approx(want[2].pv_sparsity, abs=2 / 160)


def test_a_kept_map_in_halves_emulates_the_oracle(rng):
    q, k, v = tokens(int(rng.integers(2**32)), 1, 2, 1, 300, 515, 64)
    mask = rng.random((1, 2, 5, 9)) < 0.5
    kept = cusparge.BlockMap.from_mask(mask, seqlen_q=300, seqlen_k=515, block_q=64)
    options = {"block_map": kept, "causal": True, "seqlens_k": [500]}
    assert_emulates(*both(q, k, v, Dense(quantize=True), **options))


# ---- against float64 -----------------------------------------------------------------------------


def family(rng, name, seqlen=1024, dim=64):
    q, k, v = rng.standard_normal((3, 1, 1, seqlen, dim))
    if name == "K bias":
        k += 4 * rng.standard_normal((1, 1, 1, dim))
    if name == "token outliers":
        q[:, :, ::37] *= 5
        k[:, :, ::53] *= 5
    if name == "loud V tail":
        v *= np.exp(rng.standard_normal(v.shape))
    if name == "V bias":
        v += 5 * rng.standard_normal((1, 1, 1, dim))
    if name == "structured":
        phase = np.linspace(0, 2 * np.pi, seqlen)[:, None] + rng.uniform(0, 6, dim)
        v = 1 + np.sin(phase)[None, None]
        k = 2 * np.cos(phase * np.arange(1, dim + 1) / 16)[None, None]
        q = k + 0.1 * rng.standard_normal(k.shape)
    return tuple(x.astype(np.float32) for x in (q, k, v))


FAMILIES = [
    ("gaussian", 0.05),
    ("K bias", 0.05),
    ("token outliers", 0.05),
    ("loud V tail", 0.05),
    ("V bias", 0.005),
    ("structured", 0.012),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "bound"), FAMILIES)
def test_the_error_of_quantization_stays_within_its_known_bounds(rng, name, bound, causal):
    q, k, v = family(rng, name)
    out, lse = attention(q, k, v, policy=Dense(quantize=True), causal=causal, return_lse=True)
    want = plain_attention(q, k, v, seen=visible(1024, 1024, causal=causal))
    error = relative_l1(out, want[0])
    assert error <= bound, error
    cosine = (out * want[0]).sum() / np.sqrt((out**2).sum() * (want[0] ** 2).sum())
    assert cosine >= 0.998, cosine
    # Scores of 75 between two outliers are known to 1/254 of the largest key element.
    assert_close(lse, want[1], atol=1.0 if name == "token outliers" else 0.05)
    assert relative_l1(out, want[0]) > 1e-5, "not quantized at all"


def test_enormous_bfloat16_values_stay_finite(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in family(rng, "gaussian", 300))
    arrays = [x.to(torch.bfloat16) for x in (q, k, 1e5 * v)]
    out = attention(*arrays, policy=Dense(quantize=True))
    assert out.dtype == torch.bfloat16
    want, _ = plain_attention(*arrays)
    assert relative_l1(out, want) <= 0.05  # NaN and infinity fail


@pytest.mark.parametrize("size", [1e-43, 1e-38, 1e-20, 1e20, 3e38])
def test_values_of_any_size_stay_finite(rng, size):
    q, k, _ = family(rng, "gaussian", 200)
    v = (size * rng.uniform(0.5, 1, q.shape)).astype(np.float32)
    out = attention(q, k, v, policy=Dense(quantize=True))
    want, _ = plain_attention(q, k, v)
    # Subnormal float32 values have few digits of their own; the smallest is 1.4e-45.
    assert_close(out, want, atol=2e-45, rtol=0.07)


@pytest.mark.parametrize("size", [1e-43, 1e-30, 1e-10, 1e10])
def test_queries_and_keys_of_any_size_stay_finite(rng, size):
    q, k, v = family(rng, "gaussian", 200)
    scaled = [(size * q).astype(np.float32), k / np.float32(max(size, 1e-30))]
    out = attention(scaled[0], k, v, policy=Dense(quantize=True))
    assert np.isfinite(out).all()
    out = attention(q, scaled[1], v, policy=Dense(quantize=True), sm_scale=max(size, 1e-30) / 8)
    assert relative_l1(out, plain_attention(q, k, v)[0]) <= 0.06


# ---- determinism, what quantize means ------------------------------------------------------------


@pytest.mark.parametrize("policy", [Dense(quantize=True), TopK(0.5, 0.3, 1.0, quantize=True)])
def test_repetition_gives_the_same_bits(seed, policy):
    arrays = tokens(seed, 2, 4, 2, 515, 515, 40)
    first = attention(*arrays, policy=policy, causal=True, return_lse=True)
    again = attention(*(x.copy() for x in arrays), policy=policy, causal=True, return_lse=True)
    for one, other in zip(first, again, strict=True):
        assert_same_bits(one, other)


def test_only_true_quantizes_on_the_cpu(seed):
    arrays = tokens(seed, 1, 2, 2, 300, 300, 40)
    want = attention(*arrays, policy=TopK(0.5, quantize=False))
    assert_same_bits(attention(*arrays, policy=TopK(0.5)), want)
    quantized = attention(*arrays, policy=TopK(0.5, quantize=True))
    assert 1e-3 < relative_l1(quantized, want) < 0.05


def test_quantization_changes_no_map(seed):
    q, k, _ = tokens(seed, 1, 2, 2, 300, 515, 40)
    plain = predict_block_map(q, k, policy=TopCdf(0.7, 0.1)).mask
    quantized = predict_block_map(q, k, policy=TopCdf(0.7, 0.1, quantize=True)).mask
    np.testing.assert_array_equal(plain, quantized)
