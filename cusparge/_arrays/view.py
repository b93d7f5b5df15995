"""A host array as the backends see it: memory, shape, strides and a dtype that NumPy may not know.

NumPy has no bfloat16. Its 16 bits travel as ``uint16`` here, with the dtype's name beside them, so
that torch's and JAX's bfloat16 arrays work without any further package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FLOAT_DTYPES", "HostArray", "finite_max", "from_float", "to_float"]

#: The dtypes of q, k and v, by name, with the bits that NumPy holds them in.
FLOAT_DTYPES: dict[str, type[np.generic]] = {
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float32": np.float32,
    "float64": np.float64,
}


@dataclass(frozen=True)
class HostArray:
    """A strided array in host memory.

    Attributes
    ----------
    data : numpy.ndarray
        The elements, a view of the caller's memory; bfloat16 as ``uint16``.
    dtype : str
        The element type by its field name: "float16", "bfloat16", "int32", "bool", ...
    """

    data: npt.NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each dimension."""
        return self.data.shape

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
