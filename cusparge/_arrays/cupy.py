"""CuPy arrays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from cusparge._arrays.protocol import NO_UPLOAD, Finish
from cusparge._arrays.view import Device, DeviceArray
from cusparge.errors import DeviceError, InvalidArgumentError

__all__ = ["CupyAdapter", "allocate", "upload"]


#: Memory that CUDA graphs write to whenever they are replayed. CuPy does not tell when a graph is
#: gone, so it stays.
_captured: list[Any] = []


class CupyAdapter:
    """CuPy arrays, those of ml_dtypes' bfloat16 included."""

    framework = "cupy"

    def device(self, array: Any) -> Device:
        """Return CUDA's index of the device."""
        return Device("cuda", int(array.device.id))

    def check(self, array: Any, name: str) -> None:
        """Refuse foreign byte orders, which CuPy's own functions would misread too."""
        if not array.dtype.isnative:
            raise InvalidArgumentError(
                f"{name} has a foreign byte order ({array.dtype.str}): convert it with "
                f"`{name}.astype({name}.dtype.newbyteorder('='))`."
            )

    def is_traced(self, array: Any) -> bool:
        """Never."""
        return False

    def view(self, array: Any, name: str) -> DeviceArray:
        """Describe the array's memory."""
        size = array.dtype.itemsize
        steps = tuple(step // size for step in array.strides)
        if any(step % size for step in array.strides):
            raise InvalidArgumentError(
                f"{name} has strides that are no whole number of elements: got {array.strides} "
                f"bytes for elements of {size}. Pass `cupy.ascontiguousarray({name})`."
            )
        return DeviceArray(
            int(array.data.ptr), array.shape, steps, array.dtype.name, array.device.id, array
        )

    def like(self, array: Any) -> tuple[DeviceArray, Finish]:
        """Make an array with the strides' order of `array`."""
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(array.device.id):
            out = cupy.empty_like(array)
        return self.view(out, "out"), lambda: out

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[DeviceArray, Finish]:
        """Make a C-ordered array on the same device."""
        out = allocate(shape, array.dtype if dtype == "bfloat16" else dtype, array.device.id)
        return self.view(out, "out"), lambda: out

    def signature(self, array: Any) -> Any:
        """Return shape, strides, dtype and device; an array's dtype tells its byte order too."""
        return array.shape, array.strides, array.dtype, array.device.id, array.data.ptr & 3

    def address(self, array: Any) -> int:
        """Return where the first element of a CUDA array lies."""
        return int(array.data.ptr)

    def empty(self, shapes: Sequence[tuple[int, ...]], array: Any) -> tuple[list[Any], list[int]]:
        """Allocate from CuPy's pool."""
        made = [allocate(shape, "float32", array.device.id) for shape in shapes]
        return made, [int(one.data.ptr) for one in made]

    def finish(self, made: Any) -> Any:
        """Return it: it is the caller's kind of array already."""
        return made

    def upload(self, values: Any, array: Any) -> DeviceArray:
        """Copy in the order of the current stream."""
        if self.is_capturing(array.device.id):
            raise DeviceError(NO_UPLOAD)
        return upload(values, array.device.id)

    def stream(self, device: int) -> int:
        """Return the handle of CuPy's current stream on that device."""
        return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr)

    def is_capturing(self, device: int) -> bool:
        """Tell whether the current stream of that device captures a CUDA graph."""
        return bool(sys.modules["cupy"].cuda.get_current_stream(device).is_capturing())

    def queued(self, views: tuple[Any, ...], device: int) -> None:
        """Keep what a captured graph writes to; else CuPy's pool orders reuse by the stream."""
        workspace = views[-1]
        if workspace is not None and self.is_capturing(device):
            _captured.append(workspace)


def allocate(shape: tuple[int, ...], dtype: Any, device: int) -> Any:
    """Return an uninitialised CuPy array on a device; the current device stays as it is."""
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):
        return cupy.empty(shape, dtype)


def upload(values: Any, device: int) -> DeviceArray:
    """Copy a NumPy array to a device, in the order of CuPy's current stream there."""
    made = allocate(values.shape, values.dtype, device)
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):
        made.set(values)
    strides = tuple(step // made.dtype.itemsize for step in made.strides)
    return DeviceArray(int(made.data.ptr), made.shape, strides, made.dtype.name, device, made)
