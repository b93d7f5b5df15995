"""``cusparge doctor``: what is installed, what would run, what is wrong and how to mend it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

import cusparge
from cusparge._cuda import devices
from cusparge._cuda.notices import short
from cusparge.cli import checks
from cusparge.cli.cache import amount
from cusparge.cli.checks import (
    Findings,
    check_cupy,
    check_devices,
    check_environment,
    find_gpu,
    has_cupy,
    import_cupy,
)
from cusparge.cli.measure import (
    clustered_inputs,
    machine,
    one_blas_thread,
    relative_l1,
    version_of,
)
from cusparge.cli.toolchain import check_layer, inspect_layer
from cusparge.cli.ui import Ui, table
from cusparge.errors import CuspargeError

__all__ = ["add_parser"]

EXAMPLES = """\
No framework is imported, nothing is compiled and no GPU is put to work to find out. Exit status: 0
where all is well or there is no GPU, 1 when the self-check fails or a GPU that was found cannot be
used, as is the case for every GPU today: no attention kernel for them exists yet.

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
    "cuda-pathfinder",
)

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


def check_cpu(findings: Findings) -> None:
    """Find what slows or stops the CPU backend."""
    if version_of("threadpoolctl") is None:
        findings.add(
            "threadpoolctl is not installed: BLAS may start threads of its own inside cusparge's, "
            "which makes them several times slower",
            "pip install threadpoolctl, or set OPENBLAS_NUM_THREADS=1",
        )
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(name)
        if value is not None:
            findings.add(
                f"{name}={value} is set: it limits NumPy's own products, and torch's, but not the "
                "threads of cusparge",
                f"unset {name}, or set CUSPARGE_NUM_THREADS as well if cusparge is meant",
            )
    wanted = os.environ.get("CUSPARGE_NUM_THREADS")
    if wanted is not None and not (wanted.strip().isdecimal() and 1 <= int(wanted) <= 4096):
        findings.add(
            f"CUSPARGE_NUM_THREADS={wanted} is not a number of threads, and every call fails",
            "unset it, or set a number from 1 to 4096",
        )


def self_check() -> dict[str, Any]:
    """Compare dense and sparse attention over 256 tokens with the reference."""
    arrays = clustered_inputs(
        np.random.default_rng(0), batch=1, heads=2, tokens=256, head_dim=64, sparsity=0.5
    )
    result: dict[str, Any] = {"ok": True, "tolerance": _TOLERANCE, "errors": {}, "message": None}
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
            result["errors"][name] = error
            if not error <= _TOLERANCE:  # NaN fails as well
                result["ok"] = False
                result["message"] = f"{name} attention differs from the reference: {error:.1e}"
    except CuspargeError as error:
        result["ok"] = False
        result["message"] = str(error)
    return result


def execute(args: argparse.Namespace, ui: Ui) -> int:
    """Run the command."""
    gpu = find_gpu()
    packages = devices.cupy_packages()
    cupy = import_cupy() if gpu["devices"] and has_cupy() else None
    architectures = dict.fromkeys(device["arch"] for device in gpu["devices"] if device["arch"])
    layer = inspect_layer(list(architectures))
    tested = self_check()
    findings = Findings()
    check_cpu(findings)
    check_devices(gpu, findings)
    check_cupy(gpu, packages, cupy, findings)
    check_layer(gpu, layer, findings)
    check_environment(findings)
    usable = [device for device in gpu["devices"] if device["usable"]]
    record = {
        "command": "doctor",
        "machine": machine(),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": short(sys.executable) if sys.executable else None,
        },
        "location": short(os.path.abspath(Path(cusparge.__file__).parent)),
        "packages": {name: version_of(name) for name in _PACKAGES} | {"cupy": packages or None},
        "gpu": gpu,
        "cupy": cupy,
        **layer,
        "backends": {"cpu": True, "cuda": bool(usable), "reference": True},
        "would_run": "cuda" if usable else "cpu",
        "warnings": findings.items,
        "self_check": tested,
    }
    ok = bool(tested["ok"]) and len(usable) == len(gpu["devices"])
    ui.result(record | {"ok": ok})
    if not ui.as_json:
        _show(ui, record)
    return 0 if ok else 1


