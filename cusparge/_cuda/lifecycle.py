"""What compiles when the process forks or ends.

NVRTC survives neither. A child that is forked while another thread compiles inherits NVRTC's locks
in a locked state, and its first compilation hangs; a process that tears the library down under a
thread that compiles crashes now and then. So both wait, and what takes too long is cancelled: at a
fork to be compiled again behind it, at the end for good.

NVRTC asks a C function now and then whether to go on, so that a compilation ends within
milliseconds to, for a very long one, seconds. That function must not be Python, which would take
the interpreter lock thousands of times: it is libc's ``atoi``, and it is given a text that says "0"
and, to cancel, "1".
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

from cusparge.errors import CompileError

__all__ = ["CANCELLED", "compiling", "end", "flow_callback", "is_ending"]

#: NVRTC's name for a compilation that was cancelled.
CANCELLED = "NVRTC_ERROR_CANCELLED"

#: Seconds that a fork waits before it cancels: most kernels are done by then.
_FORK_PATIENCE = 0.5
#: Seconds to wait for a cancelled compilation: NVRTC notices late where one kernel is very long.
_PATIENCE = 30

_answer = ctypes.create_string_buffer(b"0")
_changed = threading.Condition()
_threads: list[int] = []
_forking = 0
_ended = False


def is_ending() -> bool:
    """Return whether the process has begun to end."""
    return _ended


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Surround what a fork and the process's end must wait for, such as a compilation."""
    here, me = _changed, threading.get_ident()
    with here:
        # A thread that is inside already goes on: the fork waits for it.
        while _forking and me not in _threads:
            here.wait()
        if _ended:
            raise CompileError("nothing is compiled any more: the process is ending.")
        _threads.append(me)
    try:
        yield
    finally:
        with here:
            if here is _changed:  # else this is a forked child, which counts anew
                _threads.remove(me)
            here.notify_all()


def flow_callback() -> tuple[ctypes.c_void_p, ctypes.c_void_p] | None:
    """Return the function that NVRTC is to ask, and its argument; None where there is none."""
    try:
        library = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
        function = ctypes.cast(library.atoi, ctypes.c_void_p)
    except (OSError, AttributeError, TypeError):
        return None
    return function, ctypes.cast(_answer, ctypes.c_void_p)


def end() -> None:
    """Cancel what is being compiled, and wait for it; nothing is compiled from here on."""
    global _ended
    with _changed:
        _ended = True
        _answer.value = b"1"
        _changed.notify_all()
        _changed.wait_for(_others_are_done, timeout=_PATIENCE)


atexit.register(end)


def _others_are_done() -> bool:
    me = threading.get_ident()
    return all(thread == me for thread in _threads)


def _before_fork() -> None:
    """Wait until nothing is being compiled; nothing begins before `_in_parent`."""
    global _forking
    _changed.acquire()
    _forking += 1
    if not _changed.wait_for(_others_are_done, timeout=_FORK_PATIENCE):
        _answer.value = b"1"
        _changed.wait_for(_others_are_done, timeout=_PATIENCE)


def _in_parent() -> None:
    global _forking
    _forking -= 1
    if not (_forking or _ended):
        _answer.value = b"0"
    _changed.notify_all()
    _changed.release()


def _in_child() -> None:
    """Forget the parent's threads, which are not there."""
    global _changed, _forking
    _changed = threading.Condition()
    _forking = 0
    _threads.clear()
    if not _ended:
        _answer.value = b"0"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
