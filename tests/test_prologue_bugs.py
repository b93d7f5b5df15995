"""The checks of the prologue kernels can fail: planted mistakes are seen (host-emulated)."""

import functools

import numpy as np
import pool_cases
import prologue_oracle
import pytest
from host_cuda import emu
from planted import Mistake, Planted
from prologue_cases import Case
from prologue_emulation import build, emulate
from test_prologue_kernel import variants_of

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]

BAD = (pool_cases.non_finite,) * 3
TINY = (pool_cases.tiny,) * 3
HUGE = (pool_cases.huge,) * 3

# Three kernels for them all: every mistake in a format has its case in the one that has it.
E4M3 = functools.partial(Case, "bfloat16", "sm_90a", head_dim=64)
F16 = functools.partial(Case, "float16", "sm_80", head_dim=40)
F32 = functools.partial(Case, "float32", "sm_89", head_dim=64)


def nan_payload(rng, shape, dtype):
    """NaN whose lowest byte is not zero: what a GPU makes of any NaN, and the host of these."""
    x = pool_cases.normal(rng, shape, dtype)
    x[..., 5, 3] = np.array(0x7FC00055, np.uint32).view(np.float32).astype(np.float64)
    return x


def two_bad_keys(rng, shape, dtype):
    """Two bad keys of one block, which the same thread reads one after the other."""
    x = pool_cases.normal(rng, shape, dtype)
    x[..., [3, 7], 9] = np.inf
    return x


PLAIN = E4M3()
OF_TWO_BAD = E4M3(fills=(pool_cases.normal, two_bad_keys, pool_cases.normal))
OF_PAYLOAD = F32(fills=(nan_payload,) * 3)
PAIR = E4M3(batch=2, heads=(4, 2))
LONG = E4M3(heads=(1, 1), tokens=(3, 1500))
LENGTHS = E4M3(batch=3, tokens=(5, 150), lengths=(70, 0, 130))
TOO_LONG = E4M3(lengths=(99,))
OF_BAD = E4M3(tokens=(200, 200), fills=(pool_cases.non_finite,) * 3)
OF_TINY = E4M3(fills=(pool_cases.tiny,) * 3)
OF_PEAK = F32(fills=(pool_cases.peak,) * 3, tokens=(3, 133))
NEGATIVE = E4M3(sm_scale=-0.5)
FAR = E4M3(tokens=(2, 3), batch=2, heads=(2, 2), layout="far")

PACKED = functools.partial(E4M3, layout="NHD", tokens=(200, 230))
SOME = PACKED(packed=((0, 70, 70, 71, 199, 200), (0, 65, 129, 129, 130, 230)))
FALLING = PACKED(packed=((3, 90, 40, -5, 260), (0, 160, 20, 200, 230)))
EMPTY = PACKED(packed=((0, 9, 9, 20), (0, 0, 70, 70)))
MANY = PACKED(heads=(1, 1), packed=(tuple(range(0, 196, 4)), tuple(range(0, 196, 4))))

SYNC = "ptx::sync_block();"
NOTHING = ";"

