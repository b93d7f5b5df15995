"""Measure what the runtime costs beside the kernels: compiling, loading, importing, queuing.

    python benchmarks/bench_runtime.py                 # about two minutes on two cores
    python benchmarks/bench_runtime.py --repeats 3 --arch sm_90a -o other.json

Needs NVRTC, cupy and torch, and no GPU. What cannot be had without one is left out or a stand-in,
and said to be so in the result ("stands_in", "left_out"). Everything that is compiled or loaded is
measured in fresh processes, which take turns: whatever disturbs the machine for a while disturbs
all of them. The result goes to ``benchmarks/results/runtime.json``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_run import ROOT, outcome, source_state, write_json

RESULT = ROOT / "benchmarks" / "results" / "runtime.json"

#: What a user should not have to wait longer for.
TARGETS = {"cold_seconds": 5.0, "warm_ms": 100.0, "overhead_us": 25.0}

#: A first call's kernels, from nothing to files; the library NVRTC is opened within.
COLD = """
import time
import cusparge
from cusparge._cuda import build, variants
arch, jobs = {arch!r}, {jobs}
begin = time.perf_counter()
made = build.build_all(variants.default_variants(arch), arch, jobs=jobs)
seconds = time.perf_counter() - begin
print(seconds, len(made), sum(one.info.compile_ms for one in made) / 1e3,
      max(one.info.compile_ms for one in made) / 1e3)
"""

#: The same kernels once more: found on disk and checked, then handed to cupy, and to the driver if
#: it has a GPU for them.
WARM = """
import time
import cupy, cusparge
from cusparge._cuda import build, devices, variants
arch = {arch!r}
gpus = [gpu for gpu in devices.list_gpus() if devices.arch_of(gpu.capability) == arch]
if gpus:  # its context takes longer than everything else here
    cupy.cuda.Device(gpus[0].index).use()
    cupy.cuda.runtime.free(0)
begin = time.perf_counter()
made = [build.peek(variant, arch) for variant in variants.default_variants(arch)]
found = time.perf_counter()
if None in made:
    raise SystemExit("a kernel is not in the cache: its source or NVRTC has changed meanwhile")
modules = [cupy.RawModule(path=str(one.path)) for one in made]
handed = time.perf_counter()
for module, one in zip(modules, made) if gpus else ():
    module.get_function(one.lowered).kernel
loaded = time.perf_counter()
print(1e3 * (found - begin), 1e3 * (handed - found), len(made), 1e3 * (loaded - handed), len(gpus))
"""

#: An import in a process that has loaded NumPy, which cusparge needs anyway.
IMPORT = """
import time
import numpy
begin = time.perf_counter()
{statement}
print(1e3 * (time.perf_counter() - begin))
"""
IMPORTS = {
    "cusparge_lazy": ("import cusparge", "lazy"),
    "cusparge_background": ("import cusparge", "background"),
    "nothing": ("", "lazy"),
    "cupy": ("import cupy", "lazy"),
}


def fresh(script: str, cache: Path, mode: str = "lazy") -> list[float]:
    """Run a script in a fresh process; return the numbers that it prints."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("CUSPARGE_")
    }
    environment |= {
        "CUSPARGE_CACHE_DIR": str(cache),
        "CUSPARGE_COMPILE": mode,
        "CUSPARGE_QUIET": "1",
        "PYTHONPATH": str(ROOT),
    }
    if "CUSPARGE_NVRTC" in os.environ:
        environment["CUSPARGE_NVRTC"] = os.environ["CUSPARGE_NVRTC"]
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        if said and said[0].startswith(("ImportError", "ModuleNotFoundError")):
            raise ImportError(said[0])
        # What a signal ends says nothing, or lists its modules; its name tells more.
        how = [f"a fresh process: {outcome(done.returncode)}"]
        raise RuntimeError((how if done.returncode < 0 or not said else said)[0])
    return [float(word) for word in done.stdout.split()]


def median(rows: list[list[float]], column: int) -> float:
    """Return the median of a column."""
    return statistics.median(row[column] for row in rows)


def compiling(archs: list[str], jobs: list[int], repeats: int, late: Callable[[], bool]) -> Any:
    """Measure a first call's compilation, for each architecture and number of threads."""
    rows: dict[tuple[str, int], list[list[float]]] = {(a, j): [] for a in archs for j in jobs}
    for _ in range(repeats):
        for (arch, threads), found in rows.items():
            if late():
                continue
            with tempfile.TemporaryDirectory() as cache:
                found.append(fresh(COLD.format(arch=arch, jobs=threads), Path(cache)))
    return [
        {
            "arch": arch,
            "threads": threads,
            "kernels": int(found[0][1]),
            "seconds_median": median(found, 0),
            "seconds_all": [row[0] for row in found],
            "sum_of_kernels_seconds": median(found, 2),
            "longest_kernel_seconds": median(found, 3),
        }
        for (arch, threads), found in rows.items()
        if found
    ]


