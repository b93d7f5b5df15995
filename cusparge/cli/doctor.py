"""``cusparge doctor``: what is installed, what would run, what is wrong and how to mend it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

import cusparge
from cusparge.cli.measure import (
    clustered_inputs,
    machine,
    one_blas_thread,
    relative_l1,
    version_of,
)
from cusparge.cli.ui import Ui, table
from cusparge.errors import CuspargeError

__all__ = ["add_parser"]

EXAMPLES = """\
No framework is imported and no GPU is touched to find out. Exit status: 0 where all is well or
there is no GPU, 1 when the self-check fails or a GPU that was found cannot be used.

examples:
  cusparge doctor
  cusparge doctor --json > report.json    to send along with a question
"""

_PACKAGES = (
    "numpy",
    "threadpoolctl",
    "rich",
    "safetensors",
    "matplotlib",
    "ml_dtypes",
    "torch",
    "jax",
    "jaxlib",
)

#: Wheels of one package, `cupy`, that overwrite each other's files.
_CUPY = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")

_DRIVER = Path("/proc/driver/nvidia")

#: float32 against the float64 reference: rounding stays near 2e-6, and what is broken far above.
_TOLERANCE = 1e-4


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="what is installed, and what is wrong",
        description="Tell what is installed, which device and driver there are, what would run, "
        "what is wrong and how to mend it; then check attention against the reference.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(execute=execute)


def short_path(path: str | os.PathLike[str]) -> str:
    """Return a path with the home folder as ~, since reports are passed on."""
    text = os.path.abspath(path)
    home = os.path.expanduser("~").rstrip(os.sep)
    if home and (text == home or text.startswith(home + os.sep)):
        return "~" + text[len(home) :]
    return text


def find_gpu(driver: Path = _DRIVER) -> dict[str, Any]:
    """Return what the NVIDIA driver says about itself, without using it."""
    version = None
    try:
        first = (driver / "version").read_text(encoding="utf-8", errors="replace").splitlines()[0]
        # "NVRM version: NVIDIA UNIX ... Module  580.65.06  Release Build ..."
        numbers = [word for word in first.split() if word[:1].isdigit() and "." in word]
        version = numbers[0] if numbers else first.strip()
    except (OSError, IndexError):
        pass
    devices = []
    try:
        entries = sorted((driver / "gpus").iterdir())
    except OSError:
        entries = []
    for entry in entries:
        try:
            lines = (entry / "information").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for line in lines.splitlines():
            if line.startswith("Model:"):
                devices.append({"name": line.split(":", 1)[1].strip(), "usable": False})
    if not devices and version is not None:
        devices.append({"name": "NVIDIA GPU", "usable": False})
    return {
        "driver": version,
        "nvidia_smi": shutil.which("nvidia-smi") is not None,
        "devices": devices,
    }


def find_warnings(gpu: dict[str, Any], cupy: dict[str, str]) -> list[dict[str, str]]:
    """Return what is wrong, each with how to mend it."""
    found = []

    def warn(problem: str, mend: str) -> None:
        found.append({"problem": problem, "mend": mend})

    if len(cupy) > 1:
        names = ", ".join(cupy)
        warn(
            f"several cupy packages are installed, which overwrite each other: {names}",
            f"pip uninstall {' '.join(cupy)}, then install the one for your driver",
        )
    if version_of("threadpoolctl") is None:
        warn(
            "threadpoolctl is not installed: BLAS may start threads of its own inside cusparge's, "
            "which makes them several times slower",
            "pip install threadpoolctl, or set OPENBLAS_NUM_THREADS=1",
        )
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(name)
        if value is not None:
            warn(
                f"{name}={value} is set: it limits NumPy's own products, and torch's, but not the "
                "threads of cusparge",
                f"unset {name}, or set CUSPARGE_NUM_THREADS as well if cusparge is meant",
            )
    wanted = os.environ.get("CUSPARGE_NUM_THREADS")
    if wanted is not None and not (wanted.strip().isdecimal() and 1 <= int(wanted) <= 4096):
        warn(
            f"CUSPARGE_NUM_THREADS={wanted} is not a number of threads, and every call fails",
            "unset it, or set a number from 1 to 4096",
        )
    if gpu["devices"]:
        warn(
            "an NVIDIA GPU was found, and this version of cusparge has no GPU backend yet: it "
            "runs on the CPU only",
            "keep the arrays in host memory",
        )
    elif gpu["nvidia_smi"]:
        warn(
            "nvidia-smi is installed, but no NVIDIA driver is loaded",
            "nothing is needed for the CPU; for a GPU, load the driver",
        )
    return found


def self_check() -> dict[str, Any]:
    """Compare dense and sparse attention over 256 tokens with the reference."""
    arrays = clustered_inputs(
        np.random.default_rng(0), batch=1, heads=2, tokens=256, head_dim=64, sparsity=0.5
    )
    checks: dict[str, Any] = {"ok": True, "tolerance": _TOLERANCE, "errors": {}, "message": None}
    policies: dict[str, cusparge.Policy] = {
        "dense": cusparge.Dense(quantize=False),
        "sparse": cusparge.TopCdf(0.9995, 0.5),
    }
    try:
        for name, policy in policies.items():
            out = cusparge.attention(*arrays, policy=policy)
            with one_blas_thread():
                expected = cusparge.attention(*arrays, policy=policy, backend="reference")
            error = float(relative_l1(out, expected))
            checks["errors"][name] = error
            if not error <= _TOLERANCE:  # NaN fails as well
                checks["ok"] = False
                checks["message"] = f"{name} attention differs from the reference: {error:.1e}"
    except CuspargeError as error:
        checks["ok"] = False
        checks["message"] = str(error)
    return checks


def execute(args: argparse.Namespace, ui: Ui) -> int:
    """Run the command."""
    cupy = {name: version for name in _CUPY if (version := version_of(name)) is not None}
    gpu = find_gpu()
    checks = self_check()
    unusable = [device for device in gpu["devices"] if not device["usable"]]
    record = {
        "command": "doctor",
        "machine": machine(),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": short_path(sys.executable) if sys.executable else None,
        },
        "location": short_path(Path(cusparge.__file__).parent),
        "packages": {name: version_of(name) for name in _PACKAGES} | {"cupy": cupy or None},
        "gpu": gpu,
        "backends": {"cpu": True, "cuda": False, "reference": True},
        "would_run": "cpu",
        "warnings": find_warnings(gpu, cupy),
        "self_check": checks,
    }
    ok = bool(checks["ok"]) and not unusable
    ui.result(record | {"ok": ok})
    if not ui.as_json:
        _show(ui, record)
    return 0 if ok else 1


def _show(ui: Ui, record: dict[str, Any]) -> None:
    about, packages, gpu = record["machine"], record["packages"], record["gpu"]
    cupy = packages["cupy"] or {}
    names = ", ".join(device["name"] for device in gpu["devices"])
    ui.show(f"cusparge  {about['cusparge']} in {record['location']}")
    ui.show(f"python    {record['python']['version']}, {record['python']['executable']}")
    ui.show(f"system    {about['system']}")
    ui.show(f"cpu       {about['cpu']}, {about['cores']} cores, {about['threads']} threads used")
    ui.show(f"blas      {about['blas']}")
    ui.show(f"gpu       {names or 'none found'}")
    ui.show(f"driver    {gpu['driver'] or 'no NVIDIA driver loaded'}")
    ui.show("runs on   the CPU; this version has no GPU backend yet", "")
    rows = [
        (name, version or "not installed") for name, version in packages.items() if name != "cupy"
    ]
    rows += list(cupy.items()) or [("cupy", "not installed")]
    ui.show(table("packages", ("package", "version"), rows, words=2))
    for warning in record["warnings"]:
        ui.show(f"warning: {warning['problem']}", f"  to mend it: {warning['mend']}")
    if not record["warnings"]:
        ui.show("no warnings")
    checks = record["self_check"]
    if checks["ok"]:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in checks["errors"].items())
        ui.show(f"self-check passed: error against the float64 reference {errors}")
    else:
        ui.show(f"self-check FAILED: {checks['message']}")
