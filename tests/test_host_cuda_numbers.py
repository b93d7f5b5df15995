"""The emulation's conversions, arithmetic and exchanges against independent statements of them.

Exact rounding is found by search among all codes of a format in exact arithmetic, not by the bit
tricks that the runtime uses. NaN, infinities, ties, subnormals and the edges are always among the
inputs. Host-emulated: the device's approximations may differ by the ulps that the manual allows.
"""

import numpy as np
import pytest
from host_cuda import emu

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]

UNITS = emu.HERE / "kernels" / "units.cu"
NAMES = ["convert", "arithmetic", "exchange", "reduce", "copy", "add_one"]
schedules = pytest.mark.parametrize("schedule", emu.SCHEDULES)

CONVERTED = np.dtype(
    [(name, np.uint32) for name in ("f16x2", "bf16x2", "f16x2_of_e4m3x2", "s8x2")]
    + [(name, np.float32) for name in ("from_f16", "from_bf16", "from_e4m3")]
    + [("s32_of", np.int32)]
    + [(name, np.uint16) for name in ("f16", "bf16", "e4m3x2", "unused")]
)


@pytest.fixture(scope="module", autouse=True)
def built():
    emu.build(UNITS, *(f"units::{name}" for name in NAMES))


def values_of(exponent_bits, mantissa_bits, bias, finite):
    """Return the magnitude of every finite code, ascending, as exact float64."""
    codes = np.arange(finite)
    exponent, mantissa = codes >> mantissa_bits, codes & (1 << mantissa_bits) - 1
    normal = (mantissa / 2.0**mantissa_bits + 1) * 2.0 ** (exponent - bias)
    return np.where(exponent == 0, mantissa * 2.0 ** (1 - bias - mantissa_bits), normal)


F16 = values_of(5, 10, 15, 0x7C00)
BF16 = values_of(8, 7, 127, 0x7F80)
E4M3 = values_of(4, 3, 7, 0x7F)


def nearest(x, values, sign_bit, above, nan):
    """Return the codes of float32 numbers: nearest, ties to the even code.

    `above` is the code for what rounds beyond the largest value, where the next step would be.
    """
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the inputs
        magnitude = np.abs(x.astype(np.float64))
    extended = np.append(values, 2 * values[-1] - values[-2])
    upper = np.clip(np.searchsorted(extended, magnitude), 1, len(extended) - 1)
    below, over = magnitude - extended[upper - 1], extended[upper] - magnitude
    code = np.where((over < below) | ((over == below) & (upper % 2 == 0)), upper, upper - 1)
    code = np.where((magnitude > extended[-1]) | (code == len(values)), above, code)
    code = code | np.where(np.signbit(x), sign_bit, 0)
    return np.where(np.isnan(x), nan, code)


