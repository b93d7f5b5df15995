"""Stage 1 by itself: blocks of q or k pooled, on whatever device the array lives.

>>> import numpy as np
>>> from cusparge.stage1 import pool_blocks
>>> k = np.random.default_rng(0).standard_normal((1, 2, 300, 64), dtype=np.float32)
>>> pooled = pool_blocks(k, block=64, smooth=True)
>>> pooled.mean.shape, pooled.similarity.shape, pooled.token_mean.shape
((1, 2, 5, 64), (1, 2, 5), (1, 2, 64))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cusparge import _check, _graph, _options
from cusparge._arrays import Adapter, DeviceArray, adapter_for, adapter_of
from cusparge._arrays.torch_ops import in_graph, not_traced
from cusparge._cpu import pooling as on_cpu
from cusparge._cuda.devices import require_device
from cusparge._cuda.launch import functions, run
from cusparge._cuda.params import Plan
from cusparge._cuda.pooling import pool_plan
from cusparge._types import Layout, pooled_shapes, whole_number
from cusparge.errors import DeviceError, InvalidArgumentError, shown

__all__ = ["PooledBlocks", "pool_blocks"]


@dataclass(frozen=True)
class PooledBlocks:
    """Blocks of tokens: a mean vector each, and how well it stands for them.

    Attributes
    ----------
    mean : array, (B, H, ceil(S / block), D) float32
        Mean of the block's real tokens, less `token_mean` where there is one. 0 for a block
        without real tokens.
    similarity : array, (B, H, ceil(S / block)) float32
        Mean cosine similarity of its tokens, in [0, 1]; 1 for a block without real tokens, and -1
        for a block that holds a NaN or an infinity: no threshold lies below it.
    token_mean : array, (B, H, D) float32, or None
        Mean over all real tokens, where the array was smoothed.
    """

    mean: Any
    similarity: Any
    token_mean: Any | None = None


def pool_blocks(
    x: Any,
    *,
    block: int = 64,
    smooth: bool = False,
    layout: Layout = "HND",
    seqlens: Any = None,
) -> PooledBlocks:
    """Pool blocks of tokens and measure how alike their tokens are (arXiv:2502.18137, section 3.2).

    Parameters
    ----------
    x : array, (B, H, S, D) float16, bfloat16 or float32; on the CPU also float64
        q or k, of any framework and device.
    block : {64, 128}
        Tokens of a block.
    smooth : bool
        Take the mean over tokens off first, as stage 1 does with k.
    layout : {"HND", "NHD"}
        NHD: x is (B, S, H, D).
    seqlens : sequence or array of int, (B,), optional
        Real tokens of each sequence. On a GPU an int32 array there is clamped to [0, S].

    Returns
    -------
    PooledBlocks
        In the framework of `x`, on its device, from its allocator.

    Raises
    ------
    InvalidArgumentError, UnsupportedError, DeviceError, CompileError
        As `cusparge.attention`.
    """
    if in_graph():
        return PooledBlocks(*_graph.torch_pooling.pool_blocks(x, block, smooth, layout, seqlens))
    return _pool_blocks(x, block, smooth, layout, seqlens)


@not_traced("it is computed at once")
def _pool_blocks(x: Any, block: Any, smooth: Any, layout: Any, seqlens: Any) -> PooledBlocks:
    """Pool an array that has values, or hand it to whoever traces."""
    adapter = adapter_of(x, "x")
    signature = adapter.signature(x)
    if signature is not None and seqlens is None:
        key = (signature, block, smooth, layout, type(block), type(smooth))  # 1 == True
        try:
            known = _known.get(key)
        except TypeError:  # an option that is no option
            known = None
        if known is not None:
            return _launch(adapter, x, None, *known)
    else:
        key = None
    adapter, device = adapter_for(x=x)
    size = whole_number(block)
    if size not in (64, 128):
        raise InvalidArgumentError(
            f"block is not a block size: got {shown(block)}; allowed 64 and 128."
        )
    smooth = _options.check_flag("smooth", smooth)
    if _graph.is_needed(adapter, x, seqlens):
        trace = _graph.pooling_of(adapter.framework).pool_blocks
        where = device.index if device.kind == "cuda" and adapter.framework == "jax" else None
        return PooledBlocks(*trace(x, size, smooth, layout, seqlens, where))
    if device.kind == "cuda":
        require_device(device.index)  # says more clearly what a framework would say later
    if device.kind not in ("cpu", "cuda"):
        raise DeviceError(
            f"x is on {device}: allowed are the host and CUDA devices. Move it to one of these."
        )
    view = _check.check_one_array(adapter.view(x, "x"), "x", layout)
    if device.kind == "cuda":
        lengths = _device_lengths(adapter, x, view, seqlens)
        plan = pool_plan(
            *(view.dtype, view.shape, view.strides[:3], size, smooth, lengths is not None)
        )
        if key is not None:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[key] = (view.device, plan)
        return _launch(adapter, x, lengths, view.device, plan, view)
    host_lengths = _check.check_lengths(seqlens, "seqlens", view.shape[0], view.shape[2], "cpu")
    made = {
        name: adapter.new(shape, "float32", x)
        for name, shape in pooled_shapes(view.shape, size, smooth).items()
    }
    outputs = {name: out.data for name, (out, _) in made.items()}
    on_cpu.pool_blocks(view, host_lengths, size, outputs)
    return PooledBlocks(*(finish() for _, finish in made.values()))


#: Calls on CUDA arrays that have passed every check: signature and options -> device and plan.
_known: dict[Any, tuple[int, Plan]] = {}
_MOST_KNOWN = 1024


def _launch(
    adapter: Adapter,
    x: Any,
    lengths: DeviceArray | None,
    device: int,
    plan: Plan,
    view: DeviceArray | None = None,
) -> PooledBlocks:
    """Allocate in the caller's framework, and queue the kernels on its stream."""
    kernels = functions(plan, device, partial(adapter.is_capturing, device))
    made, pointers = adapter.empty(plan.shapes, x)
    addresses = dict(zip(plan.names, pointers, strict=True))
    addresses["x"] = adapter.address(x) if view is None else view.pointer
    addresses["lengths"] = 0 if lengths is None else lengths.pointer
    workspace = made.pop() if plan.workspace_bytes else None
    try:
        run(plan, addresses, device=device, stream=adapter.stream(device), kernels=kernels)
    finally:  # a launch before the one that failed may still run
        adapter.queued((view, lengths, workspace), device)
    return PooledBlocks(*map(adapter.finish, made))  # the plan's outputs are in this order


