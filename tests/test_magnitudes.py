"""Finite values at the ends of each dtype: large, small, loud and constant ones."""

import numpy as np
import pytest
from compare import assert_close, bits, plain_attention

from cusparge import Dense, TopCdf, TopK, attention

SEQLEN_Q, SEQLEN_K = 200, 270
POLICIES = {
    "dense": Dense(),
    "stage 2": Dense(pv_threshold=3.0),
    "quantized": Dense(quantize=True),
    "quantized, stage 2": Dense(quantize=True, pv_threshold=3.0),
    "cdf of 1": TopCdf(1.0),
    "cdf": TopCdf(0.7),
    "topk": TopK(0.3),
    "cdf, quantized": TopCdf(0.7, quantize=True),
    "topk, stage 2": TopK(0.5, pv_threshold=2.0),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def make(rng, seqlen_k=SEQLEN_K, dim=16):
    """Gaussian tokens of no more than 4, two batches, grouped queries."""
    sizes = {"q": (4, SEQLEN_Q), "k": (2, seqlen_k), "v": (2, seqlen_k)}
    return {
        name: rng.standard_normal((2, *size, dim), np.float32).clip(-4, 4)
        for name, size in sizes.items()
    }


MAGNITUDES = {
    # dtype, q, k, v, sm_scale
    "large q": ("f4", 1e30, 1, 1, None),
    "large k": ("f4", 1, 1e30, 1, None),
    "large all": ("f4", 1e30, 1e30, 1e30, None),
    "ends of float32": ("f4", 3e37, 3e37, 8e37, None),
    "squares overflow": ("f4", 1e19, 1e19, 1, None),
    "tiny all": ("f4", 1e-30, 1e-30, 1e-30, None),
    "tiny and large": ("f4", 1e-30, 1e30, 1e-30, None),
    "large v": ("f4", 1, 1, 1e30, None),
    "scale beyond float32": ("f4", 1e-30, 1, 1, 1e39),
    "nothing times a huge scale": ("f4", 0, 1, 1, 1e300),
    "tiny scale": ("f4", 1e15, 1e15, 1, 1e-46),
    "float64, large v": ("f8", 1, 1, 1e200, None),
    "float64, large q": ("f8", 1e200, 1, 1, None),
    "float64, large and tiny": ("f8", 1e200, 1e-200, 1, None),
    "float64, tiny scale": ("f8", 1e200, 1e100, 1, 1e-300),
    "float64, tiny and a huge scale": ("f8", 1e-200, 1, 1, 1e200),
    "float64, tiny v": ("f8", 1, 1, 1e-200, None),
}


def of_magnitude(rng, case):
    dtype, *factors, sm_scale = MAGNITUDES[case]
    arrays = make(rng, dim=8)
    for name, factor in zip("qkv", factors, strict=True):
        arrays[name] = (arrays[name].astype(float) * factor).astype(dtype)
    return arrays, sm_scale


@pytest.mark.parametrize("case", MAGNITUDES)
@pytest.mark.parametrize("policy", [Dense(), TopCdf(), Dense(40.0)])
def test_magnitudes(rng, case, policy):
    arrays, sm_scale = of_magnitude(rng, case)
    want, want_lse = plain_attention(**arrays, scale=sm_scale)
    out, lse = attention(**arrays, policy=policy, sm_scale=sm_scale, return_lse=True)
    # Gaussian tokens make every block a fix block, so TopCdf computes all. Scores stay below 30 or
    # are so far apart that one key takes all: float32's 2^-24 · 30, twice, and a sum's rounding.
    assert_close(out, want, atol=1e-5 * max(abs(arrays["v"]).max(), 1e-300))
    with np.errstate(over="ignore"):
        assert_close(lse, want_lse.astype(np.float32), atol=1e-5, rtol=1e-6)


@every_policy
@pytest.mark.parametrize("case", MAGNITUDES)
def test_finite_inputs_give_finite_outputs(rng, case, policy):
    arrays, sm_scale = of_magnitude(rng, case)
    out, lse = attention(**arrays, policy=policy, sm_scale=sm_scale, causal=True, return_lse=True)
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    # No result is larger than a mean of values can be; e4m3 codes round by up to 1/16.
    slack = 1 + 1e-5 if policy.quantize is None else 1 + 2.0**-4
    assert abs(out).max() <= slack * abs(arrays["v"]).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("policy", [Dense(), TopCdf(), Dense(quantize=True), Dense(5.0)])
def test_the_ends_of_the_half_precisions(rng, torch, dtype, policy):
    kind = getattr(torch, dtype)
    largest = torch.finfo(kind).max
    q, k, v = (torch.from_numpy(x) for x in make(rng).values())
    # Scores beyond the dtype's range: one key takes all of each row.
    loud = [(x.clamp(-3, 3) * (largest / 4)).to(kind) for x in (q, k)]
    value = torch.where(v > 0, largest, -largest).to(kind)
    out, lse = attention(*loud, value, policy=policy, return_lse=True)
    assert torch.isfinite(out).all()
    assert not torch.isnan(lse).any()
    if policy.quantize is None:
        want, _ = plain_attention(*loud, value)
        assert_close(out, want, atol=1e-2 * largest)
    # Constant values are their own mean, up to the last one.
    value = torch.full_like(value, largest)
    out = attention(q.to(kind), k.to(kind), value, policy=policy)
    assert (out == largest).all()


@every_policy
def test_a_needle_is_found(rng, policy):
    """One key that all rows look for, in a block of keys that all look away."""
    arrays = make(rng, dim=64, seqlen_k=700)
    direction = rng.standard_normal(64).astype(np.float32)
    direction /= np.linalg.norm(direction)
    arrays["q"] = (arrays["q"] * 0.1 + 30 * direction).astype(np.float32)
    arrays["k"] *= 0.1
    at = int(rng.integers(700))
    arrays["k"][:, :, at // 64 * 64 : at // 64 * 64 + 64] += 5 * direction
    arrays["k"][:, :, at] += 40 * direction
    want = np.repeat(arrays["v"][:, :, at : at + 1], 2, axis=1)
    out = attention(**arrays, policy=policy)
    # Other keys weigh exp(-40 · 30 / 8) at most. e4m3 has four significant bits.
    assert_close(
        out,
        np.broadcast_to(want, out.shape),
        rtol=1e-6 if not policy.quantize else 0.07,
        atol=0 if not policy.quantize else 0.05,
    )


@every_policy
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_constant_inputs(policy, value):
    x = np.full((1, 2, 300, 16), value, np.float32)
    out, lse = attention(x, x, x, policy=policy, return_lse=True)
    assert_close(out, x, rtol=2e-6 if not policy.quantize else 0.07)
    if isinstance(policy, Dense) and policy.quantize is None:
        assert_close(lse, np.full(lse.shape, 4 * value * value + np.log(300)), rtol=1e-6)


@every_policy
def test_the_sign_of_the_scale_is_the_sign_of_q(rng, policy):
    arrays = make(rng)
    got = attention(**arrays, policy=policy, sm_scale=-0.3, return_lse=True)
    want = attention(**arrays | {"q": -arrays["q"]}, policy=policy, sm_scale=0.3, return_lse=True)
    assert_close(got[0], want[0], atol=1e-6)
    assert_close(got[1], want[1], atol=1e-6)
    if isinstance(policy, Dense) and policy.quantize is None:
        plain, _ = plain_attention(**arrays, scale=-0.3)
        assert_close(got[0], plain, atol=1e-5)


def test_a_scale_of_zero_is_the_mean(rng):
    arrays = make(rng)
    out, lse = attention(**arrays, policy=Dense(), sm_scale=0, causal=True, return_lse=True)
    counts = np.arange(SEQLEN_Q) + 1 + SEQLEN_K - SEQLEN_Q
    means = arrays["v"].astype(float).cumsum(2)[:, :, counts - 1] / counts[:, None]
    assert_close(out, np.repeat(means, 2, axis=1), atol=1e-6)
    assert_close(lse, np.broadcast_to(np.log(counts), lse.shape), atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_two_halves_of_the_keys_merge_through_lse(rng, offset):
    arrays = make(rng, seqlen_k=400)
    arrays["k"] += offset * rng.standard_normal(16).astype(np.float32)
    cut = int(rng.integers(1, 400))
    whole, whole_lse = attention(**arrays, policy=Dense(), return_lse=True)
    parts = []
    for half in (np.s_[:, :, :cut], np.s_[:, :, cut:]):
        part = arrays | {"k": arrays["k"][half], "v": arrays["v"][half]}
        parts.append(attention(**part, policy=Dense(), return_lse=True))
    lse = np.logaddexp(parts[0][1].astype(float), parts[1][1])
    out = sum(o * np.exp(part_lse - lse)[..., None] for o, part_lse in parts)
    # float32 in scores of up to 4 · 10 · 4: 160 · 2^-24, twice.
    assert_close(lse, whole_lse, atol=4e-5)
    assert_close(out, whole, atol=1e-4)
    assert (bits(parts[0][0]) != bits(parts[1][0])).any()
