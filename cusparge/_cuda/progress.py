"""One line on standard error while somebody waits for the compiler."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from cusparge._cuda.notices import LOG, write
from cusparge._cuda.storage import place

__all__ = ["Progress"]

#: Seconds of waiting that need no explanation.
_PATIENCE = 0.3

_shown = False
_lock = threading.Lock()


class Progress:
    """Say what is being compiled, once that has taken a while.

    The line appears once a process; on a terminal it counts the kernels and ends with the time.

    Parameters
    ----------
    files : sequence of str
        The kernels' files, one for each kernel; none means that there is nothing to wait for.
    arch : str
        Such as "sm_90a".
    shown : bool
        False: say nothing.
    """

    def __init__(self, files: Sequence[str], arch: str, *, shown: bool = True) -> None:
        self._total = len(files)
        self._what = files[0] if len(files) == 1 else f"{len(files)} kernels"
        self._arch = arch
        # The background thread compiles for nobody who waits.
        background = threading.current_thread().name == "cusparge-background"
        self._wanted = shown and bool(files) and not background
        self._timer = threading.Timer(_PATIENCE, self._show)
        self._timer.daemon = True
        self._done = 0
        self._visible = False
        self._ended = False

    def __enter__(self) -> Progress:
        self._begin = time.perf_counter()
        if self._total:
            LOG.info("compiling %s for %s", self._what, self._arch)
        if self._wanted:
            try:
                self._timer.start()
            except RuntimeError as error:  # no further thread: compile without a word
                LOG.debug("no progress is shown: %s", error)
        return self

    def update(self, done: int) -> None:
        """Tell how many kernels are done."""
        with _lock:
            self._done = done
            if self._visible and _terminal() and not self._ended:
                write(f"\r{self._text()}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        with _lock:
            self._ended = True
            if self._visible and _terminal():
                spent = time.perf_counter() - self._begin
                write(f"\r{self._text()} {spent:.1f} s\n")

    def _text(self) -> str:
        where = f"once; cached in {place()}"
        count = f" {self._done}/{self._total}" if self._total > 1 and _terminal() else ""
        return f"cusparge: compiling {self._what} for {self._arch} ({where}) ...{count}"

    def _show(self) -> None:
        global _shown
        with _lock:
            if _shown or self._ended:
                return
            _shown = self._visible = True
            write(self._text() + ("" if _terminal() else "\n"))


def _terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def _reset() -> None:
    """Replace the lock in a forked child: the parent's thread that held it is not there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
