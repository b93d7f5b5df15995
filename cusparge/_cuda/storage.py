"""Which folders compiled kernels are read from and written to.

Reading: the cache, this process's private folder if there is one, then the seeds, which
``CUSPARGE_CACHE_SEED`` names and nobody writes to. Writing: the cache; where that fails, because
it is read-only, full or blocked, a private folder that is removed when the process ends. A fixed
name in a shared folder would not do: machine code is loaded from here, and others could plant it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from pathlib import Path

from cusparge._cuda import cache, lifecycle
from cusparge._cuda.cache import Cache, Entry, Info, Key
from cusparge._cuda.notices import say_once, short
from cusparge.errors import CompileError

__all__ = ["drop", "failures_folder", "lookup", "place", "seeds", "store"]

_SEED_VARIABLE = "CUSPARGE_CACHE_SEED"

_lock = threading.Lock()
#: The private folder, and the process that it belongs to.
_private: tuple[int, Cache] | None = None
#: Entries of seeds that could not be loaded: they cannot be removed, so they are passed over.
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


def lookup(key: Key, *, exact: bool) -> Entry | None:
    """Return the entry of a key, or None.

    A seed may have been compiled by another version of NVRTC. Where nothing can be compiled,
    `exact` is false, and that holds for the cache as well, which may have been filled elsewhere.
    """
    own = _writable()
    for store_ in own:
        if (entry := store_.get(key)) is not None:
            return entry
    others = seeds()
    for look in (Cache.get, Cache.get_source):
        for seed in others:
            if (entry := look(seed, key)) is not None and entry.path not in _rejected:
                return entry
    if not exact:
        for store_ in own:
            if (entry := store_.get_source(key)) is not None:
                return entry
    return None


def store(cubin: bytes, info: Info) -> Entry:
    """Write an entry to the cache, or to the private folder where the cache cannot be written."""
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
    """Forget an entry that could not be loaded: remove it, or pass over it where it is a seed."""
    for store_ in _writable():
        if path.parent == store_.folder:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            return
    _rejected.add(path)


def failures_folder(name: str) -> Path:
    """Return a new, empty folder that is kept for the user, for the files of a failure."""
    try:
        folder = cache.default().root / "failed" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="cusparge-failed-"))


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
            made = Cache(tempfile.mkdtemp(prefix="cusparge-"))
        except OSError as error:
            raise _nowhere(error) from error
        _private = (os.getpid(), made)
        atexit.register(_remove_private, os.getpid(), made.root)
    say_once(
        f"compiled kernels cannot be kept ({reason}): they go to {made.root}, which is removed "
        "when this process ends. Set CUSPARGE_CACHE_DIR to a folder that can be written to."
    )
    return made


def _remove_private(owner: int, folder: Path) -> None:
    if os.getpid() == owner:
        lifecycle.end()  # or a compilation would write there once more
        shutil.rmtree(folder, ignore_errors=True)


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
