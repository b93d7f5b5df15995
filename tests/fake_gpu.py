"""Stand-ins for what a machine with GPUs has: NVML, compiled from C, and CuPy's CUDA runtime."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")


def compile_nvml(folder):
    """Return the path of the stand-in for NVML, or skip the test."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform == "win32":
        pytest.skip("needs a C compiler")
    path = Path(folder) / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", path, SOURCE]
    subprocess.run(command, check=True, timeout=60)
    return path


def use_nvml(monkeypatch, path):
    """Let `cusparge._cuda.nvml` load that library, and return it."""
    from cusparge._cuda import nvml

    for name in ("GPUS", "FAIL", "CUDA", "DRIVER"):
        monkeypatch.delenv(f"FAKE_NVML_{name}", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvml, "_library_names", lambda: [str(path)])
    return ctypes.CDLL(str(path))


class CudaError(RuntimeError):
    """As CuPy's CUDARuntimeError: a status and a text."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Runtime:
    """`cupy.cuda.runtime` of a machine with GPUs of the given capabilities."""

    def __init__(self, *capabilities, driver=13000, built_for=13000, error=None):
        self.capabilities = capabilities
        self.driver, self.built_for, self.error = driver, built_for, error
        self.calls = 0

    def driverGetVersion(self):
        self.calls += 1
        return self.driver

    def runtimeGetVersion(self):
        return self.built_for

    def getDeviceCount(self):
        if self.error is not None:
            raise self.error
        if not self.capabilities:
            raise CudaError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
        return len(self.capabilities)

    def deviceGetAttribute(self, attribute, index):
        return self.capabilities[index][{75: 0, 76: 1}[attribute]]


def use_cupy(monkeypatch, runtime):
    """Let `cusparge._cuda.devices` find a CuPy with that runtime."""
    from cusparge._cuda import devices

    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(devices, "_cupy", cupy)
    monkeypatch.setattr(devices, "_usable", {})
    return cupy
