"""The public calls: adapt, check, compute, hand back."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from cusparge import _check
from cusparge._arrays import Adapter, HostArray, adapter_for
from cusparge._arrays.eager import not_traced
from cusparge._backend import Backend, backend_for
from cusparge._types import (
    BLOCK_K,
    BLOCK_Q,
    AttentionStats,
    BlockMap,
    CausalAlign,
    Layout,
    Problem,
    num_blocks,
)
from cusparge.policy import Policy

__all__ = ["attention", "attention_varlen", "predict_block_map"]

BackendName = Literal["auto", "cuda", "cpu", "reference"]


@not_traced
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    policy: Policy | None = None,
    block_map: BlockMap | None = None,
    causal: bool = False,
    causal_align: CausalAlign = "bottom_right",
    sm_scale: float | None = None,
    layout: Layout = "HND",
    seqlens_k: Any = None,
    return_lse: bool = False,
    return_stats: bool = False,
    check_numerics: bool = False,
    backend: BackendName = "auto",
    **unsupported: Any,
) -> Any:
    """Compute softmax attention, leaving out the blocks that cannot matter.

    ``out = softmax(sm_scale * q @ k.T) @ v`` over blocks of 128 queries by 64 keys, with both
    filters of SpargeAttn (arXiv:2502.18137): stage 1 chooses blocks before Q·K (section 3.2),
    stage 2 skips the P·V product of tiles that cannot count (section 3.3).

    Parameters
    ----------
    q : array, (B, Hq, Sq, D) float16, bfloat16, float32 or, on the CPU, float64
        Queries: NumPy, torch, JAX or any other framework that speaks DLPack. Any strides, as long
        as the last dimension is contiguous; nothing is copied for them. D is 1 to 256.
    k, v : array, (B, Hkv, Sk, D), framework, dtype and device of `q`
        Keys and values. Hq must be a multiple of Hkv: head h reads h // (Hq / Hkv).
    policy : TopCdf, TopK or Dense, optional
        What may be skipped. None: ``TopCdf()`` with its defaults.
    block_map : BlockMap, optional
        Blocks chosen before, instead of stage 1. `policy` then gives `quantize` and stage 2 only.
    causal : bool
        Let queries see no later keys, token by token.
    causal_align : {"bottom_right", "top_left"}
        Query i sees key j when j <= i + (Sk - Sq), or when j <= i; Sq and Sk are the lengths of
        the arrays, whatever `seqlens_k` says.
    sm_scale : float, optional
        Factor on the scores before softmax; 1 / sqrt(D) by default.
    layout : {"HND", "NHD"}
        NHD: arrays are (B, S, H, D).
    seqlens_k : sequence or array of int, (B,), optional
        Valid keys of each sequence; what follows them is padding, and is not looked at.
    return_lse, return_stats : bool
        Return these beside `out`, in this order.
    check_numerics : bool
        Raise for a NaN or an infinity in q, k or v (padding aside), which reads them once more.
    backend : {"auto", "cuda", "cpu", "reference"}
        "auto" goes where the arrays are. "reference" is the slow float64 oracle.
    **unsupported
        `attn_mask` and `dropout_p` of other libraries are refused with advice.

    Returns
    -------
    out : array, as q
        Same framework, shape, dtype, device and layout. 0 in a row that may see no key.
    lse : array, (B, Hq, Sq) float32, with return_lse
        Natural log of the sum of exp(sm_scale * q·k) over the keys computed; -inf for a row
        without any.
    stats : AttentionStats, with return_stats
        What was left out.

    Raises
    ------
    InvalidArgumentError
        An argument is wrong; the message names it and says how to mend it.
    UnsupportedError
        An input requires gradients or is traced by JAX, or a mask or dropout was asked for.
    DeviceError
        The arrays live on a device without a backend.

    Notes
    -----
    A NaN or infinity in an input reaches only the rows that may see it, which become NaN.

    On the CPU arithmetic is float32 (float64 where magnitudes need it). ``quantize=True``
    reproduces the int8 and fp8 rules of the GPU within rounding, and takes longer than float32.

    Examples
    --------
    >>> import numpy as np, cusparge
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 2, 300, 64), dtype=np.float32)
    >>> out, lse = cusparge.attention(q, k, v, causal=True, return_lse=True)
    >>> out.shape, lse.shape, out.dtype
    ((1, 2, 300, 64), (1, 2, 300), dtype('float32'))
    """
    _check.refuse_unknown("attention", unsupported)
    with_lse = _check.check_flag("return_lse", return_lse)
    with_stats = _check.check_flag("return_stats", return_stats)
    adapter, device = adapter_for(q=q, k=k, v=v)
    chosen = backend_for(_check.check_backend(backend), device)
    problem, views = _check.check_arrays(
        {name: adapter.view(array, name) for name, array in (("q", q), ("k", k), ("v", v))},
        policy=policy,
        causal=causal,
        causal_align=causal_align,
        sm_scale=sm_scale,
        layout=layout,
        seqlens_k=seqlens_k,
        device_kind=device.kind,
    )
    block_map = _check.check_block_map(block_map, problem)
    if _check.check_flag("check_numerics", check_numerics):
        _check.check_numerics(views, problem)
    heads_first = layout == "HND"
    return _compute(
        chosen, adapter, q, problem, views, block_map, heads_first, with_lse, with_stats
    )


@not_traced
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    policy: Policy | None = None,
    causal: bool = False,
    causal_align: CausalAlign = "bottom_right",
    sm_scale: float | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    check_numerics: bool = False,
    backend: BackendName = "auto",
    **unsupported: Any,
) -> Any:
    """Compute attention within each of several sequences that are packed one after another.

    No sequence influences another: means, scales and blocks are its own.

    Parameters
    ----------
    q : array, (total_q, Hq, D)
        Queries of all sequences, as for `attention`.
    k, v : array, (total_k, Hkv, D)
        Keys and values of all sequences.
    cu_seqlens_q, cu_seqlens_k : sequence or array of int, (B + 1,)
        Where each sequence starts, and the total at the end; rising from 0. A sequence may be
        empty.
    max_seqlen_q, max_seqlen_k : int, optional
        At least the longest sequence, for callers that have it; None works it out.
    policy, causal, causal_align, sm_scale, return_lse, return_stats, check_numerics, backend
        As for `attention`; causality is per sequence, with its own lengths.
    **unsupported
        `attn_mask` and `dropout_p` of other libraries are refused with advice.

    Returns
    -------
    out : array, (total_q, Hq, D), as q
        0 in a row that may see no key.
    lse : array, (Hq, total_q) float32, with return_lse
        As for `attention`.
    stats : AttentionStats, with return_stats
        Per sequence and head.

    Raises
    ------
    InvalidArgumentError, UnsupportedError, DeviceError
        As for `attention`.

    Examples
    --------
    >>> import numpy as np, cusparge
    >>> q = k = v = np.ones((300, 2, 64), np.float32)
    >>> cusparge.attention_varlen(q, k, v, [0, 100, 300], [0, 100, 300]).shape
    (300, 2, 64)
    """
    _check.refuse_unknown("attention_varlen", unsupported)
    with_lse = _check.check_flag("return_lse", return_lse)
    with_stats = _check.check_flag("return_stats", return_stats)
    adapter, device = adapter_for(q=q, k=k, v=v)
    chosen = backend_for(_check.check_backend(backend), device)
    problem, views = _check.check_packed_arrays(
        {name: adapter.view(array, name) for name, array in (("q", q), ("k", k), ("v", v))},
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        policy=policy,
        causal=causal,
        causal_align=causal_align,
        sm_scale=sm_scale,
        device_kind=device.kind,
    )
    if _check.check_flag("check_numerics", check_numerics):
        _check.check_numerics(views, problem)
    return _compute(chosen, adapter, q, problem, views, None, False, with_lse, with_stats)


def _compute(
    backend: Backend,
    adapter: Adapter,
    q: Any,
    problem: Problem,
    views: dict[str, HostArray],
    block_map: BlockMap | None,
    heads_first: bool,
    with_lse: bool,
    with_stats: bool,
) -> Any:
    """Allocate the results in the caller's framework, and let the backend write them."""
    out, finish_out = adapter.like(q)
    ordered = out
    if not heads_first:  # as the backend wants them
        ordered = out.with_data(out.data.swapaxes(-3, -2))
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
    results = [finish_out()]
    if with_lse:
        results.append(finish_lse())
    if with_stats:
        results.append(AttentionStats(counts))
    return results[0] if len(results) == 1 else tuple(results)


