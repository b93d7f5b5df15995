"""Launches of ``block_map.cu``: which key blocks each query block computes, and in which order.

Host code without a GPU: everything that depends on shapes and policies is decided here, and a call
only adds addresses. See ``kernels_cu/block_map.cu`` for what is computed, at which edges, and
``kernels_cu/cusparge/map_params.cuh`` for the layout of the arrays.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cusparge._cuda.map_shape import BLOCK_K, BLOCK_Q, GivenMask, MapOutput, MapShape
from cusparge._cuda.params import NULL, Launch, Plan, check_grid
from cusparge._cuda.variants import HEAD_DIMS, Variant, declare
from cusparge.errors import UnsupportedError
from cusparge.policy import Dense, Policy, TopCdf, TopK

__all__ = [
    "CLASSES",
    "MAX_RULES",
    "SHARED_LIMIT",
    "THREADS",
    "GivenMask",
    "MapOutput",
    "MapShape",
    "given_plan",
    "map_plan",
    "rule_table",
]

#: Threads of a block in the two kernels that make a map (kMapThreads).
THREADS = 256
#: Classes of rows in the work queue (kClasses).
CLASSES = 32
#: Rules for heads that travel with a launch (kMaxRules).
MAX_RULES = 64
#: Enumerators of ``Rule``.
RULES = {"reach": 0, "within": 1, "topk": 2}
#: Bytes in front of the panel of scores (kRowBytes).
ROW_BYTES = 256
#: Shared memory that one block of threads may have on every device: 99 KiB on 8.6, 8.9 and 12.0.
SHARED_LIMIT = 99 * 1024
#: What the hardware takes of a multiprocessor's shared memory for each block of threads.
RESERVED_BYTES = 1024

FILE = "block_map.cu"
_CLEAR = "cusparge::clear_queue<32>"
_TILE_ROWS = (8, 4, 2, 1)
#: Channels of all rows of a tile, which the lanes of one warp hold.
_TILE_CHANNELS = 1024
#: Numbers of blocks are 32-bit integers in the kernels, with room to step past the last one.
_MAX_BLOCKS = 2**30
_LARGEST_FLOAT = float(np.finfo(np.float32).max)

# The numbers of the structs of map_params.cuh, which follow their pointers.
_ROWS = "3q8I"  # MapRows
_RULE = struct.Struct("<dfI")  # HeadRule
_CHOOSE = struct.Struct(f"<{_ROWS}7If4I")  # MapParams, without the table
_TAKE = struct.Struct(f"<{_ROWS}4q2I")  # TakeParams


def _choose(head_dim: int, rows: int) -> str:
    return f"cusparge::choose_blocks<cusparge::MapConfig{{{head_dim}, {rows}}}>"


def _tile_rows(head_dim: int) -> tuple[int, ...]:
    return tuple(rows for rows in _TILE_ROWS if rows * head_dim <= _TILE_CHANNELS)


def _take(mask_rows: int) -> str:
    return f"cusparge::take_blocks<{mask_rows}>"


def _expressions(arch: str, dtypes: Iterable[str], head_dims: Iterable[int]) -> Iterator[str]:
    """Yield the kernels of the file: the same text on every architecture, and for every dtype."""
    for head_dim in head_dims:
        for rows in _tile_rows(head_dim):
            yield _choose(head_dim, rows)
    yield _take(64)
    yield _take(128)
    yield _CLEAR


declare("block_map", file=FILE, expressions=_expressions, in_use=False)


def rule_table(policy: TopCdf | TopK, heads: int) -> bytes:
    """Return the policy's thresholds as the kernels read them, 16 bytes for each query head.

    One entry where all heads have the same. More than `MAX_RULES` do not fit into a launch: then
    the plan asks for them as the array "rules", which is uploaded once for a policy.
    """
    share = policy.keep if isinstance(policy, TopK) else policy.cdf_threshold
    pairs = list(zip(_per_head(share, heads), _per_head(policy.sim_threshold, heads), strict=True))
    if len(set(pairs)) == 1:
        pairs = pairs[:1]
    return b"".join(_RULE.pack(one, _rounded_down(other), 0) for one, other in pairs)


def _per_head(value: Any, heads: int) -> tuple[float, ...]:
    given = tuple(value) if isinstance(value, tuple) else (value,) * heads
    assert len(given) == heads, (value, heads)
    return given


def _rounded_down(value: float) -> float:
    """Return the float32 that lies below the same float32 numbers as `value` does, or on them."""
    single = np.float32(value)
    if float(single) > value:
        single = np.nextafter(single, np.float32(-np.inf))
    return float(single)


@lru_cache(maxsize=512)
def map_plan(
    shape: MapShape,
    policy: Policy,
    *,
    sm_scale: float,
    causal: bool = False,
    causal_align: str = "bottom_right",
    has_lengths: bool = False,
    max_seqlen_k: int | None = None,
    queue: bool = True,
    queue_is_clear: bool = False,
    mask: bool = False,
    shared_limit: int = SHARED_LIMIT,
) -> Plan:
    """Return the plan that applies a policy's first stage.

    Parameters
    ----------
    shape : MapShape
        The arrays.
    policy : TopCdf, TopK or Dense
        Thresholds given per head are as many as there are query heads.
    sm_scale : float
        Factor on the scores; any sign, or 0.
    causal, causal_align
        As in `cusparge.attention`; in a packed call, for each sequence.
    has_lengths : bool
        The batch's sequences have lengths of their own, in an int32 array (batch,).
    max_seqlen_k : int, optional
        Of a packed call: the most keys that a sequence has. A sequence with more is computed whole.
    queue : bool
        Sort the rows for attention.
    queue_is_clear : bool
        An earlier kernel on the stream has zeroed "class_counts" and "ticket"; otherwise a launch
        of one warp does.
    mask : bool
        Also write the map as bytes; not for a packed call.
    shared_limit : int
        Shared memory that the device gives to one block of threads. Launches that use more than
        48 KiB must ask for it beforehand.

    Returns
    -------
    Plan
        Its arrays are "q_mean", "q_similarity", "k_mean" and "k_similarity" (float32; rows of map_
        params.cuh), "lengths" or, packed, "cu_seqlens_q" and "cu_seqlens_k", and "rules" where
        heads with thresholds of their own are more than `MAX_RULES`; `Dense` needs none but the
        lengths. Its outputs are "bits" (batch, heads, blocks, words), "count", "first" and
        "reachable" (batch, heads, blocks), and, where asked for, "class_counts", "ticket" and
        "items" (classes, rows), and "mask" (batch, heads, blocks, key blocks). The same object for
        the same arguments.

    Raises
    ------
    UnsupportedError
        If the map has more rows or blocks than one launch can have, or rows that are too long.
    """
    call = _Call(shape, causal, causal_align, has_lengths, queue, queue_is_clear, mask)
    if isinstance(policy, Dense):
        return call.plan(_take_launch(call, None))
    batch, heads_q, heads_k = shape.batch, shape.heads_q, shape.heads_k
    assert 1 <= shape.head_dim <= HEAD_DIMS[-1], shape
    assert heads_k == 0 or heads_q % heads_k == 0, shape
    if shape.rows == 0:
        return call.plan(None)

    # Rows that read the same keys: all of a kv head. Packed rows of another head begin again at the
    # first sequence, far from the last.
    heads_per_group = heads_q // heads_k if shape.num_sequences is None else 1
    rows_per_group = shape.blocks_q * heads_per_group
    longest = shape.longest
    if max_seqlen_k is not None and shape.num_sequences is not None:
        longest = min(longest, -(-max(max_seqlen_k, 0) // BLOCK_K))
    tile = next(size for size in HEAD_DIMS if shape.head_dim <= size)
    tile_rows, stride, shared_bytes = _panel(
        _tile_rows(tile), rows_per_group, longest, shared_limit, shape
    )
    tiles = -(-rows_per_group // tile_rows)
    groups = batch * heads_q // heads_per_group

    table = rule_table(policy, heads_q)
    num_rules = len(table) // _RULE.size
    is_uploaded = num_rules > MAX_RULES
    rule = RULES["topk"] if isinstance(policy, TopK) else RULES[policy.rule]
    assert math.isfinite(sm_scale), sm_scale
    scale_log2 = min(max(sm_scale * math.log2(math.e), -_LARGEST_FLOAT), _LARGEST_FLOAT)
    numbers = _CHOOSE.pack(
        *call.numbers,
        rows_per_group,
        tiles,
        heads_q // heads_k // heads_per_group,
        shape.head_dim,
        longest,
        stride,
        rule,
        scale_log2,
        policy.sink_blocks,
        policy.local_blocks,
        num_rules,
        0,
    )
    in_launch = b"" if is_uploaded else table
    arrays = ("q_mean", "q_similarity", "k_mean", "k_similarity", "rules" if is_uploaded else NULL)
    launch = Launch(
        Variant(FILE, _choose(tile, tile_rows)),
        check_grid(groups * tiles, f"groups of {tile_rows} query blocks"),
        (THREADS, 1, 1),
        shared_bytes,
        (*arrays, *call.pointers),
        numbers + in_launch.ljust(MAX_RULES * _RULE.size, b"\0"),
    )
    return call.plan(launch)


@lru_cache(maxsize=512)
def given_plan(
    shape: MapShape,
    given: GivenMask,
    *,
    causal: bool = False,
    causal_align: str = "bottom_right",
    has_lengths: bool = False,
    queue: bool = True,
    queue_is_clear: bool = False,
) -> Plan:
    """Return the plan that takes a caller's mask, cut to what the rows may see.

    Parameters are those of `map_plan`, and the mask, whose array is "given". With blocks of 64
    rows there is one more output, "halves" (batch, heads, blocks, 2, words): the bits for rows 0 to
    63 of each block and for the others; "bits" is their union.
    """
    call = _Call(shape, causal, causal_align, has_lengths, queue, queue_is_clear, False)
    assert shape.num_sequences is None, "a packed call takes no mask"
    assert {given.block_q, given.block_k} <= {64, 128}, given
    fits = (
        given.shape[0] in (1, shape.batch)
        and given.shape[1] in (1, shape.heads_q)
        and given.shape[2] == -(-shape.seqlen_q // given.block_q)
        and given.shape[3] == -(-shape.seqlen_k // given.block_k)
    )
    assert fits, (shape, given)
    return call.plan(_take_launch(call, given))


@dataclass(frozen=True)
class _Call:
    """What the kernels that make a map have in common."""

    shape: MapShape
    causal: bool
    causal_align: str
    has_lengths: bool
    queue: bool
    queue_is_clear: bool
    mask: bool

    def __post_init__(self) -> None:
        shape = self.shape
        assert self.causal_align in ("bottom_right", "top_left"), self.causal_align
        assert min(shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k) >= 0, shape
        if shape.num_sequences is not None:
            assert (shape.batch, self.has_lengths, self.mask) == (1, False, False), self
        for what, found, most in (
            ("query blocks in all heads", shape.rows, 2**32 - 1),
            ("query blocks in a head", shape.blocks_q, _MAX_BLOCKS),
            ("key blocks in a head", shape.blocks_k, _MAX_BLOCKS),
        ):
            if found > most:
                raise UnsupportedError(
                    f"the arrays are too large for one call: they have {found} {what}; allowed are "
                    f"{most}. Split the batch, the heads or the sequences into several calls."
                )

    @property
    def numbers(self) -> tuple[int, ...]:
        """The fields of MapRows."""
        shape = self.shape
        causality = offset = 0
        if self.causal:
            causality = 1
            if self.causal_align == "bottom_right":
                if shape.num_sequences is None:
                    offset = shape.seqlen_k - shape.seqlen_q
                else:
                    causality = 2
        return (
            shape.seqlen_q,
            shape.seqlen_k,
            offset,
            shape.batch if shape.num_sequences is None else shape.num_sequences,
            shape.heads_q,
            shape.blocks_q,
            shape.blocks_k,
            shape.words,
            shape.rows,
            causality,
            0,
        )

    @property
    def pointers(self) -> tuple[str, ...]:
        """The names of MapSequences and MapOutputs."""
        packed = self.shape.num_sequences is not None
        return (
            "lengths" if self.has_lengths else NULL,
            "cu_seqlens_q" if packed else NULL,
            "cu_seqlens_k" if packed else NULL,
            "bits",
            "count",
            "first",
            "reachable",
            "mask" if self.mask else NULL,
            "class_counts" if self.queue else NULL,
            "items" if self.queue else NULL,
        )

    def plan(self, launch: Launch | None) -> Plan:
        """Return the plan with this launch, None where there are no rows."""
        shape = self.shape
        rows = (shape.batch, shape.heads_q, shape.blocks_q)
        outputs = [
            MapOutput("bits", (*rows, shape.words)),
            *(MapOutput(name, rows) for name in ("count", "first", "reachable")),
        ]
        if launch is not None and "halves" in launch.pointers:
            outputs.append(MapOutput("halves", (*rows, 2, shape.words)))
        if self.mask:
            outputs.append(MapOutput("mask", (*rows, shape.blocks_k), "uint8"))
        launches = [] if launch is None else [launch]
        if self.queue:
            outputs += [
                MapOutput("class_counts", (CLASSES,)),
                MapOutput("ticket", (1,)),
                MapOutput("items", (CLASSES, shape.rows)),
            ]
            if not self.queue_is_clear:
                clear = Variant(FILE, _CLEAR)
                pointers = ("class_counts", "ticket")
                launches.insert(0, Launch(clear, (1, 1, 1), (32, 1, 1), 0, pointers, b""))
        return Plan(tuple(outputs), 0, tuple(launches))


def _panel(
    choices: tuple[int, ...], rows_per_group: int, blocks: int, shared_limit: int, shape: MapShape
) -> tuple[int, int, int]:
    """Return rows of a tile, words from one row's scores to the next's, and shared memory.

    As many rows share the keys that they read as leave room for a second block of threads on the
    multiprocessor, which is what registers allow; but two at least, where they fit at all, since
    reading every key for one row costs more than waiting. The stride lies 4 words off a multiple of
    32, so that neighbouring rows lie in different banks.
    """
    goal = (shared_limit - RESERVED_BYTES) // 2
    stride = -(-blocks // 32) * 32 + 4
    for rows in choices:
        used = ROW_BYTES + 4 * rows * stride
        if rows > 1 and (rows >= 2 * rows_per_group or (rows > 2 and used > goal)):
            continue
        if used <= shared_limit:
            return rows, stride, used
    room = (shared_limit - ROW_BYTES) // 4 - 35
    hint = "Pass max_seqlen_k, split the keys" if shape.num_sequences is not None else "Split them"
    raise UnsupportedError(
        f"there are too many keys to choose among: got {shape.seqlen_k}; allowed on this device "
        f"are {room * BLOCK_K}. {hint} and merge the parts by their lse, or use policy=Dense() "
        "or a block map of your own."
    )


def _take_launch(call: _Call, given: GivenMask | None) -> Launch | None:
    shape = call.shape
    if shape.rows == 0:
        return None
    strides = (0, 0, 0, 0)
    mask_rows, item_bytes, column_shift = BLOCK_Q, 1, 0
    if given is not None:
        steps = [s if n > 1 else 0 for s, n in zip(given.strides, given.shape, strict=True)]
        strides = (steps[0], steps[1], steps[2], steps[3])
        mask_rows, item_bytes = given.block_q, given.item_bytes
        column_shift = given.block_k // BLOCK_K - 1
    tile_rows = THREADS // 32
    return Launch(
        Variant(FILE, _take(mask_rows)),
        check_grid(-(-shape.rows // tile_rows), f"groups of {tile_rows} query blocks"),
        (THREADS, 1, 1),
        ROW_BYTES,
        (
            NULL if given is None else "given",
            "halves" if mask_rows == 64 else NULL,
            *call.pointers,
        ),
        _TAKE.pack(*call.numbers, *strides, item_bytes, column_shift),
    )
