"""The driver's management library, NVML, through ctypes: GPUs without a CUDA context.

Whatever is missing or answers with an error reads as "not known"; nothing here raises for it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Found", "Session", "session", "visible"]

#: More devices than a machine holds; a larger count is a broken answer.
_MOST_DEVICES = 1024


def _library_names() -> list[str]:
    if sys.platform == "win32":
        # Full paths, so that no file beside the program is taken for it.
        system = os.environ.get("SystemRoot", r"C:\Windows")
        programs = os.environ.get("ProgramFiles", r"C:\Program Files")
        return [
            os.path.join(system, "System32", "nvml.dll"),
            os.path.join(programs, "NVIDIA Corporation", "NVSMI", "nvml.dll"),
        ]
    return ["libnvidia-ml.so.1"]


@dataclass(frozen=True)
class Found:
    """What NVML tells about one device; `capability` is None where it does not."""

    name: str
    capability: tuple[int, int] | None
    memory_bytes: int | None
    uuid: str


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class Session:
    """NVML, initialised.

    Parameters
    ----------
    library : ctypes.CDLL
        The library.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def _call(self, name: str, *arguments: Any) -> bool:
        """Call a function; False where it is missing or fails."""
        function = getattr(self._library, name, None)
        return function is not None and function(*arguments) == 0

    def _text(self, name: str, *before: Any) -> str:
        buffer = ctypes.create_string_buffer(256)
        # One byte less than there is, so that the text ends whatever the library writes.
        if not self._call(name, *before, buffer, ctypes.c_uint(len(buffer) - 1)):
            return ""
        return buffer.value.decode("utf-8", "replace").strip()

    def driver_version(self) -> str | None:
        """Return the driver's version."""
        return self._text("nvmlSystemGetDriverVersion") or None

    def cuda_version(self) -> int | None:
        """Return the CUDA version of the driver, 12040 for 12.4."""
        number = ctypes.c_int()
        for name in ("nvmlSystemGetCudaDriverVersion_v2", "nvmlSystemGetCudaDriverVersion"):
            if self._call(name, ctypes.byref(number)):
                return number.value if number.value > 0 else None
        return None

    def count(self) -> int:
        """Return how many devices there are, those included that this process may not open."""
        number = ctypes.c_uint()
        known = self._call("nvmlDeviceGetCount_v2", ctypes.byref(number))
        return min(number.value, _MOST_DEVICES) if known else 0

    def handles(self) -> list[ctypes.c_void_p]:
        """Return the devices that this process may open, in order of their bus address."""
        found = []
        for index in range(self.count()):
            handle = ctypes.c_void_p()
            if self._call(
                "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle)
            ):
                found.append(handle)
        return found

    def mig_handle(self, uuid: str) -> tuple[ctypes.c_void_p, ctypes.c_void_p] | None:
        """Return the handles of a MIG instance and of the GPU that it is a part of."""
        instance, parent = ctypes.c_void_p(), ctypes.c_void_p()
        if not self._call(
            "nvmlDeviceGetHandleByUUID", uuid.encode("ascii", "replace"), ctypes.byref(instance)
        ):
            return None
        if not self._call(
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", instance, ctypes.byref(parent)
        ):
            return None
        return instance, parent

    def describe(self, handle: ctypes.c_void_p) -> Found:
        """Return what is known about a device."""
        major, minor, memory = ctypes.c_int(), ctypes.c_int(), _Memory()
        known = self._call(
            "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor)
        )
        has_memory = self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        return Found(
            name=self._text("nvmlDeviceGetName", handle) or "NVIDIA GPU",
            capability=(major.value, minor.value) if known else None,
            memory_bytes=memory.total if has_memory and memory.total else None,
            uuid=self._text("nvmlDeviceGetUUID", handle),
        )


@contextmanager
def session() -> Iterator[Session | None]:
    """Start NVML and end it again; gives None where there is no driver."""
    library = _load()
    opened = Session(library) if library is not None else None
    if opened is None or not opened._call("nvmlInit_v2"):
        yield None
        return
    try:
        yield opened
    finally:
        opened._call("nvmlShutdown")


def _load() -> Any:
    for name in _library_names():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def visible(opened: Session, wanted: str | None) -> list[Found]:
    """Return the devices that CUDA shows, in CUDA's order.

    Parameters
    ----------
    opened : Session
        NVML.
    wanted : str or None
        The value of CUDA_VISIBLE_DEVICES. CUDA reads it from left to right: indices, beginnings of
        UUIDs that fit one GPU alone, and names of MIG instances. What it does not understand ends
        the list, and a device that is named twice leaves none.
    """
    devices = [opened.describe(handle) for handle in opened.handles()]
    if wanted is None:
        return devices
    chosen: list[Found] = []
    for word in (part.strip() for part in wanted.split(",")):
        found = _chosen(opened, devices, word)
        if found is None:
            break
        if any(found is other or (found.uuid and found.uuid == other.uuid) for other in chosen):
            return []
        chosen.append(found)
    return chosen


def _chosen(opened: Session, devices: list[Found], word: str) -> Found | None:
    if word.isascii() and word.isdecimal() and len(word) < 10:
        index = int(word)
        return devices[index] if index < len(devices) else None
    if word.startswith("GPU-"):
        fitting = [device for device in devices if device.uuid.startswith(word)]
        return fitting[0] if len(fitting) == 1 else None
    if word.startswith("MIG-"):
        handles = opened.mig_handle(word)
        if handles is None:
            return None
        instance, parent = map(opened.describe, handles)
        return replace(instance, capability=parent.capability, uuid=word)
    return None
