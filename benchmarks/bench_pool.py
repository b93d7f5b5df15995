"""Measure the pooling kernels on a GPU: bytes a second against the fewest bytes they could move.

    python benchmarks/bench_pool.py                    # all sizes, about a minute
    python benchmarks/bench_pool.py --tokens 8192 --dtypes float16 -o other.json

The floor of a call is its input read once and its outputs written once; GB/s are floor bytes over
time, beside those of a plain copy on the same GPU (bytes read plus bytes written). Times are GPU
events around one call, medians; before each call a buffer of several times the L2 cache is
written, so that the input comes from memory. Values are random. Errors, against the CPU backend on
one head, stand beside the speeds. Host time is what queuing a call takes, where the GPU has next
to nothing to do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_run import ROOT, source_state, write_json

RESULT = ROOT / "benchmarks" / "results" / "pool.json"

DTYPES = ("float16", "bfloat16", "float32")
#: What stage 1 asks for: blocks of q, and of k with its mean taken off.
CALLS = (("q", 128, False), ("k", 64, True))
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
#: Elements of random values, repeated over an array.
TILE = 1 << 22


class Gpu:
    """The first GPU, through CuPy: memory, copies and a clock."""

    def __init__(self) -> None:
        import cupy

        cupy.cuda.runtime.getDeviceCount()  # raises where there is no driver
        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.name = properties["name"].decode()
        self.l2_bytes = int(properties["l2CacheSize"])
        self._big = cupy.cuda.Memory(max(4 * self.l2_bytes, 256 << 20))
        self._marks: list[Any] = []

    def allocate(self, num_bytes: int) -> tuple[Any, int]:
        """Return an owner of memory, and its address."""
        memory = self.cupy.cuda.Memory(max(num_bytes, 1))
        return memory, memory.ptr

    def upload(self, address: int, values: np.ndarray[Any, Any]) -> None:
        """Copy from the host."""
        self.cupy.cuda.runtime.memcpy(address, values.ctypes.data, values.nbytes, 1)

    def download(self, address: int, num_bytes: int) -> np.ndarray[Any, Any]:
        """Copy to the host."""
        out = np.empty(num_bytes, np.uint8)
        self.cupy.cuda.runtime.memcpy(out.ctypes.data, address, num_bytes, 2)
        return out

    def copy(self, to: int, source: int, num_bytes: int) -> None:
        """Queue a copy on the device."""
        self.cupy.cuda.runtime.memcpyAsync(to, source, num_bytes, 3, self.stream.ptr)

    def flush(self) -> None:
        """Queue a write of a buffer that is larger than the L2 cache."""
        big = self._big
        self.cupy.cuda.runtime.memsetAsync(big.ptr, 0, big.size, self.stream.ptr)

    def handle(self) -> int:
        """Return the stream's handle."""
        return int(self.stream.ptr)

    def mark(self) -> Any:
        """Record an event."""
        event = self.cupy.cuda.Event()
        event.record(self.stream)
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        """Return the time between two events."""
        return float(self.cupy.cuda.get_elapsed_time(begin, end))

    def wait(self) -> None:
        """Wait for all that was queued."""
        self.cupy.cuda.runtime.deviceSynchronize()


def cold_times(gpu: Any, call: Callable[[], object], repeats: int, warmup: int = 5) -> list[float]:
    """Return milliseconds of each call, its inputs out of the cache; nothing waits in between."""
    marks = []
    for number in range(warmup + repeats):
        gpu.flush()
        begin = gpu.mark()
        call()
        if number >= warmup:
            marks.append((begin, gpu.mark()))
    gpu.wait()
    return [gpu.milliseconds(*pair) for pair in marks]


