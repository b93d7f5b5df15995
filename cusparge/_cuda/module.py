"""From a variant to a function on one device, kept for the life of the process.

A call in the steady state is one look into a dict. What is missing is built, loaded through
``cupy.RawModule(path=...)`` and kept. Between the check of a file on disk and the driver's opening
it another process may remove or break it, so loading is a loop: build, load, and where that fails
drop the file and start over.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cusparge._cuda import build, devices, modes, nvrtc
from cusparge._cuda.build import Binary
from cusparge._cuda.notices import LOG
from cusparge._cuda.variants import Variant
from cusparge.errors import CompileError, DeviceError

__all__ = ["FORKED", "kernel", "loaded"]

_ATTEMPTS = 3

FORKED = (
    "this process was forked after its parent had started CUDA, which CUDA does not survive: the "
    "parent started CUDA before fork; use spawn (multiprocessing.set_start_method('spawn')), or "
    "make the first call on the GPU after the fork."
)

#: Words in the driver's errors that say: the file is to blame. Everything else is the device's
#: state (no memory, an earlier fault), which compiling again would not mend.
_FILE_TO_BLAME = (
    "INVALID_IMAGE",
    "INVALID_SOURCE",
    "NO_BINARY_FOR_GPU",
    "NOT_FOUND",  # the file, or the function in it
    "INVALID_PTX",
    "UNSUPPORTED_PTX",
    "CUDA_ERROR_UNKNOWN",
    "CUDA_ERROR_INVALID_VALUE",
    "CUDA_ERROR_OPERATING_SYSTEM",
)

_functions: dict[tuple[int, Variant], Any] = {}
_lock = threading.RLock()
_cuda_lost = False


def kernel(
    variant: Variant,
    device: int,
    *,
    capturing: Callable[[], bool] | None = None,
    max_dynamic_shared_bytes: int = 0,
) -> Any:
    """Return the `cupy.cuda.Function` of a variant on a device.

    Parameters
    ----------
    variant : Variant
        The kernel.
    device : int
        CUDA's index of the device.
    capturing : callable, optional
        Tells whether the stream is being captured into a CUDA graph. Asked only where the kernel
        is not loaded yet, since neither compiling nor loading may happen in a capture.
    max_dynamic_shared_bytes : int
        Dynamic shared memory of a launch, where it is more than 48 KiB. Set once, when the function
        is loaded: every call of one variant must name the same number.

    Raises
    ------
    CompileError
        If it can be neither found nor compiled, or the driver does not load it.
    DeviceError
        If the device cannot be used, or a capture is running.
    """
    function = _functions.get((device, variant))
    if function is None:
        function = _miss(variant, device, capturing, max_dynamic_shared_bytes)
    return function


def loaded() -> int:
    """Return how many functions this process holds."""
    return len(_functions)


def _miss(
    variant: Variant, device: int, capturing: Callable[[], bool] | None, shared_bytes: int
) -> Any:
    mode = modes.mode()
    if _cuda_lost:
        raise DeviceError(FORKED)
    if capturing is not None and capturing():
        raise DeviceError(
            f"{variant.file} is not loaded on GPU {device} yet, and the stream is being captured "
            "into a CUDA graph, where nothing can be compiled or loaded: run one warm-up call "
            "first, with the same dtype and head_dim, or cusparge.warmup()."
        )
    arch = _arch_of(device)
    cupy = devices.require_cupy()
    binary: Binary | None = None
    reason: Exception | None = None
    refused: set[Path] = set()
    for _ in range(_ATTEMPTS):
        # Not under the lock: compiling one kernel does not hold up another.
        if mode != "off":
            binary = build.build(variant, arch)
        elif (found := build.peek(variant, arch, exact=False, without=refused)) is not None:
            binary = found
        else:
            break
        with _lock:
            held = _functions.get((device, variant))
            if held is not None:
                return held
            try:
                function = _load(cupy, binary, device, shared_bytes)
            except Exception as error:
                _raise_device_error(error, device)
                LOG.warning("%s could not be loaded: %s", binary.path, error)
                reason = error
            else:
                _functions[device, variant] = function
                return function
        if mode == "off":  # nothing would replace it
            refused.add(binary.path)
        else:
            build.forget(binary)
    if binary is None:
        raise _not_compiled(variant, arch)
    raise _cannot_load(binary, device, reason, replaced=mode != "off") from reason


def _arch_of(device: int) -> str:
    try:
        return devices.arch_of(devices.require_device(device))
    except DeviceError as error:
        if _is_lost(error):
            raise DeviceError(FORKED) from error
        raise


def _is_lost(error: Exception) -> bool:
    """Return whether this is CUDA's answer in a child of a process that had started it."""
    return _forked and "initialization error" in str(error).lower()


