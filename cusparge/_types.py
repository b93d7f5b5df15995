"""Frozen records that pass between the layers, and the two that users hold: maps and stats."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cusparge._arrays import HostArray, adapter_of, jax_calls
from cusparge._arrays.torch_ops import not_traced
from cusparge.errors import DeviceError, InvalidArgumentError, UnsupportedError, shown
from cusparge.policy import Policy

__all__ = [
    "BLOCK_K",
    "BLOCK_Q",
    "AttentionStats",
    "BlockMap",
    "Counts",
    "Problem",
    "num_blocks",
    "pooled_shapes",
    "whole_number",
]

#: Blocks are 128 queries by 64 keys on every backend and device.
BLOCK_Q = 128
BLOCK_K = 64

#: Dynamo breaks its graph where maps and stats are read, or says this.
_outside = not_traced("values are read there: return the map or the stats, and read them outside")

Layout = Literal["HND", "NHD"]
CausalAlign = Literal["bottom_right", "top_left"]


def whole_number(value: Any) -> int | None:
    """Return a whole number as an int, or None for anything else, bool included."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # arrays and tensors have __index__, and may refuse
        return None


def num_blocks(tokens: int, block: int) -> int:
    """Return how many blocks cover that many tokens."""
    return -(-tokens // block)


def pooled_shapes(shape: tuple[int, ...], block: int, smooth: bool) -> dict[str, tuple[int, ...]]:
    """Return what pooling an array (B, H, S, D) gives: the shape of every result, by name."""
    batch, heads, tokens, head_dim = shape
    blocks = num_blocks(tokens, block)
    shapes: dict[str, tuple[int, ...]] = {
        "block_mean": (batch, heads, blocks, head_dim),
        "similarity": (batch, heads, blocks),
    }
    if smooth:
        shapes["token_mean"] = (batch, heads, head_dim)
    return shapes


@dataclass(frozen=True)
class Problem:
    """One checked call: everything that a backend needs to know except the arrays.

    Attributes
    ----------
    spans : tuple of (q_start, q_stop, k_start, k_stop)
        The tokens of each sequence. In a batch they start at 0, and `k_stop` is its length in
        `seqlens_k`; in a packed call they are consecutive.
    causal_offsets : tuple of int, or None
        Per sequence, query i sees key j when j <= i + offset. None: no causality.
    packed : bool
        True for `attention_varlen`, whose arrays have no batch dimension.
    """

    num_heads_q: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str
    policy: Policy
    sm_scale: float
    spans: tuple[tuple[int, int, int, int], ...]
    causal_offsets: tuple[int, ...] | None
    causal_align: str = "bottom_right"
    packed: bool = False

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return len(self.spans)


@dataclass(frozen=True)
class Counts:
    """What `AttentionStats` is made of, each (batch, num_heads_q).

    Rows are real rows, summed over blocks: they weigh what stage 2 skips, which decides for
    groups of rows that differ between devices.
    """

    reachable: npt.NDArray[np.int64]  # blocks that hold a pair which may be seen
    selected: npt.NDArray[np.int64]  # those computed
    selected_rows: npt.NDArray[np.int64]  # their rows
    skipped_rows: npt.NDArray[np.int64]  # the part of these whose P·V stage 2 skipped

    @classmethod
    def zeros(cls, batch: int, num_heads_q: int) -> Counts:
        """Return counts to add to."""
        return cls(*(np.zeros((batch, num_heads_q), np.int64) for _ in range(4)))

    def stacked(self) -> npt.NDArray[np.int64]:
        """Return them as one array, (4, batch, num_heads_q)."""
        return np.stack([self.reachable, self.selected, self.selected_rows, self.skipped_rows])


class AttentionStats:
    """What one call left out.

    All shares are of the block products that dense attention over the same reachable blocks
    would compute (128 queries by 64 keys each), 0 where no block is reachable.

    Attributes
    ----------
    sparsity : float
        Share of Q·K and P·V block products not computed: the mean of the two below, and the
        paper's measure (arXiv:2502.18137, section 4.1).
    qk_sparsity : float
        Share of the Q·K block products not computed (stage 1).
    pv_sparsity : float
        Share of the P·V block products not computed (stages 1 and 2).
    sparsity_per_head, qk_sparsity_per_head, pv_sparsity_per_head : numpy.ndarray, (B, Hq) float64
        The same for each sequence and head.
    """

    __slots__ = ("source",)

    def __init__(self, counts: Any) -> None:
        """Take `Counts`, or the same stacked in an array of any framework, read when asked for."""
        self.source = counts
        jax_calls.announce()

    @property
    def counts(self) -> Counts:
        """What the shares are made of."""
        if not isinstance(self.source, Counts):
            # (..., 4, batch, heads): jax.vmap puts its own axes first.
            self.source = Counts(*np.moveaxis(_as_int64(self.source), -3, 0))
        return self.source

    @staticmethod
    def _shares(*counts: Any) -> tuple[Any, Any]:
        """Return the shares of Q·K and of P·V that were not computed."""
        reachable, selected, selected_rows, skipped_rows = (
            np.asarray(count, np.float64) for count in counts
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = np.where(reachable > 0, selected / reachable, 1.0)
            kept_pv = kept * np.where(selected_rows > 0, 1 - skipped_rows / selected_rows, 1.0)
        return 1 - kept, 1 - kept_pv

    @_outside
    def _per_head(self) -> tuple[Any, Any]:
        c = self.counts
        return self._shares(c.reachable, c.selected, c.selected_rows, c.skipped_rows)

    @_outside
    def _total(self) -> tuple[float, float]:
        c = self.counts
        qk, pv = self._shares(
            c.reachable.sum(), c.selected.sum(), c.selected_rows.sum(), c.skipped_rows.sum()
        )
        return float(qk), float(pv)

    @property
    def qk_sparsity_per_head(self) -> npt.NDArray[np.float64]:
        """Share of Q·K block products not computed, (B, Hq)."""
        return np.asarray(self._per_head()[0])

    @property
    def pv_sparsity_per_head(self) -> npt.NDArray[np.float64]:
        """Share of P·V block products not computed, (B, Hq)."""
        return np.asarray(self._per_head()[1])

    @property
    def sparsity_per_head(self) -> npt.NDArray[np.float64]:
        """Mean of the two shares, (B, Hq)."""
        return (self.qk_sparsity_per_head + self.pv_sparsity_per_head) / 2

    @property
    def qk_sparsity(self) -> float:
        """Share of Q·K block products not computed."""
        return self._total()[0]

    @property
    def pv_sparsity(self) -> float:
        """Share of P·V block products not computed."""
        return self._total()[1]

    @property
    def sparsity(self) -> float:
        """Share of all block products not computed."""
        return (self.qk_sparsity + self.pv_sparsity) / 2

    def __repr__(self) -> str:
        """Show the three shares."""
        return (
            f"AttentionStats(sparsity={self.sparsity:.4f}, qk_sparsity={self.qk_sparsity:.4f}, "
            f"pv_sparsity={self.pv_sparsity:.4f})"
        )


class BlockMap:
    """Which blocks of the attention map are computed.

    Made by `predict_block_map` or, from a mask of your own, by `BlockMap.from_mask`.

    Attributes
    ----------
    mask : array, (B, Hq, ceil(seqlen_q / 128), ceil(seqlen_k / 64)) bool
        True where the block of 128 queries by 64 keys is computed; in the caller's framework.
        A batch or head size of 1 serves every sequence or head.
    seqlen_q, seqlen_k : int
        The lengths that the map was made for.
    sparsity : float
        Share of the reachable blocks that are not computed, 0 where none is reachable. In a map
        made by hand every block counts as reachable.
    """

    __slots__ = ("_host", "_reachable", "_row_mask", "mask", "seqlen_k", "seqlen_q")

    mask: Any
    seqlen_q: int
    seqlen_k: int
    _host: npt.NDArray[np.bool_] | None
    _reachable: Any  # a number, or an array that holds one and is read when asked for
    _row_mask: Any  # as reachable, an array of any framework after a trace

    def __init__(
        self,
        mask: Any,
        *,
        seqlen_q: int,
        seqlen_k: int,
        reachable: Any,
        host: npt.NDArray[np.bool_] | None = None,
        row_mask: Any = None,
    ) -> None:
        set_ = object.__setattr__
        if isinstance(mask, np.ndarray):
            mask.flags.writeable = False  # a write would change what is shown, not what is computed
        set_(self, "mask", mask)
        set_(self, "seqlen_q", seqlen_q)
        set_(self, "seqlen_k", seqlen_k)
        set_(self, "_host", host)
        set_(self, "_reachable", reachable)
        set_(self, "_row_mask", row_mask)
        jax_calls.announce()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse: a map may be in use by several calls."""
        raise AttributeError(f"a BlockMap is read-only: {name} cannot be set; make a new one.")

    def __delattr__(self, name: str) -> None:
        """Refuse, as setting does."""
        raise AttributeError(f"a BlockMap is read-only: {name} cannot be deleted.")

    @_outside
    def __reduce__(self) -> Any:
        """Let a map be copied and pickled, though none of its fields can be set."""
        make = partial(
            BlockMap,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            host=self.host_mask,
            reachable=self._total_reachable(),
            row_mask=self.row_mask,
        )
        return make, (self.mask,)

    @property
    def reachable(self) -> Any:
        """How many blocks are reachable: a number, or an array that holds it."""
        return self._reachable

    def _total_reachable(self) -> int:
        if isinstance(self._reachable, int):
            return self._reachable
        return int(_as_int64(self._reachable).sum())  # one number, or several after jax.vmap

    @property
    def row_mask(self) -> npt.NDArray[np.bool_] | None:
        """The mask 64 rows fine, (B, Hq, ceil(seqlen_q / 64), ceil(seqlen_k / 64)), or None.

        None where `mask` says everything.
        """
        return None if self._row_mask is None else _on_host(self._row_mask)

    @property
    def traced_row_mask(self) -> Any:
        """`row_mask` as it is, for a trace: an array of any framework, or None."""
        return self._row_mask

    @property
    def host_mask(self) -> npt.NDArray[np.bool_]:
        """`mask` as a NumPy array, for backends on the host."""
        if self._host is None:  # made by a compiled graph, where no memory could be read
            object.__setattr__(self, "_host", _on_host(self.mask).copy())
        return self._host  # type: ignore[return-value]

    @property
    @_outside
    def sparsity(self) -> float:
        """Share of the reachable blocks that are not computed."""
        reachable = self._total_reachable()
        return 1.0 - float(self.host_mask.sum()) / reachable if reachable else 0.0

    def __repr__(self) -> str:
        """Show shape, lengths and sparsity."""
        return (
            f"BlockMap(mask={'x'.join(map(str, self.mask.shape))}, seqlen_q={self.seqlen_q}, "
            f"seqlen_k={self.seqlen_k}, sparsity={self.sparsity:.4f})"
        )

    @classmethod
    @not_traced("BlockMap.from_mask reads the mask: make the map outside of the compiled function")
    def from_mask(
        cls, mask: Any, *, seqlen_q: int, seqlen_k: int, block_q: int = 128, block_k: int = 64
    ) -> BlockMap:
        """Make a map from a block mask of your own.

        Exactly the pairs of tokens that the mask keeps are computed, together with causality and
        the lengths of the call; nothing is added. A row that is left without keys gives 0 in
        `out` and -inf in `lse`.

        Parameters
        ----------
        mask : array, (B or 1, Hq or 1, ceil(seqlen_q / block_q), ceil(seqlen_k / block_k))
            bool, or integers where anything but 0 keeps the block; NumPy, torch or JAX.
        seqlen_q, seqlen_k : int
            The lengths of the sequences that the mask is for, 0 or more.
        block_q, block_k : {64, 128}
            The mask's own block sizes, in tokens. A mask of 64-row blocks stays 64 rows fine.

        Returns
        -------
        BlockMap

        Raises
        ------
        InvalidArgumentError
            The shape does not fit the lengths, or the dtype is no mask.
        DeviceError
            The mask lives on a device that cannot be used.

        Examples
        --------
        >>> import numpy as np
        >>> band = np.tri(4, 8, 2, dtype=bool)[None, None]
        >>> BlockMap.from_mask(band, seqlen_q=512, seqlen_k=512).mask.shape
        (1, 1, 4, 8)
        """
        given_sizes = {
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "block_q": block_q,
            "block_k": block_k,
        }
        sizes = []
        for name, given_size in given_sizes.items():
            number = whole_number(given_size)
            if number is None or not 0 <= number < 2**62:
                raise InvalidArgumentError(
                    f"{name} must be a whole number of tokens, 0 or more: got {shown(given_size)}."
                )
            sizes.append(number)
        seqlen_q, seqlen_k, block_q, block_k = sizes
        for name, size in (("block_q", block_q), ("block_k", block_k)):
            if size not in (64, 128):
                raise InvalidArgumentError(
                    f"{name} is not a block size: got {shown(size)}; allowed 64 and 128. Merge or "
                    "split the mask's blocks to one of these."
                )
        adapter = adapter_of(mask, "mask")
        adapter.check(mask, "mask")
        device = adapter.device(mask)
        if device.kind not in ("cpu", "traced"):
            raise no_gpu_yet("mask", device)
        if adapter.is_traced(mask):
            raise UnsupportedError(
                "mask stands for values that come later, and BlockMap.from_mask reads them: make "
                "the map outside of the traced function, and pass it in."
            )
        view = adapter.view(mask, "mask")
        given = view.data
        if (view.dtype != "bool" and given.dtype.kind not in "iu") or view.dtype == "bfloat16":
            raise InvalidArgumentError(
                f"mask must be bool or integers: got {view.dtype}. An additive mask of floats is "
                "not a block mask; pass True for the blocks to compute."
            )
        wanted = (num_blocks(seqlen_q, block_q), num_blocks(seqlen_k, block_k))
        if given.ndim != 4 or given.shape[2:] != wanted:
            raise InvalidArgumentError(
                f"mask does not fit the lengths: got shape {given.shape}; expected "
                f"(B or 1, Hq or 1, {wanted[0]}, {wanted[1]}) for seqlen_q={seqlen_q}, "
                f"seqlen_k={seqlen_k} in blocks of {block_q} x {block_k}."
            )
        fine = given != 0
        if block_k == 128:
            fine = np.repeat(fine, 2, axis=3)[..., : num_blocks(seqlen_k, BLOCK_K)]
        row_mask = None
        if block_q == 64:
            row_mask = fine
            if fine.shape[2] % 2:
                fine = np.concatenate([fine, np.zeros_like(fine[:, :, :1])], axis=2)
            fine = fine[:, :, 0::2] | fine[:, :, 1::2]
        host, finish = adapter.new(fine.shape, "bool", mask)
        host.data[...] = fine
        return cls(
            finish(),
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            host=np.ascontiguousarray(fine),
            reachable=fine.size,
            row_mask=row_mask,
        )


def _on_host(array: Any) -> npt.NDArray[Any]:
    """View an array of any framework that lives in host memory."""
    if isinstance(array, np.ndarray):
        return array
    adapter = adapter_of(array, "array")
    view = None if adapter.is_traced(array) else adapter.view(array, "array")
    if not isinstance(view, HostArray):
        raise UnsupportedError(
            "stats and block maps that are made inside a traced function have no values before it "
            "has run: return them from the function, and read them outside."
        )
    return np.asarray(view.data)


def _as_int64(counts: Any) -> npt.NDArray[np.int64]:
    """Return counts that travel as int64 or, where JAX has none, in halves as uint32."""
    values = np.ascontiguousarray(_on_host(counts))
    return values if values.dtype == np.int64 else values.view(np.int64)


def no_gpu_yet(name: str, device: Any) -> DeviceError:
    """Return the error for an array that no backend of this version can work on."""
    if device.kind == "cuda":
        return DeviceError(
            f"{name} is on {device}, and this version of cusparge has no attention kernel for GPUs "
            "yet: attention runs on the CPU only. Move the arrays to host memory (torch `.cpu()`, "
            "CuPy `.get()`, JAX `jax.device_get`)."
        )
    return DeviceError(
        f"{name} is on {device}: cusparge works on host memory. Move the arrays there first "
        "(torch `.cpu()`, JAX `jax.device_get`)."
    )
