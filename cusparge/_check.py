"""Arguments in, a `Problem` out: every argument of the public calls is checked here, once.

Nothing is allocated and no element of q, k or v is read before all of these checks have passed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cusparge._arrays import DeviceArray, HostArray, View, adapter_of
from cusparge._arrays.view import FLOAT_DTYPES, AnyView, to_float
from cusparge._options import check_choice, check_flag, check_policy, check_scale
from cusparge._types import BlockMap, Problem, whole_number
from cusparge.errors import InvalidArgumentError, shown

__all__ = [
    "check_alignment",
    "check_arrays",
    "check_block_map",
    "check_lengths",
    "check_numerics",
    "check_one_array",
    "check_packed_arrays",
    "check_packed_shapes",
    "check_shapes",
    "is_host_list",
]

MAX_HEAD_DIM = 256
_MOST_SEQUENCES = 2**24  # more would only fill the memory before its length is found wrong


def _check_dtypes(views: Mapping[str, View]) -> str:
    for name, view in views.items():
        if view.dtype not in FLOAT_DTYPES:
            raise InvalidArgumentError(
                f"{name} has dtype {view.dtype}: allowed float16, bfloat16, float32 and, on the "
                "CPU, float64. Convert it first."
            )
    found = {name: view.dtype for name, view in views.items()}
    if len(set(found.values())) > 1:
        listing = ", ".join(f"{name}: {dtype}" for name, dtype in found.items())
        raise InvalidArgumentError(
            f"{', '.join(views)} have different dtypes: got {listing}. Convert them to one dtype; "
            "the result has it too."
        )
    return next(iter(found.values()))


def _check_strides(views: Mapping[str, View]) -> None:
    for name, view in views.items():
        if not view.rows_are_contiguous:
            raise InvalidArgumentError(
                f"{name}'s last dimension is not contiguous: got strides {view.strides} (elements) "
                f"for shape {view.shape}; the last one must be 1, the others are free. Pass "
                f"`{name}.contiguous()` (torch) or `numpy.ascontiguousarray({name})`."
            )


def _check_rank(views: Mapping[str, View], rank: int, meaning: str) -> None:
    for name, view in views.items():
        if len(view.shape) != rank:
            raise InvalidArgumentError(
                f"{name} has {len(view.shape)} dimensions: got shape {view.shape}; allowed {rank}, "
                f"{meaning}. Reshape it, or add the missing ones as `{name}[None]`."
            )


def _check_heads(shapes: dict[str, tuple[int, ...]], heads_axis: int, layout: str) -> None:
    """Check head counts and head_dim; `shapes` may hold q and k alone."""
    q, k = shapes["q"], shapes["k"]
    listing = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    for name in ("k", "v"):
        if name in shapes and shapes[name][-1] != q[-1]:
            raise InvalidArgumentError(
                f"{name} has another head_dim than q: got {shapes[name][-1]} and {q[-1]} "
                f"({listing}); the last dimensions must be equal."
            )
    if "v" in shapes and shapes["v"] != k:
        raise InvalidArgumentError(
            f"v has another shape than k: got {listing}; k and v must agree in every dimension."
        )
    _check_head_dim("q", q)
    heads_q, heads_kv = q[heads_axis], k[heads_axis]
    if heads_q and (heads_kv == 0 or heads_q % heads_kv):
        raise InvalidArgumentError(
            f"the number of heads of q is no multiple of that of k and v: got {heads_q} and "
            f"{heads_kv} ({listing}, {layout}). With grouped queries each key head "
            "serves the same number of query heads; check the layout argument as well."
        )


def _check_head_dim(name: str, shape: tuple[int, ...]) -> None:
    if not 1 <= shape[-1] <= MAX_HEAD_DIM:
        size = "large" if shape[-1] else "small"
        raise InvalidArgumentError(
            f"head_dim is too {size}: got {shape[-1]} ({name}.shape = {shape}); allowed 1 to "
            f"{MAX_HEAD_DIM}. Check that the last dimension is head_dim, or use another attention "
            "for this layer."
        )


def _integers(values: Any, name: str, device_kind: str) -> list[int]:
    """Read whole numbers from a list or from a host array of any framework."""
    data: Any
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes, bytearray)):
        if len(values) > _MOST_SEQUENCES:
            raise InvalidArgumentError(
                f"{name} is too long: got {len(values)} values; allowed up to {_MOST_SEQUENCES}. "
                "Pass one for each sequence."
            )
        data = values
    else:
        if not isinstance(values, np.ndarray) and not hasattr(values, "__dlpack__"):
            raise InvalidArgumentError(
                f"{name} must be a sequence or an array of whole numbers: got {shown(values)} of "
                f"type {type(values).__name__}."
            )
        adapter = adapter_of(values, name)
        adapter.check(values, name)
        device = adapter.device(values)
        if device.kind != device_kind:
            raise InvalidArgumentError(
                f"{name} is on {device}, and q on {device_kind}: pass a list, or an array on the "
                "host."
            )
        view = adapter.view(values, name)
        if view.data.dtype.kind not in "iu" or view.dtype in ("bfloat16", "bool"):
            raise InvalidArgumentError(
                f"{name} must hold whole numbers: got dtype {view.dtype}; allowed are integer "
                "dtypes. Convert it to int32."
            )
        if view.data.ndim != 1:
            raise InvalidArgumentError(
                f"{name} must have one dimension: got shape {view.data.shape}; allowed is one "
                "value a sequence. Flatten it."
            )
        data = view.data.tolist()
    result = []
    for i, item in enumerate(data):
        number = whole_number(item)
        if number is None:
            raise InvalidArgumentError(
                f"{name}[{i}] is no whole number: got {shown(item)}; allowed are integers, 0 or "
                "more. Convert it with int()."
            )
        result.append(number)
    return result


def check_shapes(views: Mapping[str, View], layout: Any) -> str:
    """Check what shapes and dtypes of a batch alone can tell; return the dtype."""
    layout = check_choice("layout", layout, ("HND", "NHD"))
    order = "B, H, S, D" if layout == "HND" else "B, S, H, D"
    meaning = f"({order}) in layout {layout}"
    _check_rank(views, 4, meaning)
    dtype = _check_dtypes(views)
    shapes = {name: view.shape for name, view in views.items()}
    if any(shape[0] != shapes["q"][0] for shape in shapes.values()):
        listing = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InvalidArgumentError(
            f"{', '.join(views)} have different batch sizes: got {listing}, {meaning}; allowed is "
            "one size for all. Expand the smaller ones, which copies nothing."
        )
    _check_heads(shapes, 1 if layout == "HND" else 2, meaning)
    return dtype


def check_packed_shapes(views: Mapping[str, View]) -> str:
    """Check what shapes and dtypes of packed sequences alone can tell; return the dtype."""
    meaning = "(tokens, H, D)"
    _check_rank(views, 3, meaning)
    dtype = _check_dtypes(views)
    _check_heads({name: view.shape for name, view in views.items()}, 1, meaning)
    return dtype


def check_lengths(given: Any, name: str, batch: int, tokens: int, device_kind: str) -> list[int]:
    """Return one length for each sequence, all tokens where none are given."""
    if given is None:
        return [tokens] * batch
    lengths = _integers(given, name, device_kind)
    if len(lengths) != batch:
        raise InvalidArgumentError(
            f"{name} has {len(lengths)} lengths for a batch of {batch}: pass one for each sequence."
        )
    for i, length in enumerate(lengths):
        if not 0 <= length <= tokens:
            which = "keys in k" if name == "seqlens_k" else "tokens"
            raise InvalidArgumentError(
                f"{name}[{i}] is out of range: got {shown(length)}; allowed 0 to {tokens}, the "
                f"number of {which}."
            )
    return lengths


def is_host_list(given: Any) -> bool:
    """Tell whether lengths lie in a sequence or a NumPy array, whatever q is."""
    return isinstance(given, np.ndarray) or not hasattr(given, "__dlpack__")


def check_alignment(name: str, view: View) -> None:
    """Refuse a CUDA array at an address that the GPU cannot read its elements from."""
    if not isinstance(view, DeviceArray) or 0 in view.shape:
        return
    size = np.dtype(FLOAT_DTYPES.get(view.dtype, view.dtype)).itemsize
    if view.pointer % size:
        raise InvalidArgumentError(
            f"{name} is not aligned: its elements of {size} bytes start at an address that is no "
            f"multiple of {size}. Pass a copy (torch `.clone()`, CuPy `.copy()`)."
        )


def check_one_array(view: AnyView, name: str, layout: Any) -> AnyView:
    """Check an array (B, H, S, D) alone; return its view in HND order."""
    layout = check_choice("layout", layout, ("HND", "NHD"))
    order = "B, H, S, D" if layout == "HND" else "B, S, H, D"
    _check_rank({name: view}, 4, f"({order}) in layout {layout}")
    dtype = _check_dtypes({name: view})
    if dtype == "float64" and isinstance(view, DeviceArray):
        raise InvalidArgumentError(
            f"{name} has dtype float64 on a GPU: allowed float16, bfloat16 and float32 there. "
            "Convert it first, or move it to the host."
        )
    _check_head_dim(name, view.shape)
    _check_strides({name: view})
    check_alignment(name, view)
    return view if layout == "HND" else view.swapaxes(1, 2)


def check_arrays(
    views: dict[str, AnyView],
    *,
    policy: Any,
    causal: Any,
    causal_align: Any,
    sm_scale: Any,
    layout: Any,
    seqlens_k: Any,
    device_kind: str,
) -> tuple[Problem, dict[str, AnyView]]:
    """Check a batch of equal lengths; return the problem and the views in HND order."""
    dtype = check_shapes(views, layout)
    check_choice("causal_align", causal_align, ("bottom_right", "top_left"))
    is_causal = check_flag("causal", causal)
    _check_strides(views)
    if layout == "NHD":
        views = {name: view.swapaxes(1, 2) for name, view in views.items()}
    batch, heads_q, seqlen_q, head_dim = views["q"].shape
    heads_kv, seqlen_k = views["k"].shape[1:3]

    lengths = check_lengths(seqlens_k, "seqlens_k", batch, seqlen_k, device_kind)
    # Causality follows the lengths of the arrays, whatever seqlens_k says.
    offset = seqlen_k - seqlen_q if causal_align == "bottom_right" else 0
    problem = Problem(
        num_heads_q=heads_q,
        num_heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        dtype=dtype,
        policy=check_policy(policy, heads_q),
        sm_scale=check_scale(sm_scale, head_dim),
        spans=tuple((0, seqlen_q, 0, length) for length in lengths),
        causal_offsets=(offset,) * batch if is_causal else None,
        causal_align=causal_align,
    )
    return problem, views


def check_packed_arrays(
    views: dict[str, AnyView],
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    policy: Any,
    causal: Any,
    causal_align: Any,
    sm_scale: Any,
    device_kind: str,
) -> tuple[Problem, dict[str, AnyView]]:
    """Check packed sequences; return the problem and the views in (H, S, D) order."""
    check_choice("causal_align", causal_align, ("bottom_right", "top_left"))
    is_causal = check_flag("causal", causal)
    dtype = check_packed_shapes(views)
    _check_strides(views)
    views = {name: view.swapaxes(0, 1) for name, view in views.items()}
    heads_q, total_q, head_dim = views["q"].shape
    heads_kv, total_k = views["k"].shape[:2]
    edges_q = _check_edges("cu_seqlens_q", cu_seqlens_q, total_q, device_kind)
    edges_k = _check_edges("cu_seqlens_k", cu_seqlens_k, total_k, device_kind)
    if len(edges_q) != len(edges_k):
        raise InvalidArgumentError(
            f"cu_seqlens_q and cu_seqlens_k speak of different batches: got {len(edges_q)} and "
            f"{len(edges_k)} values; both need one more than there are sequences."
        )
    spans = tuple(zip(edges_q[:-1], edges_q[1:], edges_k[:-1], edges_k[1:], strict=True))
    longest_q = max((stop - start for start, stop, _, _ in spans), default=0)
    longest_k = max((stop - start for _, _, start, stop in spans), default=0)
    for name, given, longest in (
        ("max_seqlen_q", max_seqlen_q, longest_q),
        ("max_seqlen_k", max_seqlen_k, longest_k),
    ):
        if given is None:
            continue
        number = whole_number(given)
        if number is None or number < longest:
            raise InvalidArgumentError(
                f"{name} must be at least the longest sequence, {longest}: got {shown(given)}. "
                "None takes it from the lengths."
            )
    bottom_right = causal_align == "bottom_right"
    offsets = tuple(
        (k_stop - k_start) - (q_stop - q_start) if bottom_right else 0
        for q_start, q_stop, k_start, k_stop in spans
    )
    problem = Problem(
        num_heads_q=heads_q,
        num_heads_kv=heads_kv,
        seqlen_q=total_q,
        seqlen_k=total_k,
        head_dim=head_dim,
        dtype=dtype,
        policy=check_policy(policy, heads_q),
        sm_scale=check_scale(sm_scale, head_dim),
        spans=spans,
        causal_offsets=offsets if is_causal else None,
        causal_align=causal_align,
        packed=True,
    )
    return problem, views


def _check_edges(name: str, values: Any, total: int, device_kind: str) -> list[int]:
    edges = _integers(values, name, device_kind)
    if not edges or edges[0] != 0 or edges[-1] != total:
        got = f"{shown(edges[0])} to {shown(edges[-1])}" if edges else "no values"
        raise InvalidArgumentError(
            f"{name} must rise from 0 to the number of tokens, {total}: got {got}. Pass where each "
            "sequence starts, and the total at the end."
        )
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        if high < low:
            raise InvalidArgumentError(
                f"{name} falls from {shown(low)} to {shown(high)} at index {i + 1}: each value is "
                "where the next sequence starts."
            )
    return edges


def check_block_map(block_map: Any, problem: Problem) -> BlockMap | None:
    """Check that a caller's map fits the call."""
    if block_map is None:
        return None
    if not isinstance(block_map, BlockMap):
        raise InvalidArgumentError(
            f"block_map must be a BlockMap: got {type(block_map).__name__}. Make one with "
            "cusparge.BlockMap.from_mask(mask, seqlen_q=..., seqlen_k=...) or "
            "cusparge.predict_block_map(q, k)."
        )
    for name in ("seqlen_q", "seqlen_k"):
        if getattr(block_map, name) != getattr(problem, name):
            raise InvalidArgumentError(
                f"block_map was made for another {name}: got {getattr(block_map, name)}, and the "
                f"arrays have {getattr(problem, name)}. Make a map for the arrays' lengths."
            )
    batch, heads = tuple(block_map.mask.shape[:2])
    if batch not in (1, problem.batch) or heads not in (1, problem.num_heads_q):
        raise InvalidArgumentError(
            f"block_map is for batch {batch} and {heads} heads: allowed 1 or {problem.batch}, and "
            f"1 or {problem.num_heads_q}. Make a map for this call, or index its mask."
        )
    return block_map


def check_numerics(views: dict[str, HostArray], problem: Problem) -> None:
    """Raise for a NaN or an infinity in q, k or v, padding aside."""
    for name, view in views.items():
        for index, (_, _, start, stop) in enumerate(problem.spans):
            if name == "q" or problem.packed:
                part = view.data if problem.packed else view.data[index]
            else:
                part = view.data[index][:, start:stop]
            for head in part:  # head by head, so that bfloat16 needs no large copy
                bad = np.argwhere(~np.isfinite(_exact(view.with_data(head))))
                if len(bad):
                    token = int(bad[0, 0])
                    raise InvalidArgumentError(
                        f"{name} holds a NaN or an infinity (first at token {token}): all "
                        "elements must be finite with check_numerics=True. Mend the input, or "
                        "leave check_numerics off: then only rows that see it become NaN."
                    )
            if problem.packed:
                break


def _exact(array: HostArray) -> np.ndarray[Any, Any]:
    """Return floats that hold every element as it is."""
    return to_float(array) if array.dtype == "bfloat16" else array.data
