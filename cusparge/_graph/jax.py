"""The public calls as callbacks in a program of JAX (jax.jit, and arrays in a GPU's memory)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cusparge import _check
from cusparge._arrays import DeviceArray, Outline, jax_calls
from cusparge._arrays.view import Device
from cusparge._graph.results import results
from cusparge._types import (
    BLOCK_K,
    BLOCK_Q,
    AttentionStats,
    BlockMap,
    Counts,
    Problem,
    no_gpu_yet,
    num_blocks,
    whole_number,
)
from cusparge.errors import InvalidArgumentError, shown

__all__ = ["attention", "attention_varlen", "install", "predict_block_map"]

_eager: dict[str, Callable[..., Any]] = {}


def install(eager: Mapping[str, Callable[..., Any]]) -> None:
    """Take the eager functions that the callbacks run, and let JAX know what they return."""
    _eager.update(eager)
    jax_calls.register(AttentionStats, _take_stats_apart, lambda _, parts: AttentionStats(parts[0]))
    jax_calls.register(BlockMap, _take_map_apart, _make_map)
    jax_calls.announce()


def _take_stats_apart(stats: AttentionStats) -> tuple[tuple[Any, ...], None]:
    made = stats.source
    return (_halves(made.stacked()) if isinstance(made, Counts) else made,), None


def _take_map_apart(made: BlockMap) -> tuple[tuple[Any, ...], tuple[int, int]]:
    reachable = made.reachable
    if isinstance(reachable, int):
        reachable = _halves(np.array([reachable], np.int64))
    return (made.mask, reachable, made.traced_row_mask), (made.seqlen_q, made.seqlen_k)


def _make_map(lengths: tuple[int, int], parts: tuple[Any, ...]) -> BlockMap:
    mask, reachable, row_mask = parts
    return BlockMap(
        mask, seqlen_q=lengths[0], seqlen_k=lengths[1], reachable=reachable, row_mask=row_mask
    )


def _halves(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """Return int64 as uint32, twice as many along the last axis: JAX may have no int64."""
    return np.ascontiguousarray(counts).view(np.uint32)


@dataclass(frozen=True)
class _Call:
    """One public call on JAX arrays: which one, its options, and what it returns."""

    function: str
    results: tuple[Outline, ...]
    options: tuple[tuple[str, Any], ...]
    arrays: tuple[str, ...]  # the keyword each array goes by, "" where it is positional

    def outputs(self) -> tuple[Outline, ...]:
        """Return shape and dtype of every result."""
        return self.results

    def host(self, *arrays: Any) -> Sequence[Any]:
        """Compute on the host."""
        named = list(zip(self.arrays, arrays, strict=True))
        positional = [array for name, array in named if not name]
        keywords = dict(self.options) | {name: array for name, array in named if name}
        if "mask" in keywords:
            map_lengths = keywords.pop("map_lengths")
            mask = np.asarray(keywords.pop("mask"))
            keywords["block_map"] = BlockMap(
                mask,
                seqlen_q=map_lengths[0],
                seqlen_k=map_lengths[1],
                reachable=mask.size,
                row_mask=keywords.pop("row_mask", None),
            )
        elif self.function == "attention":
            keywords["block_map"] = None
        if self.function == "predict_block_map":
            made = _eager[self.function](*positional, **keywords)
            return made.mask, _halves(np.array([made.reachable], np.int64))
        out, lse, stats = _eager[self.function](
            *positional, **keywords, return_lse=True, return_stats=True
        )
        return out, lse, _halves(stats.counts.stacked())

    def device(
        self, stream: int, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]
    ) -> None:
        """Say that there is no attention kernel yet."""
        raise no_gpu_yet("q", Device("cuda", inputs[0].device))


def _bind(
    function: str,
    results: tuple[tuple[tuple[int, ...], str], ...],
    positional: Sequence[Any],
    named: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """Bind a call; `named` arrays are operands as well, and None among them is an option."""
    operands = {name: value for name, value in named.items() if value is not None}
    nothing = {name: None for name, value in named.items() if value is None}
    work = _Call(
        function,
        tuple(Outline(shape, dtype) for shape, dtype in results),
        tuple(sorted((options | nothing).items())),
        ("",) * len(positional) + tuple(operands),
    )
    return jax_calls.call(work, [*positional, *operands.values()])


def _outlines(arrays: dict[str, Any]) -> dict[str, Outline]:
    return {name: Outline(tuple(x.shape), str(x.dtype)) for name, x in arrays.items()}


def _check_traced_lengths(values: Any, name: str) -> None:
    """Check what is known of lengths without their values."""
    if np.dtype(values.dtype).kind not in "iu":
        raise InvalidArgumentError(
            f"{name} must hold whole numbers: got dtype {values.dtype}; allowed are integer "
            "dtypes. Convert it to int32."
        )
    if len(values.shape) != 1:
        raise InvalidArgumentError(
            f"{name} must have one dimension: got shape {tuple(values.shape)}; allowed is one "
            "value a sequence. Flatten it."
        )


def _lengths(values: Any, problem: Problem) -> Any:
    """Return `seqlens_k` as an operand, or None; lists are checked whole."""
    if values is None:
        return None
    if not jax_calls.is_jax(values):
        lengths = _check.check_lengths(values, "seqlens_k", problem.batch, problem.seqlen_k, "cpu")
        return np.array(lengths, np.int32)
    _check_traced_lengths(values, "seqlens_k")
    if values.shape[0] != problem.batch:
        raise InvalidArgumentError(
            f"seqlens_k has {values.shape[0]} lengths for a batch of {problem.batch}: pass one for "
            "each sequence."
        )
    return values


def _problem(arrays: dict[str, Any], layout: str, options: dict[str, Any]) -> Problem:
    """Check all that is known without values, and put the options into one form."""
    names = ("policy", "causal", "causal_align", "sm_scale")
    problem, _ = _check.check_arrays(
        _outlines(arrays),
        layout=layout,
        seqlens_k=None,
        device_kind="cpu",
        **{name: options[name] for name in names},
    )
    _normalise(options, problem)
    return problem


def _normalise(options: dict[str, Any], problem: Problem) -> None:
    """Replace options by what they mean: hashable, and equal where the calls are equal."""
    options["policy"] = problem.policy
    options["causal"] = problem.causal_offsets is not None
    options["sm_scale"] = problem.sm_scale


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    block_map: Any,
    layout: str,
    seqlens_k: Any,
    return_lse: bool,
    return_stats: bool,
    **options: Any,
) -> Any:
    """Bind `attention` into the program that JAX traces."""
    problem = _problem({"q": q, "k": k, "v": v}, layout, options)
    block_map = _check.check_block_map(block_map, problem)
    named = {"seqlens_k": _lengths(seqlens_k, problem)}
    if block_map is not None:
        mask = block_map.mask
        named["mask"] = mask if jax_calls.is_jax(mask) else block_map.host_mask
        if block_map.traced_row_mask is not None:
            named["row_mask"] = block_map.traced_row_mask
        options["map_lengths"] = (block_map.seqlen_q, block_map.seqlen_k)
    heads = (problem.batch, problem.num_heads_q)
    outputs = (
        (tuple(q.shape), problem.dtype),
        ((*heads, problem.seqlen_q), "float32"),
        ((4, problem.batch, 2 * problem.num_heads_q), "uint32"),  # see _halves
    )
    options["layout"] = layout
    out, lse, counts = _bind("attention", outputs, (q, k, v), named, options)
    return results(out, lse, counts, return_lse, return_stats)


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    return_lse: bool,
    return_stats: bool,
    **options: Any,
) -> Any:
    """Bind `attention_varlen` into the program that JAX traces."""
    outlines = _outlines({"q": q, "k": k, "v": v})
    _check.check_packed_shapes(outlines)
    edges = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    known = {name: not jax_calls.is_jax(given) for name, given in edges.items()}
    stand_ins = {
        name: given if known[name] else _stand_in(given, name, array.shape[0])
        for (name, given), array in zip(edges.items(), (q, k), strict=True)
    }
    longest = {name: options.pop(name) for name in ("max_seqlen_q", "max_seqlen_k")}
    names = ("policy", "causal", "causal_align", "sm_scale")
    problem, _ = _check.check_packed_arrays(
        outlines,
        **stand_ins,
        **(longest if all(known.values()) else dict.fromkeys(longest)),
        **{name: options[name] for name in names},
        device_kind="cpu",
    )
    _normalise(options, problem)
    for name, given in longest.items():
        options[name] = None if given is None else whole_number(given)
        if given is not None and options[name] is None:
            raise InvalidArgumentError(
                f"{name} must be at least the longest sequence: got {shown(given)}. None takes it "
                "from the lengths."
            )
    tokens, heads = q.shape[:2]
    outputs = (
        (tuple(q.shape), problem.dtype),
        ((heads, tokens), "float32"),
        ((4, problem.batch, 2 * heads), "uint32"),  # see _halves
    )
    named = {
        name: np.asarray(given, np.int32) if known[name] else given for name, given in edges.items()
    }
    out, lse, counts = _bind("attention_varlen", outputs, (q, k, v), named, options)
    return results(out, lse, counts, return_lse, return_stats)


def _stand_in(edges: Any, name: str, tokens: int) -> list[int]:
    """Return edges that are right, as many as the traced ones."""
    _check_traced_lengths(edges, name)
    return [0] * (edges.shape[0] - 1) + [tokens] * min(edges.shape[0], 1)


def predict_block_map(q: Any, k: Any, *, layout: str, seqlens_k: Any, **options: Any) -> BlockMap:
    """Bind `predict_block_map` into the program that JAX traces."""
    problem = _problem({"q": q, "k": k}, layout, options)
    blocks = (num_blocks(problem.seqlen_q, BLOCK_Q), num_blocks(problem.seqlen_k, BLOCK_K))
    outputs = (
        ((problem.batch, problem.num_heads_q, *blocks), "bool"),
        ((2,), "uint32"),  # see _halves
    )
    options["layout"] = layout
    mask, reachable = _bind(
        *("predict_block_map", outputs, (q, k)),
        {"seqlens_k": _lengths(seqlens_k, problem)},
        options,
    )
    return BlockMap(mask, seqlen_q=problem.seqlen_q, seqlen_k=problem.seqlen_k, reachable=reachable)