def _not_compiled(variant: Variant, arch: str) -> CompileError:
    return CompileError(
        f"{variant.file} ({variant.expression}) is not compiled for {arch}, and "
        f"{modes.VARIABLE}=off forbids compiling. Compile it with `cusparge compile --arch "
        f"{arch}` into the folder of CUSPARGE_CACHE_DIR or CUSPARGE_CACHE_SEED, or set "
        f"{modes.VARIABLE}=lazy."
    )


def _load(cupy: Any, binary: Binary, device: int, shared_bytes: int) -> Any:
    with cupy.cuda.Device(device):
        raw = cupy.RawModule(path=str(binary.path)).get_function(binary.lowered)
        if shared_bytes:
            raw.max_dynamic_shared_size_bytes = shared_bytes
        # The function on this device: it takes a stream, and `raw` would look it up at each launch.
        return raw.kernel


def _raise_device_error(error: Exception, device: int) -> None:
    """Raise where the device is to blame, and not the file."""
    text = str(error)
    if isinstance(error, OSError) or any(word in text for word in _FILE_TO_BLAME):
        return
    if _is_lost(error):
        raise DeviceError(FORKED) from error
    raise DeviceError(
        f"a kernel could not be loaded on GPU {device}: {text}. Where memory ran out, free some; "
        "after an illegal access of an earlier kernel the process must be started again."
    ) from error


def _cannot_load(
    binary: Binary, device: int, reason: Exception | None, *, replaced: bool
) -> CompileError:
    tried = f", even after {_ATTEMPTS} attempts with a new file" if replaced else ""
    text = (
        f"the driver does not load {binary.path} on GPU {device}{tried}: {reason}. It was compiled "
        f"by NVRTC {binary.info.nvrtc} for {binary.arch}"
    )
    driver = devices.driver_cuda_version()
    major = int(binary.info.nvrtc.partition(".")[0])
    if driver is not None and driver[0] < major:
        return CompileError(
            f"{text}, but the driver knows CUDA {driver[0]}.{driver[1]}: install a newer driver, "
            f'or an NVRTC of its major version (pip install "cusparge[cuda{driver[0]}]"): '
            f"{nvrtc.HOW_TO_INSTALL}."
        )
    if not replaced:
        return CompileError(
            f"{text}, and {modes.VARIABLE}=off forbids compiling it anew, so the file was left as "
            f"it is. If it is damaged, remove it and run `cusparge compile --arch {binary.arch}`, "
            f"or set {modes.VARIABLE}=lazy."
        )
    return CompileError(
        f"{text}. If the file vanishes or changes, another program cleans its folder: set "
        "CUSPARGE_CACHE_DIR to one that is left alone. Otherwise please report it with the output "
        'of "cusparge doctor --json".'
    )


_forked = False


def _cuda_in_use() -> bool:
    """Return whether this process is known to have a CUDA context."""
    if _functions:
        return True
    torch = sys.modules.get("torch")
    try:
        return bool(torch is not None and torch.cuda.is_initialized())
    except Exception:  # torch is half imported, or its version has no such question
        return False


_in_use_at_fork = False


def _before_fork() -> None:
    global _in_use_at_fork
    _in_use_at_fork = _cuda_in_use()


def _reset() -> None:
    """Forget the parent's functions and locks in a forked child: neither lives on there."""
    global _lock, _cuda_lost, _forked
    _lock = threading.RLock()
    _functions.clear()
    _forked = True
    _cuda_lost = _cuda_lost or _in_use_at_fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_reset)
