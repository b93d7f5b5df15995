"""``cusparge bench``: speed against the dense baselines that the machine has."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

import cusparge
from cusparge.cli import files
from cusparge.cli.measure import (
    check_clusters,
    clustered_inputs,
    cores,
    describe_machine,
    machine,
    paired_times,
    relative_l1,
    torch_attention,
)
from cusparge.cli.options import number, usage_of, whole
from cusparge.cli.ui import Ui, UsageError, table

__all__ = ["add_parser"]

EXAMPLES = """\
The inputs are made so that a known share of the blocks is needed: queries and keys sit near one
of 1 / (1 - sparsity) orthonormal centres, block by block, in shuffled order. The policy,
TopCdf(0.9995, 0.5), finds those blocks; error and sparsity are measured, not assumed.

examples:
  cusparge bench
  cusparge bench --tokens 8192 --heads 4 --sparsity 0.9 --repeats 3
  cusparge bench --threads 1 --no-torch --json
"""

_POLICY = cusparge.TopCdf(0.9995, 0.5)


def _share(text: str) -> float:
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"not a share from 0 up to, but not including, 1: {text}")
    return value


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        parents=[common],
        help="speed against the dense baselines that the machine has",
        description="Time sparse attention at chosen sparsities against dense attention, and "
        "against torch's scaled_dot_product_attention where torch is installed, in float32.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one = whole(1)
    parser.add_argument(
        "--tokens", nargs="+", type=one, default=[2048, 4096], metavar="N",
        help="lengths of the sequence (default: 2048 4096)",
    )  # fmt: skip
    parser.add_argument(
        "--sparsity", nargs="+", type=_share, default=[0.5, 0.75, 0.9], metavar="X",
        help="shares of the blocks to leave out, 0 up to 1 (default: 0.5 0.75 0.9)",
    )  # fmt: skip
    parser.add_argument("--heads", type=one, default=8, metavar="N", help="heads (default: 8)")
    parser.add_argument("--batch", type=one, default=1, metavar="N", help="sequences (default: 1)")
    parser.add_argument(
        "--head-dim", type=one, default=64, metavar="N", help="1 to 256 (default: 64)"
    )
    parser.add_argument(
        "--repeats", type=one, default=7, metavar="N",
        help="rounds that count, each of which runs every contender once (default: 7)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=one, metavar="N",
        help="threads of every contender (default: CUSPARGE_NUM_THREADS, or all processors)",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="(default: 0)")
    parser.add_argument(
        "--no-torch", action="store_true", help="leave torch out, which takes seconds to import"
    )
    parser.set_defaults(execute=execute, usage=parser.format_usage())


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Set the threads of cusparge for a while."""
    name = "CUSPARGE_NUM_THREADS"
    before = os.environ.get(name)
    if number is not None:
        os.environ[name] = str(number)
    try:
        yield
    finally:
        if number is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def execute(args: argparse.Namespace, ui: Ui) -> int:
    """Run the command."""
    if args.head_dim > 256:
        raise UsageError(f"--head-dim: allowed 1 to 256, got {args.head_dim}", args.usage)
    if args.threads is not None and args.threads > 4096:
        raise UsageError(f"--threads: allowed 1 to 4096, got {args.threads}", args.usage)
    for tokens in args.tokens:
        for sparsity in args.sparsity:
            usage_of(partial(check_clusters, tokens, args.head_dim, sparsity))
    size = 4 * args.batch * args.heads * max(args.tokens) * args.head_dim
    files.check_free(8 * size, "the largest of these measurements")
    if args.threads is not None and args.threads > cores():
        ui.note(f"{args.threads} threads on {cores()} cores: expect times that vary")
    with _threads(args.threads):
        return _measure(args, ui)


def _measure(args: argparse.Namespace, ui: Ui) -> int:
    cases = [(tokens, sparsity) for tokens in args.tokens for sparsity in args.sparsity]
    results = []
    with_torch = not args.no_torch
    with ui.progress("timing", len(cases) * args.repeats) as advance:
        for tokens, sparsity in cases:
            row, has_torch = _case(args, tokens, sparsity, with_torch, advance)
            if with_torch and not has_torch:
                ui.note("torch is not installed: compared with cusparge's dense attention only")
                with_torch = False
            results.append(row)
    record = {
        "command": "bench",
        "batch": args.batch,
        "heads": args.heads,
        "head_dim": args.head_dim,
        "dtype": "float32",
        "repeats": args.repeats,
        "seed": args.seed,
        "policy": {"policy": "TopCdf", "cdf_threshold": 0.9995, "sim_threshold": 0.5},
        "torch_timed": with_torch,
        "results": results,
        "machine": machine(),
    }
    ui.result(record)
    _show(ui, record)
    return 0


def _case(
    args: argparse.Namespace,
    tokens: int,
    sparsity: float,
    with_torch: bool,
    advance: Callable[[], object],
) -> tuple[dict[str, Any], bool]:
    """Measure one length at one sparsity."""
    arrays = clustered_inputs(
        np.random.default_rng(args.seed),
        batch=args.batch,
        heads=args.heads,
        tokens=tokens,
        head_dim=args.head_dim,
        sparsity=sparsity,
    )
    dense = cusparge.Dense(quantize=False)
    functions: dict[str, Callable[[], Any]] = {
        "dense": lambda: cusparge.attention(*arrays, policy=dense),
        "sparse": lambda: cusparge.attention(*arrays, policy=_POLICY),
    }
    torch = torch_attention(*arrays) if with_torch else None
    if torch is not None:
        functions["torch"] = torch
    out, stats = cusparge.attention(*arrays, policy=_POLICY, return_stats=True)
    error = relative_l1(out, cusparge.attention(*arrays, policy=dense))
    times = paired_times(functions, repeats=args.repeats, after_round=advance)
    row: dict[str, Any] = {
        "tokens": tokens,
        "sparsity_wanted": sparsity,
        "sparsity": stats.sparsity,
        "error": float(error),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
        "speedup": {
            name: statistics.median(
                other / mine for other, mine in zip(values, times["sparse"], strict=True)
            )
            for name, values in times.items()
            if name != "sparse"
        },
    }
    return row, torch is not None


def _show(ui: Ui, record: dict[str, Any]) -> None:
    ui.show(f"machine   {describe_machine(record['machine'])}")
    ui.show(
        f"inputs    batch {record['batch']}, {record['heads']} heads, head_dim "
        f"{record['head_dim']}, float32; policy TopCdf(0.9995, 0.5)",
        "",
    )
    names = ["dense", "torch"] if record["torch_timed"] else ["dense"]
    columns = ["tokens", "sparsity", "error", "sparse"]
    for name in names:
        columns += [name, f"vs {name}"]
    rows = []
    for row in record["results"]:
        seconds = row["seconds"]
        cells = [str(row["tokens"]), f"{row['sparsity']:.3f}", f"{row['error']:.1e}"]
        cells.append(f"{seconds['sparse'] * 1e3:.1f} ms")
        for name in names:
            cells += [f"{seconds[name] * 1e3:.1f} ms", f"{row['speedup'][name]:.2f}x"]
        rows.append(cells)
    ui.show(table("sparse attention against dense", columns, rows, words=0))
    ui.show(
        f"times: medians of {record['repeats']} rounds that run each contender once; vs: "
        "medians of the rounds' own speed-ups. dense is cusparge's own dense attention, torch is "
        "torch.nn.functional.scaled_dot_product_attention, with equally many threads. error: "
        "sum |O - O'| / sum |O| against dense."
    )
