"""``cusparge compile``: compile kernels ahead of time, for GPUs that need not be here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cusparge._cuda import devices
from cusparge._cuda.notices import short
from cusparge.cli.cache import open_cache
from cusparge.cli.options import whole
from cusparge.cli.ui import Ui, table
from cusparge.errors import CompileError, CuspargeError, InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from cusparge._cuda.cache import Cache

__all__ = ["add_parser"]

EXAMPLES = """\
No GPU is needed. Without --arch, kernels are compiled for the GPUs of this machine; where there
are none, for sm_80, sm_86, sm_89, sm_90a, sm_100a and sm_120a. What the cache holds already is not
compiled again. Exit status 1 when a kernel failed; the others are compiled nevertheless.

examples:
  cusparge compile
  cusparge compile --arch sm_90a sm_120a --set all
  cusparge compile --arch 8.9 --out kernels      CUSPARGE_CACHE_SEED=kernels then uses them
"""


def _arch(text: str) -> str:
    try:
        return devices.check_arch(text)
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compile",
        parents=[common],
        help="compile kernels ahead of time, no GPU needed",
        description="Compile CUDA kernels with NVRTC and keep them in the cache, so that the first "
        "call does not wait.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--arch", nargs="+", action="extend", type=_arch, metavar="ARCH",
        help="architectures, such as sm_90a or 9.0 (default: those of the GPUs found)",
    )  # fmt: skip
    parser.add_argument(
        "--set", choices=("default", "all"), default="default",
        help="which kernels: those that a first call needs, or every one (default: default)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR",
        help="also write the kernels into this folder, in the layout of the cache",
    )  # fmt: skip
    parser.add_argument(
        "-j", "--jobs", type=whole(1), metavar="N",
        help="compilations at a time (default: one a core, at most 4)",
    )  # fmt: skip
    parser.set_defaults(execute=execute)


def choose_architectures(wanted: Sequence[str] | None, ui: Ui) -> tuple[list[str], str]:
    """Return the architectures to compile for, and what chose them."""
    if wanted:
        return list(wanted), "option"
    found: dict[str, None] = {}
    for gpu in devices.list_gpus():
        try:
            found[devices.arch_of(gpu.capability)] = None
        except CuspargeError as error:
            ui.note(f"left out: {gpu.name}: {error}")
    if found:
        return list(found), "gpus"
    names = ", ".join(devices.MAIN_ARCHITECTURES)
    ui.note(f"no GPU that kernels exist for was found here: compiling for all of {names}")
    return list(devices.MAIN_ARCHITECTURES), "default"


def execute(args: argparse.Namespace, ui: Ui) -> int:
    """Run the command."""
    from cusparge._cuda import variants
    from cusparge._cuda.cache import Cache

    architectures, chosen_by = choose_architectures(args.arch, ui)
    choose = variants.all_variants if args.set == "all" else variants.default_variants
    wanted = {arch: choose(arch) for arch in architectures}
    if empty := [arch for arch, kernels in wanted.items() if not kernels]:
        raise UnsupportedError(
            f"there are no kernels for {', '.join(empty)} in this version of cusparge; name other "
            "architectures with --arch."
        )
    target = open_cache() if args.out is None else Cache(args.out)
    if args.out is not None:
        target.folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is told now
    rows, builds = [], []
    with ui.progress("compiling", sum(map(len, wanted.values()))) as advance:
        for arch, kernels in wanted.items():
            built, row = _compile(arch, kernels, args.jobs, advance)
            builds += built
            rows.append(row)
    problems = {} if args.out is None else _write_out(builds, target)
    _check_kept(rows, builds, target, problems, allow_seeds=args.out is None)
    for row in rows:
        good = [kernel for kernel in row["kernels"] if kernel["error"] is None]
        row["cached"] = sum(kernel["cached"] for kernel in good)
        row["compiled"] = len(good) - row["cached"]
        row["failed"] = len(row["kernels"]) - len(good)
    ok = not any(row["failed"] for row in rows)
    record = {
        "command": "compile",
        "set": args.set,
        "chosen_by": chosen_by,
        "folder": short(target.root),
        "architectures": rows,
        "ok": ok,
    }
    ui.result(record)
    _show(ui, record)
    return 0 if ok else 1


def _compile(
    arch: str, kernels: Sequence[Any], jobs: int | None, advance: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Build the kernels of one architecture; return those that were built, and the report."""
    from cusparge._cuda import build

    cached = {kernel: build.peek(kernel, arch) is not None for kernel in kernels}
    seen = 0

    def on_done(done: int, total: int) -> None:
        nonlocal seen
        for _ in range(done - seen):
            advance()
        seen = done

    results = build.try_all(kernels, arch, jobs=jobs, on_done=on_done)
    built, entries = [], []
    for kernel, result in zip(kernels, results, strict=True):
        entry: dict[str, Any] = {
            "file": kernel.file,
            "expression": kernel.expression,
            "cached": cached[kernel],
            "path": None,
            "nvrtc": None,
            "seconds": 0.0,
            "registers": None,
            "spill_bytes": None,
            "error": None,
        }
        if isinstance(result, CompileError):
            entry["error"] = str(result)
        else:
            info = result.info
            built.append(result)
            entry |= {
                "path": short(result.path),
                "nvrtc": info.nvrtc,
                "seconds": 0.0 if cached[kernel] else info.compile_ms / 1e3,
                "registers": _known(info.registers),
                "spill_bytes": _known(info.spill_bytes),
            }
        entries.append(entry)
    row = {
        "arch": arch,
        "family": devices.family_of(arch),
        "seconds": sum(entry["seconds"] for entry in entries),
        "registers": max((entry["registers"] or 0 for entry in entries), default=0) or None,
        "spill_bytes": sum(entry["spill_bytes"] or 0 for entry in entries),
        "kernels": entries,
    }
    return built, row


