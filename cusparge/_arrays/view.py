"""Arrays as the backends see them: memory, shape, strides and a dtype that NumPy may not know.

NumPy has no bfloat16 and no fp8. Their bits travel as ``uint16`` and ``uint8`` here, with the
dtype's name beside them, so that arrays of any framework work without any further package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "FLOAT_DTYPES",
    "Device",
    "DeviceArray",
    "HostArray",
    "Outline",
    "View",
    "finite_max",
    "from_float",
    "row_major",
    "to_float",
]

#: The dtypes of q, k and v, by name, with the bits that NumPy holds them in.
FLOAT_DTYPES: dict[str, type[np.generic]] = {
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float32": np.float32,
    "float64": np.float64,
}


@dataclass(frozen=True)
class Device:
    """Where an array lives: "cpu", "cuda" or another kind, and which one."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        """Write it as frameworks do."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous array."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class View(Protocol):
    """What can be known of an array without reading it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each dimension."""

    @property
    def dtype(self) -> str:
        """The element type by its field name: "float16", "bfloat16", "int32", "bool", ..."""

    @property
    def strides(self) -> tuple[int, ...]:
        """The step of each dimension, in elements."""

    @property
    def rows_are_contiguous(self) -> bool:
        """Whether neighbours along the last dimension are neighbours in memory."""

    def swapaxes(self: AnyView, first: int, second: int) -> AnyView:
        """Exchange two dimensions; nothing moves."""


AnyView = TypeVar("AnyView", bound=View)


class DeviceArray:
    """A strided array in the memory of a CUDA device.

    Attributes
    ----------
    pointer : int
        Address of the first element, 0 where there is none.
    shape, strides : tuple of int
        Strides count elements; they may be zero or negative.
    dtype : str
        The element type by its field name.
    device : int
        CUDA's index of the device.
    owner : object
        Keeps the memory alive.
    """

    __slots__ = ("device", "dtype", "owner", "pointer", "shape", "strides")

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str,
        device: int,
        owner: Any = None,
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.device = device
        self.owner = owner

    @property
    def rows_are_contiguous(self) -> bool:
        """Whether neighbours along the last dimension are neighbours in memory."""
        return not self.shape or self.shape[-1] <= 1 or 0 in self.shape or self.strides[-1] == 1

    def swapaxes(self, first: int, second: int) -> DeviceArray:
        """Exchange two dimensions; nothing moves."""
        shape, strides = list(self.shape), list(self.strides)
        shape[first], shape[second] = shape[second], shape[first]
        strides[first], strides[second] = strides[second], strides[first]
        return DeviceArray(
            self.pointer, tuple(shape), tuple(strides), self.dtype, self.device, self.owner
        )


@dataclass(frozen=True)
class Outline:
    """The shape and dtype of an array that has no memory yet, or that a trace stands in for."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of a contiguous array: whoever traces brings the elements into that order."""
        return row_major(self.shape)

    @property
    def rows_are_contiguous(self) -> bool:
        """Always."""
        return True

    def swapaxes(self, first: int, second: int) -> Outline:
        """Exchange two dimensions."""
        shape = list(self.shape)
        shape[first], shape[second] = shape[second], shape[first]
        return Outline(tuple(shape), self.dtype)


@dataclass(frozen=True)
class HostArray:
    """A strided array in host memory.

    Attributes
    ----------
    data : numpy.ndarray
        The elements, a view of the caller's memory; bfloat16 as ``uint16``, fp8 as ``uint8``.
    dtype : str
        The element type by its field name.
    """

    data: npt.NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each dimension."""
        return self.data.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """The step of each dimension, in elements."""
        return tuple(step // self.data.itemsize for step in self.data.strides)

    @property
    def rows_are_contiguous(self) -> bool:
        """Whether neighbours along the last dimension are neighbours in memory."""
        data = self.data
        return (
            data.size == 0
            or not data.shape
            or data.shape[-1] == 1
            or data.strides[-1] == data.itemsize
        )

    def swapaxes(self, first: int, second: int) -> HostArray:
        """Exchange two dimensions; nothing moves."""
        return HostArray(self.data.swapaxes(first, second), self.dtype)

    def with_data(self, data: npt.NDArray[Any]) -> HostArray:
        """Return the same dtype over other elements (a slice, a transposed view)."""
        return HostArray(data, self.dtype)


def to_float(array: HostArray, dtype: Any = np.float32) -> npt.NDArray[Any]:
    """Return the elements as `dtype`; a view where they are that already."""
    if array.dtype == "float64" and dtype != np.float64:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return array.data.astype(dtype)
    if array.dtype != "bfloat16":
        return array.data.astype(dtype, copy=False)
    bits = array.data.astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32).astype(dtype, copy=False)


def from_float(values: npt.NDArray[Any], out: HostArray) -> None:
    """Round `values` to nearest, ties to even, into `out`; overflow may be reported."""
    if out.dtype != "bfloat16":
        out.data[...] = values
        return
    single = np.array(values, dtype=np.float32, order="C")
    bits = single.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> 16
    # The carry above can turn a NaN into an infinity: keep NaN apart.
    out.data[...] = np.where(np.isnan(single), np.uint32(0x7FC0), rounded)


def finite_max(dtype: str) -> float:
    """Return the largest finite number of a float dtype, by name."""
    if dtype == "bfloat16":
        return float.fromhex("0x1.fep127")
    return float(np.finfo(dtype).max)
