"""The host side of the pooling kernels: which launches, with which numbers, for which array."""

import itertools
import math
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cusparge._cuda import params, pooling, variants
from cusparge._cuda.pooling import pool_plan
from cusparge.errors import InvalidArgumentError, UnsupportedError

KERNELS = Path(__file__).resolve().parents[1] / "kernels_cu"

#: The structs' fields in their order in memory, as the kernels name them.
ROWS = [
    "rows.stride_batch",
    "rows.stride_head",
    "rows.stride_token",
    "rows.num_tokens",
    "rows.num_heads",
    "rows.head_dim",
]
BLOCKS = ["num_blocks", "block_tokens"]
FIELDS = {
    "sum_chunks": ("SumParams", ["x", "lengths", "partial", *ROWS, "num_chunks"]),
    "finish_mean": (
        "MeanParams",
        ["partial", "lengths", "token_mean", "num_tokens", "num_chunks", "num_heads", "head_dim"],
    ),
    "pool_blocks": (
        "PoolParams",
        ["x", "lengths", "token_mean", "block_mean", "similarity", *ROWS, *BLOCKS],
    ),
}
ADDRESSES = {
    "x": 0x1111_2222_3333_4444,
    "lengths": 0x2222,
    "workspace": 0x3333,
    "token_mean": 0x4444,
    "block_mean": 0x5555,
    "similarity": 0x6666,
}


def plan_of(dtype="float16", shape=(2, 3, 300, 80), strides=(99, -7, 80), block=64, **options):
    return pool_plan(dtype, shape, strides, block, **options)


def kernel_of(launch):
    return launch.variant.expression.removeprefix("cusparge::").partition("<")[0]


