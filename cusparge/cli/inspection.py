"""``cusparge inspect``: what each head could skip, and what that would cost."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt

import cusparge
from cusparge import viz
from cusparge.cli import files, report
from cusparge.cli.measure import describe_machine, machine, one_blas_thread, relative_l1
from cusparge.cli.options import (
    add_call_options,
    call_options,
    describe_policy,
    number,
    policy_record,
    usage_of,
    whole,
)
from cusparge.cli.ui import Ui, UsageError, table

__all__ = ["add_parser"]

EXAMPLES = """\
FILE is as for `cusparge run`: q, k and v in .npz or .safetensors.

examples:
  cusparge inspect layer.npz
  cusparge inspect layer.npz --cdf 0.9 0.95 --sim -1 --max-error 0.1
  cusparge inspect layer.npz --keep 0.1 0.25 0.5
  cusparge inspect layer.npz --html report.html    tables, curves and maps (needs matplotlib)
  cusparge inspect --demo --png maps.png           on the data that ships with the package
"""

_CDF = [0.8, 0.9, 0.95, 0.98, 0.99]
_SIM = [-1.0, 0.3]
_KEEP_SIM = [-1.0]

#: Pictures of more heads than this make files that nobody looks at.
_PICTURED = 12

Float = npt.NDArray[np.float64]


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="sparsity and error of each head over a grid of thresholds",
        description="Compare sparse with dense attention, head by head, over a grid of "
        "thresholds: what could be skipped, and what error that makes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help=".npz or .safetensors with q, k and v"
    )
    parser.add_argument(
        "--demo", action="store_true", help="use the data that ships with the package"
    )
    add_call_options(parser)
    group = parser.add_argument_group("the grid")
    group.add_argument(
        "--cdf", nargs="+", type=number, metavar="X",
        help="values of cdf_threshold (default: 0.8 0.9 0.95 0.98 0.99)",
    )  # fmt: skip
    group.add_argument(
        "--keep", nargs="+", type=number, metavar="X",
        help="values of TopK's keep, instead of --cdf",
    )  # fmt: skip
    group.add_argument(
        "--sim", nargs="+", type=number, metavar="X",
        help="values of sim_threshold (default: -1 0.3, with --keep -1)",
    )  # fmt: skip
    group.add_argument(
        "--max-error", type=number, default=0.05, metavar="X",
        help="relative L1 error that the best setting of a head may have (default: 0.05)",
    )  # fmt: skip
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--png", metavar="FILE", help="the block map of each head beside its true attention"
    )
    group.add_argument("--html", metavar="REPORT", help="everything in one HTML file")
    group.add_argument(
        "--heads", nargs="+", type=whole(0), metavar="N",
        help=f"the heads to draw (default: the first {_PICTURED})",
    )  # fmt: skip
    parser.set_defaults(execute=execute, usage=parser.format_usage())


def _grid(args: argparse.Namespace) -> list[cusparge.Policy]:
    if args.keep is not None and args.cdf is not None:
        raise UsageError(
            "--cdf and --keep are two rules for the same choice: give one of them.", args.usage
        )

    def make() -> list[cusparge.Policy]:
        if args.keep is not None:
            return [cusparge.TopK(keep, sim) for sim in args.sim or _KEEP_SIM for keep in args.keep]
        return [cusparge.TopCdf(cdf, sim) for sim in args.sim or _SIM for cdf in args.cdf or _CDF]

    grid: list[cusparge.Policy] = usage_of(make)
    return list(dict.fromkeys(grid))


def execute(args: argparse.Namespace, ui: Ui) -> int:
    """Run the command."""
    if args.demo == (args.file is not None):
        raise UsageError("give either a FILE or --demo.", args.usage)
    if args.max_error < 0:
        raise UsageError("--max-error: must be 0 or more.", args.usage)
    grid = _grid(args)
    sources = [] if args.file is None else [args.file]
    targets = {}
    for name in ("png", "html"):
        if getattr(args, name):
            viz.require_matplotlib()
            targets[name] = files.check_output(getattr(args, name), inputs=sources)
    inputs = files.demo_inputs() if args.demo else files.read_inputs(args.file)
    inputs = inputs.heads_first(args.layout).in_float32()
    options = call_options(args) | {"layout": "HND"}
    if args.heads and max(args.heads) >= inputs.q.shape[1]:
        raise UsageError(
            f"--heads: the file has heads 0 to {inputs.q.shape[1] - 1}; got {max(args.heads)}.",
            args.usage,
        )

    arrays = (inputs.q, inputs.k, inputs.v)
    results = []
    with ui.progress("settings", len(grid) + 1) as advance:
        dense = cusparge.attention(*arrays, policy=cusparge.Dense(quantize=False), **options)
        advance()
        for policy in grid:
            out, stats = cusparge.attention(*arrays, policy=policy, return_stats=True, **options)
            error = np.asarray(relative_l1(out, dense, axis=(-2, -1)))
            results.append(_result(policy, stats, error, float(relative_l1(out, dense))))
            advance()
    best = _best(results, args.max_error)
    record = {
        "command": "inspect",
        "file": "the demo data: " + files.DEMO_SOURCE if args.demo else args.file,
        "inputs": {
            name: {"shape": getattr(inputs, name).shape, "dtype": inputs.dtypes[name]}
            for name in "qkv"
        },
        **call_options(args),
        "max_error": args.max_error,
        "results": results,
        "best": best,
        "png": args.png,
        "html": args.html,
        "machine": machine(),
    }
    if targets:
        panels = _panels(args, ui, inputs, grid, best, options)
        _write_pictures(targets, record, panels, args.max_error)
        for name in targets:
            ui.note(f"wrote {getattr(args, name)}")
    ui.result(record)
    _show(ui, record)
    return 0


def _result(
    policy: cusparge.Policy, stats: cusparge.AttentionStats, error: Float, total: float
) -> dict[str, Any]:
    return {
        "name": describe_policy(policy),
        **policy_record(policy),
        "sparsity": stats.sparsity,
        "error": total,
        "worst_error": float(error.max(initial=0.0)),  # NaN if any is
        "sparsity_per_head": stats.sparsity_per_head,
        "error_per_head": error,
    }


def _best(results: list[dict[str, Any]], max_error: float) -> list[dict[str, Any]]:
    """Return, for each head, the setting with the most sparsity within the error allowed."""
    best = []
    for sequence, head in np.ndindex(results[0]["error_per_head"].shape):
        row: dict[str, Any] = {
            "sequence": sequence,
            "head": head,
            "setting": None,
            "name": "none: keep it dense",
            "sparsity": 0.0,
            "error": 0.0,
        }
        found = []
        for index, result in enumerate(results):
            error = float(result["error_per_head"][sequence, head])
            if error <= max_error:  # False for NaN
                sparsity = float(result["sparsity_per_head"][sequence, head])
                found.append((-sparsity, error, index))
        if found:
            sparsity, error, index = min(found)
            row |= {
                "setting": index,
                "name": results[index]["name"],
                "sparsity": -sparsity,
                "error": error,
            }
        best.append(row)
    return best


def _panels(
    args: argparse.Namespace,
    ui: Ui,
    inputs: files.Inputs,
    grid: list[cusparge.Policy],
    best: list[dict[str, Any]],
    options: dict[str, Any],
) -> list[viz.Panel]:
    """Return two pictures for each head: the blocks computed, and where the attention is."""
    rows = [row for row in best if not args.heads or row["head"] in args.heads]
    if len(rows) > _PICTURED and not args.heads:
        ui.note(f"pictures of the first {_PICTURED} of {len(rows)} heads; --heads chooses others")
        rows = rows[:_PICTURED]
    group = inputs.q.shape[1] // max(1, inputs.k.shape[1])
    panels = []
    masks: dict[int | None, npt.NDArray[Any]] = {}
    with ui.progress("pictures", len(rows)) as advance:
        for row in rows:
            sequence, head, setting = row["sequence"], row["head"], row["setting"]
            if setting not in masks:
                policy = cusparge.Dense() if setting is None else grid[setting]
                chosen = cusparge.predict_block_map(inputs.q, inputs.k, policy=policy, **options)
                masks[setting] = np.asarray(chosen.mask)
            label = f"sequence {sequence}, head {head}" if inputs.q.shape[0] > 1 else f"head {head}"
            name = "dense" if setting is None else row["name"]
            panels.append(
                viz.Panel(
                    f"{label}: {name}\nsparsity {row['sparsity']:.2f}, error {row['error']:.3f}",
                    masks[setting][sequence, head],
                )
            )
            with one_blas_thread():
                mass = viz.block_mass(
                    inputs.q[sequence, head],
                    inputs.k[sequence, head // group],
                    causal=args.causal,
                    causal_align=args.causal_align,
                    sm_scale=args.sm_scale,
                )
            panels.append(viz.Panel(f"{label}: its attention\nshare in each block", mass))
            advance()
    return panels


def _write_pictures(
    targets: dict[str, Any], record: dict[str, Any], panels: list[viz.Panel], max_error: float
) -> None:
    maps = viz.png(viz.draw_panels(panels, columns=4), dpi=100)
    if "png" in targets:
        files.write_atomic(targets["png"], maps)
    if "html" in targets:
        # One line for each rule and similarity threshold of each head, along the other threshold.
        curves = []
        for row in record["best"]:
            where = (row["sequence"], row["head"])
            for sim in dict.fromkeys(result["sim_threshold"] for result in record["results"]):
                line = [r for r in record["results"] if r["sim_threshold"] == sim]
                curves.append(
                    (
                        f"sequence {where[0]}, head {where[1]}, sim {sim:g}",
                        [r["sparsity_per_head"][where] for r in line],
                        [r["error_per_head"][where] for r in line],
                    )
                )
        drawn = viz.png(viz.draw_curves(curves, limit=max_error), dpi=100)
        files.write_atomic(targets["html"], report.render(record, curves=drawn, maps=maps))


def _show(ui: Ui, record: dict[str, Any]) -> None:
    ui.show(f"file      {record['file']}")
    for name in "qkv":
        entry = record["inputs"][name]
        ui.show(f"{name}         {'x'.join(map(str, entry['shape']))} {entry['dtype']}")
    ui.show(f"machine   {describe_machine(record['machine'])}", "")
    ui.show(
        table(
            "settings, all heads together",
            ("policy", "sparsity", "error", "worst head"),
            (
                (r["name"], f"{r['sparsity']:.3f}", f"{r['error']:.4f}", f"{r['worst_error']:.4f}")
                for r in record["results"]
            ),
        )
    )
    rows = [
        (
            str(row["sequence"]),
            str(row["head"]),
            row["name"],
            f"{row['sparsity']:.3f}",
            f"{row['error']:.4f}",
        )
        for row in record["best"]
    ]
    title = f"best setting of each head with an error of at most {record['max_error']:g}"
    columns = ("sequence", "head", "policy", "sparsity", "error")
    ui.show(table(title, columns, rows, words=3))
    ui.show(
        "error: sum |O - O'| / sum |O| against dense attention in float32; sparsity: share of the "
        "block products not computed."
    )