MISTAKES = {
    # tiles
    "no swizzle": Mistake(
        "tiles.cuh", "linear ^ ((linear >> 7 & (row_bytes / 16 - 1)) << 4)", "linear", PLAIN
    ),
    "the swizzle of another width": Mistake("tiles.cuh", "linear >> 7", "linear >> 6", PLAIN),
    "rows of core matrices swapped": Mistake(
        "tiles.cuh", "row % 8 * 16", "(row ^ 1) % 8 * 16", F16()
    ),
    "core matrices of another row size": Mistake(
        "tiles.cuh", "row / 8 * (8 * row_bytes)", "row / 8 * (8 * row_bytes - 128)", F16()
    ),
    "V's tokens are in their order": Mistake(
        "tiles.cuh", "position - p + p / 4 * 2 + p % 2 + p / 2 % 2 * 8", "position", PLAIN
    ),
    "bytes are transposed wrongly": Mistake("quantize.cuh", "0x7632", "0x5432", PLAIN),
    "no row of ones": Mistake("prologue.cu", "row == 0 ? 0x38383838u : 0u", "0u", PLAIN),
    "the last of V's channels are left": Mistake(
        "prologue.cu",
        "item < kTileTokens / 16 * quads",
        "item < 15 * kTileTokens / 256 * quads",
        PLAIN,
    ),
    # codes and scales
    "codes end at 126": Mistake(
        "quantize.cuh",
        "kInt8Max * ptx::rcp_approx(largest * up)",
        "126.0f * ptx::rcp_approx(largest * up)",
        PLAIN,
    ),
    "codes change places": Mistake(
        "quantize.cuh",
        "ptx::prmt(bits[0], bits[1], 0x0040)",
        "ptx::prmt(bits[1], bits[0], 0x0040)",
        PLAIN,
    ),
    "tiny groups overflow": Mistake(
        "quantize.cuh", "largest < 0x1p-100f ? 0x1p100f : 1.0f", "1.0f", OF_TINY
    ),
    "the scale of a query without log2 e": Mistake(
        "prologue.cu", "magnitude(out.factor)", "magnitude(out.sm_scale) / 127.0f", PLAIN
    ),
    "a query's scale is negative": Mistake(
        "prologue.cu",
        "largest * kScale",
        "largest * (out.factor < 0.0f ? -kScale : kScale)",
        NEGATIVE,
    ),
    "the sign of the scale is lost": Mistake(
        "prologue.cu", "out.factor < 0.0f ? -int8.factor : int8.factor", "int8.factor", NEGATIVE
    ),
    "a scale for part of a group": Mistake(
        "prologue.cu", "lanes_max<32>(largest)", "lanes_max<Tile::kLanes>(largest)", PLAIN
    ),
    "the scale of another group": Mistake(
        "prologue.cu", "place.slot / Tile::kWarpSlots", "(place.slot / Tile::kWarpSlots ^ 1)", PLAIN
    ),
    "V's scale is twice the least": Mistake(
        "quantize.cuh",
        "static_cast<u32>(127 - exponent) << 23",
        "static_cast<u32>(126 - exponent) << 23",
        PLAIN,
    ),
    "V's scale is too small": Mistake(
        "quantize.cuh", "bits_of_float(largest) + kCarry", "bits_of_float(largest)", PAIR
    ),
    "V's scale has no end": Mistake("quantize.cuh", "exponent < -127", "false", OF_TINY),
    "the inverse of V's scale": Mistake(
        "prologue.cu", "inverse_power(s_inverse[channel])", "s_inverse[channel]", PLAIN
    ),
    "keys are quantized as they are": Mistake(
        "prologue.cu", "ptx::fma(y[c], unit, offset[c])", "y[c] * unit", PLAIN
    ),
    # edges
    "a token too many is quantized": Mistake(
        "prologue.cu", "token < count ? int8.factor : 0.0f", "int8.factor", PLAIN
    ),
    "a token too many is pooled": Mistake(
        "prologue.cu",
        "first + i * Tile::kWarpSlots < count",
        "first + i * Tile::kWarpSlots <= count",
        PLAIN,
    ),
    "infinities stay in K": Mistake(
        "prologue.cu", "is_finite(y[c]) ? y[c] : 0.0f", "y[c]", OF_PAYLOAD
    ),
    "a bad element of K is minus the mean": Mistake(
        "pooling.cuh", "mean[c] = 0.0f;", NOTHING, OF_BAD, "mean[c] = 0.0f;  // y is"
    ),
    "infinities stay in V": Mistake("quantize.cuh", "(carries & ~kRest) != 0", "false", OF_BAD),
    "bad keys are not told": Mistake("prologue.cu", "ptx::redux_min(bad)", "kNoBadKey", OF_BAD),
    "bad keys of one warp are told": Mistake(
        "prologue.cu", "s_bad[warp] < bad ? s_bad[warp] : bad", "bad", OF_BAD
    ),
    "the last bad key of K is told": Mistake(
        "prologue.cu", "is_bad && static_cast<u32>(token) < bad", "is_bad", OF_TWO_BAD
    ),
    "a bad query has a scale": Mistake(
        "prologue.cu", "float_from_bits(0x7FC00000u)", "1.0f", OF_BAD
    ),
    "a lane keeps a bad query to itself": Mistake(
        "prologue.cu", "lanes_max<Tile::kLanes>(is_bad ? 1.0f : 0.0f) > 0.0f", "is_bad", OF_BAD
    ),
    "infinities stay in the mean": Mistake(
        "statistics.cu", "kClear && !is_finite(x[c])", "false", OF_BAD
    ),
    "the mean overflows": Mistake("groups.cuh", "saturated(2.0f * sum)", "2.0f * sum", OF_PEAK),
    # statistics
    "a weight of the whole array": Mistake(
        "statistics.cu",
        "static_cast<float>(tokens)",
        "static_cast<float>(shape.num_tokens)",
        LENGTHS,
    ),
    "tiles of another chunk": Mistake("statistics.cu", "tile += step", "tile += step + 1", LONG),
    "a slot is left out of the largest": Mistake(
        "statistics.cu",
        "s_parts[slot * kConfig.head_dim + channel]",
        "slot == 0 ? 0.0f : s_parts[slot * kConfig.head_dim + channel]",
        PAIR,
    ),
    "a chunk that nobody wrote": Mistake(
        "sequences.cuh",
        "chunks < kMostChunks ? static_cast<u32>(chunks) : kMostChunks",
        "static_cast<u32>(chunks) + 1",
        LONG,
    ),
    "V's statistics from K's place": Mistake(
        "groups.cuh",
        "sums + static_cast<s64>(params.num_rows_k) * params.num_chunks * head_dim",
        "sums",
        PLAIN,
    ),
    "the mean of another head": Mistake(
        "prologue.cu",
        "head_idx / (params.q_rows.num_heads / params.k_rows.num_heads)",
        "head_idx % params.k_rows.num_heads",
        PAIR,
    ),
    # barriers
    "no barrier behind the chunks": Mistake(
        "statistics.cu", SYNC, NOTHING, PLAIN, f"{SYNC}  // all slots"
    ),
    "no barrier behind the mean": Mistake(
        "prologue.cu", SYNC, NOTHING, PLAIN, f"{SYNC}  // mean and scales"
    ),
    "no barrier behind the mean for a shift": Mistake(
        "prologue.cu", SYNC, NOTHING, PLAIN, f"{SYNC}  // the mean is whole"
    ),
    "no barrier behind V's codes": Mistake(
        "prologue.cu", SYNC, NOTHING, PLAIN, f"{SYNC}  // all codes"
    ),
    # packed sequences and addresses
    "keys of a sequence from its tile on": Mistake(
        "prologue.cu",
        "static_cast<s64>(block - in.first_tile) * kTileTokens",
        "static_cast<s64>(block) * kTileTokens",
        SOME,
    ),
    "queries of a sequence from its block on": Mistake(
        "prologue.cu",
        "static_cast<s64>(block - found.first_tile) * kBlockQ",
        "static_cast<s64>(block) * kBlockQ",
        SOME,
    ),
    "ends may fall": Mistake("sequences.cuh", "other > begin", "false", FALLING),
    "ends may lie outside": Mistake("sequences.cuh", "end > limit", "false", FALLING),
    "tiles of the first 32 are forgotten": Mistake(
        "sequences.cuh", "ptx::shfl_idx(tiles_through, 31)", "0u", MANY
    ),
    "ends of the first 32 are forgotten": Mistake(
        "sequences.cuh",
        "ptx::shfl_idx(chunks_through, 31)",
        "0u",
        MANY,
    ),
    "all sequences have the first one's chunks": Mistake(
        "sequences.cuh", "ptx::shfl_idx(candidate.first_chunk, source)", "0u", SOME
    ),
    "a sequence without keys has no mean": Mistake(
        "prologue.cu", "writes_statistics = empty.is_found;", "writes_statistics = false;", EMPTY
    ),
    "a 32-bit offset": Mistake(
        "rows.cuh",
        "rows.data + token * rows.stride_token",
        "rows.data + token * static_cast<int>(rows.stride_token)",
        FAR,
    ),
    "lengths beyond the array": Mistake(
        "rows.cuh", "length < num_tokens ? length : num_tokens", "length", TOO_LONG
    ),
}
CASES = list(dict.fromkeys(one.case for one in MISTAKES.values()))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = Planted(tmp_path_factory.mktemp("planted") / "kernels", MISTAKES)
    build(folder.folder, variants_of(CASES))
    return folder


def findings(planted, case, rng):
    """Return what is wrong: with the outputs, or in a report of the emulation."""
    try:
        return prologue_oracle.problems(
            case, rng, functools.partial(emulate, folder=planted.folder)
        )
    except emu.EmuError as error:
        return [str(error)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_a_mistake_nothing_is_found(planted, case, rng):
    planted.choose(None)
    assert findings(planted, case, rng) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(planted, name, rng):
    planted.choose(name)
    found = []
    for _ in range(8):  # inputs are random: a few of them do not show it
        found = found or findings(planted, MISTAKES[name].case, rng)
    print(*found, sep="\n")
    assert found, "the mistake went unseen"
