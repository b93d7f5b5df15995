"""The host side of the prologue: launches, numbers, memory, and the layout of tiles."""

import itertools
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import prologue_oracle
import pytest

from cusparge._cuda import prologue, variants
from cusparge._cuda.prologue import prologue_plan, tile_formats
from cusparge.errors import UnsupportedError

KERNELS = Path(__file__).resolve().parents[1] / "kernels_cu"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for the headers")

ROWS = ("stride_batch", "stride_head", "stride_token", "num_tokens", "num_heads", "head_dim")


def rows(name):
    return [f"{name}.{field}" for field in ROWS]


#: The structs' fields in their order in memory, as the kernels name them.
FIELDS = {
    "kv_statistics": (
        "StatisticsParams",
        [
            *("k", "v", "lengths", "cu_seqlens", "partial"),
            *(*rows("k_rows"), *rows("v_rows")),
            *("num_sequences", "num_rows", "num_chunks"),
        ],
    ),
    "prologue": (
        "PrologueParams",
        [
            *("q", "k", "v", "lengths", "cu_seqlens_q", "cu_seqlens_k", "partial"),
            *("q_tile", "q_scale", "q_mean", "q_similarity", "q_shift"),
            *("k_tile", "k_scale", "k_mean", "k_similarity", "k_bad", "token_mean"),
            *("v_tile", "v_scale"),
            *(*rows("q_rows"), *rows("k_rows"), *rows("v_rows")),
            *("num_sequences", "num_rows_q", "num_rows_k", "num_blocks_q", "num_blocks_k"),
            *("num_chunks", "q_factor", "sm_scale"),
        ],
    ),
}
FLOATS = ("q_factor", "sm_scale")


def plan_of(
    arch="sm_90a",
    dtype="float16",
    shape_q=(2, 6, 300, 80),
    shape_k=(2, 3, 700, 80),
    strides=((99, -7, 80), (98, 0, 81), (97, 5, -82)),
    sm_scale=-0.5,
    **options,
):
    return prologue_plan(arch, dtype, shape_q, shape_k, *strides, sm_scale, **options)


def kernel_of(launch):
    return launch.variant.expression.removeprefix("cusparge::").partition("<")[0]


