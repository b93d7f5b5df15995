"""Pictures of block maps: as text for a terminal, and as figures through matplotlib.

Nothing here is imported by ``import cusparge``, and matplotlib only when a figure is asked for.

>>> import numpy as np
>>> from cusparge import viz
>>> print(viz.block_map_text(np.tri(3, 6, 1, dtype=bool), ascii_only=True))
##....
###...
####..
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cusparge.errors import InvalidArgumentError, UnsupportedError

__all__ = [
    "Panel",
    "block_map_text",
    "block_mass",
    "draw_curves",
    "draw_panels",
    "png",
    "require_matplotlib",
]

_BLOCK_Q = 128
_BLOCK_K = 64

#: From nothing computed to everything, for the share of a cell's blocks that is computed.
_SHADES = "·░▒▓█"
_ASCII_SHADES = ".-+*#"


def block_map_text(
    mask: npt.ArrayLike,
    *,
    width: int = 72,
    ascii_only: bool = False,
    reachable: npt.ArrayLike | None = None,
) -> str:
    """Draw the block map of one head with characters.

    A character is one block of 128 queries by 64 keys, which gives the map its true proportions
    where characters are twice as tall as wide. A map that is wider than `width` is shown smaller:
    a character then stands for several blocks, and its shade for the share that is computed.

    Parameters
    ----------
    mask : array, (num_blocks_q, num_blocks_k) bool
        True where a block is computed.
    width : int
        The most characters in a line, 1 or more.
    ascii_only : bool
        Use ``.-+*#`` instead of ``·░▒▓█``.
    reachable : array, as `mask`, optional
        False where causality or the lengths forbid the whole block: shown as a space.

    Returns
    -------
    str
        One line for each row of blocks, or for several.

    Raises
    ------
    InvalidArgumentError
        `mask` is not two-dimensional, `reachable` is of another shape, or `width` below 1.
    """
    blocks = np.asarray(mask, dtype=bool)
    allowed = np.ones_like(blocks) if reachable is None else np.asarray(reachable, dtype=bool)
    if blocks.ndim != 2 or allowed.shape != blocks.shape:
        raise InvalidArgumentError(
            f"a block map of one head has two dimensions: got shape {blocks.shape}, and reachable "
            f"of shape {allowed.shape}. Pass mask[sequence, head]."
        )
    if width < 1:
        raise InvalidArgumentError(f"width is too small: got {width}; allowed 1 or more.")
    columns = blocks.shape[1]
    if blocks.size == 0:
        return ""
    step = -(-columns // width)
    shades = _ASCII_SHADES if ascii_only else _SHADES
    computed = _cell_sums(blocks & allowed, step)
    possible = _cell_sums(allowed, step)
    share = np.divide(computed, possible, out=np.zeros(computed.shape), where=possible > 0)
    # Only all and nothing get the outer shades: 0.99 of the blocks is not all of them.
    level = np.where(share >= 1, 4, np.where(share <= 0, 0, 1 + np.minimum(2, share * 3)))
    level = level.astype(int)
    return "\n".join(
        "".join(shades[level[i, j]] if possible[i, j] else " " for j in range(level.shape[1]))
        for i in range(level.shape[0])
    )


def _cell_sums(blocks: npt.NDArray[np.bool_], step: int) -> npt.NDArray[np.int64]:
    """Return how many blocks of each `step` by `step` cell are True."""
    edges = (range(0, blocks.shape[axis], step) for axis in (0, 1))
    sums = blocks.astype(np.int64)
    for axis, starts in enumerate(edges):
        sums = np.add.reduceat(sums, list(starts), axis=axis)
    return sums


def block_mass(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    *,
    causal: bool = False,
    causal_align: Literal["bottom_right", "top_left"] = "bottom_right",
    sm_scale: float | None = None,
) -> npt.NDArray[np.float32]:
    """Return how much of the attention really falls into each block, for one head.

    One block of queries is worked on at a time, so that long sequences need no square of memory.

    Parameters
    ----------
    q : array, (Sq, D)
        Queries of one head.
    k : array, (Sk, D)
        Keys of one head.
    causal, causal_align, sm_scale
        As in `cusparge.attention`.

    Returns
    -------
    numpy.ndarray, (ceil(Sq / 128), ceil(Sk / 64)) float32
        Mean over the rows of a query block of the softmax that falls into each key block. A row
        adds up to 1 where all of its queries see keys.

    Raises
    ------
    InvalidArgumentError
        The arrays are not those of one head.
    """
    queries, keys = np.asarray(q), np.asarray(k)
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise InvalidArgumentError(
            "q and k must be those of one head, (Sq, D) and (Sk, D): got shapes "
            f"{queries.shape} and {keys.shape}."
        )
    tokens_q, tokens_k = queries.shape[0], keys.shape[0]
    scale = queries.shape[1] ** -0.5 if sm_scale is None else sm_scale
    offset = tokens_k - tokens_q if causal_align == "bottom_right" else 0
    starts = np.arange(0, tokens_k, _BLOCK_K)
    mass = np.zeros((-(-tokens_q // _BLOCK_Q), starts.size), np.float32)
    if mass.size == 0:
        return mass
    # float64 where the inputs are, as their scores may overflow float32
    dtype = np.float64 if queries.dtype == np.float64 else np.float32
    columns = keys.astype(dtype, copy=False).T
    index = np.arange(tokens_k)
    for block in range(mass.shape[0]):
        first = block * _BLOCK_Q
        rows = queries[first : first + _BLOCK_Q].astype(dtype)
        with np.errstate(all="ignore"):  # NaN and infinity in a file stay what they are
            scores = (rows * dtype(scale)) @ columns
            if causal:
                limit = np.arange(first, first + len(rows))[:, None] + offset
                scores[index > limit] = -np.inf
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
            total = weights.sum(axis=1, keepdims=True)
            weights /= np.where(total == 0, 1, total)
        mass[block] = np.add.reduceat(weights, starts, axis=1).mean(axis=0)
    return mass


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes
    ----------
    title : str
        What stands above it.
    values : numpy.ndarray, (num_blocks_q, num_blocks_k)
        A block map (bool) or the mass of each block (float).
    """

    title: str
    values: npt.NDArray[Any]


