"""Inputs for the kernels of block_map.cu: calls, and the pooled arrays that go with them.

The kernels read pooled blocks, so cases are made of those, not of tokens. Most hold small whole
numbers and a scale that is a power of two: then every product, score and difference is exact in
float32, equal scores abound, and the map must equal that of map_oracle.py bit for bit.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from cusparge._cuda import block_map
from cusparge.policy import Dense, TopCdf, TopK

# ---- one call ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of the map: shapes, policy and what the inputs look like."""

    shape: tuple  # batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim; totals where packed
    rule: str = "reach"  # "within", "topk", "dense"
    share: object = 0.9  # a number, or a tuple with one per query head
    sim: object = -1.0
    align: object = None  # "bottom_right", "top_left"; None: no causality
    lengths: object = None
    cu_q: object = None
    cu_k: object = None
    max_seqlen_k: object = None
    sink: int = 0
    local: int = 0
    scale: float = 0.125  # of scores in log2 units, any power of two, either sign or 0
    fill: str = "integers"
    rows: object = None  # of a tile, where the plan shall have no choice
    mask: bool = False
    queue: bool = True

    def __str__(self):
        dims = "x".join(map(str, self.shape))
        parts = [dims, self.rule, self.fill, self.align or "full"]
        for name in ("lengths", "cu_q", "sink", "local", "rows"):
            if getattr(self, name):
                parts.append(f"{name}{getattr(self, name) if name == 'rows' else ''}")
        return "-".join(parts).replace("_", "")

    @property
    def policy(self):
        options = {"sink_blocks": self.sink, "local_blocks": self.local}
        if self.rule == "dense":
            return Dense(**options)
        if self.rule == "topk":
            return TopK(self.share, self.sim, **options)
        return TopCdf(self.share, self.sim, rule=self.rule, **options)

    @property
    def map_shape(self):
        packed = None if self.cu_q is None else len(self.cu_q) - 1
        return block_map.MapShape(*self.shape, packed)

    def plan(self, **more):
        shape = self.map_shape
        options = dict(
            sm_scale=self.scale * math.log(2.0),
            causal=self.align is not None,
            causal_align=self.align or "bottom_right",
            has_lengths=self.lengths is not None,
            max_seqlen_k=self.max_seqlen_k,
            queue=self.queue,
            mask=self.mask,
        )
        if self.rows is not None:  # no more rows than this fit, or fit twice
            used = 256 + 4 * self.rows * (-(-shape.longest // 32) * 32 + 4)
            options["shared_limit"] = used if self.rows <= 2 else 1024 + 2 * used
        return block_map.map_plan(shape, self.policy, **options | more)


def blocks_of(case):
    """Return query and key blocks of a head's arrays."""
    _, _, _, seqlen_q, seqlen_k, _ = case.shape
    if case.cu_q is None:
        return math.ceil(seqlen_q / 128), math.ceil(seqlen_k / 64)
    return seqlen_q // 128 + len(case.cu_q) - 1, seqlen_k // 64 + len(case.cu_q) - 1


def inputs(case, rng):
    """Return the pooled arrays of a case, and its lengths."""
    batch, heads_q, heads_k, _, _, head_dim = case.shape
    blocks_q, blocks_k = blocks_of(case)
    shape_q, shape_k = (batch, heads_q, blocks_q), (batch, heads_k, blocks_k)
    q_mean = rng.integers(-3, 4, (*shape_q, head_dim)).astype(np.float32)
    k_mean = rng.integers(-3, 4, (*shape_k, head_dim)).astype(np.float32)
    q_similarity = rng.integers(0, 17, shape_q).astype(np.float32) / 16
    k_similarity = rng.integers(0, 17, shape_k).astype(np.float32) / 16
    if case.fill == "ties":  # two kinds of blocks
        kinds = k_mean[..., :2, :] if blocks_k > 1 else k_mean
        k_mean = np.take(kinds, rng.integers(0, kinds.shape[2], blocks_k), axis=2)
    elif case.fill == "zeros":
        k_mean[...] = 0
    elif case.fill == "steep":  # most weights are 0
        k_mean *= 64
    elif case.fill == "flat":
        k_mean *= rng.random((*shape_k, 1)) < 0.1
    elif case.fill == "bad":
        for array, bad in (
            (q_similarity, (-1, np.nan)),
            (k_similarity, (-1, np.nan)),
            (k_mean, (np.nan, np.inf, -np.inf)),
            (q_mean, (np.nan, np.inf)),
        ):
            where = rng.random(array.shape) < (1 / 6 if array.ndim == 3 else 1 / (30 * head_dim))
            array[where] = rng.choice(np.array(bad, np.float32), where.sum())
    elif case.fill == "tiny":  # scores underflow to 0 of either sign
        q_mean, k_mean = np.ldexp(q_mean, -60), np.ldexp(k_mean, -60)
    elif case.fill == "edge":  # weights 2^20, 2^19 and 2^19 + 1: half of their sum is no whole one
        q_mean[...], k_mean[...] = 1, -40
        k_mean[..., :3, :] = np.log2([1, 0.5, (2**19 + 1.5) / 2**20])[:blocks_k, None]
    else:
        assert case.fill == "integers", case.fill
    arrays = {
        "q_mean": q_mean,
        "q_similarity": q_similarity,
        "k_mean": k_mean,
        "k_similarity": k_similarity,
    }
    for name, given in (("lengths", case.lengths), ("cu_seqlens_q", case.cu_q)):
        if given is not None:
            arrays[name] = np.array(given, np.int64).astype(np.int32)
    if case.cu_k is not None:
        arrays["cu_seqlens_k"] = np.array(case.cu_k, np.int64).astype(np.int32)
    return arrays


@dataclass(frozen=True)
class Given:
    """One call with a caller's mask, or without one: every block in sight."""

    shape: tuple  # batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim
    block_q: int = 128
    block_k: int = 64
    ones: tuple = ()  # dimensions of the mask that are 1: 0, 1
    dtype: str = "bool"
    layout: str = "plain"
    align: object = None
    lengths: object = None

    def __str__(self):
        dims = "x".join(map(str, self.shape))
        name = f"{dims}-{self.block_q}x{self.block_k}-{self.dtype}-{self.layout}-{self.align}"
        return name + "".join(f"-one{d}" for d in self.ones) + ("-lengths" if self.lengths else "")


# ---- lists of them ------------------------------------------------------------------------------

RULES = ("reach", "within", "topk")
ALIGNS = (None, "bottom_right", "top_left")
FILLS = ("integers", "ties", "zeros", "steep", "flat", "bad")
TOKENS = (1, 63, 64, 65, 127, 129, 640, 1291)
SHARES = (0.0, 0.3, 0.5, 0.9, 0.98, 1.0)

#: Packed lists as nobody should give them: negative, falling, beyond the array, huge.
HOSTILE = (
    ((0, 300, 300, 900), (0, 100, 777, 900)),
    ((-5, 300, 200, 10**9), (0, 900, 100, 500)),
    ((900, 0, 100, 899), (-(2**31), 2**31 - 1, 0, 900)),
    ((5, 133, 640, 700), (9, 9, 512, 901)),
    # The sequence whose end is wrong has queries and keys.
    ((0, 300, 10**9), (0, 100, 2**31 - 1)),
    ((-(2**31), 500, 900), (-7, 450, 10**9)),
    ((0, 900, 2**31 - 1, 2**31 - 1), (0, 2**31 - 1, 0, 900)),
    ((2**31 - 1, -(2**31), 900), (2**31 - 1, -(2**31), 900)),
)


def _share(rule, number):
    return max(number, 0.01) if rule == "topk" else number


CASES = [
    # Every pair of lengths with some rule, alignment and share.
    *(
        Case(
            (1, 2, 1 + i % 2, seqlen_q, seqlen_k, 16),
            RULES[(i + j) % 3],
            _share(RULES[(i + j) % 3], SHARES[(3 * i + j) % 6]),
            sim=0.25 * ((i + j) % 2),
            align=ALIGNS[(i // 2 + j) % 3],
            fill=FILLS[(i + 2 * j) % 6],
        )
        for i, seqlen_q in enumerate(TOKENS)
        for j, seqlen_k in enumerate(TOKENS)
    ),
    # Every rule with every share and alignment.
    *(
        Case(
            (1, 2, 2, 400, 2500, 8),
            rule,
            _share(rule, share),
            align=align,
            fill="ties" if number % 2 else "integers",
            sink=number % 3,
            local=number // 2 % 3,
            mask=number % 4 == 0,
        )
        for rule in RULES
        for number, (share, align) in enumerate(itertools.product(SHARES, ALIGNS))
    ),
    # Rows in fewer warps, and more, of several words each.
    *(
        Case((1, 2, 1, 640, seqlen_k, 8), rule, 0.4, fill=fill, align=align, rows=rows, local=2)
        for rows in (8, 4, 2, 1)
        for seqlen_k, rule, fill, align in (
            (9000, "reach", "integers", None),
            (5121, "within", "ties", "bottom_right"),
            (2050, "topk", "zeros", "bottom_right"),
            (9000, "topk", "steep", None),
        )
    ),
    # Sizes of a head: pieces of 16 bytes, and what cannot be read in such.
    *(
        Case((1, 2, 1, 300, 700, head_dim), sim=0.3, rows=rows, align="top_left")
        for head_dim, rows in (
            (1, None),
            (7, None),
            (60, 4),
            (64, None),
            (80, 8),
            (96, 2),
            (127, 8),
            (128, 2),
            (129, 4),
            (200, 1),
            (255, 1),
            (256, 4),
        )
    ),
    # Thresholds of heads, in the launch and beside it.
    Case((2, 6, 2, 200, 900, 8), share=(0.0, 0.3, 0.5, 0.7, 0.9, 1.0), sim=0.25),
    Case((2, 6, 2, 200, 900, 8), "topk", (0.1, 0.3, 0.5, 0.7, 0.9, 1.0), sim=(-1.0, 0.3) * 3),
    Case((1, 6, 3, 200, 900, 8), share=0.5, sim=(-1.0, 0.0, 0.25, 0.3, 0.75, 1.0)),
    Case((1, 70, 35, 100, 500, 4), share=tuple(i / 69 for i in range(70))),
    # Lengths from the device.
    *(
        Case((5, 2, 1, 300, 700, 8), rule, 0.5, align=align, lengths=(700, 0, 65, -9, 2**31 - 1))
        for rule in (*RULES, "dense")
        for align in ALIGNS
    ),
    *(
        Case(
            (1, 4, 2, 900, 900, 8),
            rule,
            0.5,
            sim=0.1,
            align=align,
            cu_q=cu_q,
            cu_k=cu_k,
            sink=sink,
        )
        for rule, sink in (("reach", 0), ("topk", 1), ("dense", 0))
        for number, (cu_q, cu_k) in enumerate(HOSTILE)
        for align in ALIGNS[number % 2 :: 2]
    ),
    # More sequences than lanes, some of them empty.
    Case(
        (1, 1, 1, 2000, 4000, 4),
        cu_q=(*range(0, 2000, 50), 2000),
        align="bottom_right",
        cu_k=tuple(100 * (i // 2 * 2) for i in range(41)),
    ),
    Case((1, 1, 1, 900, 900, 8), cu_q=(0, 300, 900), cu_k=(0, 120, 900), max_seqlen_k=300),
    # No sequence at all: every row belongs to none.
    Case((1, 1, 1, 300, 300, 8), cu_q=(0,), cu_k=(0,)),
    # Scales, forced blocks without end, and calls without a queue.
    *(Case((1, 2, 1, 300, 1291, 8), scale=scale) for scale in (-0.25, 0.0, 2.0**-26, 2.0**20)),
    Case((1, 2, 1, 300, 1291, 8), scale=2.0**-40, fill="tiny"),
    *(Case((1, 1, 1, 1, 640, 1), rule, 0.5, scale=1.0, fill="edge") for rule in RULES),
    *(
        Case((1, 1, 1, 300, 1291, 8), rule, 0.2, align=align, sink=sink, local=local, queue=False)
        for rule in ("reach", "topk")
        for align in (None, "bottom_right")
        for sink, local in ((2**31 - 1, 0), (0, 2**31 - 1), (1, 3))
    ),
    # Sums of weights beyond 32 bits, in one warp.
    Case((1, 8, 1, 1, 320000, 1), share=0.99, fill="zeros", rows=8),
    Case((1, 2, 1, 300, 0, 8)),
    Case((1, 2, 1, 300, 0, 8), "dense", align="bottom_right"),
]

GIVEN = [
    *(
        Given((2, 2, 1, seqlen_q, seqlen_k, 8), block_q, block_k, align=align)
        for block_q in (64, 128)
        for block_k in (64, 128)
        for number, (seqlen_q, seqlen_k) in enumerate(((300, 700), (64, 65), (129, 4200)))
        for align in ALIGNS[number % 2 :: 2]
    ),
    *(
        Given((2, 3, 3, 300, 700, 8), 64, 128, ones, dtype, layout, "bottom_right")
        for ones, dtype, layout in (
            ((0,), "bool", "reversed"), ((1,), "uint8", "turned"), ((0, 1), "int64", "wide"),
            ((), "int32", "turned"), ((0,), "uint16", "wide"),
        )
    ),
    Given((4, 1, 1, 300, 700, 8), 64, 64, lengths=(700, 0, 65, -9)),
    Given((4, 1, 1, 300, 700, 8), 128, 128, align="top_left", lengths=(700, 2**31 - 1, 65, -9)),
]  # fmt: skip


def random_case(rng):
    """Return any case at all, of moderate size."""
    rule = str(rng.choice((*RULES, "dense")))
    heads_k = int(rng.integers(1, 3))
    heads_q = heads_k * int(rng.integers(1, 4))
    seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, (700, 3000)))
    batch = int(rng.integers(1, 3))
    lengths = cu_q = cu_k = None
    if rng.random() < 0.3:
        batch, count = 1, int(rng.integers(2, 6))
        cu_q, cu_k = (
            tuple(map(int, np.sort(rng.integers(0, n + 1, count)))) for n in (seqlen_q, seqlen_k)
        )
    elif rng.random() < 0.5:
        lengths = tuple(map(int, rng.integers(-2, seqlen_k + 3, batch)))

    def per_head(values):
        chosen = rng.choice(values, heads_q)
        return tuple(map(float, chosen)) if rng.random() < 0.5 else float(chosen[0])

    return Case(
        (batch, heads_q, heads_k, seqlen_q, seqlen_k, int(rng.integers(1, 65))),
        rule,
        per_head((0.01, 0.3, 0.5, 0.9, 0.98, 1.0)),
        per_head((-1.0, 0.0, 0.3, 0.5)),
        [*ALIGNS][rng.integers(3)],
        lengths,
        cu_q,
        cu_k,
        sink=int(rng.integers(3)),
        local=int(rng.integers(3)),
        fill=str(rng.choice(FILLS)),
        rows=[None, 8, 4, 2, 1][rng.integers(5)],
        mask=cu_q is None and rng.random() < 0.3,
    )
