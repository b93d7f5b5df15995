"""Facts about a machine with a GPU, for `gpu_run.py`.

python benchmarks/gpu_facts.py environment -o environment.json
python benchmarks/gpu_facts.py compile -o compile.json      # every kernel for the first GPU
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_run import ROOT, source_state, write_json

sys.path.insert(0, str(ROOT / "tools"))
import kernel_budget  # of the standard library alone

#: What nvidia-smi is asked for.
QUERY = (
    "name", "driver_version", "memory.total", "power.limit", "power.draw", "temperature.gpu",
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "persistence_mode",
    "mig.mode.current", "compute_mode", "ecc.mode.current", "pstate",
)  # fmt: skip


def ask_driver() -> list[dict[str, str]] | str:
    """Return what nvidia-smi says of each GPU, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi gives no answer ({type(error).__name__})"
    rows = [row.split(", ") for row in done.stdout.strip().splitlines()]
    if not rows:
        return "nvidia-smi lists no GPU"
    return [dict(zip(QUERY, map(str.strip, row), strict=False)) for row in rows]


def clocks() -> str:
    """Return the clocks of the first GPU now, in words."""
    found = ask_driver()
    if isinstance(found, str):
        return found
    return f"SM {found[0].get('clocks.sm')}, memory {found[0].get('clocks.mem')}"


def version_of(name: str) -> str:
    """Return a module's version, or why it cannot be imported."""
    try:
        return str(getattr(importlib.import_module(name), "__version__", "unknown"))
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"broken: {error}"
    except Exception as error:  # whatever a broken package raises
        return f"broken: {type(error).__name__}: {str(error).splitlines()[:1]}"


def environment() -> dict[str, Any]:
    """Return versions, and what the driver and CUDA say of the GPUs."""
    found: dict[str, Any] = {"smi": ask_driver(), **source_state()}
    names = ("numpy", "cupy", "torch", "jax", "jaxlib", "triton", "ml_dtypes", "pytest")
    found["versions"] = {name: version_of(name) for name in names}
    with contextlib.suppress(Exception):
        import torch

        found["torch_cuda"] = str(torch.version.cuda)
        found["cudnn"] = torch.backends.cudnn.version()
    try:
        from cusparge._cuda import devices, nvrtc
        from cusparge.cli.measure import machine

        found["machine"] = machine()
        found["driver"] = devices.driver_version()
        found["driver_cuda"] = devices.driver_cuda_version()
        found["gpus"] = [vars(gpu) | {"uuid": None} for gpu in devices.list_gpus()]
        compiler = nvrtc.load()
        found["nvrtc"] = ".".join(map(str, compiler.version))
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    try:
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(0)
        kept = ("name", "multiProcessorCount", "l2CacheSize", "totalGlobalMem", "major", "minor")
        values = {name: properties[name] for name in kept}
        found["device"] = {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}
        found["cuda_runtime"] = cupy.cuda.runtime.runtimeGetVersion()
    except Exception as error:
        found["device"] = f"{type(error).__name__}: {error}"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    smi = found["smi"]
    found["summary"] = [
        smi if isinstance(smi, str) else ", ".join(map(str, smi[0].values())),
        f"{versions}, NVRTC {found.get('nvrtc')}, driver CUDA {found.get('driver_cuda')}",
        *([found["error"]] if "error" in found else []),
    ]
    return found


def compile_all() -> dict[str, Any]:
    """Compile every kernel for the first GPU; return time, registers and spills of each."""
    from cusparge._cuda import build, devices, variants
    from cusparge.cli.measure import cores
    from cusparge.errors import CompileError

    gpus = devices.list_gpus()
    if not gpus:
        return {"skipped": "the driver's management library lists no GPU"}
    return compile_for(devices.arch_of(gpus[0].capability), build, variants, CompileError, cores())


def compile_for(arch: str, build: Any, variants: Any, failure: Any, cores: int) -> dict[str, Any]:
    """Compile every kernel for an architecture."""
    wanted = variants.all_variants(arch)
    budget = json.loads((ROOT / "kernels_cu" / "budget.json").read_text(encoding="utf-8"))
    begin = time.perf_counter()
    rows = []
    for variant, made in zip(wanted, build.try_all(wanted, arch), strict=True):
        row: dict[str, Any] = {"file": variant.file, "kernel": variant.expression}
        if isinstance(made, failure):
            row["error"] = str(made)
        else:
            names = ("compile_ms", "registers", "spill_bytes", "stack_bytes", "size", "nvrtc")
            row |= {name: getattr(made.info, name) for name in names}
            of_kernel = budget["kernels"].get(kernel_budget.name_of(variant), {})
            row["budget_registers"] = of_kernel.get(arch, [None])[0]
        rows.append(row)
    spent = time.perf_counter() - begin
    failed = [row for row in rows if "error" in row]
    spilling = [row for row in rows if row.get("spill_bytes", 0) > 0]
    summary = [f"{len(rows)} kernels for {arch} in {spent:.1f} s on {cores} cores"]
    summary += [f"FAILED {row['kernel']}: {row['error'].splitlines()[0]}" for row in failed]
    # Another version of NVRTC made the budget: more registers are worth a look, and no failure.
    summary += [
        f"{row['registers']} registers, where NVRTC {budget['nvrtc']} takes "
        f"{row['budget_registers']}: {row['kernel']}"
        for row in rows
        if grown(row, 1 + kernel_budget.TOLERANCE_ELSEWHERE)
    ]
    summary += [f"SPILLS {row['spill_bytes']} bytes: {row['kernel']}" for row in spilling]
    return {
        "arch": arch,
        "seconds": spent,
        "cores": cores,
        "kernels": rows,
        "failed": len(failed),
        "spilling": len(spilling),
        "summary": summary,
    }


def grown(row: dict[str, Any], factor: float) -> bool:
    """Tell whether a kernel has more registers than its budget, by more than a factor."""
    return bool(row.get("budget_registers")) and row["registers"] > factor * row["budget_registers"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("environment", "compile"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("CUSPARGE_COMPILE", "lazy")
    found = environment() if options.what == "environment" else compile_all()
    write_json(options.output, found)
    print(*found.get("summary", [found.get("skipped")]), sep="\n")
    wrong = "error" in found or found.get("failed") or found.get("spilling")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