def spread(times: list[float]) -> dict[str, float]:
    """Return median and deciles, in milliseconds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "ms_median": statistics.median(ordered),
        "ms_p10": ordered[round(0.1 * last)],
        "ms_p90": ordered[round(0.9 * last)],
    }


def copy_rate(gpu: Any, num_bytes: int = 1 << 30, repeats: int = 20) -> dict[str, float]:
    """Measure a plain copy: the ceiling."""
    (source, from_), (target, to) = gpu.allocate(num_bytes), gpu.allocate(num_bytes)
    times = spread(cold_times(gpu, lambda: gpu.copy(to, from_, num_bytes), repeats))
    del source, target
    return times | {"bytes": num_bytes, "gb_s": 2e-6 * num_bytes / times["ms_median"]}


def random_values(rng: np.random.Generator, dtype: str, count: int) -> tuple[Any, Any]:
    """Return random numbers of a dtype: their bits, and what they are worth in float32."""
    values = rng.standard_normal(count, dtype=np.float32) + np.float32(0.5)
    if dtype == "bfloat16":
        values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16), values
    bits = values.astype(dtype)
    return bits, bits.astype(np.float32)


def measure(
    gpu: Any, rng: np.random.Generator, *, dtype: str, shape: tuple[int, int, int, int],
    block: int, smooth: bool, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure one call."""
    from cusparge._cuda.launch import run
    from cusparge._cuda.pooling import pool_plan

    batch, heads, tokens, head_dim = shape
    item = ITEM_BYTES[dtype]
    count = batch * heads * tokens * head_dim
    strides = (heads * tokens * head_dim, tokens * head_dim, head_dim)
    plan = pool_plan(dtype, shape, strides, block, smooth)
    bits, values = random_values(rng, dtype, min(TILE, count))
    memory, address = gpu.allocate(count * item)
    gpu.upload(address, bits)
    for start in range(bits.size, count, bits.size):
        size = min(bits.size, count - start)
        gpu.copy(address + start * item, address, size * item)
    kept = {one.name: gpu.allocate(one.num_bytes) for one in plan.outputs}
    kept["workspace"] = gpu.allocate(plan.workspace_bytes)
    addresses = {name: place for name, (_, place) in kept.items()} | {"x": address, "lengths": 0}
    gpu.wait()

    def call() -> None:
        run(plan, addresses, device=0, stream=gpu.handle())

    times = spread(cold_times(gpu, call, repeats))
    outputs = {
        one.name: gpu.download(addresses[one.name], one.num_bytes)
        .view(np.float32)
        .reshape(one.shape)
        for one in plan.outputs
    }
    del memory
    written = sum(one.num_bytes for one in plan.outputs)
    floor = count * item + written
    head = np.resize(values, tokens * head_dim).reshape(1, 1, tokens, head_dim)
    return {
        "dtype": dtype,
        "shape": list(shape),
        "block": block,
        "smooth": smooth,
        "launches": len(plan.launches),
        **times,
        "floor_bytes": floor,
        "moved_bytes": floor + smooth * (count * item + 2 * plan.workspace_bytes),
        "gb_s": 1e-6 * floor / times["ms_median"],
        "errors": errors(head, block, smooth, outputs),
    }


def errors(
    head: np.ndarray[Any, Any], block: int, smooth: bool, outputs: dict[str, Any]
) -> dict[str, float]:
    """Return the largest errors on the first head, against the CPU backend on the same values."""
    from cusparge.stage1 import pool_blocks

    want = pool_blocks(head, block=block, smooth=smooth)
    pairs = {"block_mean": want.mean, "similarity": want.similarity, "token_mean": want.token_mean}
    return {
        name: float(np.abs(outputs[name][:1, :1] - array).max())
        for name, array in pairs.items()
        if array is not None
    }


