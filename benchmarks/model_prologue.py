#!/usr/bin/env python3
"""What statistics.cu and prologue.cu should cost on an H200: a prediction, no measurement.

::

    python benchmarks/model_prologue.py
    python benchmarks/model_prologue.py --json

The floor reads q, k and v once and writes every result once. K and V are read twice, as the mean of
K and the scales of V are needed first. How much of the second reading the L2 cache serves follows
from the order of both kernels: the second begins with what the first read last, so a block that
was read y bytes before the first kernel's end is asked for again after y bytes and what was written
for them in between; it is a hit if that fits into the cache. Where K and V are much larger than the
cache, nearly all of the second reading comes from DRAM: 1.43 times the floor with as many heads of
k as of q. Both kernels for a few heads at a time, whose K and V fit, would mend that at the price
of launches; a scale of V for each block would spare V's second reading. Rates are assumptions,
named below;
instructions are those of the inner loops in the machine code that NVRTC 13.5 makes for sm_90a.
Nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math

from cusparge._cuda.prologue import MOST_CHUNKS, prologue_plan

#: Bytes that DRAM moves in a second, reading and writing mixed.
DRAM_RATE = 3.6e12
#: Of the 50 MB of L2, what holds lines for reading and writing: its halves keep copies of what the
#: other half owns, and results stay until they are written back.
L2_BYTES = 30e6
#: The device: multiprocessors, and instructions that each issues in a second at 1.6 GHz. Of the
#: slots for one, so many are used: loads, barriers and sums leave gaps.
MULTIPROCESSORS = 132
ISSUES = 4 * 1.6e9
ISSUE_SHARE = 0.7
#: A launch behind another, and the first and last blocks of threads of one.
LAUNCH = 4e-6

#: Instructions of a warp for 512 bytes of q, of k (both rounds) and of v; without the shift of q.
Q_TURN, K_TURN, V_TURN = 137, 159, 78
#: And for what a block of threads does once: addresses, statistics, sums, V's transposition.
Q_ONCE, KV_ONCE = 350, 700

#: Operations of dense quantized attention in a second, by head_dim: 75 % of what the pipes allow.
DENSE_RATE = {64: 629e12, 128: 1259e12}


def predict(tokens: int, heads_q: int, heads_k: int, head_dim: int) -> dict[str, float]:
    """Return bytes, times in seconds and the ratio to the floor for one shape, bfloat16."""
    shape_q, shape_k = (1, heads_q, tokens, head_dim), (1, heads_k, tokens, head_dim)
    strides = [(0, tokens * head_dim, head_dim)] * 3
    prologue = prologue_plan("sm_90a", "bfloat16", shape_q, shape_k, *strides, head_dim**-0.5)
    q_bytes = 2 * math.prod(shape_q)
    kv_bytes = 2 * 2 * math.prod(shape_k)
    partial = prologue.sections["partial"].num_bytes
    sizes = {name: one.num_bytes for name, one in prologue.sections.items() if name != "partial"}
    written = sum(sizes.values())
    kv_written = sum(size for name, size in sizes.items() if name[0] != "q")
    floor = q_bytes + kv_bytes + written
    # y + y * written / read = L2: what lies less than y bytes back is still there.
    served = min(kv_bytes, max(0.0, L2_BYTES - partial) / (1 + kv_written / kv_bytes))
    moved = floor + kv_bytes - served

    # Every block of 64 keys reads all chunks of its row again; that stays in L2.
    blocks_k = heads_k * prologue.num_blocks_k
    chunk_bytes = 2 * 4 * blocks_k * min(MOST_CHUNKS, -(-tokens // 256)) * head_dim
    warps = 4 * (heads_q * prologue.num_blocks_q * Q_ONCE + blocks_k * KV_ONCE)
    turns = q_bytes / 512 * Q_TURN + kv_bytes / 2 / 512 * (K_TURN + V_TURN)
    issue = (warps + turns) / (MULTIPROCESSORS * ISSUES * ISSUE_SHARE)
    seconds = 2 * LAUNCH + max(moved / DRAM_RATE, kv_bytes / DRAM_RATE + issue)
    dense = 4 * tokens**2 * head_dim * heads_q / DENSE_RATE[head_dim]
    return {
        "tokens": tokens,
        "heads_q": heads_q,
        "heads_k": heads_k,
        "head_dim": head_dim,
        "floor_bytes": floor,
        "moved_bytes": moved,
        "ratio": moved / floor,
        "served_share": served / kv_bytes,
        "chunk_l2_bytes": chunk_bytes,
        "dram_us": 1e6 * moved / DRAM_RATE,
        "issue_us": 1e6 * issue,
        "prologue_us": 1e6 * seconds,
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
        for tokens in (2**12, 2**13, 2**15, 2**17)
    ]
    if as_json:
        print(json.dumps({"prediction": True, "device": "H200", "rows": rows}))
        return
    print("PREDICTED, H200, bfloat16, no shift; nothing was run")
    print(
        "heads   d  tokens  floor MB  moved MB  ratio  second reading from L2   DRAM us  issue us"
    )
    for one in rows:
        print(
            f"{one['heads_q']:2.0f}/{one['heads_k']:<2.0f} {one['head_dim']:4} {one['tokens']:7} "
            f"{one['floor_bytes'] / 1e6:9.1f} {one['moved_bytes'] / 1e6:9.1f} "
            f"{one['ratio']:6.2f} {one['served_share']:23.0%} {one['dram_us']:9.1f} "
            f"{one['issue_us']:9.1f}"
        )
    print()
    print("heads   d  tokens  prologue us  dense attention us   share")
    for one in rows:
        print(
            f"{one['heads_q']:2.0f}/{one['heads_k']:<2.0f} {one['head_dim']:4} {one['tokens']:7} "
            f"{one['prologue_us']:12.1f} {one['dense_us']:19.0f} {one['share']:7.1%}"
        )


if __name__ == "__main__":
    main()
