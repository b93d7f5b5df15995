"""Launches of ``pool.cu``: the mean of all tokens, and blocks of tokens pooled (stage 1's inputs).

Host code without a GPU: everything that depends on shapes is decided here, and a call only adds
addresses. See ``kernels_cu/pool.cu`` for what is computed, at which edges.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache

from cusparge._cuda.params import NULL, Launch, Output, Plan, check_grid
from cusparge._cuda.variants import HEAD_DIMS, Variant, declare
from cusparge.errors import InvalidArgumentError

__all__ = [
    "CHUNK_TOKENS",
    "ENUMERATORS",
    "ITEM_BYTES",
    "MEAN_CHANNELS",
    "MEAN_THREADS",
    "ROWS",
    "THREADS",
    "byte_strides",
    "pool_plan",
]

#: Tokens whose sum one block of threads forms on the way to the mean (kChunkTokens).
CHUNK_TOKENS = 256
#: Channels that one block of threads finishes, and its threads (kMeanThreads).
MEAN_CHANNELS = 32
MEAN_THREADS = 512
#: Threads of a block in the other kernels (kThreads).
THREADS = 128

_FILE = "pool.cu"
_FINISH = f"cusparge::finish_mean<{MEAN_CHANNELS}>"
#: Names of the enumerators of cusparge::Dtype, and bytes of an element.
ENUMERATORS = {"float16": "kFloat16", "bfloat16": "kBFloat16", "float32": "kFloat32"}
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

# The numbers of the structs of params.cuh, which follow their pointers.
ROWS = "4q2I"  # TokenRows
_SUM = struct.Struct(f"<{ROWS}2I")  # SumParams
_MEAN = struct.Struct("<q4I")  # MeanParams
_POOL = struct.Struct(f"<{ROWS}2I")  # PoolParams


def _expression(kernel: str, dtype: str, head_dim: int) -> str:
    config = f"cusparge::PoolConfig{{cusparge::Dtype::{ENUMERATORS[dtype]}, {head_dim}}}"
    return f"cusparge::{kernel}<{config}>"


def _expressions(arch: str, dtypes: Iterable[str], head_dims: Iterable[int]) -> Iterator[str]:
    """Yield the kernels of the file: the same text on every architecture."""
    yield _FINISH
    for dtype in dtypes:
        for head_dim in head_dims:
            yield _expression("sum_chunks", dtype, head_dim)
            yield _expression("pool_blocks", dtype, head_dim)


declare("pool", file=_FILE, expressions=_expressions)


@lru_cache(maxsize=512)
def pool_plan(
    dtype: str,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    block_tokens: int,
    smooth: bool = False,
    has_lengths: bool = False,
) -> Plan:
    """Return the plan that pools the blocks of one array.

    Parameters
    ----------
    dtype : {"float16", "bfloat16", "float32"}
        Of the array.
    shape : (batch, heads, tokens, head_dim)
        Of the array, in this order whatever its layout; head_dim from 1 to 256.
    strides : (batch, head, token)
        Distances in elements, any sign or 0. Channels are contiguous.
    block_tokens : {64, 128}
        Tokens of a block.
    smooth : bool
        Take the mean over each sequence's tokens off first.
    has_lengths : bool
        Sequences have lengths of their own, in an int32 array (batch,) on the device.

    Returns
    -------
    Plan
        Its arrays are "x" and, where asked for, "lengths" and "workspace"; its outputs "block_mean"
        (batch, heads, blocks, head_dim), "similarity" (batch, heads, blocks) and, if `smooth`,
        "token_mean" (batch, heads, head_dim). The same object for the same arguments.

    Raises
    ------
    UnsupportedError
        If the array has more blocks than one launch can have.
    """
    batch, heads, tokens, head_dim = shape
    assert dtype in ITEM_BYTES, dtype
    assert block_tokens in (64, 128), block_tokens
    assert 1 <= head_dim <= HEAD_DIMS[-1], shape
    assert min(shape) >= 0, shape
    rows = batch * heads
    num_blocks = -(-tokens // block_tokens)
    outputs = [
        Output("block_mean", (batch, heads, num_blocks, head_dim)),
        Output("similarity", (batch, heads, num_blocks)),
    ]
    launches: list[Launch] = []
    workspace_bytes = 0
    tile = next(size for size in HEAD_DIMS if head_dim <= size)
    token_rows = (*byte_strides(dtype, shape, strides), tokens, heads, head_dim)
    lengths = "lengths" if has_lengths else NULL
    # Each thread holds the sums of its channels: tokens are shared by at most a warp.
    lanes = min(32, tile * ITEM_BYTES[dtype] // 16)
    sums_bytes = THREADS * (tile // lanes) * 4

    if smooth:
        outputs.append(Output("token_mean", (batch, heads, head_dim)))
    if smooth and rows:
        chunks = -(-tokens // CHUNK_TOKENS)
        workspace_bytes = rows * chunks * head_dim * 4
        if chunks:
            launches.append(
                _launch(
                    _expression("sum_chunks", dtype, tile),
                    check_grid(rows * chunks, f"chunks of {CHUNK_TOKENS} tokens"),
                    sums_bytes,
                    ("x", lengths, "workspace"),
                    _SUM.pack(*token_rows, chunks, 0),
                )
            )
        groups = -(-head_dim // MEAN_CHANNELS)
        launches.append(  # without tokens it writes zeros
            _launch(
                _FINISH,
                check_grid(rows * groups, f"groups of {MEAN_CHANNELS} channels"),
                MEAN_THREADS * 4,
                ("workspace", lengths, "token_mean"),
                _MEAN.pack(tokens, chunks, heads, head_dim, 0),
            )
        )
    if rows and num_blocks:
        launches.append(
            _launch(
                _expression("pool_blocks", dtype, tile),
                check_grid(rows * num_blocks, f"blocks of {block_tokens} tokens"),
                2 * sums_bytes + 2 * (THREADS // 32) * 4,
                ("x", lengths, "token_mean" if smooth else NULL, "block_mean", "similarity"),
                _POOL.pack(*token_rows, num_blocks, block_tokens),
            )
        )
    return Plan(tuple(outputs), workspace_bytes, tuple(launches))


def _launch(
    expression: str,
    grid: tuple[int, int, int],
    shared_bytes: int,
    pointers: tuple[str, ...],
    numbers: bytes,
) -> Launch:
    threads = MEAN_THREADS if expression == _FINISH else THREADS
    variant = Variant(_FILE, expression)
    return Launch(variant, grid, (threads, 1, 1), shared_bytes, pointers, numbers)


def byte_strides(
    dtype: str, shape: tuple[int, int, int, int], strides: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Return the strides in bytes; 0 where there is nothing to step over.

    The stride of a dimension of one element says nothing, and may be odd: it must not keep the
    kernels from wide loads.
    """
    found = []
    for extent, stride in zip(shape, strides, strict=False):  # channels have none
        step = stride * ITEM_BYTES[dtype] if extent > 1 else 0
        if abs(step) * max(extent - 1, 0) >= 2**63:
            raise InvalidArgumentError(
                f"strides reach beyond any memory: got {strides} for an array of shape {shape}; "
                "the elements must lie within 2^63 bytes. Copy the array to a contiguous one."
            )
        found.append(step)
    return found[0], found[1], found[2]
