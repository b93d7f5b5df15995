"""What `doctor` says about compiling kernels: NVRTC, the CUDA sources, the cache.

Nothing is compiled, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cusparge._cuda import devices
from cusparge._cuda.notices import short
from cusparge.cli.checks import Findings, major
from cusparge.errors import CompileError

__all__ = ["check_layer", "has_builtins", "inspect_layer", "is_writable"]


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
            "writable": is_writable(store.folder),
            "kernels": len(store.entries()),
            "bytes": store.size(),
        }
    except RuntimeError as error:  # no home folder
        found["cache"]["error"] = str(error)
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


def is_writable(folder: Path) -> bool:
    """Return whether files can be written to a folder that may not exist yet; writes nothing."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False


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
            f"{devices.extra_advice()}; or compile elsewhere and name the folder in "
            "CUSPARGE_CACHE_SEED",
            blocks=[device for device in present if device["arch"] in missing],
            why="NVRTC is missing",
        )
    if compiler["builtins"] is False and (present or os.environ.get("CUSPARGE_NVRTC")):
        findings.add(
            f"NVRTC's second library, nvrtc-builtins, is not beside {compiler['path']}: compiling "
            "may fail",
            f"install NVRTC again: {devices.extra_advice()}; or copy both libraries",
        )
    for row in layer["kernels"]:
        if row["error"] is not None:
            blocked = [device for device in present if device["arch"] == row["arch"]]
            findings.add(
                row["error"],
                "install a newer NVRTC, or compile elsewhere and name the folder in "
                "CUSPARGE_CACHE_SEED",
                blocks=blocked if row["arch"] in missing else (),
                why="NVRTC is too old for it",
            )
    version, runs = compiler["version"], gpu["driver_cuda"]
    if present and version and runs and major(version) > major(runs):
        findings.add(
            f"NVRTC {version} makes machine code that a driver for CUDA {runs} may not load",
            f"{devices.extra_advice()}, or update the driver",
        )
    if (present or os.environ.get("CUSPARGE_CACHE_DIR")) and not store["writable"]:
        where = store["folder"] or f"there is none: {store['error']}"
        findings.add(
            f"the cache cannot be written to ({where}): every process compiles anew, into a "
            "private folder that it removes",
            "set CUSPARGE_CACHE_DIR to a folder of yours, or compile once with "
            '"cusparge compile --out DIR" and set CUSPARGE_CACHE_SEED=DIR',
        )
