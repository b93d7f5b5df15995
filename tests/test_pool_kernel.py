"""The pooling kernels on the host: every result against a float64 oracle (host-emulated)."""

import shutil

import numpy as np
import pool_cases
import pytest
from host_cuda import emu
from pool_cases import Case

from cusparge import reference
from cusparge._cuda import params, variants

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]

KERNELS = emu.KERNELS


def emulate(plan, x, lengths, *, folder=KERNELS, schedule="eager", seed=0):
    """Run a plan's launches; see `pool_cases.problems`."""
    results = {one.name: np.full(one.shape, np.nan, np.float32) for one in plan.outputs}
    workspace = np.full(plan.workspace_bytes // 4, np.nan, np.float32)
    for launch in plan.launches:
        arrays = {"x": emu.In(x), "workspace": emu.InOut(workspace)}
        if lengths is not None:
            arrays["lengths"] = emu.In(lengths)
        # The mean is written by one launch and read by another.
        reads_mean = "pool_blocks" in launch.variant.expression
        for name, array in results.items():
            is_input = name == "token_mean" and reads_mean
            arrays[name] = emu.In(array) if is_input else emu.Out(array)
        names = [(8 * i, name) for i, name in enumerate(launch.pointers) if name != params.NULL]
        emu.launch_params(
            folder / launch.variant.file,
            launch.variant.expression,
            launch.grid,
            launch.block,
            launch.params,
            {at: arrays[name] for at, name in names if arrays[name].array.size},
            smem_bytes=launch.shared_bytes,
            schedule=schedule,
            seed=seed,
        )
    return results


def check(case, rng, **options):
    def run(plan, x, lengths):
        return emulate(plan, x, lengths, **options)

    assert pool_cases.problems(case, rng, run) == []


@pytest.fixture(scope="module", autouse=True)
def built():
    """All kernels in one build: it is quicker than one by one."""
    if emu.MISSING is None:
        build(KERNELS, [one for one in variants.all_variants("sm_80") if one.file == "pool.cu"])


def build(folder, wanted):
    emu.build(folder / "pool.cu", *[one.expression for one in wanted])


@pytest.mark.parametrize("case", pool_cases.CASES, ids=str)
def test_matches_the_oracle(case, rng):
    check(case, rng)


def test_random_cases_match_the_oracle(rng):
    for _ in range(30):
        check(pool_cases.random_case(rng), rng)


@pytest.mark.parametrize("fill", [pool_cases.normal, pool_cases.non_finite])
def test_results_do_not_depend_on_the_order_of_threads(fill, rng, seed):
    case = Case("bfloat16", (1, 2, 130, 70), fill=fill)
    values = case.fill(rng, case.shape, case.dtype)
    results = []

    def run(plan, x, lengths):
        for number in range(3):
            schedule = "random" if number else "eager"
            order = seed[0] + number
            results.append(emulate(plan, x, lengths, schedule=schedule, seed=order))
        return results[0]

    same = Case(case.dtype, case.shape, fill=lambda *_: values)
    assert pool_cases.problems(same, rng, run) == []
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


@pytest.mark.parametrize("block", [64, 128])
def test_agrees_with_the_package_oracle(block, rng):
    """The same rules as `cusparge.reference`: all of a head at once, the mean included."""
    case = Case("bfloat16", (1, 2, 300, 72), block)

    def run(plan, x, lengths):
        results = emulate(plan, x, lengths)
        tokens = pool_cases.decode(np.ascontiguousarray(x), case.dtype)
        for h in range(2):
            smoothed, mean = reference.smooth_keys(tokens[0, h])
            # Here the kernel's mean is off by its own rounding, and each token by as much.
            shift = pool_cases.DEPTH * pool_cases.EPS * np.abs(tokens[0, h]).mean(axis=0)
            off_by = np.linalg.norm(shift) / np.linalg.norm(smoothed, axis=1).min()
            blocks = reference.pool_blocks(smoothed, block)
            similarity = reference.self_similarity(smoothed, block)
            assert (abs(results["token_mean"][0, h] - mean) <= shift).all()
            bound = shift + pool_cases.DEPTH * pool_cases.EPS * np.abs(smoothed).max(axis=0)
            assert (abs(results["block_mean"][0, h] - blocks) <= bound).all()
            bound = pool_cases.SIMILARITY + 2 * off_by
            assert (abs(results["similarity"][0, h] - similarity) <= bound).all()
        return results

    assert pool_cases.problems(case, rng, run) == []


def test_without_tokens_the_mean_is_zero(rng):
    check(Case("float16", (2, 3, 0, 40)), rng)


# ---- planted mistakes: file, right text, wrong text, the case that shows it ----------------------

LENGTHS = Case("float16", (3, 1, 130, 24), lengths=(70, -3, 999))
FAR = Case("float16", (2, 2, 3, 8), layout="far")
PAIRS = Case("bfloat16", (2, 3, 70, 24))
TINY = Case("bfloat16", (1, 1, 70, 8), smooth=False, fill=pool_cases.tiny)
HUGE = Case("float32", (1, 2, 300, 8), fill=pool_cases.huge)
BAD = Case("float16", (2, 2, 150, 24), fill=pool_cases.non_finite)
EVEN = Case("float16", (1, 2, 70, 22), layout="even")
ODD = Case("float16", (1, 2, 70, 23), layout="odd")
AT_MEAN = Case("float16", (1, 2, 597, 24), fill=pool_cases.at_mean)
MIXED = Case("float32", (1, 2, 200, 24), smooth=False, fill=pool_cases.mixed)
ALIKE = Case("float32", (1, 64, 64, 5), smooth=False, fill=pool_cases.constant)
LONG = Case("float16", (1, 2, 600, 8))

MISTAKES = {
    "a token too many is read": ("rows.cuh", "token < end ?", "token <= end ?", PAIRS),
    "a token too many counts": (
        "pool.cu",
        "const bool is_real = first + i * Tile::kSlots < end;",
        "const bool is_real = first + i * Tile::kSlots <= end;",
        PAIRS,
    ),
    "a tail divides by the block": (
        "pool.cu",
        "sums, count, head_dim",
        "sums, block_tokens, head_dim",
        PAIRS,
    ),
    "the second barrier is missing": (
        "pooling.cuh",
        "ptx::sync_block();  // the warps' sums",
        "// the warps' sums",
        PAIRS,
    ),
    "the first barrier is missing": (
        "pooling.cuh",
        "ptx::sync_block();  // all slots and flags",
        "// all slots and flags",
        PAIRS,
    ),
    "the barrier of the sums is missing": (
        "pool.cu",
        "ptx::sync_block();  // all slots are",
        "// all slots are",
        PAIRS,
    ),
    "the barrier of the mean is missing": (
        "pool.cu",
        "ptx::sync_block();  // all warps' sums",
        "// all warps' sums",
        PAIRS,
    ),
    "a 32-bit offset of a token": (
        "rows.cuh",
        "token * rows.stride_token;",
        "token * static_cast<int>(rows.stride_token);",
        FAR,
    ),
    "a 32-bit offset of a head": (
        "rows.cuh",
        "head_idx * rows.stride_head",
        "head_idx * static_cast<u32>(rows.stride_head)",
        FAR,
    ),
    "lengths beyond the array": (
        "rows.cuh",
        "length < num_tokens ? length : num_tokens",
        "length",
        LENGTHS,
    ),
    "sums of chunks that were not written": (
        "pool.cu",
        "(tokens + kChunkTokens - 1) / kChunkTokens",
        "params.num_chunks",
        Case("float16", (2, 1, 300, 24), lengths=(70, 300)),
    ),
    "each warp sums all chunks": ("pool.cu", "chunk = warp;", "chunk = 0;", LONG),
    "a weight of the whole array": (
        "pool.cu",
        "kSumUnit * static_cast<float>(tokens)",
        "kSumUnit * static_cast<float>(params.num_tokens)",
        LENGTHS,
    ),
    "the mean of another batch item": (
        "pool.cu",
        "static_cast<s64>(head) * head_dim;\n  }",
        "static_cast<s64>(head_idx) * head_dim;\n  }",
        PAIRS,
    ),
    "infinities in the mean": ("pool.cu", "!kClear || is_finite(x[c])", "true", BAD),
    "an infinity counts as minus the mean": (
        "pooling.cuh",
        "mean[c] = 0.0f;  // y is then 0 too",
        "",
        BAD,
    ),
    "a bad block is not marked": ("pooling.cuh", "sums.is_bad = true;", ";", BAD),
    "the careful path is the lane's own": (
        "pool.cu",
        "if (ptx::ballot(is_real && !is_ordinary) != 0)",
        "if (is_real && !is_ordinary)",
        BAD,
    ),
    "a careful tail is minus the mean": (
        "pooling.cuh",
        "if (!is_real) mean[c] = 0.0f;",
        "",
        Case("float16", (1, 1, 33, 24), fill=pool_cases.at_mean),
    ),
    "squares vanish": ("pool.cu", "squares > floor &&", "squares > 0.0f &&", MIXED),
    "squares overflow": ("pool.cu", "&& squares <= kLargeSquare", "", MIXED),
    "no scale": ("pooling.cuh", "<< 23);\n\n", "<< 23) * 0 + 1.0f;\n\n", TINY),
    "noise has a direction": (
        "pooling.cuh",
        "squares > mean_squares * (kNoise * kNoise)",
        "squares > 0.0f",
        AT_MEAN,
    ),
    "tiny tokens have none": (
        "pooling.cuh",
        "sums.unit[c]);\n    sums.has_direction = true;",
        "sums.unit[c]);",
        TINY,
    ),
    "the token mean overflows": (
        "pool.cu",
        "= saturated(sum);",
        "= sum;",
        Case("float32", (1, 1, 255, 8), fill=pool_cases.peak),
    ),
    "a block's mean overflows": ("pooling.cuh", "= saturated(mean);", "= mean;", HUGE),
    "rounding passes 1": ("pooling.cuh", "ptx::min(sum, 1.0f)", "sum", ALIKE),
    "half of the lanes are summed": (
        "rows.cuh",
        "int step = kLanes / 2",
        "int step = kLanes / 4",
        PAIRS,
    ),
    "a stride is not asked for its alignment": (
        "rows.cuh",
        "static_cast<u64>(rows.stride_token) |",
        "",
        Case("float16", (1, 1, 70, 24), layout="padded"),
    ),
    "a word behind the row": ("rows.cuh", "4 * i < bytes", "4 * i <= bytes", EVEN),
    "an element behind the row": ("rows.cuh", "2 * i < bytes", "2 * i <= bytes", ODD),
    "halves swapped": ("rows.cuh", "half[2] | half[3] << 16", "half[3] | half[2] << 16", ODD),
    "a slot is forgotten": ("pooling.cuh", "for (int slot = 0;", "for (int slot = 1;", PAIRS),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake, tmp_path, rng):
    file, right, wrong, case = MISTAKES[mistake]
    shutil.copytree(KERNELS, tmp_path / "kernels")
    path = next((tmp_path / "kernels").rglob(file))
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))
    found = []

    def run(plan, x, lengths):
        folder = tmp_path / "kernels"
        build(folder, [launch.variant for launch in plan.launches])
        try:
            return emulate(plan, x, lengths, folder=folder)
        except emu.EmuError as error:
            found.append(str(error))
            raise

    try:
        found += pool_cases.problems(case, rng, run)
    except emu.EmuError:
        assert found
    print(*found, sep="\n")
    assert found, "the mistake went unseen"
