"""The public calls: they are computed at once, or handed to the compiler that traces them."""

from __future__ import annotations

from typing import Any, Literal

from cusparge import _call, _graph
from cusparge._arrays.torch_ops import in_graph
from cusparge._types import BlockMap, CausalAlign, Layout
from cusparge.policy import Policy

__all__ = ["attention", "attention_varlen", "predict_block_map"]

BackendName = Literal["auto", "cuda", "cpu", "reference"]


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
        An input requires gradients, or a mask or dropout was asked for.
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
    options: dict[str, Any] = {
        "policy": policy,
        "block_map": block_map,
        "causal": causal,
        "causal_align": causal_align,
        "sm_scale": sm_scale,
        "layout": layout,
        "seqlens_k": seqlens_k,
        "return_lse": return_lse,
        "return_stats": return_stats,
        "check_numerics": check_numerics,
        "backend": backend,
        **unsupported,
    }
    if in_graph():
        return _graph.torch.attention(q, k, v, **options)
    return _call.attention(q, k, v, **options)


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
    options: dict[str, Any] = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "policy": policy,
        "causal": causal,
        "causal_align": causal_align,
        "sm_scale": sm_scale,
        "return_lse": return_lse,
        "return_stats": return_stats,
        "check_numerics": check_numerics,
        "backend": backend,
        **unsupported,
    }
    arrays = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    if in_graph():
        return _graph.torch.attention_varlen(*arrays, **options)
    return _call.attention_varlen(*arrays, **options)


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
    options: dict[str, Any] = {
        "policy": policy,
        "causal": causal,
        "causal_align": causal_align,
        "sm_scale": sm_scale,
        "layout": layout,
        "seqlens_k": seqlens_k,
        "backend": backend,
    }
    if in_graph():
        return _graph.torch.predict_block_map(q, k, **options)
    return _call.predict_block_map(q, k, **options)


_graph.install(
    attention=_call.attention,
    attention_varlen=_call.attention_varlen,
    predict_block_map=_call.predict_block_map,
)
