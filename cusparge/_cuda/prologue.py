"""Launches of ``statistics.cu`` and ``prologue.cu``: Q, K and V quantized into tiles, and pooled.

Host code without a GPU, as `cusparge._cuda.pooling` is. See the two kernel files for what is
computed, at which edges, and ``kernels_cu/cusparge/tiles.cuh`` for the bytes of a tile.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from cusparge._cuda.params import NULL, Launch, Plan, check_grid
from cusparge._cuda.pooling import ENUMERATORS, ITEM_BYTES, ROWS, THREADS, byte_strides
from cusparge._cuda.variants import HEAD_DIMS, Variant, declare
from cusparge.errors import UnsupportedError

__all__ = [
    "BLOCK_Q",
    "LEAST_CHUNK_TILES",
    "MOST_CHUNKS",
    "ONES_ROWS",
    "TILE_TOKENS",
    "ProloguePlan",
    "Section",
    "TileFormats",
    "prologue_plan",
    "tile_formats",
]

#: Tokens of a tile (kTileTokens), which are a key block, and queries of a query block (kBlockQ).
TILE_TOKENS = 64
BLOCK_Q = 128
#: Rows behind the channels of V's e4m3 tile: ones, then zeros (kOnesRows).
ONES_ROWS = 8

#: What a thread holds of the tokens that it reads at a time (16 * kHeldPieces).
_HELD_BYTES = 64
#: Chunks of a sequence that statistics are formed of, at most, and tiles of one, at least
#: (kMostChunks and kLeastChunkTiles).
MOST_CHUNKS = 16
LEAST_CHUNK_TILES = 4

_LOG2_E = math.log2(math.e)
_FLOAT32_MAX = float.fromhex("0x1.fffffep127")

_STATISTICS_FILE = "statistics.cu"
_FILE = "prologue.cu"
_STATISTICS = struct.Struct(f"<{ROWS}{ROWS}4I")  # StatisticsParams
_PROLOGUE = struct.Struct(f"<{ROWS}{ROWS}{ROWS}6I2f")  # PrologueParams

_SECTION_ALIGNMENT = 1024  # what the widest swizzle of the tensor cores asks for
_SECTION_ITEM_BYTES = {"int8": 1, "uint8": 1, "float16": 2, "float32": 4}


class TileFormats(NamedTuple):
    """How tiles lie in memory, as the kernels name it: `TileFormat` and `ValueFormat`."""

    tiles: str  # "kCoreMatrix" or "kSwizzled"
    values: str  # "kE4m3" or "kF16"


def tile_formats(arch: str, head_dim: int) -> TileFormats:
    """Return the formats that the attention kernels of an architecture read.

    e4m3 where its tensor cores multiply it at full rate (8.9, 9.0 and 12.x); swizzled tiles where
    wgmma reads them and one row of a tile is one row of a swizzle (9.0 and 64 or 128 channels).
    """
    found = re.fullmatch(r"sm_(\d+)[af]?", arch)
    assert found, arch
    capability = int(found[1])
    if capability not in (89, 90) and capability // 10 != 12:
        return TileFormats("kCoreMatrix", "kF16")
    is_swizzled = capability == 90 and _up(head_dim, 32) in (64, 128)
    return TileFormats("kSwizzled" if is_swizzled else "kCoreMatrix", "kE4m3")


@dataclass(frozen=True)
class Section:
    """One contiguous array of the prologue's results, in the memory that a call allocates.

    Attributes
    ----------
    dtype : {"int8", "uint8", "float16", "float32"}
        e4m3 codes are uint8.
    offset : int
        Bytes from the begin of the memory; a multiple of 1024.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the array."""
        return _SECTION_ITEM_BYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True)
class ProloguePlan:
    """The launches that prepare one attention call, and where their results lie.

    ::

        prologue = prologue_plan("sm_90a", "bfloat16", q.shape, k.shape, ...)
        memory = allocate(prologue.plan.workspace_bytes)      # aligned to 1024, in any state
        addresses = prologue.addresses(memory) | {"q": ..., "k": ..., "v": ...}
        run(prologue.plan, addresses, ...)

    Attributes
    ----------
    plan : Plan
        Launches; its arrays are the inputs "q", "k", "v", "lengths", "cu_seqlens_q" and
        "cu_seqlens_k" (those that there are) and the names of `sections`. It has no `outputs`:
        everything lies in one piece of memory of ``plan.workspace_bytes`` bytes.
    sections : dict of str to Section
        By name. "partial" is of no use afterwards.
    formats : TileFormats
        Of the tiles.
    num_blocks_q, num_blocks_k : int
        Blocks of a row: of 128 queries and of 64 keys. Where sequences are packed these are bounds;
        the blocks of sequence b begin where those of b - 1 end.
    """

    plan: Plan
    sections: dict[str, Section]
    formats: TileFormats
    num_blocks_q: int
    num_blocks_k: int

    def addresses(self, memory: int) -> dict[str, int]:
        """Return the address of every section, for memory at an address."""
        return {name: memory + one.offset for name, one in self.sections.items()}


def _expression(kernel: str, config: str, dtype: str, head_dim: int, *more: str) -> str:
    fields = ", ".join([f"cusparge::Dtype::{ENUMERATORS[dtype]}", str(head_dim), *more])
    return f"cusparge::{kernel}<cusparge::{config}{{{fields}}}>"


def _statistics_expression(dtype: str, head_dim: int) -> str:
    return _expression("kv_statistics", "StatisticsConfig", dtype, head_dim)


def _prologue_expression(dtype: str, head_dim: int, formats: TileFormats) -> str:
    more = (f"cusparge::TileFormat::{formats.tiles}", f"cusparge::ValueFormat::{formats.values}")
    return _expression("prologue", "PrologueConfig", dtype, head_dim, *more)


def _statistics_expressions(
    arch: str, dtypes: Iterable[str], head_dims: Iterable[int]
) -> Iterator[str]:
    dims = tuple(head_dims)
    return (_statistics_expression(dtype, dim) for dtype in dtypes for dim in dims)


def _prologue_expressions(
    arch: str, dtypes: Iterable[str], head_dims: Iterable[int]
) -> Iterator[str]:
    """Yield the kernels for every format that some head size of a tile's width has."""
    dims = tuple(head_dims)
    for dtype in dtypes:
        for dim in dims:
            widths = range(32, dim + 1, 32)
            formats = {tile_formats(arch, width) for width in widths if _tile_width(width) == dim}
            for one in sorted(formats):
                yield _prologue_expression(dtype, dim, one)


