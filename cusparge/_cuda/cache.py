"""Compiled kernels on disk: two files an entry, machine code and what is known about it.

``<root>/v1/<kernel>-<arch>-<key>.cubin`` lies beside a ``.json`` of the same stem. The key is a
hash of everything that the machine code depends on, so an entry never grows stale and writers
cannot disagree: there are no lock files. Both files are written under another name and renamed, the
cubin first; the json commits the entry. Whoever reads checks the cubin against the hash in the
json, and what does not fit is removed and compiled again.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from cusparge.errors import InvalidArgumentError

__all__ = ["FORMAT", "Cache", "Entry", "Info", "Key", "default", "folder", "limit", "root"]

#: Version of the layout and of the metadata; part of every key.
FORMAT = 1

_FOLDER = f"v{FORMAT}"
_STEM = re.compile(r"[A-Za-z0-9_]{1,100}-sm_[0-9]{2,3}[af]?-[0-9a-f]{20}")
_HEX = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".part"

#: Seconds after which a file that nobody has finished belongs to a writer that is gone.
_STALE = 3600
#: More than any entry's description needs.
_MAX_JSON = 1 << 20

_WINDOWS = sys.platform == "win32"

_LIMIT_VARIABLE = "CUSPARGE_CACHE_LIMIT"
_DEFAULT_LIMIT = 256 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Key:
    """What an entry is found by.

    `digest` covers everything; `source_digest` leaves the version of the compiler out. Both are
    SHA-256 in hexadecimal digits.
    """

    kernel: str
    arch: str
    digest: str
    source_digest: str

    @property
    def stem(self) -> str:
        """The files' name without its suffix."""
        return f"{Path(self.kernel).stem}-{self.arch}-{self.digest[:20]}"


@dataclass(frozen=True)
class Info:
    """What is known about one compiled kernel; the json file holds these fields."""

    kernel: str  #: file of kernels_cu
    expression: str  #: C++ name
    lowered: str  #: name in the machine code
    arch: str
    options: tuple[str, ...]
    nvrtc: str  #: "13.0"
    cusparge: str  #: version of this package
    key: str
    source_key: str  #: the key without NVRTC's version
    sha256: str  #: of the cubin
    size: int  #: bytes of the cubin
    registers: int  #: of one thread; -1 where the compiler did not say
    spill_bytes: int  #: stores and loads of registers that did not fit
    stack_bytes: int
    compile_ms: float

    @classmethod
    def parse(cls, data: bytes) -> Info:
        """Read what `dump` wrote; ValueError for anything else."""
        try:
            raw = json.loads(data)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError("not the metadata of a compiled kernel")
        values: dict[str, Any] = {field.name: raw.get(field.name) for field in fields(cls)}
        for name in ("size", "registers", "spill_bytes", "stack_bytes"):
            if type(values[name]) is not int or not -1 <= values[name] < 1 << 40:
                raise ValueError(f"{name} is no number of this size")
        if type(values["compile_ms"]) not in (int, float) or not 0 <= values["compile_ms"] < 1e9:
            raise ValueError("compile_ms is no duration")
        options = values["options"]
        if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
            raise ValueError("options is no list of texts")
        values["options"] = tuple(options)
        for name in ("kernel", "expression", "lowered", "arch", "nvrtc", "cusparge"):
            if not isinstance(values[name], str) or not values[name]:
                raise ValueError(f"{name} is no text")
        for name in ("key", "source_key", "sha256"):
            if not isinstance(values[name], str) or not _HEX.fullmatch(values[name]):
                raise ValueError(f"{name} is no SHA-256")
        info = cls(**values)
        if not _STEM.fullmatch(info.stem):
            raise ValueError("kernel or arch is no name of one")
        return info

    def dump(self) -> bytes:
        """Return the json file's bytes."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1, sort_keys=True).encode()

    @property
    def stem(self) -> str:
        """The files' name without its suffix."""
        return Key(self.kernel, self.arch, self.key, self.source_key).stem


@dataclass(frozen=True)
class Entry:
    """One compiled kernel on disk."""

    path: Path  #: the cubin
    info: Info

    @property
    def metadata(self) -> Path:
        """The json file."""
        return self.path.with_suffix(".json")


