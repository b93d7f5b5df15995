"""``cusparge cache``: the folder of compiled kernels."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusparge._cuda.notices import short
from cusparge.cli.ui import Ui, table
from cusparge.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cusparge._cuda.archive import Report
    from cusparge._cuda.cache import Cache, Entry

__all__ = ["add_parser", "amount", "open_cache"]

EXAMPLES = """\
The folder is the one of CUSPARGE_CACHE_DIR, else a folder of your user. Nothing asks back: what is
cleared is compiled again when it is needed. Import only archives that you trust: they hold machine
code.

examples:
  cusparge cache path
  cusparge cache list --json
  cusparge cache export kernels.tar       on one machine, and on the next:
  cusparge cache import kernels.tar
  cusparge cache clear
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and what it can do."""
    parser = commands.add_parser(
        "cache",
        parents=[common],
        help="the compiled kernels: where they are, list, clear, export, import",
        description="Show, clear or move the compiled kernels that are kept on disk.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    for name, execute, words in (
        ("path", _path, "print the folder, and nothing else"),
        ("list", _list, "kernels, architectures, sizes, NVRTC's version, last use"),
        ("clear", _clear, "remove all kernels; they are compiled again when needed"),
        ("export", _export, "write all kernels into one file, for another machine"),
        ("import", _import, "take the kernels out of such a file"),
    ):
        action = actions.add_parser(
            name, parents=[common], help=words, description=words, allow_abbrev=False
        )
        if name in ("export", "import"):
            action.add_argument("file", metavar="FILE", help="a .tar file")
        action.set_defaults(execute=execute)


def open_cache() -> Cache:
    """Return the cache that the environment names."""
    from cusparge._cuda import cache

    try:
        return cache.default()
    except RuntimeError as error:  # of pathlib
        raise InvalidArgumentError(
            f"there is no folder for compiled kernels: {str(error).rstrip('.')}. Name one in "
            "CUSPARGE_CACHE_DIR."
        ) from error


def _open_readable() -> Cache:
    """Return the cache; an error where nobody can tell what it holds."""
    store = open_cache()
    if (error := store.blocked()) is not None:
        raise InvalidArgumentError(
            f"{short(store.folder)}: {error.strerror}: what it holds cannot be seen. Make it a "
            "folder that you may read and write, or name another in CUSPARGE_CACHE_DIR."
        )
    return store


def amount(size: int) -> str:
    """Return a number of bytes in the unit that suits it.

    Examples
    --------
    >>> amount(900), amount(3 << 20)
    ('900 B', '3.0 MiB')
    """
    if size < 1024:
        return f"{size} B"
    value, unit = size / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"


def _path(args: argparse.Namespace, ui: Ui) -> int:
    folder = str(open_cache().folder)
    ui.result({"command": "cache path", "path": folder})
    if not ui.as_json:
        # Not through `ui.show`, which breaks long lines on a terminal.
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(folder.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return 0


def _list(args: argparse.Namespace, ui: Ui) -> int:
    from cusparge._cuda import cache

    store = _open_readable()
    now = time.time()
    rows = [_row(entry, now) for entry in store.entries()]
    used, limit = store.size(), cache.limit()
    record = {
        "command": "cache list",
        "path": short(store.folder),
        "bytes": used,
        "limit_bytes": limit,
        "architectures": list(dict.fromkeys(row["arch"] for row in rows)),
        "kernels": rows,
    }
    ui.result(record)
    if not rows:
        ui.show(f"no compiled kernels in {record['path']}")
        return 0
    cells = (
        (
            row["expression"],
            row["arch"],
            amount(row["bytes"]),
            row["nvrtc"],
            "-" if row["registers"] is None else str(row["registers"]),
            _age(row["age_seconds"]),
        )
        for row in rows
    )
    columns = ("kernel", "architecture", "size", "NVRTC", "registers", "last used")
    ui.show(
        table(f"compiled kernels in {record['path']}", columns, cells, words=2),
        f"{len(rows)} kernels, {amount(used)} of at most {amount(limit)}",
    )
    return 0


def _row(entry: Entry, now: float) -> dict[str, Any]:
    info = entry.info
    try:
        # Each use touches the metadata: this is what the limit goes by.
        age = max(0.0, now - entry.metadata.stat().st_mtime)
    except OSError:  # removed meanwhile
        age = 0.0
    return {
        "kernel": Path(info.kernel).stem,
        "expression": info.expression,
        "arch": info.arch,
        "bytes": info.size,
        "nvrtc": info.nvrtc,
        "cusparge": info.cusparge,
        "registers": info.registers if info.registers >= 0 else None,
        "spill_bytes": info.spill_bytes if info.spill_bytes >= 0 else None,
        "compile_seconds": info.compile_ms / 1e3,
        "age_seconds": age,
        "file": entry.path.name,
    }


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def _clear(args: argparse.Namespace, ui: Ui) -> int:
    store = _open_readable()
    count, freed = store.clear()
    left = store.size()
    ui.result(
        {
            "command": "cache clear",
            "path": short(store.folder),
            "removed": count,
            "bytes": freed,
            "bytes_left": left,
        }
    )
    kernels = "kernel" if count == 1 else "kernels"
    ui.show(f"removed {count} {kernels}, {amount(freed)}, from {short(store.folder)}")
    if left:
        ui.note(
            f"cusparge: error: {amount(left)} could not be removed from "
            f"{short(store.folder)}: it cannot be written to, or the files are in use"
        )
    return 1 if left else 0


def _export(args: argparse.Namespace, ui: Ui) -> int:
    from cusparge._cuda import archive

    target = Path(os.path.realpath(args.file))  # a link is written through, not replaced
    if not target.parent.is_dir():
        raise InvalidArgumentError(f"{args.file}: the folder to write to does not exist.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InvalidArgumentError(
            f"{args.file}: the folder {target.parent} cannot be written to. Choose another place."
        )
    if target.exists() and not target.is_file():
        raise InvalidArgumentError(f"{args.file}: exists and is not an ordinary file.")
    store = _open_readable()
    try:
        report = archive.export(store, target)
    except OSError as error:
        raise InvalidArgumentError(
            f"{args.file}: {error.strerror}: the archive could not be written, and what was there "
            "is as before. Free some room, or name a file in another folder."
        ) from error
    _tell(ui, "export", args.file, report)
    if report.skipped:
        names = ", ".join(report.skipped)
        ui.note(f"left out, because they are damaged: {names}; they are compiled again when needed")
    return 0


def _import(args: argparse.Namespace, ui: Ui) -> int:
    from cusparge._cuda import archive

    store = open_cache()
    try:
        report = archive.import_(args.file, store)
    except OSError as error:
        if error.filename is None or Path(error.filename) == Path(args.file):
            raise  # it is the archive that cannot be read
        raise InvalidArgumentError(
            f"{error.filename}: {error.strerror}: the kernels of {args.file} could not be put "
            "there; what was imported before stays. Free some room, or name a folder that can be "
            "written to in CUSPARGE_CACHE_DIR."
        ) from error
    _tell(ui, "import", args.file, report)
    return 0


def _tell(ui: Ui, action: str, file: str, report: Report) -> None:
    record = {
        "command": f"cache {action}",
        "file": file,
        "kernels": report.kernels,
        "architectures": list(report.architectures),
        "bytes": report.bytes,
        "skipped": list(report.skipped),
    }
    ui.result(record)
    kernels = "kernel" if report.kernels == 1 else "kernels"
    architectures = ", ".join(report.architectures)
    if action == "export":
        ui.show(f"wrote {report.kernels} {kernels} for {architectures} to {file}")
        ui.show(f"{amount(report.bytes)}; on the other machine: cusparge cache import FILE")
    else:
        there = len(report.skipped)
        known = f", {there} of them here already" if there else ""
        ui.show(f"imported {report.kernels} {kernels} for {architectures} from {file}{known}")
