"""NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from cusparge._arrays.protocol import Finish, HostOnly
from cusparge._arrays.view import Device, HostArray
from cusparge.errors import InvalidArgumentError

__all__ = ["NumpyAdapter"]


class NumpyAdapter(HostOnly):
    """NumPy arrays, those of ml_dtypes' bfloat16 included."""

    framework = "numpy"

    def device(self, array: Any) -> Device:
        """Return the host."""
        return Device("cpu")

    def check(self, array: Any, name: str) -> None:
        """Refuse what would lose a part silently: masks and foreign byte orders."""
        if isinstance(array, np.ma.MaskedArray):
            raise InvalidArgumentError(
                f"{name} is a masked array, and its mask would be lost: pass `{name}.filled(0)` "
                "and say which keys are valid with seqlens_k, or which blocks with block_map."
            )
        if not array.dtype.isnative:
            raise InvalidArgumentError(
                f"{name} has a foreign byte order ({array.dtype.str}): convert it with "
                f"`{name}.astype({name}.dtype.newbyteorder('='))`."
            )

    def view(self, array: Any, name: str) -> HostArray:
        """View the array itself."""
        array = np.asarray(array)
        dtype = str(array.dtype.name)
        return HostArray(array.view(np.uint16) if dtype == "bfloat16" else array, dtype)

    def like(self, array: Any) -> tuple[HostArray, Finish]:
        """Make an array with the strides' order of `array`."""
        out = np.empty_like(array, subok=False)
        return self.view(out, "out"), lambda: out

    def new(self, shape: tuple[int, ...], dtype: str, array: Any) -> tuple[HostArray, Finish]:
        """Make a C-ordered array."""
        out = np.empty(shape, array.dtype if dtype == "bfloat16" else dtype)
        return self.view(out, "out"), lambda: out