declare("statistics", file=_STATISTICS_FILE, expressions=_statistics_expressions, in_use=False)
declare("prologue", file=_FILE, expressions=_prologue_expressions, in_use=False)


@lru_cache(maxsize=512)
def prologue_plan(
    arch: str,
    dtype: str,
    shape_q: tuple[int, int, int, int],
    shape_k: tuple[int, int, int, int],
    strides_q: tuple[int, int, int],
    strides_k: tuple[int, int, int],
    strides_v: tuple[int, int, int],
    sm_scale: float,
    *,
    has_lengths: bool = False,
    num_sequences: int | None = None,
    wants_shift: bool = False,
) -> ProloguePlan:
    """Return the plan that prepares q, k and v for attention.

    Parameters
    ----------
    arch : str
        Of the GPU, such as "sm_90a".
    dtype : {"float16", "bfloat16", "float32"}
        Of the three arrays.
    shape_q, shape_k : (batch, heads, tokens, head_dim)
        Of q, and of both k and v; the heads of q are a multiple of those of k. Packed sequences
        have a batch of 1.
    strides_q, strides_k, strides_v : (batch, head, token)
        Distances in elements, any sign or 0. Channels are contiguous.
    sm_scale : float
        Factor on q·k, any finite number: the codes of q take its sign, their scale the rest.
    has_lengths : bool
        "lengths", int32 (batch,) on the device, tells how many keys of each sequence are real.
    num_sequences : int, optional
        Sequences are packed: "cu_seqlens_q" and "cu_seqlens_k", int32 (num_sequences + 1,) on the
        device, tell where they begin and end.
    wants_shift : bool
        Write "q_shift", what smoothing takes off every score of a query.

    Returns
    -------
    ProloguePlan
        The same object for the same arguments.

    Raises
    ------
    UnsupportedError
        If there are more blocks than one launch can have.
    """
    batch, heads_q, tokens_q, head_dim = shape_q
    heads_k, tokens_k = shape_k[1:3]
    assert dtype in ITEM_BYTES, dtype
    assert 1 <= head_dim <= HEAD_DIMS[-1], shape_q
    assert shape_k[::3] == (batch, head_dim), (shape_q, shape_k)
    assert min(*shape_q, *shape_k) >= 0, (shape_q, shape_k)
    assert heads_k == heads_q == 0 or heads_q % heads_k == 0, (shape_q, shape_k)
    assert math.isfinite(sm_scale), sm_scale
    is_packed = num_sequences is not None
    if num_sequences is None:
        sequences = batch
        num_q, num_k = -(-tokens_q // BLOCK_Q), max(1, -(-tokens_k // TILE_TOKENS))
    else:
        assert batch == 1, shape_q
        assert not has_lengths
        _check_packed(tokens_q, tokens_k)
        sequences = num_sequences
        num_q, num_k = (tokens_q // BLOCK_Q + sequences, tokens_k // TILE_TOKENS + sequences)
    rows_q, rows_k = batch * heads_q, batch * heads_k
    chunks = _num_chunks(tokens_k, num_sequences)

    formats = tile_formats(arch, head_dim)
    sections = _sections(
        (batch, heads_q, num_q),
        (batch, heads_k, num_k),
        (sequences, heads_k, head_dim),
        (2, rows_k, chunks, head_dim),
        formats,
        wants_shift,
    )
    size = max((one.offset + one.num_bytes for one in sections.values()), default=0)
    width = _tile_width(head_dim)
    rows = [
        (*byte_strides(dtype, shape, strides), shape[2], shape[1], head_dim)
        for shape, strides in ((shape_q, strides_q), (shape_k, strides_k), (shape_k, strides_v))
    ]
    lengths = "lengths" if has_lengths else NULL
    cu_q, cu_k = ("cu_seqlens_q", "cu_seqlens_k") if is_packed else (NULL, NULL)
    launches = []
    if rows_k * tokens_k * sequences:
        launches.append(
            _launch(
                _STATISTICS_FILE,
                _statistics_expression(dtype, width),
                check_grid(2 * rows_k * chunks, "chunks of keys and values"),
                _sums_bytes(dtype, width),
                ("k", "v", lengths, cu_k, "partial"),
                _STATISTICS.pack(*rows[1], *rows[2], sequences, rows_k, chunks, 0),
            )
        )
    if rows_k * sequences:
        numbers = (sequences, rows_q, rows_k, num_q, num_k, chunks)
        factors = (sm_scale * _LOG2_E / 127, sm_scale)
        launches.append(
            _launch(
                _FILE,
                _prologue_expression(dtype, width, formats),
                check_grid(rows_k * num_k + rows_q * num_q, "blocks of 64 keys and of 128 queries"),
                _prologue_bytes(dtype, width, formats),
                (
                    *("q", "k", "v", lengths, cu_q, cu_k, "partial"),
                    *("q_tile", "q_scale", "q_mean", "q_similarity"),
                    "q_shift" if wants_shift else NULL,
                    *("k_tile", "k_scale", "k_mean", "k_similarity", "k_bad", "token_mean"),
                    *("v_tile", "v_scale"),
                ),
                _PROLOGUE.pack(*rows[0], *rows[1], *rows[2], *numbers, *map(_float32, factors)),
            )
        )
    return ProloguePlan(Plan((), size, tuple(launches)), sections, formats, num_q, num_k)


def _sections(
    blocks_q: tuple[int, int, int],
    blocks_k: tuple[int, int, int],
    channels: tuple[int, int, int],
    partial: tuple[int, ...],
    formats: TileFormats,
    wants_shift: bool,
) -> dict[str, Section]:
    head_dim = channels[2]
    key_bytes = TILE_TOKENS * _up(head_dim, 32)
    if formats.values == "kE4m3":
        values = ("uint8", TILE_TOKENS * (_up(head_dim, 8) + ONES_ROWS))
    else:
        values = ("float16", TILE_TOKENS * _up(head_dim, 16))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "q_tile": ("int8", (*blocks_q, 2, key_bytes)),
        "q_scale": ("float32", (*blocks_q, BLOCK_Q)),
        "q_mean": ("float32", (*blocks_q, head_dim)),
        "q_similarity": ("float32", blocks_q),
        "k_tile": ("int8", (*blocks_k, key_bytes)),
        "k_scale": ("float32", (*blocks_k, 4)),
        "k_mean": ("float32", (*blocks_k, head_dim)),
        "k_similarity": ("float32", blocks_k),
        "k_bad": ("uint8", blocks_k),
        "token_mean": ("float32", channels),
        "v_tile": (values[0], (*blocks_k, values[1])),
        "v_scale": ("float32", channels),
        "partial": ("float32", partial),
    }
    if wants_shift:
        shapes["q_shift"] = ("float32", (*blocks_q, BLOCK_Q))
    found = {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        found[name] = Section(name, dtype, shape, offset)
        offset = _up(offset + found[name].num_bytes, _SECTION_ALIGNMENT)
    return found


def _num_chunks(tokens: int, num_sequences: int | None) -> int:
    """Return how many chunks of statistics a row has, or may have where sequences are packed."""
    if num_sequences is None:
        return min(MOST_CHUNKS, -(-tokens // (TILE_TOKENS * LEAST_CHUNK_TILES)))
    tiles = tokens // TILE_TOKENS + num_sequences
    return min(MOST_CHUNKS * num_sequences, tiles // LEAST_CHUNK_TILES + num_sequences)


def _sums_bytes(dtype: str, width: int) -> int:
    """Size of one column of sums for each thread (kThreads * kChannels floats)."""
    lanes = min(32, width * ITEM_BYTES[dtype] // 16)
    return THREADS * (width // lanes) * 4


def _prologue_bytes(dtype: str, width: int, formats: TileFormats) -> int:
    """Size of the shared memory (PrologueShared)."""
    codes = TILE_TOKENS * width if formats.values == "kE4m3" else 0
    own = _HELD_BYTES * THREADS
    words = 2 * 4 * width + 3 * 4 * (THREADS // 32)
    return max(2 * _sums_bytes(dtype, width), codes) + own + words


def _launch(
    file: str,
    expression: str,
    grid: tuple[int, int, int],
    shared_bytes: int,
    pointers: tuple[str, ...],
    numbers: bytes,
) -> Launch:
    return Launch(Variant(file, expression), grid, (THREADS, 1, 1), shared_bytes, pointers, numbers)


def _check_packed(*totals: int) -> None:
    for total in totals:
        if total >= 2**31:
            raise UnsupportedError(
                f"the packed sequences are too long: got {total} tokens in all; allowed are "
                f"{2**31 - 1}, which int32 cu_seqlens can count. Split them into several calls."
            )


def _tile_width(head_dim: int) -> int:
    return next(size for size in HEAD_DIMS if head_dim <= size)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _float32(number: float) -> float:
    """Return a number that float32 holds: the largest ones in place of larger ones."""
    return min(max(number, -_FLOAT32_MAX), _FLOAT32_MAX)
