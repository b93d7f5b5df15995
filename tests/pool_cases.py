"""Inputs for the pooling kernels, a float64 oracle of them, and how close results must be.

Shared by the emulated tests and by those on a GPU. The oracle is written from the definitions and
shares no code with the package.
"""

import itertools
import mmap
from dataclasses import dataclass, field

import numpy as np

from cusparge._cuda.pooling import pool_plan

LARGEST = float(np.finfo(np.float32).max)

#: Rounding of float32.
EPS = 2.0**-24
#: What the kernels' unit of 2^-9 costs near the smallest numbers: half of 2^-149 per addition.
TINY = 2.0**-137
#: Additions behind a number, at most: 64 in a thread and 4 slots, or 16 and 16, then 16 warps;
#: conversions and factors add a handful. Each rounds to within EPS of a sum no larger than that of
#: the magnitudes.
DEPTH = 90
#: The error of a mean unit vector is at most (DEPTH + 2) EPS for its additions, 2^-22.9 for the
#: reciprocal root and 16 EPS for the sum of squares in it; squaring a length up to 1 doubles it.
SIMILARITY = 2 * ((DEPTH + 2 + 16) * EPS + 2.0**-22.9)


# ---- number formats ----------------------------------------------------------------------------


def encode(values, dtype):
    """Return the nearest numbers of a format as their bits (uint16), or as float32."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "float16":
            return values.astype(np.float16).view(np.uint16)
        single = values.astype(np.float32)
        if dtype == "float32":
            return single
        bits = single.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16)


def decode(stored, dtype):
    """Return what bits mean, in float64."""
    if dtype == "float16":
        return stored.view(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


# ---- inputs ------------------------------------------------------------------------------------


def smallest(dtype):
    return {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}[dtype]


def largest(dtype):
    return {"float16": 65504.0, "bfloat16": 255 * 2.0**120, "float32": LARGEST}[dtype]


def normal(rng, shape, dtype):
    """Tokens around a common vector, one in eight of them zero."""
    x = rng.normal(size=shape) + 2 * rng.normal(size=(*shape[:2], 1, shape[3]))
    return x * (rng.random((*shape[:3], 1)) > 1 / 8)


def tiny(rng, shape, dtype):
    return smallest(dtype) * rng.integers(-3, 4, shape)


def huge(rng, shape, dtype):
    """Near the largest number; signs by heads, at random, or apart by more than float32 holds."""
    token = np.arange(shape[2])[:, None]
    patterns = [np.ones((shape[2], shape[3])), np.where(token < 64, 1.0, -1.0) + np.zeros(shape[3])]
    sign = np.stack([patterns[h % 2] for h in range(shape[1])])
    sign = sign * rng.choice([-1.0, 1.0], (*shape[:2], 1, 1))
    random = rng.choice([-1.0, 1.0], shape)
    sign = np.where(np.arange(shape[1])[:, None, None] % 3 == 2, random, sign)
    return largest(dtype) * sign * rng.uniform(0.75, 1.0, shape)


def peak(rng, shape, dtype):
    """The largest number, and nothing else in a head: its mean must not round to infinity."""
    return largest(dtype) * rng.choice([-1.0, 1.0], (*shape[:2], 1, 1)) * np.ones(shape)


def mixed(rng, shape, dtype):
    """Tokens of every magnitude of the format, side by side."""
    low, high = np.log2(smallest(dtype)) + 4, np.log2(largest(dtype)) - 1
    return np.exp2(rng.uniform(low, high, (*shape[:3], 1))) * rng.uniform(-1, 1, shape)


def non_finite(rng, shape, dtype):
    """A few elements that are NaN or infinite, in a third of the blocks of 64."""
    x = normal(rng, shape, dtype)
    bad = np.repeat(rng.random((*shape[:2], -(-shape[2] // 64))) < 1 / 3, 64, axis=2)
    where = bad[:, :, : shape[2], None] & (rng.random(shape) < 2 / (64 * shape[3]) + 0.002)
    where[-1, -1, rng.integers(shape[2]), rng.integers(shape[3])] = True
    x[where] = rng.choice([np.nan, np.inf, -np.inf], where.sum())
    return x


def at_mean(rng, shape, dtype):
    """Groups of three tokens a + b, a - b and a: every third one is the mean, but for rounding."""
    a = rng.integers(3, 60, (*shape[:2], 1, shape[3]))
    b = rng.integers(1, 4, (*shape[:2], -(-shape[2] // 3), 1, shape[3]))
    x = a[:, :, :, None] + b * np.array([1, -1, 0])[:, None]
    return x.reshape(*shape[:2], -1, shape[3])[:, :, : shape[2]].astype(np.float64)


def constant(rng, shape, dtype):
    """One vector repeated: smoothing leaves rounding, and that has no direction."""
    return np.broadcast_to(rng.normal(size=(*shape[:2], 1, shape[3])), shape)


def zeros(rng, shape, dtype):
    return np.zeros(shape)


@dataclass(frozen=True)
class Case:
    """One array, and how it lies in memory."""

    dtype: str
    shape: tuple  # batch, heads, tokens, head_dim
    block: int = 64
    smooth: bool = True
    fill: object = field(default=normal)
    layout: str = "HND"
    lengths: tuple = None

    def __str__(self):
        dims = "x".join(map(str, self.shape))
        smooth = "smooth" if self.smooth else "raw"
        return f"{self.dtype}-{dims}-{self.block}-{smooth}-{self.fill.__name__}-{self.layout}" + (
            "-lengths" if self.lengths else ""
        )


def place(case, values):
    """Return (1-D memory, element offset of x[0, 0, 0, 0], element strides of B, H and S)."""
    batch, heads, tokens, head_dim = case.shape
    stored = encode(values, case.dtype)
    if case.layout == "HND":
        strides, offset = (heads * tokens * head_dim, tokens * head_dim, head_dim), 0
    elif case.layout == "NHD":
        strides, offset = (tokens * heads * head_dim, head_dim, heads * head_dim), 0
    elif case.layout == "odd":  # odd distances, from an odd element on
        strides, offset = (heads * (tokens * (head_dim + 3) + 5), tokens * (head_dim + 3) + 5), 1
        strides = (*strides, head_dim + 3)
    elif case.layout == "padded":  # begins aligned, and only the distances are not
        strides, offset = (heads * tokens * (head_dim + 2), tokens * (head_dim + 2)), 0
        strides = (*strides, head_dim + 2)
    elif case.layout == "even":  # 4-byte words can be read, 16-byte ones cannot
        row = head_dim + head_dim % 2 + 2
        strides, offset = (heads * tokens * row, tokens * row, row), 2
    elif case.layout == "reversed":
        strides = (-heads * tokens * head_dim, -tokens * head_dim, -head_dim)
        offset = batch * heads * tokens * head_dim - head_dim
    elif case.layout == "one head":  # the same keys for all heads, as grouped queries see them
        strides, offset = (tokens * head_dim, 0, head_dim), 0
    elif case.layout == "one token":
        strides, offset = (heads * head_dim, head_dim, 0), 0
    elif case.layout == "far":  # no offset of a second token or head fits into 32 bits
        strides, offset = (head_dim, 2**32 + 8, 2**31 + 8), 0
    else:
        raise AssertionError(case.layout)
    reach = sum(max(0, s) * (n - 1) for s, n in zip(strides, case.shape, strict=False))
    memory = sparse_zeros(offset + reach + head_dim, stored.dtype)
    for b, h, t in itertools.product(range(batch), range(heads), range(tokens)):
        start = offset + b * strides[0] + h * strides[1] + t * strides[2]
        memory[start : start + head_dim] = stored[b, h, t]
    return memory, offset, strides


def sparse_zeros(count, dtype):
    """Zeros that take memory only where they are touched."""
    if count < 2**24:
        return np.zeros(count, dtype)
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which Python does not name in all versions
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype)


def read_back(case, memory, offset, strides):
    """Return the array that the strides describe, in float64."""
    x = np.zeros(case.shape)
    for b, h, t in itertools.product(*map(range, case.shape[:3])):
        start = offset + b * strides[0] + h * strides[1] + t * strides[2]
        x[b, h, t] = decode(memory[start : start + case.shape[3]], case.dtype)
    return x


# ---- the oracle --------------------------------------------------------------------------------


def real_tokens(case, b):
    return case.shape[2] if case.lengths is None else min(max(case.lengths[b], 0), case.shape[2])


def oracle_mean(case, x):
    """Return the mean over real tokens, and that of the magnitudes."""
    batch, heads, _, head_dim = case.shape
    mean, size = np.zeros((2, batch, heads, head_dim))
    for b, h in itertools.product(range(batch), range(heads)):
        tokens = x[b, h, : real_tokens(case, b)]
        tokens = np.where(np.isfinite(tokens), tokens, 0)
        if len(tokens):
            mean[b, h] = tokens.mean(axis=0)
            size[b, h] = np.abs(tokens).mean(axis=0)
    return mean, size


def oracle_blocks(case, x, mean):
    """Return the blocks' means and mean magnitudes, less `mean` (B, H, D), and similarities."""
    batch, heads, tokens, head_dim = case.shape
    count = -(-tokens // case.block)
    means, sizes = np.zeros((2, batch, heads, count, head_dim))
    similarity = np.ones((batch, heads, count))
    for b, h, j in np.ndindex(batch, heads, count):
        end = min((j + 1) * case.block, real_tokens(case, b))
        block = x[b, h, j * case.block : end]
        if not len(block):
            continue
        finite = np.isfinite(block)
        y = np.where(finite, block, 0) - np.where(finite, mean[b, h], 0)
        means[b, h, j] = y.mean(axis=0)
        sizes[b, h, j] = np.abs(y).mean(axis=0)
        length = np.sqrt((y * y).sum(axis=1))
        noise = 2.0**-22 * np.sqrt((np.where(finite, mean[b, h], 0) ** 2).sum(axis=1))
        pointing = length > noise
        if pointing.any():
            unit = y[pointing] / length[pointing, None]
            similarity[b, h, j] = min(1.0, ((unit.sum(axis=0) / len(block)) ** 2).sum())
        if not finite.all():
            similarity[b, h, j] = -1.0
    return means, sizes, similarity


# ---- running and judging -----------------------------------------------------------------------


def problems(case, rng, run):
    """Run a case and return what is wrong with its outputs: an empty list if all is well.

    `run(plan, x, lengths)` returns {name: array}: x is a view of the memory, lengths an int32 array
    or None. Every output starts as NaN.
    """
    memory, offset, strides = place(case, case.fill(rng, case.shape, case.dtype))
    x = read_back(case, memory, offset, strides)
    has_lengths = case.lengths is not None
    plan = pool_plan(case.dtype, case.shape, strides, case.block, case.smooth, has_lengths)
    lengths = np.array(case.lengths, np.int32) if has_lengths else None
    view = np.lib.stride_tricks.as_strided(
        memory[offset:], case.shape, [memory.itemsize * s for s in (*strides, 1)]
    )
    got = run(plan, view, lengths)
    assert got.keys() == {output.name for output in plan.outputs}
    found = []

    def compare(name, expected, bound):
        actual = got[name].astype(np.float64)
        assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
        error = np.abs(actual - expected)
        wrong = ~(error <= bound)  # NaN is wrong
        if wrong.any():
            at = tuple(map(int, np.argwhere(wrong)[0]))
            found.append(
                f"{case}: {name}{list(at)} is {actual[at]!r}, not {expected[at]!r} within "
                f"{np.broadcast_to(bound, expected.shape)[at]:.3g} ({wrong.sum()} of {wrong.size})"
            )

    subtracted = np.zeros((*case.shape[:2], case.shape[3]))
    if case.smooth:
        mean, size = oracle_mean(case, x)
        compare("token_mean", mean, DEPTH * EPS * size + TINY)
        # The blocks are judged by the mean that was taken off, so that its error counts once.
        subtracted = got["token_mean"].astype(np.float64)
    means, sizes, similarity = oracle_blocks(case, x, subtracted)
    compare("block_mean", np.clip(means, -LARGEST, LARGEST), DEPTH * EPS * sizes + TINY)
    compare("similarity", similarity, np.where(similarity < 0, 0.0, SIMILARITY))
    if (got["similarity"] > 1).any():
        found.append(f"{case}: a similarity above 1: {got['similarity'].max()!r}")
    return found


# ---- the cases ---------------------------------------------------------------------------------

DTYPES = ("float16", "bfloat16", "float32")
TOKENS = (1, 63, 64, 65, 127, 128, 129, 300)
HEAD_DIMS = (1, 7, 32, 64, 80, 96, 128, 256)
LAYOUTS = ("HND", "NHD", "odd", "even", "padded", "reversed", "one head", "one token")
FILLS = (normal, tiny, huge, peak, mixed, non_finite, at_mean, constant, zeros)

CASES = [
    # Every number of tokens with four sizes of head, every size with four numbers of tokens.
    *(
        Case(DTYPES[(i + j) % 3], (1, 2, tokens, head_dim), 64 << (i + j // 2) % 2, j % 4 != 3)
        for i, tokens in enumerate(TOKENS)
        for j, head_dim in enumerate(HEAD_DIMS)
        if (i + j) % 2 == 0
    ),
    *(
        Case(dtype, (1, 2, 130, 40), block, smooth, fill)
        for dtype in DTYPES
        for fill in FILLS
        for block, smooth in ((64, True), (128, False))
    ),
    *(
        Case(dtype, (2, 3, 70, head_dim), layout=layout)
        for dtype, head_dim in (("float16", 40), ("bfloat16", 39), ("float32", 129))
        for layout in LAYOUTS
    ),
    *(
        Case(dtype, (4, 2, 150, 72), block, smooth, non_finite, lengths=(150, 0, 65, 149))
        for dtype in DTYPES
        for block, smooth in ((64, True), (128, False))
    ),
    Case("float32", (1, 3, 300, 24), fill=huge),
    Case("bfloat16", (1, 3, 300, 24), fill=huge),
    Case("float16", (3, 1, 150, 24), lengths=(-(2**31), 2**31 - 1, 151)),
    Case("bfloat16", (2, 2, 3, 8), layout="far"),
    Case("float32", (2, 2, 3, 100), layout="far"),
]


def random_case(rng):
    """Return any case at all, of moderate size."""
    batch = int(rng.integers(1, 4))
    tokens = int(rng.integers(1, 280))
    lengths = tuple(map(int, rng.integers(-2, tokens + 3, batch))) if rng.random() < 0.5 else None
    return Case(
        str(rng.choice(DTYPES)),
        (batch, int(rng.integers(1, 4)), tokens, int(rng.integers(1, 257))),
        int(rng.choice((64, 128))),
        bool(rng.integers(2)),
        FILLS[rng.integers(len(FILLS))],
        str(rng.choice(LAYOUTS)),
        lengths,
    )
