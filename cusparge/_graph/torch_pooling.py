"""Pooling as an operator in a graph of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cusparge import _check
from cusparge._arrays import torch_ops
from cusparge._graph.torch import flag, outlines, word
from cusparge._types import pooled_shapes

__all__ = ["install", "pool_blocks"]

_eager: list[Callable[..., Any]] = []

_POOL = (
    "(Tensor x, Tensor? lengths, int block, bool smooth, str layout, SymInt[]? lengths_list)"
    " -> (Tensor, Tensor, Tensor)"
)


def install(eager: Callable[..., Any]) -> None:
    """Take the eager function, and make the operator of it."""
    _eager[:] = [eager]
    torch_ops.implement("pool_blocks", _POOL, _run_pool, _fake_pool)


def pool_blocks(
    x: Any, block: Any, smooth: Any, layout: Any, seqlens: Any, device: None = None
) -> tuple[Any, ...]:
    """Put the operator for pooling into the graph; the token mean is None if not asked for."""
    torch_ops.check_tensors(x=x)
    smooth = flag("smooth", smooth)
    block = torch_ops.whole(block, "block")
    lengths, lengths_list = torch_ops.lengths(seqlens, "seqlens")
    made = torch_ops.call(
        "pool_blocks", x, lengths, block, smooth, word("layout", layout), lengths_list
    )
    return (*made[:2], made[2] if smooth else None)


def _run_pool(
    x: Any, lengths: Any, block: Any, smooth: Any, layout: Any, lengths_list: Any
) -> tuple[Any, ...]:
    made = _eager[0](x, block, smooth, layout, lengths if lengths is not None else lengths_list)
    token_mean = made.token_mean if smooth else x.new_empty((0,), dtype=made.mean.dtype)
    return made.mean, made.similarity, token_mean


def _fake_pool(
    x: Any, lengths: Any, block: Any, smooth: Any, layout: Any, lengths_list: Any
) -> tuple[Any, ...]:
    _check.check_one_array(outlines(x=x)["x"], "x", layout)
    batch, heads, tokens, head_dim = x.shape
    if layout == "NHD":
        tokens, heads = heads, tokens
    (float32,) = torch_ops.dtypes("float32")
    shapes = pooled_shapes((batch, heads, tokens, head_dim), block, smooth)
    mean, similarity = shapes["block_mean"], shapes["similarity"]
    token_mean = shapes.get("token_mean", (0,))
    return tuple(x.new_empty(shape, dtype=float32) for shape in (mean, similarity, token_mean))
