"""Any other framework that speaks DLPack and has a ``from_dlpack`` in its top module."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cusparge._arrays import dlpack
from cusparge._arrays.cupy import allocate, upload
from cusparge._arrays.numpy import NumpyAdapter
from cusparge._arrays.protocol import NO_UPLOAD, Finish, type_name
from cusparge._arrays.view import Device, DeviceArray, HostArray
from cusparge.errors import DeviceError, InvalidArgumentError, UnsupportedError

__all__ = ["DlpackAdapter"]

#: Views of foreign memory in use by queued work, each with the event that tells when it is done.
_in_use: dict[int, deque[tuple[Any, tuple[Any, ...]]]] = {}
_lock = threading.Lock()


class DlpackAdapter:
    """Arrays of an unknown framework.

    On a device the exporter is asked to order its work before CuPy's current stream, where ours is
    queued; what it exported is held until that work is done. Results are CuPy's memory, handed over
    through the framework's ``from_dlpack``.
    """

    def __init__(self, framework: str) -> None:
        self.framework = framework

    def device(self, array: Any) -> Device:
        """Translate DLPack's device."""
        kind, index = dlpack.device_of(array)
        if dlpack.is_host(kind):
            return Device("cpu")
        return Device("cuda" if dlpack.is_cuda(kind) else f"DLPack device {kind}", index)

    def check(self, array: Any, name: str) -> None:
        """Refuse arrays that could be read but not given back."""
        if not hasattr(sys.modules.get(self.framework), "from_dlpack"):
            raise InvalidArgumentError(
                f"{name} is a {type_name(array)}, and {self.framework} has no from_dlpack to "
                "make results with: pass a NumPy, torch, JAX or CuPy array."
            )

    def is_traced(self, array: Any) -> bool:
        """Never."""
        return False

    def view(self, array: Any, name: str) -> HostArray | DeviceArray:
        """View the memory behind the capsule."""
        kind, index = dlpack.device_of(array)
        if dlpack.is_cuda(kind):
            if self.is_capturing(index):
                raise UnsupportedError(
                    f"a CUDA graph cannot be captured over arrays of {self.framework}: {name}'s "
                    "memory is borrowed for one call only. Capture with torch or CuPy arrays."
                )
            # 0 would be ambiguous between two default streams: DLPack writes 1 for the legacy one.
            return dlpack.read_device(array, name, stream=self.stream(index) or 1)
        return dlpack.read_host(array, name)

    def like(self, array: Any) -> tuple[Any, Finish]:
        """Make an output of the same shape and dtype."""
        view = self.view(array, "q")
        return self.new(view.shape, view.dtype, array)

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[Any, Finish]:
        """Make memory of NumPy or CuPy, and hand it over when it is written."""
        if dtype == "bfloat16":
            raise UnsupportedError(
                f"bfloat16 results cannot be handed to {self.framework}: neither NumPy nor CuPy "
                "exports them. Pass float32 or float16, or use torch or JAX."
            )
        from_dlpack = sys.modules[self.framework].from_dlpack
        kind, index = dlpack.device_of(array)
        if not dlpack.is_cuda(kind):
            out = np.empty(shape, dtype)
            return NumpyAdapter().view(out, "out"), lambda: from_dlpack(out)
        _cupy()
        made = allocate(shape, dtype, index)
        strides = tuple(step // made.dtype.itemsize for step in made.strides)
        view = DeviceArray(int(made.data.ptr), shape, strides, dtype, index, made)
        return view, lambda: from_dlpack(made)

    def signature(self, array: Any) -> Any:
        """Look again: an exporter tells its shape by exporting."""
        return None

    def address(self, array: Any) -> int:
        """Never needed: an array without a signature is viewed."""
        raise NotImplementedError

    def empty(self, shapes: Sequence[tuple[int, ...]], array: Any) -> tuple[list[Any], list[int]]:
        """Allocate from CuPy's pool."""
        _cupy()
        device = dlpack.device_of(array)[1]
        made = [allocate(shape, "float32", device) for shape in shapes]
        return made, [int(one.data.ptr) for one in made]

    def finish(self, made: Any) -> Any:
        """Hand CuPy's memory over to the framework."""
        return sys.modules[self.framework].from_dlpack(made)

    def upload(self, values: Any, array: Any) -> DeviceArray:
        """Copy in the order of the current stream."""
        index = dlpack.device_of(array)[1]
        if self.is_capturing(index):
            raise DeviceError(NO_UPLOAD)
        return upload(values, index)

    def stream(self, device: int) -> int:
        """Return the handle of CuPy's current stream on that device."""
        return int(_ask(lambda: _cupy().cuda.get_current_stream(device).ptr))

    def is_capturing(self, device: int) -> bool:
        """Tell whether the current stream of that device captures a CUDA graph."""
        return bool(_ask(lambda: _cupy().cuda.get_current_stream(device).is_capturing()))

    def queued(self, views: tuple[Any, ...], device: int) -> None:
        """Hold the exporter's memory until the stream has passed this point."""
        cupy = _cupy()
        with cupy.cuda.Device(device):
            event = cupy.cuda.Event(disable_timing=True)
            event.record(cupy.cuda.get_current_stream())
        done = []  # given back outside of the lock: that runs code of the exporter
        with _lock:
            waiting = _in_use.setdefault(device, deque())
            while waiting and waiting[0][0].done:
                done.append(waiting.popleft())
            waiting.append((event, views))
        done.clear()


def _ask(question: Callable[[], Any]) -> Any:
    """Ask CuPy about a device; what it cannot answer is the device's fault."""
    try:
        return question()
    except DeviceError:
        raise
    except Exception as error:
        raise DeviceError(
            f"CuPy cannot use the GPU: {error}. Install an NVIDIA driver that fits its CUDA "
            "version; `cusparge doctor` tells what is missing."
        ) from error


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            'CuPy is needed to run kernels: pip install "cusparge[cuda13]" (NVIDIA driver 580 or '
            'later) or "cusparge[cuda12]" (driver 525 or later).'
        ) from error
    return cupy