def decoded(folder, plan):
    """Return {kernel: {field: value}} as the compiler of the kernels sees the filled structs."""
    lines = []
    for name, (struct_name, fields) in FIELDS.items():
        prints = "".join(
            f'  std::printf("{name} {field} %lld\\n", (long long)p.{field});\n' for field in fields
        )
        lines.append(
            f"static void {name}() {{\n  cusparge::{struct_name} p;\n"
            "  if (std::fread(&p, sizeof p, 1, stdin) != 1) std::exit(1);\n"
            "  if (std::getchar() != EOF) std::exit(2);\n"
            f"{prints}}}\n"
        )
    main = "".join(f'  if (std::string_view(which[1]) == "{name}") {name}();\n' for name in FIELDS)
    (folder / "main.cpp").write_text(
        "#include <cstdio>\n#include <cstdlib>\n#include <string_view>\n"
        '#include "cusparge/params.cuh"\n'
        + "".join(lines)
        + f"int main(int, char** which) {{\n{main}}}\n"
    )
    command = ["g++", "-std=c++20", "-I", str(KERNELS), "-o", "main", "main.cpp"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    found = {}
    for launch, filled in zip(plan.launches, plan.fill(**ADDRESSES), strict=True):
        done = subprocess.run(
            [folder / "main", kernel_of(launch)],
            input=filled,
            capture_output=True,
            check=True,
            timeout=60,
        )
        for line in done.stdout.decode().splitlines():
            kernel, name, value = line.split()
            found.setdefault(kernel, {})[name] = int(value)
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the header with")
def test_the_compiler_reads_what_the_host_packs(tmp_path):
    plan = plan_of(smooth=True, has_lengths=True)
    rows = dict(zip(ROWS, [198, -14, 160, 300, 3, 80], strict=True))
    x, lengths = ADDRESSES["x"], ADDRESSES["lengths"]
    assert decoded(tmp_path, plan) == {
        "sum_chunks": {"x": x, "lengths": lengths, "partial": 0x3333, **rows, "num_chunks": 2},
        "finish_mean": {
            "partial": 0x3333,
            "lengths": lengths,
            "token_mean": 0x4444,
            "num_tokens": 300,
            "num_chunks": 2,
            "num_heads": 3,
            "head_dim": 80,
        },
        "pool_blocks": {
            "x": x,
            "lengths": lengths,
            "token_mean": 0x4444,
            "block_mean": 0x5555,
            "similarity": 0x6666,
            **rows,
            "num_blocks": 5,
            "block_tokens": 64,
        },
    }


def test_launches_and_outputs():
    plan = plan_of(smooth=True)
    assert [kernel_of(one) for one in plan.launches] == ["sum_chunks", "finish_mean", "pool_blocks"]
    assert [one.grid for one in plan.launches] == [(12, 1, 1), (18, 1, 1), (30, 1, 1)]
    assert [one.shared_bytes for one in plan.launches] == [4096, 2048, 8224]
    assert [one.block for one in plan.launches] == [(128, 1, 1), (512, 1, 1), (128, 1, 1)]
    assert {output.name: output.shape for output in plan.outputs} == {
        "block_mean": (2, 3, 5, 80),
        "similarity": (2, 3, 5),
        "token_mean": (2, 3, 80),
    }
    assert plan.workspace_bytes == 2 * 3 * 2 * 80 * 4
    assert sum(output.num_bytes for output in plan.outputs) == 4 * (2 * 3 * 5 * 81 + 2 * 3 * 80)


def test_without_smoothing_there_is_one_launch():
    plan = plan_of(block=128)
    assert [kernel_of(one) for one in plan.launches] == ["pool_blocks"]
    assert plan.launches[0].pointers == ("x", "null", "null", "block_mean", "similarity")
    assert plan.launches[0].grid == (18, 1, 1)
    assert plan.workspace_bytes == 0
    filled = plan.fill(x=1, block_mean=2, similarity=3)
    assert struct.unpack_from("<5Q", filled[0]) == (1, 0, 0, 2, 3)
    assert filled[0][40:] == plan.launches[0].params[40:]


def test_a_missing_address_is_an_error():
    with pytest.raises(KeyError, match="similarity"):
        plan_of().fill(x=1, block_mean=2)


@pytest.mark.parametrize(
    ("shape", "kernels", "outputs"),
    [
        ((2, 3, 0, 80), ["finish_mean"], [(2, 3, 0, 80), (2, 3, 0), (2, 3, 80)]),
        ((0, 3, 9, 80), [], [(0, 3, 1, 80), (0, 3, 1), (0, 3, 80)]),
        ((2, 0, 9, 80), [], [(2, 0, 1, 80), (2, 0, 1), (2, 0, 80)]),
    ],
)
def test_empty_arrays(shape, kernels, outputs):
    plan = plan_of(shape=shape, smooth=True)
    assert [kernel_of(one) for one in plan.launches] == kernels
    assert [output.shape for output in plan.outputs] == outputs
    assert plan.workspace_bytes == 0


def test_the_stride_of_a_single_element_is_dropped():
    one = plan_of(shape=(1, 1, 1, 8), strides=(13, 13, 13)).launches[0].numbers
    assert struct.unpack_from("<3q", one) == (0, 0, 0)
    three = plan_of(shape=(3, 3, 3, 8), strides=(13, 0, -13)).launches[0].numbers
    assert struct.unpack_from("<3q", three) == (26, 0, -26)


def test_what_one_launch_cannot_do_is_refused():
    shape, strides = (1, 2**20, 2**18, 1), (0, 0, 0)
    with pytest.raises(UnsupportedError, match=r"4294967296 blocks of 64 tokens; allowed are 2147"):
        plan_of(shape=shape, strides=strides)
    with pytest.raises(UnsupportedError, match="4294967296 chunks of 256 tokens"):
        plan_of(shape=(1, 2**22, 2**18, 1), strides=strides, smooth=True)
    with pytest.raises(InvalidArgumentError, match=r"within 2\^63 bytes. Copy"):
        plan_of(shape=(2, 1, 4, 8), strides=(2**62, 0, 8))


def test_plans_are_kept():
    assert plan_of(smooth=True) is plan_of(smooth=True)
    assert plan_of(smooth=True) is not plan_of(smooth=False)


def test_every_planned_kernel_is_declared():
    declared = set(variants.all_variants("sm_90a"))
    assert len({one for one in declared if one.file == "pool.cu"}) == 1 + 3 * 3 * 2
    dims = [1, 63, 64, 65, 128, 129, 256]
    for dtype, dim, smooth in itertools.product(variants.DTYPES, dims, [False, True]):
        plan = plan_of(dtype=dtype, shape=(1, 1, 9, dim), smooth=smooth)
        assert {one.variant for one in plan.launches} <= declared
        tile = {1: 64, 63: 64, 64: 64, 65: 128, 128: 128, 129: 256, 256: 256}[dim]
        assert plan.launches[-1].variant.expression.endswith(f", {tile}}}>")


def test_constants_are_those_of_the_kernels():
    text = (KERNELS / "pool.cu").read_text() + (KERNELS / "cusparge/rows.cuh").read_text()
    for line in (
        f"kChunkTokens = {pooling.CHUNK_TOKENS};",
        f"kMeanThreads = {pooling.MEAN_THREADS};",
        f"kThreads = {pooling.THREADS};",
    ):
        assert f"inline constexpr int {line}" in text


def test_sizes_of_outputs():
    output = params.Output("a", (2, 3, 5))
    assert output.num_bytes == 4 * math.prod(output.shape) == np.zeros((2, 3, 5), np.float32).nbytes
