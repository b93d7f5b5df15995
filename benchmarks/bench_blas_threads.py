"""Measure what BLAS's own threads cost inside cusparge's (docs/decisions/0001).

    python benchmarks/bench_blas_threads.py

Each round runs the same sparse call with BLAS held to one thread, as the CPU backend does it
through threadpoolctl, and with BLAS left alone, as it is where threadpoolctl is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from bench_cpu import ROOT, SEED, commit

import cusparge
from cusparge._cpu import threads
from cusparge.cli.measure import clustered_inputs, machine, paired_times

RESULT = ROOT / "benchmarks" / "results" / "cpu_blas_threads.json"


def measure(tokens: int, head_dim: int, repeats: int) -> dict[str, Any]:
    """Measure one size."""
    q, k, v = clustered_inputs(
        np.random.default_rng(SEED),
        batch=1, heads=8, tokens=tokens, head_dim=head_dim, sparsity=0.75,
    )  # fmt: skip
    policy = cusparge.TopCdf(0.9995, 0.5)
    held = threads._blas

    def left_alone() -> None:
        threads._blas = threads._Blas()
        threads._blas._controller = False
        try:
            cusparge.attention(q, k, v, policy=policy)
        finally:
            threads._blas = held

    times = paired_times(
        {"held": lambda: cusparge.attention(q, k, v, policy=policy), "left_alone": left_alone},
        repeats=repeats,
    )
    ratios = [b / a for a, b in zip(times["held"], times["left_alone"], strict=True)]
    return {
        "tokens": tokens,
        "head_dim": head_dim,
        "heads": 8,
        "sparsity": 0.75,
        "seconds": times,
        "left_alone_over_held_median": statistics.median(ratios),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    sizes = [measure(tokens, dim, options.repeats) for tokens in (2048, 4096) for dim in (64, 128)]
    result = {
        "benchmark": "bench_blas_threads",
        "commit": commit(),
        "machine": machine(),
        "repeats": options.repeats,
        "sizes": sizes,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for size in sizes:
        print(size["tokens"], size["head_dim"], round(size["left_alone_over_held_median"], 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
