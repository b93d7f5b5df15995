"""What `doctor` looks at for GPUs: driver, devices, CuPy and settings; see also `toolchain`.

Nothing is compiled, and no CUDA context is created. CuPy is imported by a process of its own, and
only where there is a GPU.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cusparge._cuda import devices
from cusparge.errors import CuspargeError, DeviceError, InvalidArgumentError

__all__ = [
    "GPU_ATTENTION",
    "Findings",
    "check_cupy",
    "check_devices",
    "check_environment",
    "find_gpu",
    "has_cupy",
    "import_cupy",
    "major",
]

#: Whether attention runs on CUDA arrays. So far one kernel of stage 1, pooling, exists and no
#: attention kernel: such arrays are refused.
GPU_ATTENTION = False
_NO_ATTENTION = "this version of cusparge has no attention kernel for GPUs yet"

_PROC_GPUS = Path("/proc/driver/nvidia/gpus")

#: Every variable that the library reads.
_VARIABLES = (
    "CUSPARGE_CACHE_DIR",
    "CUSPARGE_CACHE_LIMIT",
    "CUSPARGE_CACHE_SEED",
    "CUSPARGE_COMPILE",
    "CUSPARGE_DEBUG",
    "CUSPARGE_KERNELS",
    "CUSPARGE_LINEINFO",
    "CUSPARGE_NUM_THREADS",
    "CUSPARGE_NVRTC",
    "CUSPARGE_QUIET",
)
_OF_TESTS = ("CUSPARGE_TEST_", "CUSPARGE_CI_", "CUSPARGE_EXPECT_")


class Findings:
    """What is wrong, each with how to mend it and which devices it makes unusable."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    def add(
        self, problem: str, mend: str, *, blocks: Sequence[dict[str, Any]] = (), why: str = ""
    ) -> None:
        """Add a finding; `why` is what the devices that it blocks say, in few words."""
        self.items.append({"problem": problem, "mend": mend})
        for device in blocks:
            device["usable"] = False
            device["problems"].append(why or problem)


# --- GPUs ----------------------------------------------------------------------------------------


def find_gpu() -> dict[str, Any]:
    """Return the driver and the GPUs that this process may use, as far as they tell."""
    cuda, driver = devices.driver_cuda_version(), devices.driver_version()
    listed = devices.list_gpus()
    found: dict[str, Any] = {
        "driver": driver,
        "driver_cuda": None if cuda is None else f"{cuda[0]}.{cuda[1]}",
        "nvidia_smi": shutil.which("nvidia-smi") is not None,
        "hidden": 0,
        "devices": [],
    }
    count = devices.count_gpus()
    if count is None:
        found["devices"] = _from_proc(driver)
        return found
    found["devices"] = [
        _device(gpu.name, gpu.index, gpu.capability, gpu.memory_bytes) for gpu in listed
    ]
    missing = max(0, count - len(listed))
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        found["hidden"] = missing
    else:
        found["devices"] += [_device("NVIDIA GPU") for _ in range(missing)]
    return found


