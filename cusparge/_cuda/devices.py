"""Which GPUs there are, which of them cusparge can use, and what their kernels are compiled for.

GPUs are listed through the driver's management library (NVML), which creates no CUDA context: a
process may do so at import and still fork. Only the functions named ``require_...`` touch CuPy.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusparge._cuda import nvml
from cusparge.errors import DeviceError, InvalidArgumentError, shown

__all__ = [
    "ARCHITECTURES",
    "CUPY_PACKAGES",
    "MAIN_ARCHITECTURES",
    "Gpu",
    "arch_of",
    "check_arch",
    "count_gpus",
    "cupy_packages",
    "driver_cuda_version",
    "driver_version",
    "extra_advice",
    "family_of",
    "list_gpus",
    "require_cupy",
    "require_device",
]

#: Each architecture that kernels are compiled for, and the compute capability that runs it. From
#: 9.0 on it is the exact one ("a"): its instructions are not carried over to the next.
_CAPABILITIES = {
    "sm_80": (8, 0),
    "sm_86": (8, 6),
    "sm_89": (8, 9),
    "sm_90a": (9, 0),
    "sm_100a": (10, 0),
    "sm_120a": (12, 0),
    "sm_87": (8, 7),
    "sm_88": (8, 8),
    "sm_103a": (10, 3),
    "sm_110a": (11, 0),
    "sm_121a": (12, 1),
}
#: Every architecture, those that are compiled by default first.
ARCHITECTURES = tuple(_CAPABILITIES)
#: What is compiled where no GPU says which architecture is wanted: most GPUs of today.
MAIN_ARCHITECTURES = ARCHITECTURES[:6]

_ARCH_OF = {capability: arch for arch, capability in _CAPABILITIES.items()}

#: Where P·V may run in e4m3: mma.sync has it at full rate from sm_89 and on sm_12x. Data-center
#: Blackwell (sm_100, sm_103, sm_110) keeps mma.sync as a slow path beside its tensor memory.
_MMA_E4M3 = {"sm_89", "sm_120a", "sm_121a"}

#: Packages that all install a module `cupy`, and so overwrite each other's files.
CUPY_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")

_PROC_VERSION = Path("/proc/driver/nvidia/version")

# Attributes of cudaDeviceGetAttribute; CuPy has no names for them.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76

_NO_DEVICE = 100  # cudaErrorNoDevice
_INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver

_HOST_ARRAYS = 'use host arrays, which run on the CPU ("cusparge doctor" tells more)'


@dataclass(frozen=True)
class Gpu:
    """One GPU that this process may use.

    Attributes
    ----------
    index : int
        CUDA's index of the device. On a machine with GPUs of several models it is certain only
        with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``: by default CUDA puts the fastest first.
    name : str
        The model.
    capability : tuple of int
        Compute capability, (major, minor).
    memory_bytes : int or None
        All of its memory; None where the driver does not tell.
    uuid : str
        The driver's identifier, empty where it does not tell.
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int | None
    uuid: str


def list_gpus() -> list[Gpu]:
    """Return the GPUs that CUDA would show this process, without starting CUDA.

    ``CUDA_VISIBLE_DEVICES`` is followed as CUDA does. The list is empty where there is no GPU, no
    driver, or anything is wrong with either: nothing is ever raised.
    """
    with nvml.session() as session:
        if session is None:
            return []
        return [
            Gpu(index, found.name, found.capability, found.memory_bytes, found.uuid)
            for index, found in enumerate(
                nvml.visible(session, os.environ.get("CUDA_VISIBLE_DEVICES"))
            )
            if found.capability is not None
        ]


def count_gpus() -> int | None:
    """Return how many GPUs the driver knows, hidden ones included; None without a driver."""
    with nvml.session() as session:
        return session.count() if session is not None else None


def driver_version() -> str | None:
    """Return the NVIDIA driver's version, such as "580.65.06"; None where none is loaded."""
    with nvml.session() as session:
        version = session.driver_version() if session is not None else None
    if version:
        return version
    try:
        text = _PROC_VERSION.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build ..."
    found = re.search(r"(?<!\S)\d+(?:\.\d+)+(?!\S)", text.partition("\n")[0])
    return found[0] if found else None


