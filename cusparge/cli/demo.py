"""``cusparge demo``: dense and sparse attention side by side on real data."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.columns import Columns
from rich.text import Text

import cusparge
from cusparge import viz
from cusparge.cli import files
from cusparge.cli.measure import (
    describe_machine,
    machine,
    one_blas_thread,
    paired_times,
    relative_l1,
    torch_attention,
)
from cusparge.cli.options import describe_policy, policy_record
from cusparge.cli.ui import Ui, table

__all__ = ["add_parser"]

EXAMPLES = """\
examples:
  cusparge demo                 a few seconds on two cores
  cusparge demo --png maps.png  the block maps as a picture (needs matplotlib)
  cusparge demo --torch         time torch's own attention beside it, where torch is installed
  cusparge demo --json
"""

#: What the comparison may take, warm-up aside.
_SECONDS = 12.0


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="dense and sparse attention on real data that ships with the package",
        description="Compute attention dense and sparse on " + files.DEMO_SOURCE + ", and compare "
        "speed, error and sparsity. In float32 on the CPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--png", metavar="FILE", help="write the block maps of all heads as a PNG")
    parser.add_argument(
        "--torch", action="store_true", help="also time torch's scaled_dot_product_attention"
    )
    parser.set_defaults(execute=execute)


def policies() -> list[cusparge.Policy]:
    """Return the settings compared: the default first, then bolder ones."""
    return [cusparge.TopCdf(), cusparge.TopCdf(0.95, -1), cusparge.TopCdf(0.9, -1)]


def execute(args: argparse.Namespace, ui: Ui) -> int:
    """Run the command."""
    target = None
    if args.png:
        viz.require_matplotlib()
        target = files.check_output(args.png, inputs=[])
    inputs = files.demo_inputs().in_float32()
    arrays = (inputs.q, inputs.k, inputs.v)
    settings = policies()
    ui.note("the float64 reference ...")
    dense = cusparge.Dense(quantize=False)
    with one_blas_thread():
        exact = cusparge.attention(*arrays, policy=dense, backend="reference")

    functions = _functions(arrays, settings, ui if args.torch else None)
    repeats = 15
    with ui.progress("timing", repeats) as advance:
        times = paired_times(functions, repeats=repeats, seconds=_SECONDS, after_round=advance)

    results = [_row("dense", dense, arrays, exact, times)]
    for policy in settings:
        results.append(_row(describe_policy(policy), policy, arrays, exact, times))
    if "torch" in times:
        out = np.asarray(functions["torch"]())
        results.append(_row("torch", None, arrays, exact, times, out=out))

    maps = [cusparge.predict_block_map(*arrays[:2], policy=policy).mask for policy in settings]
    if target is not None:
        _write_png(target, maps, settings)
        ui.note(f"wrote {args.png}")
    record = {
        "command": "demo",
        "data": files.DEMO_SOURCE,
        "shape": inputs.q.shape,
        "dtype": "float32",
        "pairs": len(times["dense"]),
        "results": results,
        "png": args.png,
        "machine": machine(),
    }
    ui.result(record)
    if not ui.as_json:
        _show(ui, record, maps, settings)
    return 0


def _functions(
    arrays: Sequence[npt.NDArray[Any]], settings: Sequence[cusparge.Policy], ui: Ui | None
) -> dict[str, Callable[[], Any]]:
    """Return what to time; `ui` is given where torch is wanted."""

    def call(policy: cusparge.Policy) -> Callable[[], Any]:
        return lambda: cusparge.attention(*arrays, policy=policy)

    functions: dict[str, Callable[[], Any]] = {"dense": call(cusparge.Dense(quantize=False))}
    functions |= {describe_policy(policy): call(policy) for policy in settings}
    if ui is not None:
        ui.note("importing torch ...")
        torch = torch_attention(*arrays)
        if torch is None:
            ui.note("torch is not installed, so it is left out: pip install torch")
        else:
            functions["torch"] = torch
    return functions


def _row(
    name: str,
    policy: cusparge.Policy | None,
    arrays: Sequence[npt.NDArray[Any]],
    exact: npt.NDArray[Any],
    times: dict[str, list[float]],
    out: npt.NDArray[Any] | None = None,
) -> dict[str, Any]:
    """Return what is known of one way to compute it."""
    pairs = zip(times["dense"], times[name], strict=True)
    row: dict[str, Any] = {
        "name": name,
        "seconds": statistics.median(times[name]),
        "speedup": statistics.median(dense / mine for dense, mine in pairs),
    }
    if policy is not None:
        row |= policy_record(policy)
        out, stats = cusparge.attention(*arrays, policy=policy, return_stats=True)
        row["sparsity"] = stats.sparsity
        row["sparsity_per_head"] = stats.sparsity_per_head[0]
    assert out is not None
    row["error"] = float(relative_l1(out, exact))
    row["error_per_head"] = relative_l1(out, exact, axis=(-2, -1))[0]
    return row


def _write_png(
    target: Any, maps: Sequence[npt.NDArray[Any]], settings: Sequence[cusparge.Policy]
) -> None:
    panels = [
        viz.Panel(f"head {head}, {describe_policy(policy)}", mask[0, head])
        for head in range(maps[0].shape[1])
        for policy, mask in zip(settings, maps, strict=True)
    ]
    figure = viz.draw_panels(
        panels,
        columns=len(settings),
        title="Blocks computed (blue): Whisper tiny.en, encoder layer 3",
    )
    files.write_atomic(target, viz.png(figure))


def _show(
    ui: Ui,
    record: dict[str, Any],
    maps: Sequence[npt.NDArray[Any]],
    settings: Sequence[cusparge.Policy],
) -> None:
    """Print everything for people."""
    results = record["results"]
    heads = range(record["shape"][1])
    ui.show(f"data      {files.DEMO_SOURCE}")
    shape = "x".join(map(str, record["shape"]))
    ui.show(f"shape     {shape} (batch, heads, tokens, head_dim), computed in float32")
    ui.show(f"machine   {describe_machine(record['machine'])}", "")

    def cells(row: dict[str, Any]) -> list[str]:
        sparsity = f"{row['sparsity']:.3f}" if "sparsity" in row else "-"
        times = f"{row['seconds'] * 1e3:.1f} ms", f"{row['speedup']:.2f}x"
        return [row["name"], *times, f"{row['error']:.1e}", sparsity]

    ui.show(
        table(
            "attention, dense and sparse",
            ("policy", "time", "speed-up", "error", "sparsity"),
            map(cells, results),
        )
    )
    ui.show(
        f"time: median of {record['pairs']} rounds that run each once; speed-up: median of the "
        "rounds' own ratios to dense. error: sum |O - O'| / sum |O| against dense attention in "
        "float64. sparsity: share of the block products not computed.",
        "",
    )
    sparse = [row for row in results if row.get("sparsity_per_head") is not None][1:]
    rows = [
        [
            f"head {head}",
            *(
                f"{row['sparsity_per_head'][head]:.3f} / {row['error_per_head'][head]:.4f}"
                for row in sparse
            ),
        ]
        for head in heads
    ]
    columns = ["", *(row["name"] for row in sparse)]
    ui.show(table("sparsity / error of each head", columns, rows))
    chosen = settings[1]
    shares = [maps[1][0, head].mean() for head in heads]
    kinds = {int(np.argmin(shares)): "local", int(np.argmax(shares)): "global"}
    pictures = []
    for head, kind in sorted(kinds.items()):
        picture = viz.block_map_text(
            maps[1][0, head], width=max(8, ui.width // 2 - 4), ascii_only=ui.ascii_only
        )
        pictures.append(Text(f"head {head}, {kind}\n{picture}\n"))
    mark = "#" if ui.ascii_only else "█"
    ui.show(
        f"blocks that {describe_policy(chosen)} computes ({mark}): a line is 128 queries, "
        "a character 64 keys",
        "",
        Columns(pictures, padding=(0, 4)),
    )