def _device_lengths(
    adapter: Adapter, x: Any, view: DeviceArray, seqlens: Any
) -> DeviceArray | None:
    """Return the lengths as int32 on the device of `x`, without waiting for it."""
    if seqlens is None:
        return None
    batch, tokens = view.shape[0], view.shape[2]
    if _check.is_host_list(seqlens):
        lengths = _check.check_lengths(seqlens, "seqlens", batch, tokens, "cpu")
        uploaded: DeviceArray = adapter.upload(np.array(lengths, np.int32), x)
        return uploaded
    found = adapter_of(seqlens, "seqlens")
    device = found.device(seqlens)
    if found.framework != adapter.framework or device != adapter.device(x):
        raise InvalidArgumentError(
            f"seqlens is a {found.framework} array on {device}, and x a {adapter.framework} array "
            f"on {adapter.device(x)}: pass a list, or an int32 array beside x."
        )
    found.check(seqlens, "seqlens")
    lengths_view: DeviceArray = found.view(seqlens, "seqlens")
    if lengths_view.dtype != "int32" or lengths_view.shape != (batch,):
        raise InvalidArgumentError(
            f"seqlens does not fit: got {lengths_view.dtype} of shape {lengths_view.shape}; "
            f"allowed on a GPU is int32 of shape ({batch},), one length for each sequence. Convert "
            "it to int32, or pass a list."
        )
    if batch > 1 and lengths_view.strides != (1,):
        raise InvalidArgumentError(
            f"seqlens is not contiguous: got stride {lengths_view.strides[0]}; pass a contiguous "
            "copy."
        )
    return lengths_view


_graph.install_pooling(_pool_blocks, PooledBlocks)