def _device(
    name: str,
    index: int | None = None,
    capability: tuple[int, int] | None = None,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    arch = None
    if capability is not None:
        try:
            arch = devices.arch_of(capability)
        except DeviceError:  # `check_devices` tells
            arch = None
    return {
        "index": index,
        "name": name,
        "capability": None if capability is None else "{}.{}".format(*capability),
        "memory_bytes": memory_bytes,
        "arch": arch,
        "family": None if arch is None else devices.family_of(arch),
        "usable": True,
        "problems": [],
    }


def _from_proc(driver: str | None) -> list[dict[str, Any]]:
    """Return the GPUs that the kernel's driver tells of, where its library does not answer."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return []
    found: list[dict[str, Any]] = []
    try:
        entries = sorted(_PROC_GPUS.iterdir())
    except OSError:
        entries = []
    for entry in entries:
        try:
            text = (entry / "information").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        names = [line[6:].strip() for line in text.splitlines() if line.startswith("Model:")]
        found += map(_device, names)
    if not found and driver is not None:
        found.append(_device("NVIDIA GPU"))
    return found


def check_devices(gpu: dict[str, Any], findings: Findings) -> None:
    """Find what the devices themselves and their driver lack."""
    silent = [device for device in gpu["devices"] if device["capability"] is None]
    if silent:
        findings.add(
            "the driver knows of a GPU that this process cannot ask for anything",
            "check nvidia-smi and the permissions of /dev/nvidia*; start a container with its GPUs "
            "(docker run --gpus all)",
            blocks=silent,
            why="does not answer",
        )
    for device in gpu["devices"]:
        if device["capability"] is not None and device["arch"] is None:
            why = f"compute capability {device['capability']} is not supported"
            newer = "" if major(device["capability"]) < 8 else "a newer version of cusparge, "
            findings.add(
                f"GPU {device['index']}, {device['name']}, cannot be used: {why}",
                f"use {newer}a GPU that kernels exist for (Ampere, Ada, Hopper, Blackwell), or "
                "host arrays",
                blocks=[device],
                why=why,
            )
    if not gpu["devices"] and gpu["nvidia_smi"] and gpu["driver"] is None:
        findings.add(
            "nvidia-smi is installed, but no NVIDIA driver is loaded",
            "nothing is needed for the CPU; for a GPU, load the driver (580 or later for CUDA 13, "
            "525 or later for CUDA 12)",
        )
    if gpu["devices"] and not GPU_ATTENTION:
        findings.add(
            f"an NVIDIA GPU was found, and {_NO_ATTENTION}: attention on CUDA arrays is refused",
            "keep the arrays in host memory; attention runs on the CPU",
            blocks=gpu["devices"],
            why="no attention kernel yet",
        )


# --- CuPy ----------------------------------------------------------------------------------------

_IMPORT = (
    "import cupy; runtime = cupy.cuda.runtime; print(cupy.__version__, runtime.runtimeGetVersion())"
)


def has_cupy() -> bool:
    """Return whether there is a module of that name; it is not imported."""
    try:
        return importlib.util.find_spec("cupy") is not None
    except (ImportError, ValueError):  # a module without a specification
        return "cupy" in sys.modules


def import_cupy() -> dict[str, Any]:
    """Return what CuPy says about itself, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _IMPORT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return {"version": None, "cuda": None, "error": f"it could not be tried: {error}"}
    words = (done.stdout.strip().splitlines() or [""])[-1].split()
    if done.returncode == 0 and len(words) == 2 and words[1].isdecimal():
        number = int(words[1])
        cuda = f"{number // 1000}.{number % 1000 // 10}"
        return {"version": words[0], "cuda": cuda, "error": None}
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # The last line that names the exception: CuPy puts pages of advice behind it.
    named = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    text = (named or lines or [f"ended with status {done.returncode}"])[-1]
    return {"version": None, "cuda": None, "error": text[:300]}


def check_cupy(
    gpu: dict[str, Any],
    packages: dict[str, str],
    tried: dict[str, Any] | None,
    findings: Findings,
) -> None:
    """Find what is wrong with CuPy; where there is no GPU, it need not be there."""
    advice = devices.extra_advice()
    if len(packages) > 1:
        findings.add(
            "several packages of CuPy are installed, which overwrite each other: "
            + ", ".join(packages),
            f"pip uninstall {' '.join(packages)}, then {advice}",
        )
    if not gpu["devices"]:
        return
    if tried is None:
        findings.add(
            "CuPy is not installed, which kernels are loaded with",
            advice,
            blocks=gpu["devices"],
            why="CuPy is not installed",
        )
    elif tried["error"] is not None:
        names = " ".join(packages) or "cupy"
        mend = f"pip uninstall {names}, then {advice}"
        if tried["error"].startswith(("PermissionError", "OSError: [Errno 30]")):
            # Importing CuPy makes a folder in the home folder.
            mend = "set CUPY_CACHE_DIR to a folder that can be written to"
        findings.add(
            f"CuPy is installed but cannot be imported: {tried['error']}",
            mend,
            blocks=gpu["devices"],
            why="CuPy cannot be imported",
        )
    elif gpu["driver_cuda"] and major(tried["cuda"]) > major(gpu["driver_cuda"]):
        least = "580" if major(tried["cuda"]) >= 13 else "525"
        findings.add(
            f"the driver {gpu['driver'] or ''} is too old for CuPy: it runs CUDA "
            f"{gpu['driver_cuda']}, and CuPy is built for CUDA {tried['cuda']}",
            f"update the driver to {least} or later, or {advice}",
            blocks=gpu["devices"],
            why="the driver is too old for CuPy",
        )


def major(version: str) -> int:
    """Return the first number of a version."""
    return int(version.partition(".")[0])


# --- Settings ------------------------------------------------------------------------------------


def check_environment(findings: Findings) -> None:
    """Find settings that mean nothing."""
    from cusparge._cuda import cache, modes

    for name, read in (("CUSPARGE_COMPILE", modes.mode), ("CUSPARGE_CACHE_LIMIT", cache.limit)):
        try:
            read()
        except InvalidArgumentError as error:
            findings.add(str(error), f"unset {name}, or set one of what is allowed")
    for name in ("CUSPARGE_DEBUG", "CUSPARGE_LINEINFO", "CUSPARGE_QUIET"):
        value = os.environ.get(name, "")
        if value not in ("", "0", "1"):
            findings.add(f"{name}={value[:100]} is read as 1", f"set {name} to 0 or 1")
    for seed in filter(None, os.environ.get("CUSPARGE_CACHE_SEED", "").split(os.pathsep)):
        folder = Path(os.path.abspath(os.path.expanduser(seed)))
        try:
            empty = not cache.Cache(folder, read_only=True).entries()
        except (OSError, CuspargeError):
            empty = True
        if empty:
            findings.add(
                f"CUSPARGE_CACHE_SEED names {seed}, which holds no compiled kernels",
                'name folders that "cusparge compile --out DIR" wrote, separated by '
                f'"{os.pathsep}", or unset it',
            )
    for name in sorted(os.environ):
        if not name.startswith("CUSPARGE_") or name in _VARIABLES or name.startswith(_OF_TESTS):
            continue
        close = difflib.get_close_matches(name, _VARIABLES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        findings.add(
            f"{name} is set, and cusparge knows no such variable",
            f"{hint}unset it; known are {', '.join(_VARIABLES)}",
        )
