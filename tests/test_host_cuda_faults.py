"""Every check of the emulation can fail: kernels with one planted fault each, in every schedule.

The kernels without a fault must give the right numbers and no report; that half keeps the checks
from crying wolf. Reports are matched by their kind, and must name a line of the kernel.
"""

import re

import numpy as np
import pytest
from host_cuda import emu

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]

FOLDER = emu.HERE / "kernels"
schedules = pytest.mark.parametrize("schedule", emu.SCHEDULES)

RACE, DEADLOCK, BOUNDS = "race in ", "deadlock in ", "out of bounds in "
UNINITIALISED, DIVERGENT = "uninitialised read in ", "divergent collective in "
COPY, MBARRIER, WGMMA = (
    "async copy in flight in ",
    "misuse of an mbarrier in ",
    "wgmma in flight in ",
)
MISALIGNED, GROUP = "misaligned access in ", "warpgroup misuse in "
PROXY, FENCE = "missing fence.proxy.async in ", "missing wgmma.fence in "

#: kernel -> {number of the fault: start of the report, or several where schedules differ}
FAULTS = {
    "exchange": {
        1: (RACE, UNINITIALISED),
        2: (RACE, UNINITIALISED),
        3: DEADLOCK,
        4: (RACE, "barrier misuse in ", UNINITIALISED),
        5: (DEADLOCK, UNINITIALISED),
        6: BOUNDS,
        7: RACE,
        8: (RACE, UNINITIALISED),
        9: MISALIGNED,
        10: BOUNDS,
        11: "wrong address space in ",
        12: UNINITIALISED,
        13: (RACE, UNINITIALISED),
        14: RACE,
    },
    "move": {
        1: BOUNDS,
        2: BOUNDS,
        3: "unwritten output: argument 1",
        4: "write to an input in ",
        5: UNINITIALISED,
        6: RACE,
        7: (RACE, UNINITIALISED),
        8: BOUNDS,
        9: "signed overflow in ",
        10: MISALIGNED,
        11: "stale read in ",
        12: BOUNDS,
        13: "shift out of range in ",
        14: "division by zero or overflow in ",
        15: "index out of range in ",
        16: MISALIGNED,
        17: RACE,
        18: "endless loop in ",
    },
    "increment": {1: RACE},
    "collect": {
        1: DIVERGENT,
        2: DIVERGENT,
        3: DIVERGENT,
        4: DIVERGENT,
        5: DIVERGENT,
        6: (DIVERGENT, DEADLOCK),
        7: DIVERGENT,
    },
    "handover": {
        1: (DEADLOCK, UNINITIALISED),
        2: (RACE, DEADLOCK, UNINITIALISED),
        3: "barrier misuse in ",
        4: (RACE, UNINITIALISED, DEADLOCK),
    },
    "count": {1: UNINITIALISED, 2: (RACE, UNINITIALISED), 3: RACE, 4: RACE},
    "stream": {
        1: COPY,
        2: (RACE, COPY, UNINITIALISED),
        3: COPY,
        4: COPY,
        5: (RACE, COPY),
        6: MISALIGNED,
        7: BOUNDS,
        8: COPY,
        9: COPY,
    },
    "ring": {
        1: "missing fence.mbarrier_init in ",
        2: (COPY, UNINITIALISED, RACE),
        3: DEADLOCK,
        4: (MBARRIER, COPY, RACE, DEADLOCK),
        5: (DEADLOCK, MBARRIER),
        6: (MBARRIER, COPY, RACE, UNINITIALISED, DEADLOCK),
        7: DEADLOCK,
        8: (MBARRIER, RACE, COPY),
        9: (COPY, UNINITIALISED, RACE),
        10: (RACE, COPY, MBARRIER),
        11: (RACE, MBARRIER),
        12: (RACE, COPY, UNINITIALISED),
        13: MISALIGNED,
        14: PROXY,
        15: MBARRIER,
        16: (MBARRIER, RACE, COPY, DEADLOCK),
        17: (COPY, DEADLOCK),
        18: MBARRIER,
        19: PROXY,
        21: MBARRIER,
        22: RACE,
        23: MBARRIER,
        24: (MBARRIER, DEADLOCK),
    },
    "product": {
        1: PROXY,
        2: PROXY,
        3: (RACE, UNINITIALISED, PROXY),
        4: FENCE,
        5: FENCE,
        6: WGMMA,
        7: WGMMA,
        8: WGMMA,
        9: WGMMA,
        10: WGMMA,
        11: "wgmma descriptor in ",
        12: MISALIGNED,
        13: GROUP,
        14: GROUP,
        15: GROUP,
        16: FENCE,
        17: FENCE,
        18: WGMMA,
        19: (RACE, WGMMA),
        22: BOUNDS,
    },
    "loaded": {1: (WGMMA, RACE, COPY), 2: (RACE, COPY, UNINITIALISED), 3: (WGMMA, RACE, COPY)},
    "weighted": {1: FENCE, 2: WGMMA, 3: WGMMA, 4: FENCE, 5: FENCE},
    "shift": {1: GROUP, 2: "setmaxnreg in ", 3: "setmaxnreg in ", 4: GROUP},
}
#: What the report must say besides, where several checks begin it alike.
SAYS = {
    ("collect", 1): "lacks its own lane 0",
    ("collect", 5): "reads lane 20, which is not in mask",
    ("collect", 7): "its warp has 8 lanes",
    ("ring", 23): "has all of its 1 arrivals",
    ("ring", 24): "64 bytes outstanding",
    ("ring", 18): "each is initialised once",
    ("ring", 21): "waits for parity 2",
    ("product", 4): "no wgmma.fence since",
    ("product", 5): "register 3 of its accumulators",
    ("product", 7): "still accumulates into",
    ("weighted", 1): "of its operand A",
    ("weighted", 2): "still reads",
    ("shift", 2): "the other direction",
    ("shift", 3): "asks for 25600 registers",
}
#: Without a fault, though they look as if they had one.
CLEAN = [(name, 0) for name in FAULTS] + [("ring", 20)]

