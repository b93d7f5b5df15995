"""What the compiler made of block_map.cu's kernels, for every architecture: no GPU is needed.

Registers, stack and spills are what ptxas reports; widths of loads are read from the machine code,
by the decoder of test_pool_static.py, which is checked there.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_tools import ARCHS, need_nvrtc
from test_pool_static import LOADS, LOCAL, SIXTEEN_BYTES, instructions

from cusparge._cuda import block_map, sources, variants

#: Of a thread: 65,536 of a multiprocessor for as many blocks of 256 threads as the launch bounds
#: say, two that choose and four that take.
MAX_REGISTERS = {"choose_blocks": 128, "take_blocks": 64, "clear_queue": 16}

#: A float64 product fused with a sum: `keep` of a count would be rounded once, not twice.
DFMA = 0x22B

CHOOSE = "cusparge::choose_blocks<cusparge::MapConfig{128, 8}>"


def problems(expression, arch, files=None):
    """Return what is wrong with a kernel's machine code."""
    texts = sources.load().files if files is None else files
    headers = {name: texts[name] for name in sorted(texts) if name.endswith(".cuh")}
    options = [f"--gpu-architecture={arch}", "-std=c++20", "--ptxas-options=-v"]
    source = texts["block_map.cu"]
    result = need_nvrtc().compile(source, "block_map.cu", headers, expression, options)
    assert result.error is None, result.log
    name = expression.removeprefix("cusparge::").partition("<")[0]
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", result.log)]
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.log
    )
    found = []
    if len(registers) != 1 or len(spills) != 1:
        found.append(f"ptxas reports on {len(registers)} functions, not on one")
    if max(registers, default=0) > MAX_REGISTERS[name]:
        found.append(f"{max(registers)} registers; at most {MAX_REGISTERS[name]}")
    if any(set(numbers) != {"0"} for numbers in spills):
        found.append(f"stack and spilled bytes: {spills}")
    if re.search(r"\bC75\d\d\b|[Ww]arning", result.log):
        found.append(f"a warning: {result.log}")
    counts = instructions(result.cubin)
    wide = sum(counts[opcode, SIXTEEN_BYTES] for opcode in LOADS)
    # The rows' channels, and at least two key blocks in flight.
    needed = int(expression.rpartition(", ")[2][0]) + 2 if name == "choose_blocks" else 0
    if wide < needed:
        found.append(f"{wide} loads of 16 bytes; at least {needed}")
    if any(opcode == DFMA for opcode, _ in counts):
        found.append("a product is fused with a difference")
    if any(opcode in LOCAL for opcode, _ in counts):
        found.append("local memory is used")
    return [f"{expression} for {arch}: {text}" for text in found]


def test_no_spills_and_wide_loads(rng):
    """Some kernels for every architecture: another choice in every run."""
    need_nvrtc()
    jobs = []
    for arch in ARCHS:
        every = variants.all_variants(arch)
        kernels = [one.expression for one in every if one.file == "block_map.cu"]
        assert len(kernels) == 14
        jobs += [(kernels[i], arch) for i in rng.choice(14, 2, replace=False)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: problems(*job), jobs))
    assert [text for texts in found for text in texts] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(arch):
    need_nvrtc()
    every = [one for one in variants.all_variants(arch) if one.file == block_map.FILE]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda one: problems(one.expression, arch), every))
    assert [text for texts in found for text in texts] == []


NARROW = "load_piece<4>(reinterpret_cast<const u8*>(row + channel),"


COUNT = "ptx::mul_rn(keep, static_cast<double>(reachable)) - ptx::mul_rn(1e-6, reachable)"


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (COUNT, "keep * static_cast<double>(reachable) - 1e-6 * reachable", "is fused"),
        ("(kMapThreads, 2) choose", "(kMapThreads, 4) choose", "spilled"),
        ("(kMapThreads, 2) choose", "(kMapThreads, 1) choose", "registers; at most 128"),
        ("load_piece<kAccess>(reinterpret_cast<const u8*>(row + channel),", NARROW, "of 16 bytes"),
        ("kMapWarps / kRows;\n", "kMapWarps / kRows;\n#warning odd\n", "a warning"),
    ],
)
def test_a_planted_mistake_is_seen(right, wrong, said):
    files = dict(sources.load().files)
    name = "cusparge/select.cuh" if right is COUNT else "block_map.cu"
    text = files[name].decode()
    assert right in text
    files[name] = text.replace(right, wrong).encode()
    found = problems(CHOOSE, "sm_90a", files)
    assert re.search(said, " ".join(found)), found
