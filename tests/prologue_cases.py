"""Inputs for the prologue kernels: shapes, layouts, data, and lists of packed sequences.

`prologue_oracle` says what must come out of them.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pool_cases
from pool_cases import normal

from cusparge._cuda.prologue import prologue_plan


@dataclass(frozen=True)
class Case:
    """One call: shapes, how the arrays lie in memory, and what is in them."""

    dtype: str = "bfloat16"
    arch: str = "sm_90a"
    heads: tuple = (2, 1)  # of q, of k
    tokens: tuple = (130, 70)  # of q, of k
    head_dim: int = 64
    batch: int = 1
    fills: tuple = (normal, normal, normal)
    layout: str = "HND"
    lengths: tuple = None
    packed: tuple = None  # cu_seqlens_q, cu_seqlens_k
    sm_scale: float = 0.25
    shift: bool = True

    def __str__(self):
        names = "-".join(dict.fromkeys(fill.__name__ for fill in self.fills))
        kind = "-packed" if self.packed else "-lengths" if self.lengths else ""
        (nq, nk), (hq, hk) = self.tokens, self.heads
        shape = f"{self.batch}x{hq}.{hk}x{nq}.{nk}x{self.head_dim}"
        return f"{self.dtype}-{self.arch}-{shape}-{names}-{self.layout}{kind}"

    @property
    def shape_q(self):
        return (self.batch, self.heads[0], self.tokens[0], self.head_dim)

    @property
    def shape_k(self):
        return (self.batch, self.heads[1], self.tokens[1], self.head_dim)


@dataclass(frozen=True)
class Placed:
    """An array in memory."""

    memory: np.ndarray
    offset: int
    strides: tuple  # of batch, heads and tokens, in elements
    shape: tuple

    @property
    def view(self):
        item = self.memory.itemsize
        return np.lib.stride_tricks.as_strided(
            self.memory[self.offset :], self.shape, [item * s for s in (*self.strides, 1)]
        )


def place(case, shape, values):
    like = pool_cases.Case(case.dtype, shape, layout=case.layout)
    return Placed(*pool_cases.place(like, values), shape)


def inputs(case, rng):
    """Return q, k and v in memory."""
    shapes = (case.shape_q, case.shape_k, case.shape_k)
    return [
        place(case, shape, fill(rng, shape, case.dtype))
        for shape, fill in zip(shapes, case.fills, strict=True)
    ]


def plan_of(case, placed):
    return prologue_plan(
        case.arch,
        case.dtype,
        case.shape_q,
        case.shape_k,
        *(one.strides for one in placed),
        case.sm_scale,
        has_lengths=case.lengths is not None,
        num_sequences=None if case.packed is None else len(case.packed[0]) - 1,
        wants_shift=case.shift,
    )


def lists(case):
    """Return the int32 arrays of a call by name."""
    found = {}
    if case.lengths is not None:
        found["lengths"] = case.lengths
    if case.packed is not None:
        found["cu_seqlens_q"], found["cu_seqlens_k"] = case.packed
    return {name: np.array(values, np.int32) for name, values in found.items()}


# ---- sequences ---------------------------------------------------------------------------------


def clamped(ends, total):
    """Return cu_seqlens as the kernels read it: within the array and never falling."""
    return np.maximum.accumulate(np.clip(np.asarray(ends, np.int64), 0, total)).tolist()


@dataclass(frozen=True)
class Part:
    """One sequence: its tokens in an array, and its blocks among those of a row."""

    tokens: slice
    blocks: slice


def parts(case, which):
    """Return the sequences of q (0) or k (1)."""
    total, step = case.tokens[which], (128, 64)[which]
    if case.packed is None:
        blocks = slice(0, max(which, -(-total // step)))
        counts = [total] * case.batch
        if which and case.lengths is not None:
            counts = [min(max(n, 0), total) for n in case.lengths]
        return [Part(slice(0, n), blocks) for n in counts]
    ends = clamped(case.packed[which], total)
    found, first = [], 0
    for begin, end in itertools.pairwise(ends):
        last = first + -(-(end - begin) // step)
        found.append(Part(slice(begin, end), slice(first, last)))
        first = last
    return found


# ---- the cases ---------------------------------------------------------------------------------

#: One format for each dtype and width, so that every format meets every width and dtype.
ARCHS = {
    ("float16", 64): "sm_80",
    ("bfloat16", 64): "sm_90a",
    ("float32", 64): "sm_89",
    ("float16", 128): "sm_90a",
    ("bfloat16", 128): "sm_89",
    ("float32", 128): "sm_80",
    ("float16", 256): "sm_89",
    ("float32", 256): "sm_89",
}
#: Sizes whose tiles are swizzled on sm_90a: there the others need a kernel of their own.
SWIZZLED = {64: range(33, 65), 128: range(97, 129)}

PACKED = (
    ((0, 70, 70, 71, 199, 200), (0, 65, 129, 129, 130, 230)),
    ((0, 0, 130), (0, 70, 70)),  # the first and the last sequence lack tokens
)
#: Lists that nobody has checked: falling, negative, beyond the array, not beginning at 0.
HOSTILE = (
    ((3, 90, 40, -5, 260), (-7, 300, 20, 64, 65)),
    ((2**31 - 1, -(2**31), 5), (50, 40, 30)),
    ((0, 0, 0), (0, 0, 0)),
)


def fills():
    """Every kind of data once in each place."""
    kinds = pool_cases.FILLS
    return [(kinds[i], kinds[(i + 3) % len(kinds)], kinds[(2 * i + 1) % len(kinds)])
            for i in range(len(kinds))]  # fmt: skip


def arch_of(dtype, head_dim):
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    arch = ARCHS[dtype, width]
    return arch if arch != "sm_90a" or head_dim in SWIZZLED[width] else None


def _cases():
    dtypes = ("bfloat16", "float16", "float32")
    sizes = ((1, 1), (64, 63), (65, 64), (127, 65), (129, 128), (300, 129), (5, 330))
    for i, tokens in enumerate(sizes):  # one and several blocks, whole and not
        for j, head_dim in enumerate((1, 40, 64, 72, 80, 100, 128, 129, 256)):
            dtype = dtypes[(i + j) % 3]
            if (i + 2 * j) % 3 == 0 and (dtype, head_dim) != ("bfloat16", 256):
                yield dtype, head_dim, {"tokens": tokens}
    for i, kinds in enumerate(fills()):
        for dtype in dtypes:
            yield dtype, (40, 64, 50)[i % 3], {"fills": kinds, "tokens": (200, 150)}
    for dtype, head_dim in (("float16", 40), ("bfloat16", 39), ("float32", 129), ("float16", 121)):
        for layout in pool_cases.LAYOUTS:
            tokens = (70, 70)  # one array after the other: equal lengths for every layout
            yield dtype, head_dim, {"layout": layout, "heads": (2, 2), "batch": 2, "tokens": tokens}
    for dtype in dtypes:
        lengths = (150, 0, 65, -(2**31))
        kinds = (normal, pool_cases.non_finite, pool_cases.non_finite)
        yield dtype, 44, {"batch": 4, "lengths": lengths, "tokens": (9, 150), "fills": kinds}
    for i, packed in enumerate((*PACKED, *HOSTILE)):
        kinds = (pool_cases.non_finite,) * 3 if i % 2 else (normal,) * 3
        more = {"packed": packed, "tokens": (200, 230), "layout": "NHD", "fills": kinds}
        yield dtypes[i % 3], 40, {**more, "tokens": (130, 70) if i == 1 else (200, 230)}
    for sm_scale in (-0.3, 0.0, 3e38, -1e-30):
        yield "bfloat16", 64, {"sm_scale": sm_scale}
    yield "float32", 64, {"tokens": (3, 1500), "heads": (1, 1)}  # several chunks
    yield "float16", 64, {"tokens": (3, 0), "heads": (4, 2)}
    yield "bfloat16", 64, {"tokens": (2, 3), "batch": 2, "heads": (2, 2), "layout": "far"}
    yield "float32", 100, {"tokens": (3, 2), "batch": 2, "heads": (2, 2), "layout": "far"}


def cases():
    """Return the cases that every run goes through."""
    found = []
    for dtype, head_dim, options in _cases():
        arch = arch_of(dtype, head_dim)
        if arch is None:  # a size that this kernel does not swizzle: another, of the same width
            head_dim, arch = (64, "sm_90a") if head_dim <= 64 else (128, "sm_90a")
        found.append(Case(dtype, arch, head_dim=head_dim, shift=len(found) % 3 > 0, **options))
    return found


CASES = cases()


def random_case(rng, archs=("sm_80", "sm_89", "sm_90a")):
    """Return any case at all, of moderate size, for the kernels of any of these architectures."""
    dtype = str(rng.choice(("float16", "bfloat16", "float32")))
    batch, heads_k = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    heads = (heads_k * int(rng.integers(1, 3)), heads_k)
    tokens = tuple(int(n) for n in rng.integers(1, 200, 2))
    lengths = packed = None
    layout = str(rng.choice(pool_cases.LAYOUTS))
    kind = rng.integers(3)
    if kind == 0:
        lengths = tuple(map(int, rng.integers(-2, tokens[1] + 3, batch)))
    elif kind == 1:
        sequences = int(rng.integers(1, 9))
        ends = [np.sort(rng.integers(0, n + 1, sequences + 1)) for n in tokens]
        if rng.random() < 0.3:
            ends = [rng.permutation(some) for some in ends]
        packed, batch = tuple(tuple(map(int, some)) for some in ends), 1
    return Case(
        dtype,
        str(rng.choice(archs)),
        heads,
        tokens,
        int(rng.integers(1, 257)),
        batch,
        tuple(pool_cases.FILLS[i] for i in rng.integers(len(pool_cases.FILLS), size=3)),
        layout,
        lengths,
        packed,
        float(rng.choice([0.125, -1.0, 7.5])),
        bool(rng.integers(2)),
    )
