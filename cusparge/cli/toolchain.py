"""What `doctor` says about compiling kernels: NVRTC, the CUDA sources, the cache.

Nothing is compiled, and nothing that is written stays.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cusparge._cuda import devices
from cusparge._cuda.notices import short
from cusparge.cli.checks import Findings, major
from cusparge.errors import CompileError

__all__ = ["check_layer", "has_builtins", "inspect_layer", "why_not_writable"]

#: Bytes that the cache must have room for: a few kernels.
_ROOM = 1 << 20


def inspect_layer(architectures: Sequence[str]) -> dict[str, Any]:
    """Return what kernels are compiled with and from, where they are kept, and which exist."""
    from cusparge._cuda import build, cache, nvrtc, sources, variants

    found: dict[str, Any] = {
        "nvrtc": {
            "version": None,
            "path": None,
            "builtins": None,
            "architectures": [],
            "error": None,
        },
        "sources": {"folder": None, "files": 0, "id": None, "error": None},
        "cache": {"folder": None, "writable": False, "kernels": 0, "bytes": 0, "error": None},
        "kernels": [],
    }
    compiler = None
    try:
        compiler = nvrtc.load()
        found["nvrtc"] |= {
            "version": "{}.{}".format(*compiler.version),
            "path": short(compiler.path),
            "builtins": has_builtins(Path(compiler.path)),
            "architectures": [f"sm_{number}" for number in compiler.supported_archs()],
        }
    except CompileError as error:
        found["nvrtc"]["error"] = str(error)
    try:
        text = sources.load()
        found["sources"] |= {
            "folder": short(text.folder),
            "files": len(text.files),
            "id": text.source_id,
        }
    except CompileError as error:
        found["sources"]["error"] = str(error)
    try:
        store = cache.default()
        found["cache"] |= {
            "folder": short(store.folder),
            "error": why_not_writable(store.folder),
            "kernels": len(store.entries()),
            "bytes": store.size(),
        }
    except RuntimeError as error:  # no home folder
        found["cache"]["error"] = str(error).rstrip(".")
    found["cache"]["writable"] = found["cache"]["error"] is None
    if found["sources"]["error"] is not None:
        return found
    for arch in architectures:
        kernels = variants.default_variants(arch)
        row: dict[str, Any] = {"arch": arch, "needed": len(kernels), "cached": 0, "error": None}
        found["kernels"].append(row)
        try:
            row["cached"] = sum(build.peek(kernel, arch) is not None for kernel in kernels)
            if compiler is not None:
                compiler.require_arch(arch)
        except CompileError as error:
            row["error"] = str(error)
    return found


def has_builtins(library: Path) -> bool | None:
    """Return whether NVRTC's second library lies beside it; None where its folder is not known."""
    if not library.is_absolute():
        return None
    folder = library.resolve().parent
    return any(next(folder.glob(name), None) for name in ("libnvrtc-builtins*", "nvrtc-builtins*"))


def why_not_writable(folder: Path) -> str | None:
    """Return what keeps files from being written to a folder that may not exist yet, or None.

    A file is written and removed again, in the folder or the nearest one above that exists: neither
    rights nor free space tell about quotas, read-only mounts and file systems without files.
    """
    place = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    try:
        with tempfile.TemporaryFile(dir=place, prefix=".cusparge-") as file:
            file.write(os.urandom(_ROOM))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _advice_on_nvrtc(otherwise: str) -> str:
    """Return how to come by another NVRTC: what is installed does not count beside the variable."""
    if os.environ.get("CUSPARGE_NVRTC"):
        return (
            "unset CUSPARGE_NVRTC, or name in it the NVRTC library of another CUDA toolkit, of "
            "version 12.8 or later"
        )
    return otherwise


def check_layer(gpu: dict[str, Any], layer: dict[str, Any], findings: Findings) -> None:
    """Find what stands in the way of compiling; where there is no GPU, nobody compiles."""
    present = gpu["devices"]
    compiler, text, store = layer["nvrtc"], layer["sources"], layer["cache"]
    if text["error"] is not None:
        findings.add(
            text["error"],
            "install cusparge again, or unset CUSPARGE_KERNELS",
            blocks=present,
            why="the CUDA sources are missing",
        )
    missing = {row["arch"] for row in layer["kernels"] if row["cached"] < row["needed"]}
    if compiler["error"] is not None and (present or os.environ.get("CUSPARGE_NVRTC")):
        findings.add(
            compiler["error"],
            f"{_advice_on_nvrtc(devices.extra_advice())}; or compile elsewhere and name the folder "
            "in CUSPARGE_CACHE_SEED",
            blocks=[device for device in present if device["arch"] in missing],
            why="NVRTC is missing",
        )
    if compiler["builtins"] is False and (present or os.environ.get("CUSPARGE_NVRTC")):
        findings.add(
            f"NVRTC's second library, nvrtc-builtins, is not beside {compiler['path']}: compiling "
            "may fail",
            _advice_on_nvrtc(f"install NVRTC again: {devices.extra_advice()}")
            + "; or copy both libraries",
        )
    for row in layer["kernels"]:
        if row["error"] is not None:
            blocked = [device for device in present if device["arch"] == row["arch"]]
            findings.add(
                row["error"],
                f"{_advice_on_nvrtc('install a newer NVRTC')}, or compile elsewhere and name the "
                "folder in CUSPARGE_CACHE_SEED",
                blocks=blocked if row["arch"] in missing else (),
                why="NVRTC is too old for it",
            )
    version, runs = compiler["version"], gpu["driver_cuda"]
    if present and version and runs and major(version) > major(runs):
        findings.add(
            f"NVRTC {version} makes machine code that a driver for CUDA {runs} may not load",
            f"{_advice_on_nvrtc(devices.extra_advice())}, or update the driver",
        )
    if (present or os.environ.get("CUSPARGE_CACHE_DIR")) and not store["writable"]:
        where = f"{store['folder'] or 'there is none'}: {store['error']}"
        findings.add(
            f"the cache cannot be written to ({where}): every process compiles anew, into a "
            "private folder that it removes",
            "free some room if the disk is full, or set CUSPARGE_CACHE_DIR to a folder of yours, "
            "or compile once with "
            '"cusparge compile --out DIR" and set CUSPARGE_CACHE_SEED=DIR',
        )
