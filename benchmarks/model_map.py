#!/usr/bin/env python3
"""What block_map.cu should cost on an H200, beside dense attention: a prediction, no measurement.

::

    python benchmarks/model_map.py
    python benchmarks/model_map.py --json

Counts follow from shapes and from the plan that the library makes; instructions are those of the
loops in the machine code that NVRTC 13.5 makes for sm_90a. Rates and latencies are assumptions, and
named below. Nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re

from cusparge._cuda.block_map import MapShape, map_plan
from cusparge.policy import TopCdf

#: The device: multiprocessors, what each issues in a second, and the shared memory of one block of
#: threads. Clocks under load are taken as 1.6 GHz.
MULTIPROCESSORS = 132
ISSUES = 4 * 1.6e9
SHARED_LIMIT = 227 * 1024
#: Of the slots that issue an instruction, how many do: loads, barriers and sums leave gaps.
ISSUE_SHARE = 0.7
#: Bytes that L2 gives in a second, and that DRAM does.
L2_RATE, DRAM_RATE = 5.5e12, 3.6e12
#: A launch behind another, and what one block of threads waits for at least: rows, channels, the
#: first key blocks, similarities, 21 sums.
LAUNCH, CHAIN = 2e-6, 5e-6
#: Operations of dense quantized attention in a second, by head_dim: 75 % of what the pipes allow.
DENSE_RATE = {64: 629e12, 128: 1259e12}

#: Instructions of a warp for 32 products of a row and a key block, by head_dim.
PRODUCTS = {64: 159, 128: 315}
#: And for 32 columns of a row: score, weigh, 21 sums of weights, write.
COLUMNS = 133 / 4 + 113 / 4 + 21 * 87 / 16 + 79


def predict(tokens: int, heads_q: int, heads_k: int, head_dim: int) -> dict[str, float]:
    """Return counts, times in seconds and the share of dense attention for one shape."""
    shape = MapShape(1, heads_q, heads_k, tokens, tokens, head_dim)
    options = {"sm_scale": head_dim**-0.5, "queue_is_clear": True, "shared_limit": SHARED_LIMIT}
    (launch,) = map_plan(shape, TopCdf(), **options).launches
    found = re.search(r", (\d)}", launch.variant.expression)
    assert found is not None
    tile_rows = int(found[1])
    pairs = shape.rows * shape.blocks_k
    instructions = pairs / 32 * (PRODUCTS[head_dim] + COLUMNS)
    key_bytes = 4 * head_dim * shape.blocks_k
    l2_bytes = launch.grid[0] * key_bytes + 4 * shape.rows * (head_dim + shape.blocks_k)
    dram_bytes = 4 * head_dim * shape.rows + heads_k * key_bytes + 4 * shape.rows * shape.words
    issue = instructions / (MULTIPROCESSORS * ISSUES * ISSUE_SHARE)
    l2, dram = l2_bytes / L2_RATE, dram_bytes / DRAM_RATE
    seconds = LAUNCH + CHAIN + max(issue, l2, dram)
    dense = 4 * tokens**2 * head_dim * heads_q / DENSE_RATE[head_dim]
    return {
        "tokens": tokens,
        "heads_q": heads_q,
        "heads_k": heads_k,
        "head_dim": head_dim,
        "tile_rows": tile_rows,
        "flops": 2 * pairs * head_dim,
        "instructions": instructions,
        "l2_bytes": l2_bytes,
        "dram_bytes": dram_bytes,
        "issue_us": 1e6 * issue,
        "l2_us": 1e6 * l2,
        "map_us": 1e6 * seconds,
        "dense_us": 1e6 * dense,
        "share": seconds / dense,
    }


def main() -> None:
    """Print the prediction for the shapes that matter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    as_json = parser.parse_args().json
    rows = [
        predict(tokens, 32, heads_k, head_dim)
        for head_dim in (64, 128)
        for heads_k in (32, 8)
        for tokens in (2**12, 2**13, 2**15, 2**17, 2**20)
    ]
    if as_json:
        print(json.dumps({"prediction": True, "device": "H200", "rows": rows}))
        return
    print("PREDICTED, H200, no causality; nothing was run")
    print(
        "heads   d   tokens  rows  Gflop  L2 GB   issue us     L2 us    map us    dense us   share"
    )
    for one in rows:
        print(
            f"{one['heads_q']:2.0f}/{one['heads_k']:<2.0f} {one['head_dim']:4} {one['tokens']:8} "
            f"{one['tile_rows']:5} {one['flops'] / 1e9:6.1f} {one['l2_bytes'] / 1e9:6.2f} "
            f"{one['issue_us']:10.1f} {one['l2_us']:9.1f} {one['map_us']:9.1f} "
            f"{one['dense_us']:11.0f} {one['share']:7.2%}"
        )


if __name__ == "__main__":
    main()