def loading(archs: list[str], repeats: int, late: Callable[[], bool]) -> Any:
    """Measure what a process does with kernels that the cache on disk holds."""
    with tempfile.TemporaryDirectory() as cache:
        rows: dict[str, list[list[float]]] = {}
        for arch in archs:
            if not late():
                fresh(COLD.format(arch=arch, jobs=None), Path(cache))
                rows[arch] = []
        for number in range(repeats):
            for arch, found in rows.items():
                if number == 0 or not late():
                    found.append(fresh(WARM.format(arch=arch), Path(cache)))
    return [
        {
            "arch": arch,
            "kernels": int(found[0][2]),
            "find_and_check_ms_median": median(found, 0),
            "find_and_check_ms_all": [row[0] for row in found],
            "raw_module_ms_median": median(found, 1),
            "driver_ms_median": median(found, 3) if found[0][4] else None,
            "left_out": "cupy's import, CUDA's context"
            + ("" if found[0][4] else ", the driver's loading, which needs a GPU"),
        }
        for arch, found in rows.items()
    ]


def importing(repeats: int) -> Any:
    """Measure imports, beside one of nothing."""
    rows: dict[str, list[float]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory() as cache:
        for number in range(repeats + 1):
            for name, (statement, mode) in IMPORTS.items():
                (spent,) = fresh(IMPORT.format(statement=statement), Path(cache), mode)
                if number:  # the first one writes bytecode
                    rows[name].append(spent)
    return {
        name: {"ms_median": statistics.median(found), "ms_all": found}
        for name, found in rows.items()
    }


#: What is not real in `queuing`.
STAND_INS = [
    "tensors are in host memory and say that they are on a GPU",
    "torch's CPU allocator for its CUDA caching allocator",
    "a function that does nothing for cupy's launch",
    "constants for the current stream and the current device",
]


def queuing(repeats: int, calls: int = 2000) -> Any:
    """Measure the host's work in an eager call on torch tensors, with a stand-in for the GPU."""
    from types import SimpleNamespace
    from unittest import mock

    import torch

    from cusparge import stage1
    from cusparge._arrays import Device, DeviceArray
    from cusparge._arrays.torch import TorchAdapter
    from cusparge._cuda import devices, launch, module
    from cusparge.cli.measure import paired_times

    def nothing(grid: Any, block: Any, args: Any, shared_bytes: int, stream: Any) -> None:
        """Stand for the launch."""

    def view(adapter: Any, x: Any, name: str) -> DeviceArray:
        text = str(x.dtype).rpartition(".")[2]
        return DeviceArray(x.data_ptr(), tuple(x.shape), x.stride(), text, 0, x)

    def device(adapter: Any, x: Any) -> Device:
        return Device("cuda", 0)

    def stream(index: int) -> int:
        return 0

    runtime = SimpleNamespace(getDevice=lambda: 0)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", stream, create=True),
        mock.patch.object(TorchAdapter, "device", device),
        mock.patch.object(stage1, "require_device", return_value=(9, 0)),
        mock.patch.object(TorchAdapter, "view", view),
        mock.patch.object(devices, "_cupy", cupy),
        mock.patch.object(module, "_functions", {}),
        mock.patch.object(stage1, "_known", {}),
    ):
        x = torch.ones(1, 2, 256, 64, dtype=torch.float16)
        rows = []
        for name, options in (("plain", {}), ("smooth", {"smooth": True})):
            plan = _plan_of(x, **options)
            for one in plan.launches:
                module._functions[0, one.variant] = nothing
            shapes = [(one.shape, torch.float32) for one in plan.outputs]
            if plan.workspace_bytes:
                shapes.append(((plan.workspace_bytes,), torch.uint8))
            addresses = dict.fromkeys(("x", "lengths", "workspace"), 0)
            addresses |= {one.name: 0 for one in plan.outputs}

            def repeat(function: Callable[[], object]) -> Callable[[], object]:
                def run() -> None:
                    for _ in range(calls):
                        function()

                return run

            def allocate(shapes: Any = shapes) -> None:
                for shape, dtype in shapes:
                    torch.empty(shape, dtype=dtype, device=x.device)

            times = paired_times(
                {
                    "call": repeat(lambda o=options: stage1.pool_blocks(x, **o)),
                    "run": repeat(lambda p=plan, a=addresses: launch.run(p, a, device=0, stream=0)),
                    "allocations": repeat(allocate),
                },
                repeats=repeats,
                warmup=2,
            )
            scaled = {key: [1e6 * t / calls for t in found] for key, found in times.items()}
            rows.append(
                {
                    "call": f"pool_blocks, {name}",
                    "launches": len(plan.launches),
                    **{f"{key}_us_median": statistics.median(v) for key, v in scaled.items()},
                    "call_us_all": scaled["call"],
                    "stands_in": STAND_INS,
                }
            )
    return rows


