"""Where the CUDA sources lie, and their bytes.

``kernels_cu`` is part of the installed package, and stands beside the package in a checkout.
``CUSPARGE_KERNELS`` names another folder, for those who change kernels.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cusparge.errors import CompileError

__all__ = ["MARKER", "Sources", "digest", "find", "load"]

#: A folder is ours when it holds this file: others may have a folder of the same name.
MARKER = "cusparge/geometry.cuh"

_VARIABLE = "CUSPARGE_KERNELS"
_SUFFIXES = (".cu", ".cuh")


@dataclass(frozen=True)
class Sources:
    """The CUDA sources: name with forward slashes -> bytes as shipped."""

    files: Mapping[str, bytes]
    folder: Path
    source_id: str

    @property
    def headers(self) -> Mapping[str, bytes]:
        """The files that others include, sorted by name."""
        return {name: self.files[name] for name in sorted(self.files) if name.endswith(".cuh")}


def digest(fields: Iterable[bytes]) -> str:
    """Return the SHA-256 of the fields, each behind its length: none can run into the next."""
    total = hashlib.sha256()
    for field in fields:
        total.update(len(field).to_bytes(8, "little"))
        total.update(field)
    return total.hexdigest()


def find() -> Path:
    """Return the folder of the sources."""
    given = os.environ.get(_VARIABLE)
    if given:
        folder = Path(os.path.abspath(os.path.expanduser(given)))
        if not (folder / MARKER).is_file():
            raise CompileError(
                f"{_VARIABLE}={given} is no folder of cusparge's CUDA sources: it holds no file "
                f"{MARKER}. Set it to a copy of kernels_cu, or unset it."
            )
        return folder
    package = Path(__file__).resolve().parents[1]
    tried = (package / "kernels_cu", package.parent / "kernels_cu")
    for folder in tried:
        if (folder / MARKER).is_file():
            return folder
    raise CompileError(
        f"cusparge's CUDA sources are missing: neither {tried[0]} nor {tried[1]} holds {MARKER}. "
        f"Install cusparge again, or set {_VARIABLE} to a copy of kernels_cu."
    )


def load() -> Sources:
    """Return the sources, read once a process: all kernels of one come from the same text."""
    return _read(find())


@functools.lru_cache(maxsize=8)
def _read(folder: Path) -> Sources:
    files: dict[str, bytes] = {}
    try:
        for path in sorted(folder.rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
    except OSError as error:
        raise CompileError(
            f"cusparge's CUDA sources cannot be read: {error}. Make {folder} readable, or set "
            f"{_VARIABLE} to a copy of it."
        ) from error
    if broken := [name for name, data in files.items() if b"\0" in data]:
        raise CompileError(
            f"{folder / broken[0]} holds a zero byte and is no source text: copy kernels_cu again."
        )
    fields = (part for name, data in sorted(files.items()) for part in (name.encode(), data))
    return Sources(MappingProxyType(files), folder, digest(fields)[:12])
