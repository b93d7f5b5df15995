"""The public calls as operators in a graph of torch (torch.compile, torch.export, fake tensors)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cusparge import _check, _options
from cusparge._arrays import Outline, torch_ops
from cusparge._graph.results import results
from cusparge._types import BLOCK_K, BLOCK_Q, BlockMap, num_blocks
from cusparge.errors import InvalidArgumentError, shown

__all__ = ["attention", "attention_varlen", "install", "predict_block_map"]

_eager: dict[str, Callable[..., Any]] = {}

_OPTIONS = f"{torch_ops.POLICY}, bool causal, str causal_align, float? sm_scale, "
_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? row_mask, Tensor? seqlens_k, "
    f"{_OPTIONS}str layout, SymInt[]? seqlens_k_list, SymInt[]? map_lengths, bool check_numerics, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
_VARLEN = (
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    f"{_OPTIONS}SymInt[]? cu_seqlens_q_list, SymInt[]? cu_seqlens_k_list, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, bool check_numerics, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_PREDICT = (
    "(Tensor q, Tensor k, Tensor? seqlens_k, "
    f"{_OPTIONS}str layout, SymInt[]? seqlens_k_list, str backend) -> (Tensor, Tensor)"
)
_NUM_FIELDS = torch_ops.POLICY.count(",") + 1


def install(eager: Mapping[str, Callable[..., Any]]) -> None:
    """Take the eager functions, and make the operators of them."""
    _eager.update(eager)
    torch_ops.implement("attention", _ATTENTION, _run_attention, _fake_attention)
    torch_ops.implement("attention_varlen", _VARLEN, _run_varlen, _fake_varlen)
    torch_ops.implement("predict_block_map", _PREDICT, _run_predict, _fake_predict)


# -- what Dynamo traces -----------------------------------------------------------------------


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
    """Put the operator for `attention` into the graph."""
    _refuse_unknown("attention", unsupported)
    with_lse, with_stats = flag("return_lse", return_lse), flag("return_stats", return_stats)
    torch_ops.check_tensors(q=q, k=k, v=v)
    mask = row_mask = map_lengths = None
    if block_map is not None:
        if not isinstance(block_map, BlockMap):
            raise InvalidArgumentError(
                f"block_map must be a BlockMap: got {type(block_map).__name__}. Make one with "
                "cusparge.predict_block_map(q, k), or with cusparge.BlockMap.from_mask outside of "
                "the compiled function."
            )
        mask = torch_ops.tensor(block_map.mask)
        row_mask = torch_ops.tensor(block_map.traced_row_mask)
        map_lengths = [block_map.seqlen_q, block_map.seqlen_k]
    lengths, lengths_list = torch_ops.lengths(seqlens_k, "seqlens_k")
    out, lse, counts = torch_ops.call(
        "attention",
        *(q, k, v, mask, row_mask, lengths),
        *_shared(policy, causal, causal_align, sm_scale),
        *(word("layout", layout), lengths_list, map_lengths),
        *(flag("check_numerics", check_numerics), word("backend", backend)),
    )
    return results(out, lse, counts, with_lse, with_stats)


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
    """Put the operator for `attention_varlen` into the graph."""
    _refuse_unknown("attention_varlen", unsupported)
    with_lse, with_stats = flag("return_lse", return_lse), flag("return_stats", return_stats)
    torch_ops.check_tensors(q=q, k=k, v=v)
    edges_q, edges_q_list = _edges(cu_seqlens_q, "cu_seqlens_q")
    edges_k, edges_k_list = _edges(cu_seqlens_k, "cu_seqlens_k")
    out, lse, counts = torch_ops.call(
        "attention_varlen",
        *(q, k, v, edges_q, edges_k),
        *_shared(policy, causal, causal_align, sm_scale),
        *(edges_q_list, edges_k_list),
        torch_ops.whole(max_seqlen_q, "max_seqlen_q"),
        torch_ops.whole(max_seqlen_k, "max_seqlen_k"),
        *(flag("check_numerics", check_numerics), word("backend", backend)),
    )
    return results(out, lse, counts, with_lse, with_stats)


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
    """Put the operator for `predict_block_map` into the graph."""
    torch_ops.check_tensors(q=q, k=k)
    lengths, lengths_list = torch_ops.lengths(seqlens_k, "seqlens_k")
    mask, reachable = torch_ops.call(
        "predict_block_map",
        *(q, k, lengths),
        *_shared(policy, causal, causal_align, sm_scale),
        *(word("layout", layout), lengths_list, word("backend", backend)),
    )
    tokens = 2 if layout == "HND" else 1
    return BlockMap(mask, seqlen_q=q.shape[tokens], seqlen_k=k.shape[tokens], reachable=reachable)


def _shared(policy: Any, causal: Any, causal_align: Any, sm_scale: Any) -> tuple[Any, ...]:
    """Return the options that all operators share, in the order of their schemas."""
    sm_scale = torch_ops.number(sm_scale, "sm_scale")
    return (
        *torch_ops.fields(policy),
        *(flag("causal", causal), word("causal_align", causal_align), sm_scale),
    )


def flag(name: str, value: Any) -> bool:
    return _options.check_flag(name, torch_ops.printable(value))


def word(name: str, value: Any) -> str:
    """Return a word; whether it is one of those allowed is checked when the operator runs."""
    if isinstance(value, str):
        return value
    raise InvalidArgumentError(
        f"{name} is unknown: got {shown(torch_ops.printable(value))}; allowed are words, as in the "
        "documentation of the call. Pass one of these."
    )


def _refuse_unknown(function: str, options: dict[str, Any]) -> None:
    printable = {name: torch_ops.printable(value) for name, value in options.items()}
    _options.refuse_unknown(function, printable)


def _edges(values: Any, name: str) -> tuple[Any, Any]:
    if values is None:
        raise InvalidArgumentError(
            f"{name} must be a sequence or an array of whole numbers: got None. Pass where each "
            "sequence starts, and the total at the end."
        )
    return torch_ops.lengths(values, name)


# -- what runs in the compiled graph, and what the tracer is told of it ----------------------------


def _common(options: Sequence[Any]) -> dict[str, Any]:
    """Return the options that all operators share, by name."""
    causal, causal_align, sm_scale = options[_NUM_FIELDS : _NUM_FIELDS + 3]
    return {
        "policy": torch_ops.policy_of(options[:_NUM_FIELDS]),
        "causal": causal,
        "causal_align": causal_align,
        "sm_scale": sm_scale,
    }


def _three(made: Any, q: Any) -> Any:
    out, lse, stats = made
    return out, lse, torch_ops.from_numpy(stats.counts.stacked(), q)


def _run_attention(
    q: Any, k: Any, v: Any, mask: Any, row_mask: Any, lengths: Any, *options: Any
) -> Any:
    layout, lengths_list, map_lengths, check_numerics, backend = options[_NUM_FIELDS + 3 :]
    block_map = None
    if mask is not None:
        block_map = BlockMap(
            mask,
            seqlen_q=map_lengths[0],
            seqlen_k=map_lengths[1],
            reachable=mask.numel(),
            row_mask=None if row_mask is None else row_mask.numpy(),
        )
    made = _eager["attention"](
        *(q, k, v),
        **_common(options),
        block_map=block_map,
        layout=layout,
        seqlens_k=lengths if lengths is not None else lengths_list,
        return_lse=True,
        return_stats=True,
        check_numerics=check_numerics,
        backend=backend,
    )
    return _three(made, q)


def _run_varlen(q: Any, k: Any, v: Any, edges_q: Any, edges_k: Any, *options: Any) -> Any:
    list_q, list_k, longest_q, longest_k, check_numerics, backend = options[_NUM_FIELDS + 3 :]
    made = _eager["attention_varlen"](
        *(q, k, v),
        edges_q if edges_q is not None else list_q,
        edges_k if edges_k is not None else list_k,
        **_common(options),
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        return_lse=True,
        return_stats=True,
        check_numerics=check_numerics,
        backend=backend,
    )
    return _three(made, q)


def _run_predict(q: Any, k: Any, lengths: Any, *options: Any) -> Any:
    layout, lengths_list, backend = options[_NUM_FIELDS + 3 :]
    made = _eager["predict_block_map"](
        *(q, k),
        **_common(options),
        layout=layout,
        seqlens_k=lengths if lengths is not None else lengths_list,
        backend=backend,
    )
    return made.mask, torch_ops.from_numpy(np.array(made.reachable, np.int64), q)


def outlines(**tensors: Any) -> dict[str, Outline]:
    """Return the shapes and dtypes of torch tensors that may have no memory."""
    return {
        name: Outline(tuple(x.shape), str(x.dtype).rpartition(".")[2])
        for name, x in tensors.items()
    }


def _fake_attention(
    q: Any, k: Any, v: Any, mask: Any, row_mask: Any, lengths: Any, *options: Any
) -> Any:
    layout = options[_NUM_FIELDS + 3]
    _check.check_shapes(outlines(q=q, k=k, v=v), layout)
    heads, tokens = (1, 2) if layout == "HND" else (2, 1)
    return _fake_results(q, (q.shape[0], q.shape[heads], q.shape[tokens]), q.shape[0], heads)


def _fake_varlen(q: Any, k: Any, v: Any, edges_q: Any, edges_k: Any, *options: Any) -> Any:
    _check.check_packed_shapes(outlines(q=q, k=k, v=v))
    edges = edges_q.shape[0] if edges_q is not None else len(options[_NUM_FIELDS + 3])
    if edges == 0:
        raise InvalidArgumentError(
            "cu_seqlens_q must rise from 0 to the number of tokens: got no values. Pass where each "
            "sequence starts, and the total at the end."
        )
    return _fake_results(q, (q.shape[1], q.shape[0]), edges - 1, 1)


def _fake_results(q: Any, lse_shape: tuple[Any, ...], batch: Any, heads: int) -> Any:
    float32, int64 = torch_ops.dtypes("float32", "int64")
    counts = q.new_empty((4, batch, q.shape[heads]), dtype=int64)
    return torch_ops.empty_like(q), q.new_empty(lse_shape, dtype=float32), counts


def _fake_predict(q: Any, k: Any, lengths: Any, *options: Any) -> Any:
    layout = options[_NUM_FIELDS + 3]
    _check.check_shapes(outlines(q=q, k=k), layout)
    heads, tokens = (1, 2) if layout == "HND" else (2, 1)
    shape = (
        q.shape[0],
        q.shape[heads],
        num_blocks(q.shape[tokens], BLOCK_Q),
        num_blocks(k.shape[tokens], BLOCK_K),
    )
    bool_, int64 = torch_ops.dtypes("bool", "int64")
    return q.new_empty(shape, dtype=bool_), q.new_empty((), dtype=int64)
