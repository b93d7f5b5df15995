"""What a host call of a few kernels amounts to: a plan, made once for a shape and then filled.

Every kernel takes one struct by value, whose pointers stand in front of its numbers. The numbers
depend on shapes, strides and settings alone, so a plan holds them as bytes; a call puts the
pointers of its arrays in front of them, and nothing is computed or formatted again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from operator import itemgetter
from typing import Any

from cusparge._cuda.variants import Variant
from cusparge.errors import UnsupportedError

__all__ = ["MAX_GRID", "NULL", "Launch", "Output", "Plan", "check_grid"]

#: Blocks that one launch may have in the first dimension of its grid.
MAX_GRID = 2**31 - 1

#: Name of a pointer that is null in every call of a plan.
NULL = "null"


@dataclass(frozen=True)
class Output:
    """A contiguous float32 array that the plan's kernels write in full."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the array."""
        return 4 * prod(self.shape)


@dataclass(frozen=True)
class Launch:
    """One launch of a plan.

    Attributes
    ----------
    variant : Variant
        Which kernel.
    grid, block : tuple of three int
        Numbers of blocks, and of threads in one.
    shared_bytes : int
        Dynamic shared memory of a block.
    pointers : tuple of str
        Name of the array that each pointer of the kernel's struct points to: pointer ``i`` is the
        eight bytes at ``8 * i``. `NULL` stands for none.
    numbers : bytes
        The rest of the struct.
    """

    variant: Variant
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    pointers: tuple[str, ...]
    numbers: bytes

    @property
    def params(self) -> bytes:
        """The struct with all pointers null."""
        return bytes(8 * len(self.pointers)) + self.numbers


@dataclass(frozen=True)
class Plan:
    """Launches in order, what they write, and the memory that they need in between.

    ::

        plan = pool_plan("float16", q.shape, strides, block_tokens=128)
        arrays = {output.name: allocate(output.shape) for output in plan.outputs}
        structs = plan.fill(x=q_address, block_mean=..., similarity=...)
        for one, params in zip(plan.launches, structs):
            launch(kernel(one.variant), one.grid, one.block, params, one.shared_bytes, stream)

    Attributes
    ----------
    outputs : tuple of Output
        To be allocated by the caller, in any state.
    workspace_bytes : int
        Size of the array "workspace", which may hold anything before and after the call; 0 if none
        is needed, and then its address may be 0.
    launches : tuple of Launch
        In order, on one stream. None for an array without elements.
    """

    outputs: tuple[Output, ...]
    workspace_bytes: int
    launches: tuple[Launch, ...]

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """What to allocate as float32 arrays: the outputs and, if there is one, the workspace."""
        workspace = ((-(-self.workspace_bytes // 4),),) if self.workspace_bytes else ()
        return (*(one.shape for one in self.outputs), *workspace)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names that `fill` takes the addresses of `shapes` by."""
        workspace = ("workspace",) if self.workspace_bytes else ()
        return (*(one.name for one in self.outputs), *workspace)

    @cached_property
    def _packers(self) -> tuple[Any, ...]:
        # Every struct has two pointers or more: itemgetter of one name would return no tuple.
        return tuple(
            (
                struct.Struct(f"<{len(one.pointers)}Q").pack,
                itemgetter(*one.pointers),
                one.numbers,
            )
            for one in self.launches
        )

    def fill(self, **addresses: int) -> tuple[bytes, ...]:
        """Return the struct of every launch, with the addresses of its arrays.

        Takes the address of each name in the launches' `pointers`, apart from `NULL`, and from
        "workspace" where none is needed.
        """
        addresses[NULL] = 0
        addresses.setdefault("workspace", 0)
        return tuple([pack(*pick(addresses)) + numbers for pack, pick, numbers in self._packers])


def check_grid(blocks: int, what: str) -> tuple[int, int, int]:
    """Return the grid of that many blocks, or raise if a launch cannot have as many."""
    if blocks > MAX_GRID:
        raise UnsupportedError(
            f"the array is too large for one launch: it has {blocks} {what}; allowed are "
            f"{MAX_GRID}. Split the batch or the heads into several calls."
        )
    return blocks, 1, 1
