"""A folder of this process alone, for compiled kernels where the cache cannot be written.

It is removed when the process ends. A process that is killed cannot do that, so the next one that
needs such a folder removes what dead ones left. A lock on a file inside, which the system releases
with its process, tells whether the owner lives: its number would not, since containers that share
a folder for temporary files count their processes separately.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

from cusparge._cuda import lifecycle

__all__ = ["make", "remove"]

_PREFIX = "cusparge-"
_NAME = re.compile(r"cusparge-[a-z0-9_]{8}")
_LOCK_FILE = "in-use"
#: Seconds that a folder is left alone: its owner may not have locked it yet.
_AGE = 60

#: Folder -> the locked file that says it is in use.
_held: dict[Path, int] = {}


def make() -> Path:
    """Return a new folder, and see to its removal; OSError where there is no room for one."""
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    with contextlib.suppress(OSError):  # without a lock it is left behind where we are killed
        number = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        if _lock(number):
            _held[folder] = number
        else:
            os.close(number)
            os.unlink(folder / _LOCK_FILE)
    atexit.register(remove, os.getpid(), folder)
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        # Such a process skips atexit, and ends with these; the last of them, after its children.
        from multiprocessing.util import Finalize

        Finalize(None, remove, args=(os.getpid(), folder), exitpriority=-100)
    return folder


def remove(owner: int, folder: Path) -> None:
    """Remove a folder, unless this is a child of the process that made it."""
    if os.getpid() != owner:
        return
    lifecycle.end()  # or a compilation would write there once more
    number = _held.pop(folder, None)
    if number is not None:
        with contextlib.suppress(OSError):
            os.close(number)  # Windows removes no open file
    shutil.rmtree(folder, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove the folders of this user whose owners are dead."""
    try:
        with os.scandir(place) as items:
            found = [item for item in items if _NAME.fullmatch(item.name)]
    except OSError:
        return
    before = time.time() - _AGE
    for item in found:
        try:
            status = item.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and status.st_mtime < before and _is_ours(status):
                _remove_dead(Path(item.path))
        except OSError:  # gone meanwhile
            continue


def _is_ours(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def _remove_dead(folder: Path) -> None:
    # What has no such file is not ours to judge: it is opened, and not made.
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    number = os.open(folder / _LOCK_FILE, flags)
    try:
        dead = stat.S_ISREG(os.fstat(number).st_mode) and _lock(number)
    finally:
        os.close(number)
    if dead:
        shutil.rmtree(folder, ignore_errors=True)


if sys.platform == "win32":
    import msvcrt

    def _lock(number: int) -> bool:
        try:
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock(number: int) -> bool:
        """Lock an open file for as long as the process lives; False where another one has."""
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
