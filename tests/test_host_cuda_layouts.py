"""The emulation's tensor-core instructions against layouts written a second time, in NumPy.

Maps are those of the PTX ISA manual. The runtime states them in C++, this file as index arrays, so
agreement shows that both read the manual alike. That is host-emulated: no GPU took part.
"""

import itertools

import numpy as np
import pytest
from host_cuda import emu

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]

UNITS = emu.HERE / "kernels" / "units.cu"
LANE = np.arange(32)
GROUP, INSIDE = LANE // 4, LANE % 4

#: Value of every e4m3 code, from the format's definition.
E4M3 = np.array(
    [
        (-1) ** (code >> 7)
        * (
            np.nan
            if code & 127 == 127
            else (code & 7) * 2.0**-9
            if code & 120 == 0
            else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3 & 15) - 7)
        )
        for code in range(256)
    ]
)
schedules = pytest.mark.parametrize("schedule", emu.SCHEDULES)


def launch(expression, block, args, **options):
    emu.launch(UNITS, f"units::{expression}", 1, block, args, **options)


LDMATRIX = [f"load_matrices<{n}, {t}>" for n in (1, 2, 4) for t in ("false", "true")]
MMA = {
    "f16": "multiply<units::kF16, float>",
    "bf16": "multiply<units::kBf16, float>",
    "s8": "multiply<units::kS8, int>",
    "e4m3": "multiply<units::kE4m3, float>",
}
#: type, columns
WGMMA_SHAPES = [
    ("int", 64),
    ("int", 128),
    ("float", 64),
    ("float", 72),
    ("float", 128),
    ("float", 136),
]
#: bytes of swizzle (0: none): how many steps of 32 bytes along k a tile holds
STEPS = {128: 4, 64: 2, 32: 1, 0: 2}


def wgmma_name(kind, columns, swizzle, registers):
    flag = "true" if registers else "false"
    return f"warpgroup<{kind}, {columns // 2}, {STEPS[swizzle]}, {flag}>"


@pytest.fixture(scope="module", autouse=True)
def built():
    names = [*LDMATRIX, *MMA.values()]
    for (kind, columns), swizzle, registers in itertools.product(
        WGMMA_SHAPES, (128, 64, 32), (False, True)
    ):
        names.append(wgmma_name(kind, columns, swizzle, registers))
    emu.build(UNITS, *(f"units::{name}" for name in names))


@schedules
@pytest.mark.parametrize("name", LDMATRIX)
def test_ldmatrix(name, schedule, rng):
    count, transposed = int(name[14]), "true" in name
    matrices = rng.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    out = np.zeros((32, count), np.uint32)
    launch(
        name,
        32,
        [emu.In(matrices.view(np.uint32)), emu.Out(out)],
        smem_bytes=512,
        schedule=schedule,
    )
    m = matrices[:count].swapaxes(1, 2) if transposed else matrices[:count]
    expected = np.stack([m[:, GROUP, 2 * INSIDE], m[:, GROUP, 2 * INSIDE + 1]], axis=-1)
    np.testing.assert_array_equal(
        out.view(np.uint16).reshape(32, count, 2), expected.transpose(1, 0, 2)
    )


