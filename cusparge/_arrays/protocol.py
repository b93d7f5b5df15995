"""What cusparge needs to know of a framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cusparge._arrays.view import Device

__all__ = ["NO_UPLOAD", "Adapter", "Finish", "HostOnly", "type_name"]

#: What to say where numbers on the host are needed inside a CUDA graph.
NO_UPLOAD = (
    "numbers from a list cannot be copied to the GPU while a CUDA graph is being captured: the "
    "graph would read host memory that is gone. Pass an int32 array on the device, and change its "
    "values between replays."
)

#: Finishes an output: hands back the caller's kind of array once it is (queued to be) written.
Finish = Callable[[], Any]


class Adapter(Protocol):
    """What cusparge needs to know of a framework."""

    framework: str

    def device(self, array: Any) -> Device:
        """Return where `array` lives."""

    def check(self, array: Any, name: str) -> None:
        """Raise for an array of this framework that cannot be an argument at all."""

    def is_traced(self, array: Any) -> bool:
        """Tell whether `array` stands for values that come later: it has no memory."""

    def view(self, array: Any, name: str) -> Any:
        """View the memory: a `HostArray`, a `DeviceArray`, or an `Outline` where it is traced."""

    def like(self, array: Any) -> tuple[Any, Finish]:
        """Make an output with the shape, dtype, device and memory order of `array`."""

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[Any, Finish]:
        """Make a row-major output beside `array`, from the framework's own allocator."""

    def signature(self, array: Any) -> Any:
        """Return a key of all that checks depend on, or None where each call must look again.

        Two arrays of one key pass or fail the same checks, and lie on the same CUDA device.
        """

    def address(self, array: Any) -> int:
        """Return where the first element of a CUDA array with a signature lies."""

    def empty(self, shapes: Sequence[tuple[int, ...]], array: Any) -> tuple[list[Any], list[int]]:
        """Return uninitialised float32 arrays beside a CUDA `array`, and their addresses."""

    def finish(self, made: Any) -> Any:
        """Return what `empty` made, once work on it is queued, as the caller's kind of array."""

    def upload(self, values: Any, array: Any) -> Any:
        """Copy a small NumPy array beside `array`, in the order of the current stream."""

    def stream(self, device: int) -> int:
        """Return the handle of the framework's current stream on a CUDA device."""

    def is_capturing(self, device: int) -> bool:
        """Tell whether a CUDA graph is being captured on the current stream of a device."""

    def queued(self, views: tuple[Any, ...], device: int) -> None:
        """Be told that work on `views`, the workspace last, is queued on the current stream."""


class HostOnly:
    """The parts of an adapter that a framework without GPU arrays does not need."""

    def is_traced(self, array: Any) -> bool:
        """Never."""
        return False

    def signature(self, array: Any) -> Any:
        """Look again: the work on the host is far longer than its checks."""
        return None

    def address(self, array: Any) -> int:
        """Never needed: no array of this framework is a `DeviceArray`."""
        raise NotImplementedError

    def empty(self, shapes: Sequence[tuple[int, ...]], array: Any) -> tuple[list[Any], list[int]]:
        """Never needed: no array of this framework is a `DeviceArray`."""
        raise NotImplementedError

    def finish(self, made: Any) -> Any:
        """Never needed, as `empty`."""
        raise NotImplementedError

    def upload(self, values: Any, array: Any) -> Any:
        """Never needed: host arrays take lists."""
        raise NotImplementedError

    def stream(self, device: int) -> int:
        """Return CUDA's default stream: nothing of this framework is ordered by another."""
        return 0

    def is_capturing(self, device: int) -> bool:
        """Never."""
        return False

    def queued(self, views: tuple[Any, ...], device: int) -> None:
        """Nothing is to be kept: the framework's allocator knows the stream."""


def type_name(array: Any) -> str:
    """Return a type's full name, for messages."""
    return f"{type(array).__module__}.{type(array).__qualname__}"