def _known(number: int) -> int | None:
    return None if number < 0 else number


def _write_out(builds: Sequence[Any], target: Cache) -> dict[str, str]:
    """Copy what was built; return {name of a file: why it could not be written}."""
    from cusparge._cuda.entries import read_file

    problems = {}
    for binary in builds:
        try:
            cubin = read_file(binary.path, binary.info.size)
        except (OSError, ValueError):  # the limit has removed it again: `_check_kept` tells
            continue
        try:
            target.put(cubin, binary.info)
        except (OSError, ValueError) as error:
            problems[binary.path.name] = str(error)
    return problems


def _check_kept(
    rows: Sequence[dict[str, Any]],
    builds: Sequence[Any],
    target: Cache,
    problems: dict[str, str],
    *,
    allow_seeds: bool,
) -> None:
    """Note as an error what was compiled and is not there for the next process."""
    from cusparge._cuda import storage

    seeds = [folder for seed in storage.seeds() for folder in (seed.folder, seed.root)]
    places = {
        (binary.variant.file, binary.variant.expression, binary.arch): binary for binary in builds
    }
    for row in rows:
        for kernel in row["kernels"]:
            binary = places.get((kernel["file"], kernel["expression"], row["arch"]))
            if binary is None:
                continue
            kept = target.folder / binary.path.name
            # os.path: pathlib raises where we may not look.
            if os.path.exists(kept) and kept.name not in problems:
                kernel["path"] = short(kept)
            elif not (allow_seeds and binary.path.parent in seeds and os.path.exists(binary.path)):
                why = problems.get(kept.name) or (
                    "the folder cannot be written to, or CUSPARGE_CACHE_LIMIT is too small for all "
                    "kernels"
                )
                kernel["error"] = (
                    f"it was compiled but not kept in {short(target.root)}: {why}. Name another "
                    "folder in CUSPARGE_CACHE_DIR or with --out, or raise the limit."
                )


def _show(ui: Ui, record: dict[str, Any]) -> None:
    columns = ("architecture", "kernels", "compiled", "cached", "failed", "seconds")
    ui.show(
        table(
            "kernels",
            (*columns, "most registers", "spilled bytes"),
            (
                (
                    row["arch"],
                    str(len(row["kernels"])),
                    str(row["compiled"]),
                    str(row["cached"]),
                    str(row["failed"]),
                    f"{row['seconds']:.1f}",
                    "-" if row["registers"] is None else str(row["registers"]),
                    str(row["spill_bytes"]),
                )
                for row in record["architectures"]
            ),
        ),
        f"kept in {record['folder']}",
    )
    reasons: dict[str, list[str]] = {}
    for row in record["architectures"]:
        for kernel in row["kernels"]:
            if kernel["error"] is not None:
                name = f"{kernel['file']} ({kernel['expression']}) for {row['arch']}"
                reasons.setdefault(kernel["error"], []).append(name)
    for reason, names in reasons.items():
        ui.note("failed:")
        for name in names:
            ui.note(f"  {name}")
        ui.note(f"  {reason}")