def fragments_a(a):
    """Return A, 16 rows of bytes or halves, as registers [lane][4] of 32 bits."""
    packed = 4 // a.itemsize
    k = packed * INSIDE[:, None] + np.arange(packed)
    quarters = [a[(GROUP + 8 * (r % 2))[:, None], k + r // 2 * 4 * packed] for r in range(4)]
    return np.ascontiguousarray(np.stack(quarters, axis=1)).view(np.uint32).reshape(32, 4)


def fragments_b(b):
    """Return B, stored as 8 columns of consecutive k, as registers [lane][2]."""
    packed = 4 // b.itemsize
    k = packed * INSIDE[:, None] + np.arange(packed)
    halves = [b[GROUP[:, None], k + r * 4 * packed] for r in range(2)]
    return np.ascontiguousarray(np.stack(halves, axis=1)).view(np.uint32).reshape(32, 2)


def fragments_c(c):
    rows = np.stack([GROUP, GROUP, GROUP + 8, GROUP + 8], axis=1)
    return rows, np.stack([2 * INSIDE, 2 * INSIDE + 1] * 2, axis=1)


@schedules
@pytest.mark.parametrize("form", MMA)
def test_mma(form, schedule, rng):
    depth = 32 if form in ("s8", "e4m3") else 16
    shapes = (16, depth), (8, depth)
    if form == "s8":
        a, b = (rng.integers(-128, 128, s).astype(np.int8) for s in shapes)
        c = rng.integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
        values = a.astype(np.int64), b.astype(np.int64)
    else:  # small whole numbers: every sum is exact
        values = tuple(rng.integers(-8, 9, s).astype(np.float64) for s in shapes)
        c = rng.integers(-99, 99, (16, 8)).astype(np.float32)
        if form == "f16":
            a, b = (v.astype(np.float16).view(np.uint16) for v in values)
        elif form == "bf16":
            a, b = ((v.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for v in values)
        else:
            a, b = (np.argmax(E4M3 == v[..., None], axis=-1).astype(np.uint8) for v in values)
    rows, columns = fragments_c(c)
    out = np.zeros((32, 4), c.dtype)
    args = [
        emu.In(fragments_a(a)),
        emu.In(fragments_b(b)),
        emu.In(np.ascontiguousarray(c[rows, columns])),
        emu.Out(out),
    ]
    launch(MMA[form], 32, args, schedule=schedule)
    expected = (values[0] @ values[1].T + c).astype(c.dtype)
    np.testing.assert_array_equal(out, expected[rows, columns])


def image(tile, swizzle):
    """Return a tile's bytes as they lie in shared memory, and its descriptor's upper bits.

    The swizzle is stated as the exchange of 16-byte pieces inside groups of 8 rows.
    """
    rows, width = tile.shape
    pieces = tile.reshape(rows // 8, 8, width // 16, 16)
    if swizzle == 0:  # core matrices of 8 rows x 16 bytes, one behind the other
        high = (8 * width >> 4) << 32 | (128 >> 4) << 16
        return pieces.transpose(0, 2, 1, 3).reshape(-1), high
    placed = np.empty_like(pieces)
    for row in range(8):
        moved = np.arange(width // 16) ^ (row // {128: 1, 64: 2, 32: 4}[swizzle])
        placed[:, row, moved] = pieces[:, row]
    mode = {128: 1, 64: 2, 32: 3}[swizzle]
    return placed.reshape(-1), mode << 62 | (8 * width >> 4) << 32 | 1 << 16


def run_wgmma(kind, a, b, swizzle, registers, schedule, seed=0):
    """Multiply tiles of bytes by wgmma; return D as [row][column]."""
    columns, steps = len(b), STEPS[swizzle]
    image_a, high_a = image(a, swizzle)
    image_b, high_b = image(b, swizzle)
    data = np.concatenate([image_a, image_b])
    areg = (
        np.stack(
            [
                fragments_a(a[16 * w : 16 * w + 16, 32 * k : 32 * k + 32])
                for w in range(4)
                for k in range(steps)
            ]
        )
        .reshape(4, steps, 32, 4)
        .transpose(0, 2, 1, 3)
    )
    out = np.zeros((128, columns // 2), np.int32 if kind == "int" else np.float32)
    step = 256 if swizzle == 0 else 32
    launch(
        wgmma_name(kind, columns, swizzle, registers),
        128,
        [
            emu.In(data.view(np.uint32)),
            emu.In(np.ascontiguousarray(areg)),
            emu.Out(out),
            np.uint64(high_a),
            np.uint64(high_b),
            np.uint32(data.size // 4),
            np.uint32(image_a.size),
            np.uint32(step),
            np.uint32(step),
        ],
        smem_bytes=data.size,
        schedule=schedule,
        seed=seed,
    )
    d = np.empty((64, columns), out.dtype)
    thread, i = np.indices(out.shape)
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    d[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = out
    return d


@schedules
@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("swizzle", STEPS)
@pytest.mark.parametrize(("kind", "columns"), WGMMA_SHAPES)
def test_wgmma(kind, columns, swizzle, registers, schedule, rng):
    width = 32 * STEPS[swizzle]
    shapes = (64, width), (columns, width)
    if kind == "int":
        a, b = (rng.integers(-128, 128, s).astype(np.int8).view(np.uint8) for s in shapes)
        expected = a.view(np.int8).astype(np.int64) @ b.view(np.int8).astype(np.int64).T
    else:
        values = [rng.integers(-8, 9, s) for s in shapes]
        expected = values[0] @ values[1].T
        a, b = (np.argmax(E4M3 == v[..., None], axis=-1).astype(np.uint8) for v in values)
    seed = int(rng.integers(2**32))
    d = run_wgmma(kind, a, b, swizzle, registers, schedule, seed)
    np.testing.assert_array_equal(d, expected)


def test_wgmma_of_all_e4m3_codes(rng):
    """Subnormals, the largest numbers and NaN, which spreads over its row and no further."""
    a, b = (rng.integers(0, 256, (64, 64)).astype(np.uint8) for _ in range(2))
    a[np.isnan(E4M3[a])] = 0x01
    b[np.isnan(E4M3[b])] = 0x7E
    a[5, 7] = 0xFF
    d = run_wgmma("float", a, b, 64, False, "lazy")
    expected = E4M3[a] @ E4M3[b].T
    assert np.isnan(d[5]).all()
    assert not np.isnan(np.delete(d, 5, axis=0)).any()
    # Two float32 roundings of sums below |a| |b|^T.
    bound = 2.0**-23 * (np.nan_to_num(np.abs(E4M3[a])) @ np.abs(E4M3[b]).T)
    assert (np.abs(d - expected) <= bound)[np.arange(64) != 5].all()
