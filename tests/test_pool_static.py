"""What the compiler made of the pooling kernels, for every architecture: no GPU is needed.

Registers, stack and spills are what ptxas reports. The widths of loads are read from the machine
code itself, in which every instruction is 16 bytes: the opcode is the lowest 12 bits, and bits 73
to 75 of a memory instruction say how much it moves. The decoder is checked on kernels whose
accesses are known.
"""

import collections
import re
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_tools import ARCHS, need_nvrtc

from cusparge._cuda import sources, variants

#: Six blocks of 128 threads share the 65,536 registers of a multiprocessor; a thread has a multiple
#: of 8.
MAX_REGISTERS = 80

LOADS = (0x381, 0x981)
LOCAL = (0x983, 0x387, 0x987)
SIXTEEN_BYTES = 6

FINISH = "cusparge::finish_mean<32>"
POOL = "cusparge::pool_blocks<cusparge::PoolConfig{cusparge::Dtype::kBFloat16, 128}>"


def compiled(expression, arch, source=None, headers=None):
    """Return (ptxas's report, machine code)."""
    text = sources.load()
    result = need_nvrtc().compile(
        source or text.files["pool.cu"],
        "pool.cu",
        headers or text.headers,
        expression,
        [f"--gpu-architecture={arch}", "-std=c++20", "--ptxas-options=-v"],
    )
    assert result.error is None, result.log
    return result.log, result.cubin


def instructions(cubin):
    """Count the instructions of an ELF file's text sections: {(opcode, width field): count}."""
    table, count = struct.unpack_from("<Q", cubin, 40)[0], struct.unpack_from("<H", cubin, 60)[0]
    names = struct.unpack_from("<H", cubin, 62)[0]
    sections = [struct.unpack_from("<2I4Q", cubin, table + 64 * i) for i in range(count)]
    found = collections.Counter()
    for name, _, _, _, offset, size in sections:
        start = sections[names][4] + name
        if not cubin[start : start + 6] == b".text.":
            continue
        for low, high in struct.iter_unpack("<2Q", cubin[offset : offset + size]):
            found[low & 0xFFF, high >> 9 & 7] += 1
    return found


def problems(expression, arch, **options):
    """Return what is wrong with a kernel's machine code."""
    log, cubin = compiled(expression, arch, **options)
    found = []
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if len(registers) != 1 or len(spills) != 1:
        found.append(f"ptxas reports on {len(registers)} functions, not on one")
    if max(registers, default=0) > MAX_REGISTERS:
        found.append(f"{max(registers)} registers; at most {MAX_REGISTERS}")
    if any(set(numbers) != {"0"} for numbers in spills):
        found.append(f"stack and spilled bytes: {spills}")
    if re.search(r"\bC75\d\d\b|[Ww]arning", log):
        found.append(f"a warning: {log}")
    counts = instructions(cubin)
    wide = sum(counts[opcode, SIXTEEN_BYTES] for opcode in LOADS)
    if expression != FINISH and wide < 4:  # that many in flight
        found.append(f"{wide} loads of 16 bytes; at least 4")
    if any(opcode in LOCAL for opcode, _ in counts):
        found.append("local memory is used")
    return [f"{expression} for {arch}: {text}" for text in found]


def test_no_spills_and_wide_loads(rng):
    """Some kernels for every architecture: another choice in every run."""
    need_nvrtc()
    jobs = []
    for arch in ARCHS:
        kernels = [one.expression for one in variants.all_variants(arch) if one.file == "pool.cu"]
        assert len(kernels) == 19
        jobs += [(kernels[i], arch) for i in rng.choice(19, 3, replace=False)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: problems(*job), jobs))
    assert [text for texts in found for text in texts] == []


def test_the_decoder_knows_loads_and_local_memory():
    source = b"""
struct alignas(16) V { int x, y, z, w; };
__global__ void wide(const V* a, V* b) { b[threadIdx.x] = a[threadIdx.x]; }
__global__ void narrow(const int* a, int* b) { b[threadIdx.x] = a[threadIdx.x]; }
__global__ void local(const int* a, int* b) {
  int x[500];
  for (int i = 0; i < 500; ++i) x[i] = a[i] * i;
  b[0] = x[a[40]] + x[a[41]];
}
"""
    for arch in ARCHS:
        found = {}
        for name in ("wide", "narrow", "local"):
            text = source.decode()
            others = "|".join({"wide", "narrow", "local"} - {name})
            text = re.sub(rf"__global__ (void ({others}))", r"static inline __device__ \1", text)
            found[name] = instructions(compiled(name, arch, source=text.encode())[1])
        loads = {
            name: sum(counts[opcode, SIXTEEN_BYTES] for opcode in LOADS)
            for name, counts in found.items()
        }
        assert loads["wide"] == 1, arch
        assert loads["narrow"] == 0, arch
        for name, counts in found.items():
            assert any(opcode in LOCAL for opcode, _ in counts) == (name == "local"), (arch, name)


NARROW = "load_piece<4>(source, bytes < 16 ? bytes : 16)"


@pytest.mark.parametrize(
    ("file", "right", "wrong", "said"),
    [
        ("pool.cu", "__launch_bounds__(kThreads, 6)", "__launch_bounds__(kThreads, 16)", "spilled"),
        ("cusparge/rows.cuh", "ptx::ld_global_16(source)", NARROW, "loads of 16 bytes"),
        ("cusparge/rows.cuh", "kInFlight = 4 /", "kInFlight = 16 /", "registers|spilled"),
    ],
)
def test_a_planted_mistake_is_seen(file, right, wrong, said):
    text = sources.load()
    files = {name: data.decode() for name, data in text.files.items()}
    assert right in files[file]
    files[file] = files[file].replace(right, wrong)
    headers = {name: files[name].encode() for name in text.headers}
    found = problems(POOL, "sm_90a", source=files["pool.cu"].encode(), headers=headers)
    assert re.search(said, " ".join(found)), found
