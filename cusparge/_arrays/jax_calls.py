"""The public calls inside jax.jit, and on JAX arrays in a GPU's memory.

What is traced, or lives in a GPU's memory, is only touched by the compiled program. So the call is
bound as a callback: on the host ``jax.pure_callback`` hands over the arrays; on a GPU
``buffer_callback`` hands over XLA's own buffers and stream, in place and without a copy, and XLA
allocates the results and the workspace. Which of the two is decided when the program is lowered.

Errors inside a callback reach the caller wrapped in a runtime error of JAX: everything that can be
checked without values is checked before.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from cusparge._arrays import dlpack
from cusparge._arrays.view import DeviceArray, Outline
from cusparge.errors import UnsupportedError

__all__ = ["Work", "announce", "as_int32", "call", "is_jax", "register"]

#: Kinds of objects that JAX is to know, each with how to take it apart and to put it together.
_kinds: list[tuple[type, Callable[..., Any], Callable[..., Any]]] = []
_lock = threading.Lock()


class Work(Protocol):
    """One call with everything but its arrays; equal ones share one compiled program."""

    def __hash__(self) -> int:
        """Equal work is bound once."""

    def outputs(self) -> tuple[Outline, ...]:
        """Return shape and dtype of every result, then of the workspace on a GPU."""

    def host(self, *arrays: Any) -> Sequence[Any]:
        """Compute NumPy arrays from NumPy arrays."""

    def device(
        self, stream: int, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]
    ) -> None:
        """Queue the work on a CUDA stream."""


def call(work: Work, arrays: Sequence[Any]) -> Any:
    """Run `work` on JAX arrays or tracers, in the program that is being traced if there is one."""
    return _bound(work)(*arrays)


def is_jax(values: Any) -> bool:
    """Tell whether `values` is an array or tracer of JAX."""
    return isinstance(values, sys.modules["jax"].Array)


def as_int32(values: Any, limit: int) -> Any:
    """Return whole numbers as int32; what lies outside of [0, limit] stays outside of it."""
    numpy = sys.modules["jax"].numpy
    values = numpy.asarray(values)
    bounds = np.iinfo(values.dtype)
    low, high = max(-1, bounds.min), min(limit + 1, bounds.max)
    return numpy.clip(values, low, high).astype("int32")


def register(kind: type, flatten: Callable[..., Any], unflatten: Callable[..., Any]) -> None:
    """Say which arrays an object of ours holds; JAX learns of it from `announce`."""
    _kinds.append((kind, flatten, unflatten))


def announce() -> None:
    """Tell JAX of all kinds registered so far, once it is loaded: they may pass through jax.jit."""
    if not _kinds or "jax" not in sys.modules:
        return
    with _lock:
        tree_util: Any = getattr(sys.modules["jax"], "tree_util", None)
        while _kinds and hasattr(tree_util, "register_pytree_node"):
            tree_util.register_pytree_node(*_kinds[-1])
            _kinds.pop()


# Stats and maps are made in graphs of torch too: Dynamo runs a function so marked while it traces,
# and does not walk sys.modules for it.
announce._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=512)
def _bound(work: Work) -> Any:
    jax = sys.modules["jax"]
    results = tuple(
        jax.ShapeDtypeStruct(outline.shape, jax.numpy.dtype(outline.dtype))
        for outline in work.outputs()
    )

    def on_host(*arrays: Any) -> Any:
        return jax.pure_callback(_HostCall(work), results, *arrays, vmap_method="sequential")

    def on_device(*arrays: Any) -> Any:
        # Traced for every program, also one that will run on the host: what is missing for a GPU
        # may be said there only.
        callback = _buffer_callback()
        if callback is None:
            return jax.pure_callback(_no_callback, results, *arrays, vmap_method="sequential")
        return callback(
            _DeviceCall(work), results, vmap_method="sequential", command_buffer_compatible=False
        )(*arrays)

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def bound(*arrays: Any) -> Any:
        return jax.lax.platform_dependent(*arrays, cpu=on_host, cuda=on_device)

    @bound.defjvp  # type: ignore[untyped-decorator]
    def refuse(primals: Any, tangents: Any) -> Any:
        raise UnsupportedError(
            "an input requires a gradient, and cusparge computes the forward pass only: keep it "
            "out of jax.grad and jax.jvp, or pass `jax.lax.stop_gradient(x)` for q, k and v."
        )

    return jax.jit(bound)


def _buffer_callback() -> Any:
    try:
        from jax.experimental.buffer_callback import buffer_callback
    except ImportError:
        return None
    return buffer_callback


def _no_callback(*arrays: Any) -> Any:
    raise UnsupportedError(
        f"JAX {sys.modules['jax'].__version__} has no buffer callback, which kernels on JAX's "
        "GPU arrays need: update it (pip install --upgrade jax), or pass the arrays to torch "
        "or CuPy through DLPack."
    )


class _HostCall:
    """Receive arrays on the host."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, *arrays: Any) -> Any:
        return tuple(self.work.host(*(np.asarray(array) for array in arrays)))


class _DeviceCall:
    """Receive XLA's buffers and stream."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, context: Any, outputs: Any, *inputs: Any) -> None:
        self.work.device(
            int(context.stream),
            [_buffer(array, "an input") for array in inputs],
            [_buffer(array, "a result") for array in outputs],
        )


def _buffer(array: Any, name: str) -> DeviceArray:
    """View one of XLA's buffers, which is valid on the callback's stream."""
    return dlpack.read_device(array, name)