def run_cpp(folder, text, data=b""):
    """Compile and run a program; return what it prints."""
    (folder / "main.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-I", str(KERNELS), "-o", "main", "main.cpp"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    done = subprocess.run(
        [folder / "main"], input=data, capture_output=True, check=True, timeout=60
    )
    return done.stdout.decode()


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
def test_the_compiler_reads_what_the_host_packs(packed, tmp_path):
    options = {"num_sequences": 5, "shape_q": (1, 6, 300, 80), "shape_k": (1, 3, 700, 80)}
    plan = plan_of(wants_shift=True, **(options if packed else {"has_lengths": True})).plan
    names = sorted({name for one in plan.launches for name in one.pointers} - {"null"})
    addresses = {name: 0x1111_0000_0000 + 16 * i for i, name in enumerate(names)}
    found = {}
    for launch, filled in zip(plan.launches, plan.fill(**addresses), strict=True):
        name, fields = FIELDS[kernel_of(launch)]
        prints = "".join(
            f'  std::printf("{field} %.9g\\n", p.{field});\n'
            if field in FLOATS
            else f'  std::printf("{field} %lld\\n", (long long)p.{field});\n'
            for field in fields
        )
        text = (
            '#include <cstdio>\n#include "cusparge/params.cuh"\nint main() {\n'
            f"  cusparge::{name} p;\n"
            "  if (std::fread(&p, sizeof p, 1, stdin) != 1) return 1;\n"
            f"  if (std::getchar() != EOF) return 2;\n{prints}}}\n"
        )
        lines = run_cpp(tmp_path, text, filled).splitlines()
        found[kernel_of(launch)] = {k: float(v) for k, v in map(str.split, lines)}

    expected = dict.fromkeys(FIELDS["prologue"][1], 0) | addresses
    if packed:
        counts = {"num_sequences": 5, "num_rows_q": 6, "num_rows_k": 3}
        counts |= {"num_blocks_q": 2 + 5, "num_blocks_k": 10 + 5, "num_chunks": 3 + 5}
    else:
        counts = {"num_sequences": 2, "num_rows_q": 12, "num_rows_k": 6}
        counts |= {"num_blocks_q": 3, "num_blocks_k": 11, "num_chunks": 3}
    expected |= counts
    # A batch of one has no stride.
    batch = [0, 0, 0] if packed else [198, 196, 194]
    expected |= dict(zip(rows("q_rows"), [batch[0], -14, 160, 300, 6, 80], strict=True))
    expected |= dict(zip(rows("k_rows"), [batch[1], 0, 162, 700, 3, 80], strict=True))
    expected |= dict(zip(rows("v_rows"), [batch[2], 10, -164, 700, 3, 80], strict=True))
    factor = np.float32(-0.5 * math.log2(math.e) / 127)
    expected |= {"q_factor": float(f"{factor:.9g}"), "sm_scale": -0.5}
    assert found["prologue"] == expected
    shared = {name: expected.get(name, 0) for name in FIELDS["kv_statistics"][1]}
    shared |= {"num_rows": counts["num_rows_k"], "cu_seqlens": expected["cu_seqlens_k"]}
    assert found["kv_statistics"] == shared


# ---- tiles ---------------------------------------------------------------------------------------


def offsets_of(format_name, row_bytes, rows_of_a_tile):
    return (
        f"  for (int r = 0; r < {rows_of_a_tile}; ++r)\n"
        f"    for (int c = 0; c < {row_bytes}; ++c)\n"
        f'      std::printf("%d ", cusparge::tile_offset(cusparge::TileFormat::{format_name}, '
        f"{row_bytes}, r, c));\n"
    )


@needs_compiler
def test_tiles_are_as_stated_a_second_time(tmp_path):
    """`prologue_oracle.rows_of_tile` says the same by reshaping and by a table of chunks."""
    tiles = [("kSwizzled", 64, 64), ("kSwizzled", 128, 64), ("kSwizzled", 64, 136)]
    tiles += [("kCoreMatrix", width, 64) for width in (32, 64, 96, 128, 160, 256)]
    tiles += [("kCoreMatrix", 64, count) for count in (16, 48, 136, 264)]
    sizes = "".join(
        f'  std::printf("%d %d %d ", cusparge::key_tile_bytes({d}), '
        + ", ".join(
            f"cusparge::value_tile_bytes(cusparge::ValueFormat::{one}, {d})"
            for one in ("kE4m3", "kF16")
        )
        + ");\n"
        for d in range(1, 257)
    )
    text = '#include <cstdio>\n#include "cusparge/tiles.cuh"\nint main() {\n' + sizes
    text += "".join(offsets_of(*tile) for tile in tiles)
    text += '  for (int p = 0; p < 64; ++p) std::printf("%d ", cusparge::stored_token(p));\n}\n'
    numbers = iter(map(int, run_cpp(tmp_path, text).split()))
    for d in range(1, 257):
        key, e4m3, f16 = itertools.islice(numbers, 3)
        assert key == 64 * 32 * math.ceil(d / 32)
        assert e4m3 == 64 * (8 * math.ceil(d / 8) + 8)
        assert f16 == 64 * 2 * 16 * math.ceil(d / 16)
    for format_name, width, count in tiles:
        found = np.array(list(itertools.islice(numbers, count * width)))
        assert sorted(found) == list(range(count * width))  # each byte once
        flat = np.arange(count * width)
        expected = prologue_oracle.rows_of_tile(flat, count, format_name == "kSwizzled")
        np.testing.assert_array_equal(found, expected.ravel(), (format_name, width, count))
    stored = list(numbers)
    assert stored == [16 * (p // 16) + prologue_oracle.STORED[p % 16] for p in range(64)]


def test_formats_of_architectures():
    assert tile_formats("sm_80", 64) == ("kCoreMatrix", "kF16")
    assert tile_formats("sm_86", 128) == ("kCoreMatrix", "kF16")
    assert tile_formats("sm_100a", 128) == ("kCoreMatrix", "kF16")
    assert tile_formats("sm_103a", 64) == ("kCoreMatrix", "kF16")
    assert tile_formats("sm_89", 64) == ("kCoreMatrix", "kE4m3")
    assert tile_formats("sm_120a", 128) == ("kCoreMatrix", "kE4m3")
    swizzled = [d for d in range(1, 257) if tile_formats("sm_90a", d).tiles == "kSwizzled"]
    assert swizzled == [*range(33, 65), *range(97, 129)]
    assert {tile_formats("sm_90a", d).values for d in range(1, 257)} == {"kE4m3"}


# ---- launches and memory -------------------------------------------------------------------------


def test_launches():
    plan = plan_of().plan
    assert [kernel_of(one) for one in plan.launches] == ["kv_statistics", "prologue"]
    assert [one.grid for one in plan.launches] == [(2 * 6 * 3, 1, 1), (6 * 11 + 12 * 3, 1, 1)]
    assert [one.block for one in plan.launches] == [(128, 1, 1)] * 2
    assert [one.shared_bytes for one in plan.launches] == [4096, 8192 + 8192 + 1024 + 48]
    assert plan.outputs == ()
    assert plan.launches[0].pointers == ("k", "v", "null", "null", "partial")
    assert plan.launches[1].pointers[3:7] == ("null", "null", "null", "partial")
    assert plan.launches[1].pointers[11] == "null"  # no shift


@needs_compiler
def test_shared_memory_is_what_the_kernels_cut_up(tmp_path):
    """The struct in groups.cuh says so itself, compiled for the host."""
    text = (KERNELS / "cusparge/groups.cuh").read_text()
    constants = text[text.index("struct PrologueShared {") :]
    constants = constants[: constants.index("};")]
    lines = []
    expected = []
    for arch in ("sm_80", "sm_89", "sm_90a"):
        for dtype, width in itertools.product(variants.DTYPES, variants.HEAD_DIMS):
            plan = plan_of(arch, dtype, (1, 1, 5, width), (1, 1, 5, width)).plan
            expected.append(plan.launches[1].shared_bytes)
            config = re.search(r"<cusparge::(PrologueConfig\{.*\})>", plan.launches[1].variant[1])
            lines.append(f"PrologueShared<{config[1]}>::kBytes")
    names = {"kThreads": "128", "kWarps": "4", "kTileTokens": "64", "kHeldPieces": "4"}
    for name, value in names.items():
        constants = constants.replace(name, value)
    channels = (
        "template <PrologueConfig c> struct GroupTile { static constexpr int kChannels =\n"
        "  c.dtype == Dtype::kFloat32 && c.head_dim < 256 ? 4 : 8; };\n"
    )
    program = (
        '#include <cstdio>\n#include "cusparge/tiles.cuh"\nnamespace cusparge {\n'
        "enum class Dtype { kFloat16, kBFloat16, kFloat32 };\n"
        "struct PrologueConfig { Dtype dtype; int head_dim; TileFormat tiles; "
        f"ValueFormat values; }};\n{channels}template <PrologueConfig kConfig>\n{constants}}};\n"
        "}\nusing namespace cusparge;\nint main() {\n"
        + "".join(f'  std::printf("%d ", {line});\n' for line in lines)
        + "}\n"
    )
    assert list(map(int, run_cpp(tmp_path, program).split())) == expected


def test_sections_follow_each_other():
    made = plan_of(wants_shift=True)
    assert made.formats == ("kCoreMatrix", "kE4m3")
    assert (made.num_blocks_q, made.num_blocks_k) == (3, 11)
    shapes = {name: (one.dtype, one.shape) for name, one in made.sections.items()}
    assert shapes == {
        "q_tile": ("int8", (2, 6, 3, 2, 64 * 96)),
        "q_scale": ("float32", (2, 6, 3, 128)),
        "q_mean": ("float32", (2, 6, 3, 80)),
        "q_similarity": ("float32", (2, 6, 3)),
        "q_shift": ("float32", (2, 6, 3, 128)),
        "k_tile": ("int8", (2, 3, 11, 64 * 96)),
        "k_scale": ("float32", (2, 3, 11, 4)),
        "k_mean": ("float32", (2, 3, 11, 80)),
        "k_similarity": ("float32", (2, 3, 11)),
        "k_bad": ("uint8", (2, 3, 11)),
        "token_mean": ("float32", (2, 3, 80)),
        "v_tile": ("uint8", (2, 3, 11, 64 * 88)),
        "v_scale": ("float32", (2, 3, 80)),
        "partial": ("float32", (2, 6, 3, 80)),
    }
    end = 0
    for name, one in sorted(made.sections.items(), key=lambda item: item[1].offset):
        assert one.name == name
        assert one.offset % 1024 == 0
        assert end <= one.offset < end + 1024
        assert one.num_bytes == np.zeros(one.shape, one.dtype).nbytes
        end = one.offset + one.num_bytes
    assert made.plan.workspace_bytes == end
    addresses = made.addresses(0x10000)
    assert addresses["q_tile"] == 0x10000
    assert addresses["q_shift"] == 0x10000 + made.sections["q_shift"].offset
    half = plan_of("sm_80")
    assert half.sections["v_tile"].dtype == "float16"
    assert half.sections["v_tile"].shape == (2, 3, 11, 64 * 80)
    assert "q_shift" not in half.sections


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"shape_k": (2, 3, 0, 80)}, ["prologue"]),  # zeros, and a mean of zero
        ({"shape_q": (2, 6, 0, 80)}, ["kv_statistics", "prologue"]),
        ({"shape_q": (0, 6, 300, 80), "shape_k": (0, 3, 700, 80)}, []),
        ({"shape_q": (2, 0, 300, 80), "shape_k": (2, 0, 700, 80)}, []),
        (
            {"shape_q": (1, 6, 0, 80), "shape_k": (1, 3, 0, 80), "num_sequences": 0},
            [],
        ),
        (
            {"shape_q": (1, 6, 9, 80), "shape_k": (1, 3, 0, 80), "num_sequences": 2},
            ["prologue"],
        ),
    ],
)
def test_empty_arrays(options, kernels):
    assert [kernel_of(one) for one in plan_of(**options).plan.launches] == kernels