@not_traced
def predict_block_map(
    q: Any,
    k: Any,
    *,
    policy: Policy | None = None,
    causal: bool = False,
    causal_align: CausalAlign = "bottom_right",
    sm_scale: float | None = None,
    layout: Layout = "HND",
    seqlens_k: Any = None,
    backend: BackendName = "auto",
) -> BlockMap:
    """Run stage 1 alone: predict which blocks of the attention map matter.

    Per block of 128 queries, the softmax over mean-pooled blocks of 64 keys decides
    (arXiv:2502.18137, section 3.2). The map can be kept and given to later calls of `attention`.

    Parameters
    ----------
    q, k : array
        As for `attention`.
    policy, causal, causal_align, sm_scale, layout, seqlens_k, backend
        As for `attention`.

    Returns
    -------
    BlockMap
        Its mask is (B, Hq, ceil(Sq / 128), ceil(Sk / 64)) bool in the caller's framework.

    Raises
    ------
    InvalidArgumentError, UnsupportedError, DeviceError
        As for `attention`.

    Examples
    --------
    >>> import numpy as np, cusparge
    >>> q = k = np.random.default_rng(0).standard_normal((1, 1, 512, 64), dtype=np.float32)
    >>> m = cusparge.predict_block_map(q, k, policy=cusparge.TopK(0.25))
    >>> m.mask.shape, m.sparsity
    ((1, 1, 4, 8), 0.75)
    """
    adapter, device = adapter_for(q=q, k=k)
    chosen = backend_for(_check.check_backend(backend), device)
    problem, views = _check.check_arrays(
        {"q": adapter.view(q, "q"), "k": adapter.view(k, "k")},
        policy=policy,
        causal=causal,
        causal_align=causal_align,
        sm_scale=sm_scale,
        layout=layout,
        seqlens_k=seqlens_k,
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
