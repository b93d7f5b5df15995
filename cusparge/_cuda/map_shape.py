"""The arrays that a block map is made for, from and of, as its launches see them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cusparge._cuda.params import Output
from cusparge._types import BLOCK_K, BLOCK_Q

__all__ = ["BLOCK_K", "BLOCK_Q", "GivenMask", "MapOutput", "MapShape"]


@dataclass(frozen=True)
class MapOutput(Output):
    """A contiguous array of another type than float32; "uint8" of a mask holds 0 and 1."""

    dtype: str = "uint32"

    @property
    def num_bytes(self) -> int:
        """Size of the array."""
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.shape)


@dataclass(frozen=True)
class MapShape:
    """The arrays that a map is for.

    Attributes
    ----------
    batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim : int
        Of q and k. In a packed call, `batch` is 1 and the lengths are the totals.
    num_sequences : int, optional
        Sequences of a packed call; None: not packed.
    """

    batch: int
    heads_q: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    num_sequences: int | None = None

    @property
    def blocks_q(self) -> int:
        """Query blocks of a head, as the arrays have them: in a packed call, enough for any."""
        return self._blocks(self.seqlen_q, BLOCK_Q)

    @property
    def blocks_k(self) -> int:
        """Key blocks of a head, likewise."""
        return self._blocks(self.seqlen_k, BLOCK_K)

    def _blocks(self, tokens: int, block: int) -> int:
        if self.num_sequences is None:
            return -(-tokens // block)
        return tokens // block + self.num_sequences

    @property
    def words(self) -> int:
        """Words of 32 bits for the key blocks of one row."""
        return -(-self.longest // 32)

    @property
    def longest(self) -> int:
        """Key blocks of the longest sequence that there can be."""
        return -(-self.seqlen_k // BLOCK_K)

    @property
    def rows(self) -> int:
        """Rows of the map: query blocks of all heads."""
        return self.batch * self.heads_q * self.blocks_q


@dataclass(frozen=True)
class GivenMask:
    """A caller's mask as it lies in the device's memory.

    Attributes
    ----------
    shape : (batch or 1, heads_q or 1, rows, columns)
        In blocks of the mask's own.
    strides : tuple of four int
        Distances in bytes, any sign or 0.
    item_bytes : int
        Size of an element, a bool or an integer: the block is kept where it is not 0.
    block_q, block_k : {64, 128}
        Tokens that an element stands for.
    """

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    item_bytes: int
    block_q: int
    block_k: int