def test_the_number_of_chunks_has_a_bound(rng):
    def chunks(tokens, sequences=None):
        shape = (2 if sequences is None else 1, 3, tokens, 80)
        made = plan_of(shape_k=shape, shape_q=(shape[0], 6, 9, 80), num_sequences=sequences)
        return made.sections["partial"].shape[2]

    assert [chunks(n) for n in (1, 256, 257, 16 * 256, 10**6)] == [1, 1, 2, 16, 16]
    assert chunks(10**6, 1) == 16
    assert chunks(10**6, 100) == 1600
    assert chunks(5, 100) == 125
    # Whatever the lengths are, all sequences' chunks fit.
    for _ in range(200):
        lengths = rng.integers(0, rng.choice([3, 70, 5000]), rng.integers(1, 40))
        used = sum(min(16, math.ceil(math.ceil(n / 64) / 4)) for n in lengths)
        assert used <= chunks(int(lengths.sum()), len(lengths))


def test_what_one_launch_cannot_do_is_refused():
    shape, strides = (1, 2**20, 2**18, 1), ((0, 0, 0),) * 3
    with pytest.raises(UnsupportedError, match=r"blocks of 64 keys and of 128 queries"):
        plan_of(shape_q=shape, shape_k=shape, strides=strides)
    with pytest.raises(UnsupportedError, match=r"got 2147483648 tokens in all.*2147483647, which"):
        plan_of(shape_q=(1, 1, 2**31, 1), shape_k=(1, 1, 9, 1), strides=strides, num_sequences=1)