def driver_cuda_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver runs; None where no driver is loaded."""
    with nvml.session() as session:
        number = session.cuda_version() if session is not None else None
    return _cuda_version(number) if number else None


def _cuda_version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10  # 12040 is 12.4


def arch_of(capability: tuple[int, int]) -> str:
    """Return the architecture that kernels for a compute capability are compiled for.

    Parameters
    ----------
    capability : tuple of int
        (major, minor).

    Raises
    ------
    DeviceError
        cusparge has no kernels for it.

    Examples
    --------
    >>> arch_of((8, 6)), arch_of((9, 0))
    ('sm_86', 'sm_90a')
    """
    arch = _ARCH_OF.get(capability)
    if arch is not None:
        return arch
    version = f"{capability[0]}.{capability[1]}"
    if capability < (8, 0):
        raise DeviceError(
            f"Turing and older are not supported (compute capability {version}): kernels need "
            f"8.0 (Ampere) or later. Choose another GPU, or {_HOST_ARRAYS}."
        )
    known = ", ".join(f"{major}.{minor}" for major, minor in sorted(_ARCH_OF))
    raise DeviceError(
        f"compute capability {version} is not known to this version of cusparge, which has kernels "
        f"for {known}. Install a newer version, choose another GPU, or {_HOST_ARRAYS}."
    )


def _spellings() -> dict[str, str]:
    found = {}
    for arch, (major, minor) in _CAPABILITIES.items():
        digits = f"{major}{minor}"
        for word in (digits, arch.removeprefix("sm_"), f"sm_{digits}", arch, f"{major}.{minor}"):
            found[word] = arch
    return found


_SPELLINGS = _spellings()


def check_arch(text: str) -> str:
    """Return the architecture that a user means.

    Parameters
    ----------
    text : str
        "sm_90a", "sm_90", "90a", "90" or "9.0", in any case.

    Raises
    ------
    InvalidArgumentError
        It is none of `ARCHITECTURES`.

    Examples
    --------
    >>> check_arch("SM_90"), check_arch("8.9")
    ('sm_90a', 'sm_89')
    """
    arch = _SPELLINGS.get(text.strip().lower()) if isinstance(text, str) else None
    if arch is None:
        raise InvalidArgumentError(
            f"unknown architecture {shown(text)}; allowed are {', '.join(ARCHITECTURES)} (sm_90, "
            '90a and 9.0 mean sm_90a). "cusparge doctor" tells those of the GPUs in this machine.'
        )
    return arch


def family_of(arch: str) -> str:
    """Return which kernel of attention an architecture runs.

    The families are named after the instructions, because GPUs of one generation need different
    kernels: Blackwell's sm_120 multiplies e4m3 by mma.sync as Ada does, while sm_100 would need
    tensor memory for it and falls back to the f16 product of Ampere.

    Parameters
    ----------
    arch : str
        One of `ARCHITECTURES`.

    Returns
    -------
    str
        "mma_f16" (mma.sync, P·V in f16), "mma_e4m3" (mma.sync, P·V in e4m3) or "wgmma_e4m3"
        (warpgroups, P·V in e4m3).

    Examples
    --------
    >>> family_of("sm_90a"), family_of("sm_100a"), family_of("sm_120a")
    ('wgmma_e4m3', 'mma_f16', 'mma_e4m3')
    """
    arch = check_arch(arch)
    if arch == "sm_90a":
        return "wgmma_e4m3"
    return "mma_e4m3" if arch in _MMA_E4M3 else "mma_f16"


# --- What needs CuPy -----------------------------------------------------------------------------

_cupy: Any = None
#: Devices that passed `require_device`, and their capabilities.
_usable: dict[int, tuple[int, int]] = {}


def cupy_packages() -> dict[str, str]:
    """Return the installed packages that hold CuPy, and their versions; nothing is imported."""
    from importlib import metadata  # brings many modules, and `import cusparge` comes by here

    found = {}
    for name in CUPY_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def extra_advice() -> str:
    """Return which packages to install for the driver that is loaded."""
    cuda = driver_cuda_version()
    if cuda is not None and cuda >= (13, 0):
        return f"pip install 'cusparge[cuda13]' (the driver runs CUDA {cuda[0]}.{cuda[1]})"
    if cuda is not None and cuda[0] == 12:
        return f"pip install 'cusparge[cuda12]' (the driver runs CUDA {cuda[0]}.{cuda[1]})"
    return (
        "pip install 'cusparge[cuda13]' for a driver of version 580 or later, or "
        "pip install 'cusparge[cuda12]' for one of 525 or later"
    )


def require_cupy() -> Any:
    """Return the module `cupy`.

    Raises
    ------
    DeviceError
        It is not installed, or it cannot be imported.
    """
    global _cupy
    if _cupy is not None:
        return _cupy
    packages = cupy_packages()
    if len(packages) > 1:
        warnings.warn(
            f"several packages of CuPy are installed, which overwrite each other: "
            f"{', '.join(packages)}. Mend it: pip uninstall {' '.join(packages)}, then "
            f"{extra_advice()}.",
            RuntimeWarning,
            stacklevel=2,
        )
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            raise DeviceError(
                f"CUDA arrays need CuPy, which is not installed: {extra_advice()}."
            ) from None
        raise _broken_cupy(packages, error) from error
    except Exception as error:  # a broken wheel may raise anything
        raise _broken_cupy(packages, error) from error
    _cupy = cupy
    return cupy


def _broken_cupy(packages: dict[str, str], error: Exception) -> DeviceError:
    names = ", ".join(f"{name} {version}" for name, version in packages.items()) or "cupy"
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 500 else f"{reason[:500]}..."
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        # Importing CuPy makes a folder in the home folder.
        return DeviceError(
            f"CuPy ({names}) cannot make the folder of its own cache: {reason}. Set "
            "CUPY_CACHE_DIR to a folder that can be written to, and CUSPARGE_CACHE_DIR likewise."
        )
    return DeviceError(
        f"CuPy is installed ({names}) but cannot be imported: {type(error).__name__}: {reason}. "
        f"Reinstall it: pip uninstall {' '.join(packages) or 'cupy'}, then {extra_advice()}."
    )


def require_device(index: int) -> tuple[int, int]:
    """Return the compute capability of a device that cusparge can use.

    The first success is remembered for each device; later calls cost one look-up.

    Parameters
    ----------
    index : int
        CUDA's index.

    Raises
    ------
    DeviceError
        CuPy, the driver or the device is missing, too old, or not accessible.
    """
    capability = _usable.get(index)
    if capability is None:
        capability = _usable[index] = _check_device(require_cupy().cuda.runtime, index)
    return capability


def _check_device(runtime: Any, index: int) -> tuple[int, int]:
    # Without a driver CuPy reports "insufficient driver" as well, so the driver is asked first.
    driver = int(runtime.driverGetVersion())
    if driver == 0:
        raise DeviceError(
            "no NVIDIA driver was found, and so no GPU: install the driver (CUDA 13 needs 580 or "
            f"later, CUDA 12 needs 525 or later), or {_HOST_ARRAYS}."
        )
    try:
        count = int(runtime.getDeviceCount())
        if not 0 <= index < count:
            raise _out_of_range(index, count)
        capability = (
            int(runtime.deviceGetAttribute(_CAPABILITY_MAJOR, index)),
            int(runtime.deviceGetAttribute(_CAPABILITY_MINOR, index)),
        )
    except DeviceError:
        raise
    except RuntimeError as error:  # CuPy's CUDARuntimeError is one
        status = getattr(error, "status", None)
        if status == _INSUFFICIENT_DRIVER:
            raise _old_driver(runtime, driver) from error
        if status == _NO_DEVICE:
            raise _out_of_range(index, 0) from error
        raise DeviceError(
            f"the GPU with index {index} cannot be used; CUDA says: {error}. Check that this user "
            f"may open it (and, for a MIG instance, that it exists), or {_HOST_ARRAYS}."
        ) from error
    try:
        arch_of(capability)
    except DeviceError as error:
        raise DeviceError(f"the GPU with index {index} cannot be used: {error}") from None
    return capability


def _old_driver(runtime: Any, driver: int) -> DeviceError:
    needed = _cuda_version(int(runtime.runtimeGetVersion()))
    have = _cuda_version(driver)
    least = "580" if needed[0] >= 13 else "525"
    choice = f"update the driver to {least} or later"
    if have[0] == 12 and needed[0] >= 13:
        installed = " ".join(cupy_packages()) or "cupy"
        choice += f", or pip uninstall {installed} and pip install 'cusparge[cuda12]'"
    version = driver_version()
    named = "the NVIDIA driver" + (f" {version}" if version else "")
    return DeviceError(
        f"{named} is too old for the installed CuPy: it runs CUDA {have[0]}.{have[1]}, and CuPy is "
        f"built for CUDA {needed[0]}.{needed[1]}. Mend it: {choice}."
    )


def _out_of_range(index: int, count: int) -> DeviceError:
    if count == 0:
        text = "CUDA shows no GPU to this process"
    else:
        allowed = "0" if count == 1 else f"0 to {count - 1}"
        text = f"there is no GPU with index {index}: CUDA shows {count}, index {allowed}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        text += f". CUDA_VISIBLE_DEVICES={visible!r} may hide it: unset it or name the GPU there"
    elif count == 0:
        text += f". Check that the GPU works (nvidia-smi), or {_HOST_ARRAYS}"
    return DeviceError(f"{text}.")
