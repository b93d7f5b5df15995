"""The public calls on arrays that have values: adapt, check, compute, hand back."""

from __future__ import annotations

from typing import Any

import numpy as np

from cusparge import _check, _graph, _options
from cusparge._arrays import Adapter, Device, adapter_for
from cusparge._arrays.torch_ops import not_traced
from cusparge._backend import Backend, backend_for
from cusparge._graph.results import results
from cusparge._types import (
    BLOCK_K,
    BLOCK_Q,
    BlockMap,
    Problem,
    num_blocks,
)

__all__ = ["attention", "attention_varlen", "predict_block_map"]


#: Where Dynamo gave up on a graph, it would still trace what the call is made of.
_eager = not_traced("it is computed at once")


def _adapted(backend: str, **arrays: Any) -> tuple[Adapter, Device]:
    """Return the adapter and the device of the arrays, given by argument name."""
    adapter, device = adapter_for(**arrays)
    if device.kind == "cuda" and adapter.framework != "torch":  # JAX would say it late, wrapped
        backend_for(backend, device)
    return adapter, device


@_eager
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    policy: Any,
    block_map: Any,
    causal: Any,
    causal_align: Any,
    sm_scale: Any,
    layout: Any,
    seqlens_k: Any,
    return_lse: Any,
    return_stats: Any,
    check_numerics: Any,
    backend: Any,
    **unsupported: Any,
) -> Any:
    """Compute `cusparge.attention`."""
    _options.refuse_unknown("attention", unsupported)
    with_lse = _options.check_flag("return_lse", return_lse)
    with_stats = _options.check_flag("return_stats", return_stats)
    with_numerics = _options.check_flag("check_numerics", check_numerics)
    backend = _options.check_backend(backend)
    adapter, device = _adapted(backend, q=q, k=k, v=v)
    common = {
        "policy": policy,
        "causal": causal,
        "causal_align": causal_align,
        "sm_scale": sm_scale,
        "layout": layout,
        "seqlens_k": seqlens_k,
    }
    if _graph.is_needed(adapter, q, k, v, seqlens_k):
        return _graph.of(adapter.framework).attention(
            *(q, k, v),
            **common,
            block_map=block_map,
            return_lse=with_lse,
            return_stats=with_stats,
            check_numerics=with_numerics,
            backend=backend,
        )
    chosen = backend_for(backend, device)
    problem, views = _check.check_arrays(
        {name: adapter.view(array, name) for name, array in (("q", q), ("k", k), ("v", v))},
        **common,
        device_kind=device.kind,
    )
    block_map = _check.check_block_map(block_map, problem)
    if with_numerics:
        _check.check_numerics(views, problem)
    return _compute(
        *(chosen, adapter, q, problem, views, block_map),
        heads_first=layout == "HND",
        with_lse=with_lse,
        with_stats=with_stats,
    )


@_eager
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    policy: Any,
    causal: Any,
    causal_align: Any,
    sm_scale: Any,
    return_lse: Any,
    return_stats: Any,
    check_numerics: Any,
    backend: Any,
    **unsupported: Any,
) -> Any:
    """Compute `cusparge.attention_varlen`."""
    _options.refuse_unknown("attention_varlen", unsupported)
    with_lse = _options.check_flag("return_lse", return_lse)
    with_stats = _options.check_flag("return_stats", return_stats)
    with_numerics = _options.check_flag("check_numerics", check_numerics)
    backend = _options.check_backend(backend)
    adapter, device = _adapted(backend, q=q, k=k, v=v)
    common = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "policy": policy,
        "causal": causal,
        "causal_align": causal_align,
        "sm_scale": sm_scale,
    }
    if _graph.is_needed(adapter, q, k, v, cu_seqlens_q, cu_seqlens_k):
        return _graph.of(adapter.framework).attention_varlen(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k),
            **common,
            return_lse=with_lse,
            return_stats=with_stats,
            check_numerics=with_numerics,
            backend=backend,
        )
    chosen = backend_for(backend, device)
    problem, views = _check.check_packed_arrays(
        {name: adapter.view(array, name) for name, array in (("q", q), ("k", k), ("v", v))},
        cu_seqlens_q,
        cu_seqlens_k,
        **common,
        device_kind=device.kind,
    )
    if with_numerics:
        _check.check_numerics(views, problem)
    return _compute(
        *(chosen, adapter, q, problem, views, None),
        heads_first=False,
        with_lse=with_lse,
        with_stats=with_stats,
    )


def _compute(
    backend: Backend,
    adapter: Adapter,
    q: Any,
    problem: Problem,
    views: dict[str, Any],
    block_map: BlockMap | None,
    *,
    heads_first: bool,
    with_lse: bool,
    with_stats: bool,
) -> Any:
    """Allocate the results in the caller's framework, and let the backend write them."""
    out, finish_out = adapter.like(q)
    ordered = out
    if not heads_first:  # as the backend wants them
        ordered = out.swapaxes(-3, -2)
    lse = None
    if with_lse:
        shape: tuple[int, ...] = (problem.num_heads_q, problem.seqlen_q)
        if not problem.packed:
            shape = (problem.batch, *shape)
        lse, finish_lse = adapter.new(shape, "float32", q)
    counts = backend.attention(
        problem,
        views["q"],
        views["k"],
        views["v"],
        block_map,
        ordered,
        None if lse is None else lse.data,
    )
    sums = finish_lse() if with_lse else None
    return results(finish_out(), sums, counts, with_lse, with_stats)


@_eager
def predict_block_map(
    q: Any,
    k: Any,
    *,
    policy: Any,
    causal: Any,
    causal_align: Any,
    sm_scale: Any,
    layout: Any,
    seqlens_k: Any,
    backend: Any,
) -> BlockMap:
    """Compute `cusparge.predict_block_map`."""
    backend = _options.check_backend(backend)
    adapter, device = _adapted(backend, q=q, k=k)
    common = {
        "policy": policy,
        "causal": causal,
        "causal_align": causal_align,
        "sm_scale": sm_scale,
        "layout": layout,
        "seqlens_k": seqlens_k,
    }
    if _graph.is_needed(adapter, q, k, seqlens_k):
        made: BlockMap = _graph.of(adapter.framework).predict_block_map(
            q, k, **common, backend=backend
        )
        return made
    chosen = backend_for(backend, device)
    problem, views = _check.check_arrays(
        {"q": adapter.view(q, "q"), "k": adapter.view(k, "k")},
        **common,
        device_kind=device.kind,
    )
    shape = (
        problem.batch,
        problem.num_heads_q,
        num_blocks(problem.seqlen_q, BLOCK_Q),
        num_blocks(problem.seqlen_k, BLOCK_K),
    )
    mask, finish = adapter.new(shape, "bool", q)
    mask.data[...] = False
    reachable = chosen.predict(problem, views["q"], views["k"], mask.data)
    return BlockMap(
        finish(),
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        host=np.array(mask.data),
        reachable=reachable,
    )