def require_matplotlib() -> None:
    """Raise `UnsupportedError`, saying how to mend it, where matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "pictures and reports need matplotlib, which is not installed: "
            'pip install "cusparge[plot]"'
        ) from error


def draw_panels(panels: Sequence[Panel], *, columns: int, title: str = "") -> Any:
    """Draw panels in rows of `columns`.

    Block maps are white where nothing is computed; masses are shaded by the power 0.4 of their
    share, because the blocks that matter least are the interesting ones.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UnsupportedError
        matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(3.0 * columns, 3.1 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        if panel.values.size == 0:
            axis.set_axis_off()
            continue
        is_map = panel.values.dtype == bool
        options: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": "Blues"}
        if not is_map:
            options = {"norm": PowerNorm(0.4, vmin=0, vmax=1), "cmap": "magma_r"}
        # Blocks are twice as high as wide, in tokens.
        axis.imshow(panel.values, interpolation="nearest", aspect=2, **options)
        axis.set_title(panel.title, fontsize=9, parse_math=False)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("key block (64 keys)", fontsize=7)
        axis.set_ylabel("query block (128 queries)", fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def draw_curves(
    curves: Sequence[tuple[str, npt.ArrayLike, npt.ArrayLike]], *, limit: float | None = None
) -> Any:
    """Draw the relative L1 error over the sparsity, one line for each (label, sparsity, error).

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UnsupportedError
        matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for label, sparsity, error in curves:
        axis.plot(np.asarray(sparsity), np.asarray(error), marker="o", markersize=3, label=label)
    if limit is not None:
        axis.axhline(limit, color="grey", linestyle="--", linewidth=1, label=f"error {limit:g}")
    axis.set_xlabel("sparsity: share of the block products not computed")
    axis.set_ylabel("relative L1 error against dense attention")
    axis.set_xlim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    if len(curves) <= 24:  # more labels than that would cover the lines
        axis.legend(fontsize=7, loc="upper left")
    return figure


def png(figure: Any, *, dpi: int = 120) -> bytes:
    """Return a figure of this module as the bytes of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