def _plan_of(x: Any, **options: Any) -> Any:
    from cusparge._cuda.pooling import pool_plan

    name = str(x.dtype).rpartition(".")[2]
    return pool_plan(name, tuple(x.shape), x.stride()[:3], 64, options.get("smooth", False))


def summarise(report: dict[str, Any]) -> list[str]:
    """Return the results as lines, each with its target."""
    lines = []
    for row in report.get("compiling", []):
        lines.append(
            f"cold  {row['arch']:8} {row['kernels']} kernels, {row['threads']} threads: "
            f"{row['seconds_median']:.2f} s (target {TARGETS['cold_seconds']:g} s)"
        )
    for row in report.get("loading", []):
        driver = row["driver_ms_median"]
        lines.append(
            f"warm  {row['arch']:8} {row['kernels']} kernels: "
            f"{row['find_and_check_ms_median']:.1f} ms + RawModule "
            f"{row['raw_module_ms_median']:.2f} ms + driver "
            f"{'not measurable without a GPU' if driver is None else f'{driver:.1f} ms'} "
            f"(target {TARGETS['warm_ms']:g} ms)"
        )
    imports = {name: row["ms_median"] for name, row in report.get("importing", {}).items()}
    if imports:
        lines.append("import, ms: " + ", ".join(f"{n} {ms:.1f}" for n, ms in imports.items()))
    for row in report.get("queuing", []):
        lines.append(
            f"host  {row['call']}, {row['launches']} launches that do nothing: "
            f"{row['call_us_median']:.1f} us (target {TARGETS['overhead_us']:g} us), of which "
            f"allocations {row['allocations_us_median']:.1f}, queuing {row['run_us_median']:.1f}"
        )
    lines += [f"not measured: {text}" for text in report["not_measured"]]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--arch",
        nargs="+",
        help="architectures (default: of the GPUs here, else the six main ones)",
    )
    parser.add_argument("--threads", type=int, nargs="+", help="of compilation (default: 1, cores)")
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing after that")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ["CUSPARGE_COMPILE"] = "lazy"
    begin = time.monotonic()

    from cusparge._cuda import devices, nvrtc
    from cusparge.cli.measure import cores, machine, version_of
    from cusparge.errors import CompileError

    here = [gpu.capability for gpu in devices.list_gpus() if gpu.capability >= (8, 0)]
    archs = [devices.check_arch(text) for text in options.arch or ()]
    archs = archs or list(
        {devices.arch_of(one): None for one in here} or devices.MAIN_ARCHITECTURES
    )
    threads = options.threads or sorted({1, min(4, cores())})
    packages = {"cupy": "cupy-cuda13x", "pathfinder": "cuda-pathfinder", "torch": "torch"}
    report: dict[str, Any] = {
        "benchmark": "bench_runtime",
        **source_state(),
        "machine": machine(),
        "versions": {name: version_of(package) for name, package in packages.items()},
        "targets": TARGETS,
        "repeats": options.repeats,
        "not_measured": [],
    }
    try:
        report["versions"]["nvrtc"] = ".".join(map(str, nvrtc.load().version))
    except CompileError as error:
        reason = str(error).partition("\n")[0]
        report["not_measured"].append(f"loading and compiling: {reason}")

    def late() -> bool:
        return time.monotonic() - begin > options.seconds

    steps: dict[str, Callable[[], Any]] = {
        "queuing": lambda: queuing(3 * options.repeats),
        "importing": lambda: importing(options.repeats),
        "loading": lambda: loading(archs, options.repeats, late),
        "compiling": lambda: compiling(archs, threads, options.repeats, late),
    }
    if "nvrtc" not in report["versions"]:
        del steps["loading"], steps["compiling"]
    failed = False
    for name, step in steps.items():
        try:
            report[name] = step()
        except ImportError as error:  # a package is missing
            report["not_measured"].append(f"{name}: {error}")
        except Exception as error:  # keeps no other step from being measured
            failed = True
            report["not_measured"].append(f"FAILED {name}: {type(error).__name__}: {error}")
            traceback.print_exc()
        if name in ("loading", "compiling"):
            measured = {row["arch"] for row in report.get(name, [])}
            left = [arch for arch in archs if arch not in measured]
            if left and name in report:
                report["not_measured"].append(f"{name} for {', '.join(left)}: out of time")
        report["summary"] = summarise(report)
        write_json(options.output, report)
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print(*report["summary"], sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
