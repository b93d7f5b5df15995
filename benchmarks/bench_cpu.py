"""Measure the CPU backend against torch's dense attention, side by side in one process.

    python benchmarks/bench_cpu.py                # all sizes, about five minutes on two cores
    python benchmarks/bench_cpu.py --tokens 2048 --repeats 3 -o other.json
    python benchmarks/bench_cpu.py --readme-only  # only write README's table from the result file

Every round runs torch's scaled_dot_product_attention, cusparge dense, and cusparge at each
sparsity once, with the same number of threads. A figure is the median over rounds of a ratio
within a round. The inputs have a known share of blocks that matter (`clustered_inputs`); what was
left out and the error against torch's result stand beside each speed. The result goes to
``benchmarks/results/cpu.json``, and the table in README.md is written from that file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench_cpu:begin -->", "<!-- bench_cpu:end -->"

SPARSITIES = (0.5, 0.75, 0.9)
SEED = 20251121


def measure(tokens: int, head_dim: int, heads: int, repeats: int) -> dict[str, Any]:
    """Measure one size."""
    import numpy as np
    import torch

    import cusparge
    from cusparge.cli.measure import clustered_inputs, paired_times, relative_l1

    rng = np.random.default_rng(SEED)
    policy = cusparge.TopCdf(0.9995, 0.5)
    functions: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, float]] = {}
    for sparsity in SPARSITIES:
        inputs = clustered_inputs(
            rng, batch=1, heads=heads, tokens=tokens, head_dim=head_dim, sparsity=sparsity
        )
        tensors = tuple(torch.from_numpy(array) for array in inputs)
        name = f"sparse_{round(100 * sparsity)}"
        if sparsity == SPARSITIES[0]:
            functions["torch_sdpa"] = lambda x=tensors: (
                torch.nn.functional.scaled_dot_product_attention(*x)
            )
            functions["dense"] = lambda x=inputs: cusparge.attention(
                *x, policy=cusparge.Dense(quantize=False)
            )
            functions["dense_quantized"] = lambda x=inputs: cusparge.attention(
                *x, policy=cusparge.Dense(quantize=True)
            )
            dense, expected = functions["dense"](), functions["torch_sdpa"]()
            found["dense"] = {"l1": float(relative_l1(dense, expected.numpy()))}
            quantized = functions["dense_quantized"]()
            found["dense_quantized"] = {"l1": float(relative_l1(quantized, expected.numpy()))}
        functions[name] = lambda x=inputs: cusparge.attention(*x, policy=policy)
        functions[f"predict_{round(100 * sparsity)}"] = lambda x=inputs: cusparge.predict_block_map(
            *x[:2], policy=policy
        )
        out, stats = cusparge.attention(*inputs, policy=policy, return_stats=True)
        expected = torch.nn.functional.scaled_dot_product_attention(*tensors).numpy()
        found[name] = {"sparsity": stats.sparsity, "l1": float(relative_l1(out, expected))}
    times = paired_times(functions, repeats=repeats)
    rows: dict[str, Any] = {}
    for name, seconds in times.items():
        ratios = [t / base for t, base in zip(seconds, times["torch_sdpa"], strict=True)]
        rows[name] = {
            "seconds_median": statistics.median(seconds),
            "seconds_all": seconds,
            "time_over_torch_sdpa_median": statistics.median(ratios),
            "time_over_torch_sdpa_min": min(ratios),
            "time_over_torch_sdpa_max": max(ratios),
            **found.get(name, {}),
        }
    return {"tokens": tokens, "head_dim": head_dim, "heads": heads, "batch": 1, "results": rows}


def commit() -> str | None:
    """Return the commit that is measured, with a mark where the tree differs from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def table(result: dict[str, Any]) -> str:
    """Return README's table of a result file."""
    machine = result["machine"]
    lines = [
        "| tokens | head_dim | dense | 50 % skipped | 75 % skipped | 90 % skipped | prediction |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in result["sizes"]:
        rows = size["results"]
        cells = [f"{size['tokens']:,}", str(size["head_dim"])]
        for name in ("dense", *(f"sparse_{round(100 * s)}" for s in SPARSITIES)):
            cells.append(f"{1 / rows[name]['time_over_torch_sdpa_median']:.2f}×")
        cells.append(f"{100 * rows['predict_75']['time_over_torch_sdpa_median']:.1f} %")
        lines.append("| " + " | ".join(cells) + " |")
    worst = max(
        row["l1"]
        for size in result["sizes"]
        for name, row in size["results"].items()
        if name.startswith("sparse_")
    )
    skipped = [size["results"]["sparse_90"]["sparsity"] for size in result["sizes"]]
    least, most = min(skipped), max(skipped)
    quantized = [
        size["results"]["dense_quantized"]["seconds_median"]
        / size["results"]["dense"]["seconds_median"]
        for size in result["sizes"]
    ]
    first = result["sizes"][0]
    lines += [
        "",
        f"Speed relative to torch's `scaled_dot_product_attention` (1× is its speed), float32, "
        f"batch {first['batch']}, {first['heads']} heads, {machine['threads']} threads each; "
        f"medians of {result['repeats']} paired runs. Prediction is stage 1 alone, as a share of "
        f"torch's time, on the inputs of which 75 % are skipped. The inputs are made to have that "
        f"share of blocks that do not matter, scattered at random ({least:.3f} to {most:.3f} where "
        f"90 % is written, else exactly); relative L1 error against torch is at most {worst:.0e}. "
        f"`quantize=True` takes "
        f"{min(quantized):.1f} to {max(quantized):.1f} times as long as float32 here.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, NumPy "
        f"{machine['numpy']} ({machine['blas']}), torch {machine['torch']}; commit "
        f"`{result['commit']}`; from `benchmarks/results/{RESULT.name}`, made by "
        "`python benchmarks/bench_cpu.py`.",
    ]
    return "\n".join(lines)


def write_readme(result: dict[str, Any]) -> None:
    """Put the table between README's markers."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    parser.add_argument("--readme-only", action="store_true")
    options = parser.parse_args()
    if options.readme_only:
        write_readme(json.loads(options.output.read_text(encoding="utf-8")))
        return 0

    os.environ["CUSPARGE_NUM_THREADS"] = str(options.threads)
    import torch

    from cusparge.cli.measure import machine

    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "benchmark": "bench_cpu",
        "commit": commit(),
        "machine": machine(),
        "dtype": "float32",
        "seed": SEED,
        "repeats": options.repeats,
        "sizes": [],
    }
    for tokens in options.tokens:
        for head_dim in options.head_dim:
            size = measure(tokens, head_dim, options.heads, options.repeats)
            result["sizes"].append(size)
            summary = {
                name: round(1 / row["time_over_torch_sdpa_median"], 2)
                for name, row in size["results"].items()
            }
            print(tokens, head_dim, summary, file=sys.stderr, flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.output == RESULT and README.exists():
        write_readme(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