def test_extreme_factors_stay_in_float32():
    for sm_scale, expected in ((1e300, 3.4028234663852886e38), (-1e300, -3.4028234663852886e38)):
        numbers = plan_of(sm_scale=sm_scale).plan.launches[1].numbers
        assert struct.unpack_from("<2f", numbers, len(numbers) - 8) == (expected, expected)


def test_plans_are_kept():
    assert plan_of() is plan_of()
    assert plan_of() is not plan_of(sm_scale=0.25)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"])
def test_every_planned_kernel_is_declared(arch):
    declared = set(variants.all_variants(arch))
    count = {"sm_90a": 3 * 5}.get(arch, 3 * 3)
    assert len({one for one in declared if one.file == "prologue.cu"}) == count
    assert len({one for one in declared if one.file == "statistics.cu"}) == 9
    planned = set()
    for dtype, dim in itertools.product(variants.DTYPES, range(1, 257)):
        shape = (1, 1, 9, dim)
        planned |= {one.variant for one in plan_of(arch, dtype, shape, shape).plan.launches}
    assert planned <= declared
    assert len(planned) == count + 9
    few = variants._matching(arch, ["float16"], [64], every=True)
    assert len([one for one in few if one.file == "prologue.cu"]) == count // 9 + (count > 9)
    files = {one.file for one in variants.select(arch)}
    assert files == {"pool.cu"}, "no call launches the others yet, and nobody waits for them"


def test_constants_are_those_of_the_kernels():
    text = (KERNELS / "cusparge/tiles.cuh").read_text()
    text += (KERNELS / "cusparge/sequences.cuh").read_text()
    text += (KERNELS / "cusparge/geometry.cuh").read_text()
    for line in (
        f"kTileTokens = {prologue.TILE_TOKENS};",
        f"kBlockQ = {prologue.BLOCK_Q};",
        f"kOnesRows = {prologue.ONES_ROWS};",
        f"kMostChunks = {prologue.MOST_CHUNKS};",
        f"kLeastChunkTiles = {prologue.LEAST_CHUNK_TILES};",
    ):
        assert f"inline constexpr int {line}" in text