FILES = {
    "faults_memory.cu": ["exchange", "move", "increment", "collect", "handover", "count"],
    "faults_async.cu": ["stream", "ring"],
    "faults_wgmma.cu": ["product", "loaded", "weighted", "shift"],
}
FILE_OF = {name: file for file, names in FILES.items() for name in names}


@pytest.fixture(scope="module", autouse=True)
def built():
    for file, names in FILES.items():
        cases = [(name, bug) for name in names for bug in FAULTS[name]]
        cases += [(name, bug) for name, bug in CLEAN if name in names]
        emu.build(FOLDER / file, *(f"faults::{name}<{bug}>" for name, bug in cases))


def swizzled64(tile):
    """Rows of 64 bytes as the 64-byte swizzle stores them."""
    pieces = tile.reshape(-1, 8, 4, 16)
    placed = np.empty_like(pieces)
    for row in range(8):
        placed[:, row, np.arange(4) ^ (row // 2)] = pieces[:, row]
    return placed.reshape(-1)


def run(name, bug, schedule, rng):
    """Launch a kernel; return its output and what it should be."""
    block, grid, smem, registers = 64, 1, 0, 0
    if name == "exchange":
        x, out = rng.integers(0, 2**32, 64, dtype=np.uint32), np.zeros(64, np.uint32)
        args, expected, smem = [emu.In(x), emu.Out(out)], x[np.arange(64) ^ 32], 256
    elif name == "move":
        x, out = rng.standard_normal(100).astype(np.float32), np.zeros(100, np.float32)
        if bug == 18:
            x[:] = 1
        params = bytes(16) + np.int64(100).tobytes()
        pointers = {0: emu.In(x), 8: emu.Out(out)}
        emu.launch_params(
            FOLDER / FILE_OF[name],
            f"faults::{name}<{bug}>",
            2,
            64,
            params,
            pointers,
            schedule=schedule,
            seed=int(rng.integers(2**32)),
        )
        return out, x
    elif name == "increment":
        out = rng.integers(0, 99, 128).astype(np.uint32)
        args, grid, expected = [emu.InOut(out)], 2, out + 1
    elif name == "collect":
        block = 40 if bug == 7 else 32
        x, out = rng.integers(0, 99, block).astype(np.uint32), np.zeros(block, np.uint32)
        args, expected = [emu.In(x), emu.Out(out)], np.full(block, x.sum(), np.uint32)
    elif name == "handover":
        x, out = rng.integers(0, 2**31, 192).astype(np.uint32), np.zeros(96, np.uint32)
        args, expected = [emu.In(x), emu.Out(out)], x.reshape(3, 2, 32).sum(1).ravel()
        block, smem = 96, 256
    elif name == "count":
        x, out = rng.integers(0, 99, 64).astype(np.uint32), np.zeros(1, np.uint32)
        args, expected, smem = [emu.In(x), emu.InOut(out)], [64 * x.sum()], 4
    elif name == "stream":
        x = rng.integers(0, 2**28, (296, 4)).astype(np.uint32)
        out, tiles = np.zeros(64, np.uint32), np.zeros((320, 4), np.uint32)
        tiles[:296] = x
        expected = tiles[:, 1].reshape(5, 64).sum(0)[np.arange(64) ^ 33]
        args, smem = [emu.In(x), emu.Out(out)], 2048
    elif name == "ring":
        x, out = rng.integers(0, 2**28, (5, 128)).astype(np.uint32), np.zeros(128, np.uint32)
        args, expected = [emu.In(x), emu.Out(out)], x.sum(0)
        block, smem = 160, 1024 + 32
    elif name == "product":
        a, b = (rng.integers(-128, 128, (64, 64)).astype(np.int8) for _ in range(2))
        tiles = np.concatenate([swizzled64(a), swizzled64(b)]).view(np.uint32)
        out = np.zeros((128, 32), np.int32)
        args, block, smem = [emu.In(tiles), emu.Out(out)], 128, 8192
        expected = accumulators(2 * a.astype(np.int64) @ b.astype(np.int64).T)
    elif name == "loaded":
        tiles = rng.integers(-128, 128, (4, 64, 64)).astype(np.int8)
        out = np.zeros((128, 32), np.int32)
        data = np.concatenate([swizzled64(tile) for tile in tiles])
        args, block, smem = [emu.In(data.view(np.uint8)), emu.Out(out)], 128, 8192 + 16
        whole = tiles.astype(np.int64)
        expected = accumulators(whole[0] @ whole[1:].sum(0).T)
    elif name == "weighted":
        areg = np.full((128, 8), 0x38383838, np.uint32)  # ones
        tile = rng.choice(np.array([0x38, 0xB8, 0x40, 0], np.uint8), (64, 64))  # 1, -1, 2, 0
        value = np.select([tile == 0x38, tile == 0xB8, tile == 0x40], [1, -1, 2], 0)
        out = np.zeros((128, 32), np.float32)
        args = [emu.In(areg), emu.In(swizzled64(tile).view(np.uint32)), emu.Out(out)]
        expected = accumulators(np.broadcast_to(value.sum(1), (64, 64)))
        block, smem = 128, 4096
    else:
        out, registers, block = np.zeros(256, np.uint32), 96, 256
        args, expected = [emu.Out(out)], np.arange(256)
    emu.launch(
        FOLDER / FILE_OF[name],
        f"faults::{name}<{bug}>",
        grid,
        block,
        args,
        smem_bytes=smem,
        schedule=schedule,
        seed=int(rng.integers(2**32)),
        registers=registers,
    )
    return out, expected


def accumulators(d):
    """The registers [thread][32] of a 64 x 64 product."""
    thread, i = np.indices((128, 32))
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    return d[row, i // 4 * 8 + thread % 4 * 2 + i % 2]


@schedules
@pytest.mark.parametrize(("name", "bug"), CLEAN)
def test_a_correct_kernel_gives_its_numbers_and_no_report(name, bug, schedule, rng):
    for _ in range(5 if schedule == "random" else 1):
        out, expected = run(name, bug, schedule, rng)
        np.testing.assert_array_equal(out, expected)


CASES = [
    (name, bug, schedule)
    for name, faults in FAULTS.items()
    for bug in faults
    for schedule in emu.SCHEDULES
    # Its millions of accesses take a while, and are counted alike in every schedule.
    if (name, bug) != ("move", 18) or schedule == "eager"
]


@pytest.mark.parametrize(("name", "bug", "schedule"), CASES)
def test_a_planted_fault_is_reported(name, bug, schedule, rng):
    allowed = FAULTS[name][bug]
    with pytest.raises(emu.EmuError) as caught:
        run(name, bug, schedule, rng)
    report = str(caught.value)
    assert report.startswith(allowed), report
    assert SAYS.get((name, bug), "") in report
    assert f"[{emu.BACKEND}" in report
    if not report.startswith("unwritten output"):
        assert re.search(re.escape(FILE_OF[name]) + r":\d+|registers in all", report), report
