"""Compiled kernels on disk: two files an entry, machine code and what is known about it.

``<root>/v1/<kernel>-<arch>-<key>.cubin`` lies beside a ``.json`` of the same stem. The key is a
hash of everything that the machine code depends on, so an entry never grows stale and writers
cannot disagree: there are no lock files. Both files are written under another name and renamed, the
cubin first; the json commits the entry. Whoever reads checks the cubin against the hash in the
json, and what does not fit is removed and compiled again.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterator
from hashlib import sha256
from pathlib import Path

from cusparge._cuda.entries import (
    FORMAT,
    MOST_JSON,
    STEM,
    Entry,
    Info,
    Key,
    read_file,
)
from cusparge.errors import InvalidArgumentError

__all__ = ["FORMAT", "Cache", "Entry", "Info", "Key", "default", "folder", "limit", "root"]

_FOLDER = f"v{FORMAT}"
_FAILED = "failed"
_TEMPORARY = ".part"

#: Our own names, exactly: a folder that the user chose may hold files of others as well.
_TEMPORARY_NAME = re.compile(rf"\.{STEM.pattern}\.(?:cubin|json)-[0-9a-f]{{16}}\.part")
_FAILED_NAME = re.compile(rf"{STEM.pattern}-[0-9a-f]{{8}}")

#: Seconds after which a file that nobody has finished belongs to a writer that is gone.
_STALE = 3600
#: Of failed compilations, so many are kept for the user.
_MOST_FAILED = 8

_WINDOWS = sys.platform == "win32"

_LIMIT_VARIABLE = "CUSPARGE_CACHE_LIMIT"
_DEFAULT_LIMIT = 256 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


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

    def get(self, key: Key, *, without: Collection[Path] = ()) -> Entry | None:
        """Return the entry of a key, checked, or None; cubins in `without` are passed over."""
        for place in self._places():
            path = place / f"{key.stem}.json"
            if path.with_suffix(".cubin") in without:
                continue
            entry = self._read(path)
            if entry is not None and entry.info.key == key.digest:
                return entry
        return None

    def get_source(self, key: Key, *, without: Collection[Path] = ()) -> Entry | None:
        """Return an entry of the same sources from whatever version of the compiler, or None."""
        begin = f"{Path(key.kernel).stem}-{key.arch}-"
        for place in self._places():
            for path in _described(place):
                if not path.name.startswith(begin) or path.with_suffix(".cubin") in without:
                    continue
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

    def blocked(self) -> OSError | None:
        """Return why nobody can look into the folder; None where it is not there yet."""
        try:
            os.stat(os.path.join(self.folder, "."))  # needs the right to reach the files in it
            with os.scandir(self.folder):
                return None
        except FileNotFoundError:
            return None
        except OSError as error:
            return error

    def entries(self) -> list[Entry]:
        """Return what is there, sorted by name, by metadata alone: no cubin is read."""
        found: dict[str, Entry] = {}
        for place in self._places():
            for path in _described(place):
                info = _parsed(path)
                cubin = path.with_suffix(".cubin")
                if info is not None and info.stem == path.stem and os.path.isfile(cubin):
                    found.setdefault(path.stem, Entry(cubin, info))
        return [found[stem] for stem in sorted(found)]

    def drop(self, entry: Entry) -> None:
        """Remove an entry; nothing happens where it is gone or this cache is only read."""
        if not self.read_only:
            _unlink(entry.metadata)
            _unlink(entry.path)

    def clear(self) -> tuple[int, int]:
        """Remove every entry, and what was kept of failed compilations; return count and bytes.

        Files of other names stay: the folder may be one that the user keeps other things in.
        """
        count = total = 0
        for stem, (size, _) in self._sizes().items():
            # The json first: an entry without one does not exist.
            if _unlink(self.folder / f"{stem}.json") | _unlink(self.folder / f"{stem}.cubin"):
                count += 1
                total += size
        self._sweep(60)  # a minute: what others write right now is left to them
        failed = self.root / _FAILED
        for path in _failures(failed):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # not there, or something of the user's lies in it
            failed.rmdir()
        return count, total

    def failure_folder(self, key: Key) -> Path:
        """Make a folder for the files of a failed compilation; only the newest ones are kept."""
        failed = self.root / _FAILED
        made = failed / f"{key.stem}-{secrets.token_hex(4)}"
        made.mkdir(parents=True)
        before = time.time() - 60  # others may be writing theirs right now
        for path in _failures(failed)[_MOST_FAILED:]:
            with contextlib.suppress(OSError):  # gone meanwhile
                if path != made and path.lstat().st_mtime < before:
                    shutil.rmtree(path, ignore_errors=True)
        return made

    def size(self) -> int:
        """Return the bytes of all entries, both files of each."""
        return sum(size for size, _ in self._sizes().values())

    def _places(self) -> tuple[Path, ...]:
        return (self.folder, self.root) if self.read_only else (self.folder,)

    def _read(self, path: Path) -> Entry | None:
        """Return the entry whose json is `path`, if all of it is right; else remove it."""
        cubin = path.with_suffix(".cubin")
        try:
            data: bytes | None = read_file(path, MOST_JSON)
        except OSError:  # not there, or not ours to read: whoever may write will replace it
            return None
        except ValueError:  # too large, or no file
            data = None
        try:
            info = Info.parse(data or b"")
            code = read_file(cubin, info.size)
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
        except OSError as error:
            if error.filename2 is None:  # a full disk names no file at all
                error.filename = str(target)
            raise
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
            if suffix not in (".json", ".cubin") or not STEM.fullmatch(stem):
                continue
            try:
                status = item.stat(follow_symlinks=False)
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
            left = _TEMPORARY_NAME.fullmatch(item.name) or (
                path.suffix == ".cubin"
                and STEM.fullmatch(path.stem)
                and not os.path.lexists(path.with_suffix(".json"))
            )
            try:
                if left and item.stat(follow_symlinks=False).st_mtime <= before:
                    _unlink(path)
            except OSError:  # gone meanwhile
                continue


def _scan(place: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(place) as items:
            yield from items
    except OSError:  # not there yet, or not ours to see
        return


def _described(place: Path) -> list[Path]:
    """Return the json files of entries, sorted by name."""
    names = (item.name for item in _scan(place))
    return [place / name for name in sorted(names) if _is_metadata(name)]


def _is_metadata(name: str) -> bool:
    return name.endswith(".json") and STEM.fullmatch(name.removesuffix(".json")) is not None


def _parsed(path: Path) -> Info | None:
    try:
        return Info.parse(read_file(path, MOST_JSON))
    except (OSError, ValueError):
        return None


def _failures(place: Path) -> list[Path]:
    """Return the folders of failed compilations, the newest first."""
    found = []
    for item in _scan(place):
        with contextlib.suppress(OSError):  # gone meanwhile
            if _FAILED_NAME.fullmatch(item.name) and item.is_dir(follow_symlinks=False):
                found.append((item.stat(follow_symlinks=False).st_mtime, item.path))
    return [Path(path) for _, path in sorted(found, reverse=True)]


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # gone already, open elsewhere, or not ours: nobody depends on its going
        return False
    return True


def root() -> Path:
    """Return the folder of the cache, which may not exist yet.

    ``CUSPARGE_CACHE_DIR``, else ``cusparge`` in the user's cache folder. RuntimeError where the
    user has no home folder, or the user that is named.
    """
    given = os.environ.get("CUSPARGE_CACHE_DIR")
    if given:
        place = os.path.expanduser(given)
        if place.startswith("~"):
            raise RuntimeError(
                f"CUSPARGE_CACHE_DIR={given[:200]} names the home folder of a user that is not "
                "known here (./~... is a folder of that name)"
            )
        return Path(os.path.abspath(place))
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
