"""Compiled kernels from one machine to another: the entries of a cache in one file, and back.

An archive is a plain tar file with a manifest. Reading one checks all of it before anything is
written. The check finds what is damaged or not ours; it cannot tell good machine code from bad, so
only archives of a source that is trusted should be imported.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cusparge._cuda import cache as caches
from cusparge._cuda import tarball
from cusparge._cuda.cache import Cache, Info, Key
from cusparge._cuda.entries import MOST_CUBIN, MOST_JSON, read_file
from cusparge.errors import InvalidArgumentError

__all__ = ["Report", "export", "import_"]

_STEM = r"[A-Za-z0-9_]{1,67}-sm_[0-9]{2,3}[af]?-[0-9a-f]{20}"
#: What an archive may hold, and how many bytes each file may have.
_LIMITS = {_STEM + r"\.cubin": MOST_CUBIN, _STEM + r"\.json": MOST_JSON}
_KERNEL_FILE = re.compile(r"[A-Za-z0-9_]+\.cu")
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class Report:
    """What was exported or imported.

    Attributes
    ----------
    kernels : int
        Entries in the archive.
    architectures : tuple of str
        What they were compiled for.
    bytes : int
        Size of the archive.
    skipped : tuple of str
        Names of the entries that were left out: on export the damaged ones, on import those that
        the cache holds already.
    """

    kernels: int
    architectures: tuple[str, ...]
    bytes: int
    skipped: tuple[str, ...]


def export(cache: Cache, file: str | os.PathLike[str]) -> Report:
    """Write all entries of a cache into one file, replacing it whole or not at all.

    Parameters
    ----------
    cache : Cache
        Where the entries are.
    file : path
        What to write.

    Raises
    ------
    InvalidArgumentError
        There is nothing to export, or too much for one file.
    OSError
        The file cannot be written.
    """
    files: dict[str, bytes] = {}
    skipped = []
    infos = []
    for entry in cache.entries():
        try:
            cubin = read_file(entry.path, entry.info.size)
        except (OSError, ValueError):
            cubin = b""
        metadata = entry.info.dump()
        try:
            _check_entry(entry.path.stem, cubin, metadata)
        except InvalidArgumentError:
            skipped.append(entry.path.stem)
            continue
        files[entry.path.name] = cubin
        files[entry.metadata.name] = metadata
        infos.append(entry.info)
    if not infos:
        damaged = f" but {len(skipped)} damaged ones" if skipped else ""
        raise InvalidArgumentError(
            f"nothing to export: the cache {cache.root} holds no compiled kernels{damaged}. "
            'Compile some with "cusparge compile", or name another cache in CUSPARGE_CACHE_DIR.'
        )
    size = tarball.write(Path(file), files)
    return Report(len(infos), _architectures(infos), size, tuple(skipped))


def import_(file: str | os.PathLike[str], cache: Cache) -> Report:
    """Put all entries of an archive into a cache, or none where any part of it is not right.

    Parameters
    ----------
    file : path
        What `export` wrote.
    cache : Cache
        Where to put the entries.

    Raises
    ------
    InvalidArgumentError
        The file is no such archive, or it was damaged; nothing was written then.
    OSError
        The file cannot be read, or the cache cannot be written: its `filename` tells which. What
        was put into the cache before that stays there.
    """
    path = Path(file)
    files = tarball.read(path, limits=_LIMITS)
    try:
        found = _parse_entries(files)
    except InvalidArgumentError as error:
        raise tarball.refused(path, error) from None
    total, most = sum(map(len, files.values())), caches.limit()
    if total > most:
        raise InvalidArgumentError(
            f"{path}: holds {total} bytes of kernels, and the cache may take {most}: nothing was "
            f"imported. Set CUSPARGE_CACHE_LIMIT to {-(-total >> 20) + 1}M or more."
        )
    skipped = []
    for info, cubin in found:
        if cache.get(Key(info.kernel, info.arch, info.key, info.source_key)) is not None:
            skipped.append(info.stem)
        else:
            cache.put(cubin, info)
    infos = [info for info, _ in found]
    return Report(len(infos), _architectures(infos), path.stat().st_size, tuple(skipped))


def _architectures(infos: Iterable[Info]) -> tuple[str, ...]:
    return tuple(sorted({info.arch for info in infos}, key=lambda arch: (len(arch), arch)))


def _parse_entries(files: Mapping[str, bytes]) -> list[tuple[Info, bytes]]:
    """Return all entries, or say which file does not belong to one."""
    found = []
    for name, data in files.items():
        stem, suffix = os.path.splitext(name)
        other = stem + (".json" if suffix == ".cubin" else ".cubin")
        if other not in files:
            raise InvalidArgumentError(f"it holds {name} without {other}")
        if suffix == ".json":
            found.append((_check_entry(stem, files[other], data), files[other]))
    if not found:
        raise InvalidArgumentError("it holds no kernels")
    return found


def _check_entry(stem: str, cubin: bytes, metadata: bytes) -> Info:
    """Return the metadata of one entry if all of it fits together."""
    name = f"{stem}.json"
    tarball.parse_json(metadata, name)
    try:
        info = Info.parse(metadata)
    except ValueError as error:
        raise InvalidArgumentError(f"{name}: {str(error)[:200]}") from None
    if not _KERNEL_FILE.fullmatch(info.kernel) or info.stem != stem:
        raise InvalidArgumentError(f"{name} describes another kernel")
    if info.size != len(cubin) or info.sha256 != hashlib.sha256(cubin).hexdigest():
        raise InvalidArgumentError(f"{name} describes other machine code than {stem}.cubin")
    if not cubin.startswith(_ELF):
        raise InvalidArgumentError(f"{stem}.cubin is no machine code")
    return info