def interesting(rng):
    """Every code of the small formats, the midpoints between neighbours, and edges."""
    exact = np.concatenate([F16, (F16[1:] + F16[:-1]) / 2, E4M3, (E4M3[1:] + E4M3[:-1]) / 2])
    near = exact.astype(np.float32)
    near = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, 0)])
    bits = rng.integers(0, 2**32, 6000, dtype=np.uint32)
    bits[::3] &= np.uint32(0xFFFF8000)  # bf16 numbers and ties
    edges = [
        0,
        448,
        463.99,
        464,
        465,
        480,
        65504,
        65519.996,
        65520,
        1e9,
        3e38,
        2.0**31,
        2.0**31 - 128,
        2.0**-149,
        2.0**-10,
        2.0**-25,
        126.5,
        127.5,
        128.5,
        0.5,
        1.5,
        2.5,
        np.inf,
        np.nan,
    ]
    x = np.concatenate([near, bits.view(np.float32), np.float32(edges), -near, -np.float32(edges)])
    x = rng.permutation(x)
    return x[: len(x) // 2 * 2]


def test_conversions_round_to_nearest_even_and_know_nan_and_infinity(rng):
    x = interesting(rng)
    assert np.isnan(x).any()
    assert np.isinf(x).any()
    n = len(x) // 2
    out = np.zeros(n, CONVERTED)
    args = [emu.In(x), emu.Out(out.view(np.uint8)), np.uint32(n)]
    emu.launch(UNITS, "units::convert", -(-n // 256), 256, args)
    high, low = x[0::2], x[1::2]

    f16 = nearest(low, F16, 0x8000, 0x7C00, 0x7FFF)
    bf16 = nearest(low, BF16, 0x8000, 0x7F80, 0x7FFF)
    e4m3 = nearest(low, E4M3, 0x80, 0x7E, 0x7F)  # saturates
    np.testing.assert_array_equal(out["f16"], f16)
    np.testing.assert_array_equal(out["bf16"], bf16)
    np.testing.assert_array_equal(out["f16x2"] & 0xFFFF, f16)
    np.testing.assert_array_equal(out["f16x2"] >> 16, nearest(high, F16, 0x8000, 0x7C00, 0x7FFF))
    np.testing.assert_array_equal(out["bf16x2"] & 0xFFFF, bf16)
    np.testing.assert_array_equal(out["bf16x2"] >> 16, nearest(high, BF16, 0x8000, 0x7F80, 0x7FFF))
    np.testing.assert_array_equal(out["e4m3x2"] & 0xFF, e4m3)
    np.testing.assert_array_equal(out["e4m3x2"] >> 8, nearest(high, E4M3, 0x80, 0x7E, 0x7F))

    def decoded(code, values, sign_bit, infinity):
        magnitude = code & (sign_bit - 1)
        table = np.append(values, [infinity, np.nan])
        value = table[np.minimum(magnitude, len(values) + 1)]
        return np.where(code & sign_bit, -value, value).astype(np.float32)

    np.testing.assert_array_equal(out["from_f16"], decoded(f16, F16, 0x8000, np.inf))
    np.testing.assert_array_equal(out["from_bf16"], decoded(bf16, BF16, 0x8000, np.inf))
    np.testing.assert_array_equal(out["from_e4m3"], decoded(e4m3, E4M3, 0x80, np.nan))
    pair = out["f16x2_of_e4m3x2"] & 0xFFFF
    np.testing.assert_array_equal(pair.astype(np.uint16).view(np.float16), out["from_e4m3"])
    for column in ("from_f16", "from_bf16", "from_e4m3"):  # signs of zeros too
        known = ~np.isnan(low)
        np.testing.assert_array_equal(np.signbit(out[column])[known], np.signbit(low)[known])

    def whole(values):
        with np.errstate(invalid="ignore"):
            clipped = np.clip(np.rint(values.astype(np.float64)), -(2**31), 2**31 - 1)
        return np.where(np.isnan(values), 0, clipped).astype(np.int64)

    np.testing.assert_array_equal(out["s32_of"], whole(low))
    packed = (np.clip(whole(low), -128, 127) & 255) | (np.clip(whole(high), -128, 127) & 255) << 8
    np.testing.assert_array_equal(out["s8x2"], packed | 0x1234 << 16)


def test_arithmetic(rng):
    x = interesting(rng)
    n = len(x) // 2
    out = np.zeros((n, 8), np.float32)
    args = [emu.In(x), emu.Out(out), np.uint32(n)]
    emu.launch(UNITS, "units::arithmetic", -(-n // 256), 256, args)
    a, b = x[0::2], x[1::2]

    def flushed(values):
        small = np.abs(values) < np.finfo(np.float32).tiny
        return np.where(small, np.copysign(np.zeros_like(values), values), values)

    with np.errstate(all="ignore"):
        v = flushed(a).astype(np.float64)
        expected = [1 / v, 1 / np.sqrt(v), np.exp2(v), np.log2(v)]
        for column, values in enumerate(expected):  # one rounding; the results are flushed as well
            want = flushed(values.astype(np.float32))
            np.testing.assert_allclose(out[:, column], want, rtol=2.0**-23, atol=0)
        np.testing.assert_array_equal(out[:, 4], np.sqrt(a))
        np.testing.assert_array_equal(out[:, 5], a / b)
        for column, choose in ((6, np.maximum), (7, np.minimum)):
            want = np.where(np.isnan(a), b, np.where(np.isnan(b), a, choose(a, b)))
            np.testing.assert_array_equal(out[:, column], want)


@schedules
def test_exchange_inside_warps(schedule, rng):
    x = rng.integers(0, 2**32, 128, dtype=np.uint32)
    x[40] &= ~np.uint32(0xFF)  # warp 1: any
    x[64:96] |= np.uint32(2)  # warp 2: all
    x[100] = 0x3301  # warp 3: neither
    x[96:] |= np.uint32(1)
    out = np.zeros((128, 10), np.uint32)
    emu.launch(UNITS, "units::exchange", 1, 128, [emu.In(x), emu.Out(out)], schedule=schedule)
    lane = np.arange(32)
    for w, warp in enumerate(x.reshape(4, 32)):
        got = out[32 * w : 32 * w + 32].T
        low = warp & 0xFF
        np.testing.assert_array_equal(got[0], warp[lane ^ 5])
        np.testing.assert_array_equal(got[1], warp[(lane + 3) % 32])
        np.testing.assert_array_equal(got[2], warp[np.where(lane < 25, lane + 7, lane)])
        np.testing.assert_array_equal(got[3], warp[np.where(lane >= 7, lane - 7, lane)])
        assert (got[4] == sum(int(v & 1) << i for i, v in enumerate(warp))).all()
        assert (got[5] == (2 if (low == 0).any() else 1 if (low != 1).all() else 0)).all()
        assert (got[6] == warp.sum(dtype=np.uint32)).all()
        assert (got[7] == warp.min() ^ warp.max()).all()
        assert (got[8] == warp.view(np.int32).max().view(np.uint32)).all()
        both = np.stack([warp, ~warp], axis=1).view(np.uint8).reshape(32, 8)
        spread = np.where(both[:, 4] & 0x80, 255, 0).astype(np.uint8)  # nibble 0xc of 0x3c51
        chosen = np.stack([both[:, 1], both[:, 5], spread, both[:, 3]], axis=1)
        word = np.ascontiguousarray(chosen).view(np.uint32)[:, 0]
        np.testing.assert_array_equal(got[9], word ^ np.bitwise_or.reduce(warp))


@schedules
def test_named_barriers_and_atomics(schedule, rng):
    x = rng.integers(0, 2**20, (3, 128)).astype(np.uint32)
    x[1, :64] &= ~np.uint32(1)  # no odd number in this half
    out, total = np.zeros((3, 128), np.uint32), np.array([5], np.uint32)
    args = [emu.In(x), emu.Out(out), emu.InOut(total)]
    emu.launch(
        UNITS,
        "units::reduce",
        3,
        128,
        args,
        smem_bytes=4,
        schedule=schedule,
        seed=int(rng.integers(2**32)),
    )
    odd = (x & 1).reshape(3, 2, 64).any(axis=2).repeat(64, axis=1)
    np.testing.assert_array_equal(out, 2 * x.sum(axis=1, keepdims=True) + odd)
    assert total == 5 + x.sum()