class Cache:
    """The entries below one folder.

    Parameters
    ----------
    root : path
        The entries lie in its folder ``v1``, which the first `put` creates.
    read_only : bool
        Never write, remove or touch anything, and accept entries in `root` itself as well.
    """

    def __init__(self, root: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.root = Path(os.path.abspath(root))
        self.folder = self.root / _FOLDER
        self.read_only = read_only
        #: Entries that did not fit their hash since this object was made.
        self.corrupt = 0

    def get(self, key: Key) -> Entry | None:
        """Return the entry of a key, checked, or None."""
        for place in self._places():
            entry = self._read(place / f"{key.stem}.json")
            if entry is not None and entry.info.key == key.digest:
                return entry
        return None

    def get_source(self, key: Key) -> Entry | None:
        """Return an entry of the same sources from whatever version of the compiler, or None."""
        pattern = f"{Path(key.kernel).stem}-{key.arch}-*.json"
        for place in self._places():
            for path in sorted(place.glob(pattern)):
                entry = self._read(path)
                if entry is not None and entry.info.source_key == key.source_digest:
                    return entry
        return None

    def put(self, cubin: bytes, info: Info) -> Entry:
        """Write an entry, then remove the oldest ones beyond the limit; OSError if it cannot."""
        if self.read_only:
            raise PermissionError(f"{self.root} is only read")
        if info.sha256 != sha256(cubin).hexdigest() or info.size != len(cubin):
            raise ValueError("the metadata belongs to another cubin")
        bound = limit()
        entry = Entry(self.folder / f"{info.stem}.cubin", info)
        for attempt in range(3):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write(entry.path, cubin, entry)
                self._write(entry.metadata, info.dump(), entry)
                break
            except FileNotFoundError:  # somebody cleared the cache, or removed the folder
                if attempt == 2:
                    raise
        self._trim(bound, keep=entry.path.stem)
        return entry

    def entries(self) -> list[Entry]:
        """Return what is there, sorted by name, by metadata alone: no cubin is read."""
        found: dict[str, Entry] = {}
        for place in self._places():
            for path in sorted(place.glob("*.json")):
                info = _parsed(path)
                cubin = path.with_suffix(".cubin")
                if info is not None and info.stem == path.stem and cubin.is_file():
                    found.setdefault(path.stem, Entry(cubin, info))
        return [found[stem] for stem in sorted(found)]

    def drop(self, entry: Entry) -> None:
        """Remove an entry; nothing happens where it is gone or this cache is only read."""
        if not self.read_only:
            _unlink(entry.metadata)
            _unlink(entry.path)

    def clear(self) -> tuple[int, int]:
        """Remove every entry, and what was kept of failed compilations; return count and bytes."""
        count = total = 0
        for stem, (size, _) in self._sizes().items():
            # The json first: an entry without one does not exist.
            if _unlink(self.folder / f"{stem}.json") | _unlink(self.folder / f"{stem}.cubin"):
                count += 1
                total += size
        self._sweep(60)  # a minute: what others write right now is left to them
        shutil.rmtree(self.root / "failed", ignore_errors=True)
        return count, total

    def size(self) -> int:
        """Return the bytes of all entries, both files of each."""
        return sum(size for size, _ in self._sizes().values())

    def _places(self) -> tuple[Path, ...]:
        return (self.folder, self.root) if self.read_only else (self.folder,)

    def _read(self, path: Path) -> Entry | None:
        """Return the entry whose json is `path`, if all of it is right; else remove it."""
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:  # not ours to read: whoever may write will replace it
            return None
        cubin = path.with_suffix(".cubin")
        try:
            info = Info.parse(data)
            code = cubin.read_bytes()
            good = (
                info.stem == path.stem
                and info.size == len(code)
                and info.sha256 == sha256(code).hexdigest()
            )
        except (OSError, ValueError):
            good = False
        if good:
            self._touch(path)
            return Entry(cubin, info)
        self.corrupt += 1
        if not self.read_only:
            _unlink(path)
            _unlink(cubin)
        return None

    def _touch(self, path: Path) -> None:
        """Note that an entry was used: the limit removes what was not."""
        if not self.read_only:
            try:
                os.utime(path)
            except OSError:
                return

    def _write(self, target: Path, data: bytes, entry: Entry) -> None:
        temporary = target.parent / f".{target.name}-{secrets.token_hex(8)}{_TEMPORARY}"
        # Not mkstemp: it keeps others from reading what is in a folder that is shared on purpose.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._replace(temporary, target, entry)
        finally:
            _unlink(temporary)

    def _replace(self, temporary: Path, target: Path, entry: Entry) -> None:
        for attempt in range(10):
            try:
                os.replace(temporary, target)
                return
            except PermissionError:
                # Windows, while another process has the target open. Writers agree, so an entry
                # that is complete is as good as ours.
                if not _WINDOWS:
                    raise
                if self._is_complete(entry):
                    return
                time.sleep(0.02 * (attempt + 1))
        os.replace(temporary, target)

    def _is_complete(self, entry: Entry) -> bool:
        found = self._read(entry.metadata)
        return found is not None and found.info.sha256 == entry.info.sha256

    def _sizes(self) -> dict[str, tuple[int, float]]:
        """Return {stem: (bytes of both files, time of the last use)}."""
        sizes: dict[str, int] = {}
        used: dict[str, float] = {}
        for item in _scan(self.folder):
            stem, suffix = os.path.splitext(item.name)
            if suffix not in (".json", ".cubin") or not _STEM.fullmatch(stem):
                continue
            try:
                status = item.stat()
            except OSError:  # gone meanwhile
                continue
            sizes[stem] = sizes.get(stem, 0) + status.st_size
            # A cubin alone may be half an entry in the making: then its own time counts.
            if suffix == ".json" or stem not in used:
                used[stem] = status.st_mtime
        return {stem: (size, used[stem]) for stem, size in sizes.items()}

    def _trim(self, bound: int, keep: str) -> None:
        """Remove the entries that were not used for longest, until the rest fits the limit."""
        self._sweep(_STALE)
        sizes = self._sizes()
        total = sum(size for size, _ in sizes.values())
        for stem in sorted(sizes, key=lambda stem: sizes[stem][1]):
            if total <= bound:
                return
            if stem != keep:
                _unlink(self.folder / f"{stem}.json")
                _unlink(self.folder / f"{stem}.cubin")
                total -= sizes[stem][0]

    def _sweep(self, age: float) -> None:
        """Remove temporary files, and cubins without metadata, that are older than `age`."""
        before = time.time() - age
        for item in _scan(self.folder):
            path = Path(item.path)
            left = item.name.endswith(_TEMPORARY) or (
                path.suffix == ".cubin" and not path.with_suffix(".json").exists()
            )
            try:
                if left and item.stat().st_mtime <= before:
                    _unlink(path)
            except OSError:  # gone meanwhile
                continue


def _scan(place: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(place) as items:
            yield from items
    except OSError:  # not there yet, or not ours to see
        return


def _parsed(path: Path) -> Info | None:
    try:
        if path.stat().st_size > _MAX_JSON:
            return None
        return Info.parse(path.read_bytes())
    except (OSError, ValueError):
        return None


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # gone already, open elsewhere, or not ours: nobody depends on its going
        return False
    return True


def root() -> Path:
    """Return the folder of the cache, which may not exist yet.

    ``CUSPARGE_CACHE_DIR``, else ``cusparge`` in the user's cache folder. RuntimeError where the
    user has no home folder.
    """
    given = os.environ.get("CUSPARGE_CACHE_DIR")
    if given:
        return Path(os.path.abspath(os.path.expanduser(given)))
    if _WINDOWS:
        local = os.environ.get("LOCALAPPDATA")
        return Path(local, "cusparge") if local else Path.home() / "AppData/Local/cusparge"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored, says the XDG specification.
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "cusparge"


def limit() -> int:
    """Return how many bytes the cache may take: ``CUSPARGE_CACHE_LIMIT``, 256 MiB by default."""
    text = os.environ.get(_LIMIT_VARIABLE)
    if not text:
        return _DEFAULT_LIMIT
    found = re.fullmatch(r"\s*([0-9]{1,15})\s*([KMG]?)(i?B)?\s*", text, re.IGNORECASE | re.ASCII)
    if not found:
        raise InvalidArgumentError(
            f"{_LIMIT_VARIABLE}={text[:100]} is not a size. Allowed: a number of bytes, or one "
            f"with K, M or G behind it, such as 512M. Unset it for {_DEFAULT_LIMIT >> 20}M."
        )
    return int(found[1]) * _UNITS[found[2].upper()]


def folder() -> Path:
    """Return the folder that holds the compiled kernels, which may not exist yet."""
    return default().folder


_caches: dict[Path, Cache] = {}
_lock = threading.Lock()


def default() -> Cache:
    """Return the cache that the environment names."""
    place = root()
    with _lock:
        return _caches.setdefault(place, Cache(place))


def _reset() -> None:
    """Replace the lock in a forked child: the parent's thread that held it is not there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
