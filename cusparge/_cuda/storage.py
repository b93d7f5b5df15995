"""Which folders compiled kernels are read from and written to.

Reading: the cache, this process's private folder if there is one, then the seeds, which
``CUSPARGE_CACHE_SEED`` names and nobody writes to. Writing: the cache; where that fails, because
it is read-only, full or blocked, a private folder that is removed when the process ends. A fixed
name in a shared folder would not do: machine code is loaded from here, and others could plant it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from cusparge._cuda import cache, private
from cusparge._cuda.cache import Cache, Entry, Info, Key
from cusparge._cuda.notices import say_once, short
from cusparge.errors import CompileError

__all__ = ["drop", "failure_folders", "lookup", "place", "seeds", "store"]

_SEED_VARIABLE = "CUSPARGE_CACHE_SEED"

_lock = threading.Lock()
#: The private folder, and the process that it belongs to.
_private: tuple[int, Cache] | None = None
#: Cubins that could not be loaded and cannot be removed: they are passed over.
_rejected: set[Path] = set()


def place() -> str:
    """Return the folder where kernels are written, for messages."""
    own = _own()
    try:
        return short((own or cache.default()).root)
    except RuntimeError:
        return "a private folder"


def seeds() -> list[Cache]:
    """Return the read-only caches that ``CUSPARGE_CACHE_SEED`` names."""
    found = []
    for name in filter(None, os.environ.get(_SEED_VARIABLE, "").split(os.pathsep)):
        folder = Path(os.path.abspath(os.path.expanduser(name)))
        if folder.is_dir():
            found.append(Cache(folder, read_only=True))
        else:
            say_once(f"{_SEED_VARIABLE} names {name}, which is no folder: mend or remove it")
    return found


def lookup(key: Key, *, exact: bool, without: Collection[Path] = ()) -> Entry | None:
    """Return the entry of a key, or None; cubins in `without` are passed over.

    A seed may have been compiled by another version of NVRTC. Where nothing can be compiled,
    `exact` is false, and that holds for the cache as well, which may have been filled elsewhere.
    """
    passed = {*_rejected, *without}
    own = _writable()
    for store_ in own:
        if (entry := store_.get(key, without=passed)) is not None:
            return entry
    others = seeds()
    for look in (Cache.get, Cache.get_source):
        for seed in others:
            if (entry := look(seed, key, without=passed)) is not None:
                return entry
    if not exact:
        for store_ in own:
            if (entry := store_.get_source(key, without=passed)) is not None:
                return entry
    return None


def store(cubin: bytes, info: Info) -> Entry:
    """Write an entry to the cache, or to the private folder where the cache cannot be written."""
    entry = _store(cubin, info)
    _rejected.discard(entry.path)  # it is a new file now
    return entry


def _store(cubin: bytes, info: Info) -> Entry:
    if (own := _own()) is None:
        try:
            return cache.default().put(cubin, info)
        except (OSError, RuntimeError) as error:
            own = _make_private(error)
    try:
        return own.put(cubin, info)
    except OSError as error:
        raise _nowhere(error) from error


def drop(path: Path) -> None:
    """Forget an entry that could not be loaded: remove it, or pass over it where that fails."""
    if any(path.parent == store_.folder for store_ in _writable()):
        with contextlib.suppress(OSError):  # a read-only folder, an open file, or no file at all
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            return
    _rejected.add(path)


def failure_folders(key: Key) -> Iterator[Path]:
    """Make folders that are kept for the user, for the files of a failure, until one will do."""
    with contextlib.suppress(OSError, RuntimeError):
        yield cache.default().failure_folder(key)
    with contextlib.suppress(OSError):
        yield Path(tempfile.mkdtemp(prefix="cusparge-failed-"))


def _writable() -> list[Cache]:
    own = _own()
    try:
        return [cache.default()] + ([own] if own else [])
    except RuntimeError:  # no home folder
        return [own] if own else []


def _own() -> Cache | None:
    """Return this process's private folder: a forked child leaves its parent's alone."""
    held = _private
    return held[1] if held is not None and held[0] == os.getpid() else None


def _make_private(reason: Exception) -> Cache:
    global _private
    with _lock:
        own = _own()
        if own is not None:
            return own
        try:
            made = Cache(private.make())
        except OSError as error:
            raise _nowhere(error) from error
        _private = (os.getpid(), made)
    say_once(
        f"compiled kernels cannot be kept ({reason}): they go to {made.root}, which is removed "
        "when this process ends. Set CUSPARGE_CACHE_DIR to a folder that can be written to."
    )
    return made


def _nowhere(error: OSError) -> CompileError:
    return CompileError(
        f"a compiled kernel can be written neither to the cache nor to a temporary folder: {error}."
        " Set CUSPARGE_CACHE_DIR to a folder with a few megabytes of room."
    )


def _reset() -> None:
    """Replace the lock in a forked child: the parent's thread that held it is not there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
