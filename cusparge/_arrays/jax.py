"""JAX arrays: read through DLPack, written by handing NumPy memory over, or through a callback."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cusparge._arrays import dlpack
from cusparge._arrays.numpy import NumpyAdapter
from cusparge._arrays.protocol import Finish, HostOnly
from cusparge._arrays.view import Device, HostArray, Outline
from cusparge.errors import InvalidArgumentError

__all__ = ["TRACED", "JaxAdapter"]

#: Not one device: wherever the traced function will run.
TRACED = Device("traced")


class JaxAdapter(HostOnly):
    """JAX arrays.

    Concrete arrays in host memory are read where they lie. Tracers, and arrays in a GPU's memory,
    have no memory that Python may touch: they are `Outline` here, and the work goes through a
    callback of the compiled program (`cusparge._arrays.jax_calls`), which brings XLA's own stream
    and buffers along.
    """

    framework = "jax"

    def device(self, array: Any) -> Device:
        """Return the platform of the array's (first) device."""
        if _is_tracer(array):
            return TRACED
        first = min(array.devices(), key=lambda device: device.id)
        kind = "cuda" if first.platform in ("gpu", "cuda") else str(first.platform)
        local = getattr(first, "local_hardware_id", None)
        return Device(kind, int(first.id if local is None else local))

    def check(self, array: Any, name: str) -> None:
        """Refuse arrays without values."""
        if not _is_tracer(array) and array.is_deleted():
            raise InvalidArgumentError(
                f"{name} is a JAX array that has been deleted, perhaps donated to another "
                "computation: pass an array that still has its values."
            )

    def is_traced(self, array: Any) -> bool:
        """Tell whether the call has to go through a callback: a tracer, or a GPU's array."""
        if not isinstance(array, sys.modules["jax"].Array):
            return False
        return _is_tracer(array) or self.device(array).kind == "cuda"

    def view(self, array: Any, name: str) -> HostArray | Outline:
        """View the buffer of a host array once it is computed, the outline of any other."""
        if self.is_traced(array):
            return Outline(tuple(array.shape), str(array.dtype))
        array.block_until_ready()
        if len(array.devices()) > 1:  # sharded: DLPack has no word for it, so it is gathered
            return NumpyAdapter().view(np.asarray(array), name)
        return dlpack.read_host(array, name)

    def like(self, array: Any) -> tuple[HostArray, Finish]:
        """Make an output of the same shape, dtype and sharding."""
        return self.new(array.shape, str(array.dtype), array)

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[HostArray, Finish]:
        """Make NumPy memory, and put it on the array's device when it is written."""
        jax = sys.modules["jax"]
        out: Any = np.empty(shape, array.dtype if dtype == "bfloat16" else dtype)
        view = NumpyAdapter().view(out, "out")
        place = (
            array.sharding
            if out.shape == array.shape
            else min(array.devices(), key=lambda device: device.id)
        )
        return view, lambda: jax.device_put(out, place)


def _is_tracer(array: Any) -> bool:
    core = getattr(sys.modules.get("jax"), "core", None)
    return core is not None and isinstance(array, core.Tracer)
