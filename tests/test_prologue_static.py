"""What the compiler made of the prologue kernels, for every architecture: no GPU is needed.

The checks of `test_pool_static`, with the registers that these kernels may have: four blocks of 128
threads share the 65,536 of a multiprocessor, and six of the statistics.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_tools import ARCHS, need_nvrtc
from test_pool_static import LOADS, LOCAL, SIXTEEN_BYTES, instructions

from cusparge._cuda import prologue, sources, variants

MAX_REGISTERS = {"prologue.cu": 128, "statistics.cu": 80}
#: 16-byte loads: four tokens at a time of Q, K, K again and V; eight of the statistics' K and V.
LEAST_LOADS = {"prologue.cu": 4 * 4, "statistics.cu": 2 * 4}

#: The one that is changed to see whether the checks can fail.
SHAPE = (1, 1, 9, 128)
PLAN = prologue.prologue_plan("sm_90a", "bfloat16", SHAPE, SHAPE, *((0, 0, 0),) * 3, 1.0).plan


def compiled(variant, arch, files=None):
    """Return (ptxas's report, machine code)."""
    text = sources.load()
    files = {**text.files, **(files or {})}
    result = need_nvrtc().compile(
        files[variant.file],
        variant.file,
        {name: files[name] for name in text.headers},
        variant.expression,
        [f"--gpu-architecture={arch}", "-std=c++20", "--ptxas-options=-v"],
    )
    assert result.error is None, result.log
    return result.log, result.cubin


def problems(variant, arch, files=None):
    """Return what is wrong with a kernel's machine code."""
    log, cubin = compiled(variant, arch, files)
    found = []
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if len(registers) != 1 or len(spills) != 1:
        found.append(f"ptxas reports on {len(registers)} functions, not on one")
    if max(registers, default=0) > MAX_REGISTERS[variant.file]:
        found.append(f"{max(registers)} registers")
    if any(set(numbers) != {"0"} for numbers in spills):
        found.append(f"stack and spilled bytes: {spills}")
    if re.search(r"\bC75\d\d\b|[Ww]arning", log):
        found.append(f"a warning: {log}")
    counts = instructions(cubin)
    wide = sum(counts[opcode, SIXTEEN_BYTES] for opcode in LOADS)
    if wide < LEAST_LOADS[variant.file]:
        found.append(f"{wide} loads of 16 bytes; at least {LEAST_LOADS[variant.file]}")
    if any(opcode in LOCAL for opcode, _ in counts):
        found.append("local memory is used")
    return [f"{variant.expression} for {arch}: {text}" for text in found]


def kernels(arch):
    return [one for one in variants.all_variants(arch) if one.file in MAX_REGISTERS]


def check(jobs):
    need_nvrtc()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: problems(*job), jobs))
    assert [text for texts in found for text in texts] == []


def test_no_spills_and_wide_loads(rng):
    """A kernel of each file for every architecture: another choice in every run."""
    jobs = []
    for arch in ARCHS:
        for file in MAX_REGISTERS:
            some = [one for one in kernels(arch) if one.file == file]
            jobs.append((some[rng.integers(len(some))], arch))
    check(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(arch):
    check([(one, arch) for one in kernels(arch)])


NARROW = "load_piece<4>(source, bytes < 16 ? bytes : 16)"


@pytest.mark.parametrize(
    ("which", "file", "right", "wrong", "said"),
    [
        (1, "prologue.cu", "(kThreads, 4)", "(kThreads, 12)", "spilled"),
        (0, "statistics.cu", "(kThreads, 6)", "(kThreads, 16)", "spilled"),
        (1, "cusparge/groups.cuh", "kHeldPieces = 4", "kHeldPieces = 1", "loads of 16 bytes"),
        (0, "cusparge/rows.cuh", "ptx::ld_global_16(source)", NARROW, "loads of 16 bytes"),
    ],
)
def test_a_planted_mistake_is_seen(which, file, right, wrong, said):
    text = sources.load().files[file].decode()
    assert right in text
    files = {file: text.replace(right, wrong).encode()}
    found = problems(PLAN.launches[which].variant, "sm_90a", files)
    assert re.search(said, " ".join(found)), found