def host_times(
    calls: dict[str, Callable[[], object]], wait: Callable[[], object], count: int = 300
) -> dict[str, float]:
    """Return microseconds that queuing each call takes: medians over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(12):
        for name, call in calls.items():
            wait()
            begin = time.perf_counter()
            for _ in range(count):
                call()
            if number >= 2:
                times[name].append(1e6 * (time.perf_counter() - begin) / count)
    wait()
    return {name: statistics.median(found) for name, found in times.items()}


def host_calls() -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Return calls on arrays of which the GPU makes short work, and what is missing for more."""
    import cupy

    from cusparge._cuda.launch import run
    from cusparge._cuda.pooling import pool_plan
    from cusparge.stage1 import pool_blocks

    plan = pool_plan("float16", (1, 1, 64, 64), (4096, 4096, 64), 64, True)
    kept = {one.name: cupy.cuda.Memory(one.num_bytes) for one in plan.outputs}
    kept |= {"x": cupy.cuda.Memory(8192), "workspace": cupy.cuda.Memory(plan.workspace_bytes)}
    addresses = {name: memory.ptr for name, memory in kept.items()} | {"lengths": 0}
    of_cupy = cupy.asarray(np.ones((1, 1, 64, 64), np.float16))
    calls: dict[str, Callable[[], object]] = {
        "launches_only": lambda kept=kept: run(plan, addresses, device=0, stream=0),
        "cupy": lambda: pool_blocks(of_cupy, smooth=True),
    }
    try:
        import torch

        of_torch = torch.ones((1, 1, 64, 64), dtype=torch.float16, device="cuda")
    except Exception as error:  # not installed, or without CUDA
        return calls, [f"torch: {type(error).__name__}: {error}"]
    calls["torch"] = lambda: pool_blocks(of_torch, smooth=True)
    return calls, []


def summarise(report: dict[str, Any]) -> list[str]:
    """Return the table as lines."""
    lines = [f"copy {report['copy']['gb_s']:.0f} GB/s (read + written)"]
    for row in report["rows"]:
        shape = "x".join(map(str, row["shape"]))
        what = f"{row['dtype']:8} {shape:18} {row['block']:3} {'smooth' if row['smooth'] else ''}"
        lines.append(
            f"{what:40} {row['ms_median']:7.4f} ms {row['gb_s']:5.0f} GB/s "
            f"{100 * row['gb_s'] / report['copy']['gb_s']:3.0f} % of copy, error "
            f"{max(row['errors'].values()):.1e}"
        )
    host = ", ".join(f"{name} {value:.1f}" for name, value in report["host_us"].items())
    lines.append(f"host time of a call with three launches, us: {host}")
    lines += [f"not measured: {text}" for text in report["not_measured"]]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=300, help="begin no size after that")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    begin = time.monotonic()
    try:
        gpu = Gpu()
        calls, missing = host_calls()
    except Exception as error:
        reason = f"no GPU that CuPy can use: {type(error).__name__}: {error}"
        print(reason, file=sys.stderr)
        if options.output != RESULT:
            write_json(options.output, {"skipped": reason})
        return 1
    from gpu_facts import clocks

    from cusparge.cli.measure import machine, version_of

    rng = np.random.default_rng()
    report: dict[str, Any] = {
        "benchmark": "bench_pool",
        **source_state(),
        "machine": machine() | {"cupy": version_of("cupy-cuda13x") or version_of("cupy-cuda12x")},
        "gpu": gpu.name,
        "l2_bytes": gpu.l2_bytes,
        "clocks_before": clocks(),
        "repeats": options.repeats,
        "copy": copy_rate(gpu),
        "rows": [],
        "host_us": host_times(calls, gpu.wait),
        "not_measured": missing,
    }
    for tokens in options.tokens:
        for head_dim in options.head_dim:
            for dtype in options.dtypes:
                for name, block, smooth in CALLS:
                    shape = (1, options.heads, tokens, head_dim)
                    if time.monotonic() - begin > options.seconds:
                        report["not_measured"].append(f"{name} {dtype} {shape}: out of time")
                        continue
                    row = measure(
                        gpu, rng, dtype=dtype, shape=shape, block=block, smooth=smooth,
                        repeats=options.repeats,
                    )  # fmt: skip
                    report["rows"].append(row)
                    report["summary"] = summarise(report)
                    write_json(options.output, report)
    report["clocks_after"] = clocks()
    report["summary"] = summarise(report)
    write_json(options.output, report)
    print(*report["summary"], sep="\n")
    # Both backends sum the same float32 numbers in another order; NaN is wrong.
    return 0 if all(e < 1e-4 for row in report["rows"] for e in row["errors"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
