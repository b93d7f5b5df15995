"""Buffers that a thread keeps between calls: fresh memory costs more than the arithmetic on it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["scratch"]


class _Scratch(threading.local):
    """The buffers of one thread, by name and dtype."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Any], npt.NDArray[Any]] = {}

    def get(self, name: str, shape: tuple[int, ...], work: Any) -> npt.NDArray[Any]:
        """Return an uninitialised array of that shape."""
        size = 1
        for extent in shape:
            size *= extent
        buffer = self._buffers.get((name, work))
        if buffer is None or buffer.size < size:
            buffer = np.empty(size, work)
            self._buffers[name, work] = buffer
        return buffer[:size].reshape(shape)


scratch = _Scratch()