def _show(ui: Ui, record: dict[str, Any]) -> None:
    about, packages = record["machine"], record["packages"]
    ui.show(f"cusparge  {about['cusparge']} in {record['location']}")
    ui.show(f"python    {record['python']['version']}, {record['python']['executable']}")
    ui.show(f"system    {about['system']}")
    ui.show(f"cpu       {about['cpu']}, {about['cores']} cores, {about['threads']} threads used")
    ui.show(f"blas      {about['blas']}")
    _show_gpu(ui, record)
    rows = [
        (name, version or "not installed") for name, version in packages.items() if name != "cupy"
    ]
    rows += list((packages["cupy"] or {}).items()) or [("cupy", "not installed")]
    ui.show(table("packages", ("package", "version"), rows, words=2))
    for warning in record["warnings"]:
        ui.show(f"warning: {warning['problem']}", f"  to mend it: {warning['mend']}")
    if not record["warnings"]:
        ui.show("no warnings")
    tested = record["self_check"]
    if tested["ok"]:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in tested["errors"].items())
        ui.show(f"self-check passed: error against the float64 reference {errors}")
    else:
        ui.show(f"self-check FAILED: {tested['message']}")


def _show_gpu(ui: Ui, record: dict[str, Any]) -> None:
    gpu, compiler, text, store = (record[key] for key in ("gpu", "nvrtc", "sources", "cache"))
    hidden = f" ({gpu['hidden']} hidden by CUDA_VISIBLE_DEVICES)" if gpu["hidden"] else ""
    for device in gpu["devices"]:
        words = [device["name"]]
        if device["capability"] is not None:
            words.append(f"compute capability {device['capability']}")
        if device["arch"] is not None:
            words.append(f"{device['arch']} ({device['family']})")
        if device["memory_bytes"] is not None:
            words.append(amount(device["memory_bytes"]))
        number = "" if device["index"] is None else f"{device['index']}: "
        state = "usable" if device["usable"] else f"NOT usable: {'; '.join(device['problems'])}"
        ui.show(f"gpu       {number}{', '.join(words)}; {state}")
    if not gpu["devices"] or hidden:
        ui.show(f"gpu       {'others' if gpu['devices'] else 'none found'}{hidden}")
    runs = f", runs CUDA {gpu['driver_cuda']}" if gpu["driver_cuda"] else ""
    ui.show(f"driver    {gpu['driver'] or 'no NVIDIA driver loaded'}{runs}")
    if record["cupy"] is not None:
        tried = record["cupy"]
        state = tried["error"] or f"{tried['version']}, built for CUDA {tried['cuda']}"
        ui.show(f"cupy      {state}")
    if compiler["error"] is None:
        ui.show(f"nvrtc     {compiler['version']}, {compiler['path']}")
    else:
        ui.show("nvrtc     not usable; it is needed for GPUs only")
    if text["error"] is None:
        ui.show(f"kernels   {text['files']} source files, id {text['id']}, {text['folder']}")
    if store["folder"] is None:
        ui.show(f"cache     none: {store['error']}")
    else:
        state = "writable" if store["writable"] else "NOT writable"
        size = amount(store["bytes"])
        ui.show(f"cache     {store['kernels']} kernels, {size}, {store['folder']}, {state}")
    for row in record["kernels"]:
        left = row["needed"] - row["cached"]
        ui.show(
            f"compile   {row['arch']}: a first call needs {row['needed']} kernels, "
            f"{row['cached']} are there, {left} to compile"
        )
    if record["would_run"] == "cuda":
        ui.show("runs on   the GPU for CUDA arrays, the CPU for host arrays", "")
    elif checks.GPU_ATTENTION:
        ui.show("runs on   the CPU", "")
    else:
        ui.show(
            "runs on   the CPU; there is no attention kernel for GPUs yet, and attention on CUDA "
            "arrays is refused",
            "",
        )
