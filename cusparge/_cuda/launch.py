"""Queue the launches of a plan on a stream, leaving the caller's current device as it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cusparge._cuda import devices, module
from cusparge._cuda.params import Launch, Plan
from cusparge.errors import DeviceError

__all__ = ["functions", "run"]

#: CuPy passes a NumPy array of one element by value: one dtype for each size of struct.
_struct_types: dict[int, np.dtype[np.void]] = {}


class _Stream:
    """What a launch needs of a stream that another framework owns."""

    __slots__ = ("ptr",)

    def __init__(self, handle: int) -> None:
        self.ptr = handle


def functions(plan: Plan, device: int, capturing: Callable[[], bool] | None = None) -> list[Any]:
    """Return the kernel of each launch, compiled and loaded.

    To be called before anything is allocated: what keeps a kernel from being loaded (no GPU, a
    fork, a capture) would keep frameworks from allocating too, and they say it less clearly.

    Parameters
    ----------
    plan : Plan
        What will be launched.
    device : int
        CUDA's index of the device.
    capturing : callable, optional
        Tells whether the stream is being captured; asked where a kernel has to be loaded first.

    Raises
    ------
    CompileError, DeviceError
        A kernel is missing, or the device cannot be used.
    """
    return [module.kernel(one.variant, device, capturing=capturing) for one in plan.launches]


def run(
    plan: Plan,
    addresses: dict[str, int],
    *,
    device: int,
    stream: int,
    kernels: list[Any] | None = None,
) -> None:
    """Queue every launch of `plan`; nothing waits for the GPU.

    Parameters
    ----------
    plan : Plan
        What to launch.
    addresses : dict of str to int
        Where each of the plan's arrays lies in the device's memory.
    device : int
        CUDA's index of the device; it is made current for the launches and the caller's restored.
    stream : int
        Handle of the stream, 0 for the legacy default stream.
    kernels : list, optional
        What `functions` returned.

    Raises
    ------
    CompileError, DeviceError
        A kernel is missing or a launch fails; nothing that follows it is queued.
    """
    if not plan.launches:
        return
    if kernels is None:
        kernels = functions(plan, device)
    runtime = devices.require_cupy().cuda.runtime
    wanted = _Stream(stream)
    structs = plan.fill(**addresses)
    one = plan.launches[0]
    before = device
    try:
        before = runtime.getDevice()
        if before != device:
            runtime.setDevice(device)
        for function, one, params in zip(kernels, plan.launches, structs, strict=True):
            function(one.grid, one.block, (_by_value(params),), one.shared_bytes, wanted)
            if _DEBUG:
                runtime.streamSynchronize(stream)
    except Exception as error:
        raise DeviceError(_failed(one, device, error)) from error
    finally:
        if before != device:
            runtime.setDevice(before)


def _by_value(params: bytes) -> np.ndarray[Any, np.dtype[np.void]]:
    size = len(params)
    kind = _struct_types.get(size)
    if kind is None:
        kind = _struct_types[size] = np.dtype((np.void, size))
    return np.frombuffer(params, kind)


def _failed(one: Launch, device: int, error: Exception) -> str:
    where = "" if _DEBUG else " A fault may belong to earlier work: CUSPARGE_DEBUG=1 tells."
    return (
        f"a launch failed on GPU {device}: {one.variant.expression} of {one.variant.file}, grid "
        f"{one.grid}, {one.block[0]} threads, {one.shared_bytes} bytes of shared memory: {error}. "
        "After an illegal access the process must be started again; where memory ran out, free "
        f"some.{where}"
    )


def _debug() -> bool:
    value = os.environ.get("CUSPARGE_DEBUG", "").strip()
    return value not in ("", "0")


#: ``CUSPARGE_DEBUG=1``: wait after each launch, so that a fault names its kernel.
_DEBUG = _debug()
