"""A pool of threads over work items, with BLAS held to one thread inside each of them.

The matrix products here are small (64 to 1,024 keys by 128 queries): BLAS's own threads make them
several times slower, while whole query blocks spread over threads without any waiting.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from cusparge.errors import InvalidArgumentError

__all__ = ["num_threads", "run", "single_threaded_blas"]

T = TypeVar("T")


def num_threads() -> int:
    """Return how many threads a call may use.

    ``CUSPARGE_NUM_THREADS`` where it is set, else the processors that this process may run on.
    """
    wanted = os.environ.get("CUSPARGE_NUM_THREADS")
    if wanted is None:
        if hasattr(os, "sched_getaffinity"):
            return max(1, len(os.sched_getaffinity(0)))
        return os.cpu_count() or 1
    if wanted.strip().isdecimal() and 1 <= int(wanted) <= 4096:
        return int(wanted)
    raise InvalidArgumentError(
        f"CUSPARGE_NUM_THREADS is not a number of threads: got {wanted!r}; allowed 1 to 4096. "
        "Unset it to use every processor that the process may run on."
    )


class _Blas:
    """BLAS's thread limit, shared by overlapping calls: set by the first, restored by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._controller: Any = None
        self._limit: Any = None

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            if self._controller is None:
                self._controller = _blas_controller()
            if self._controller:
                self._limit = self._controller.limit(limits=1)

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._limit is not None:
                self._limit.restore_original_limits()
                self._limit = None


def _blas_controller() -> Any:
    """Return threadpoolctl's hold on the BLAS libraries that are loaded, or False without it."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        warnings.warn(
            "threadpoolctl is not installed, so BLAS may start threads of its own inside "
            "cusparge's and make them much slower: pip install threadpoolctl, or set "
            "OPENBLAS_NUM_THREADS=1.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return ThreadpoolController().select(user_api="blas")


class _Pool:
    """One executor for the process, made at the first use and again after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0

    def executor(self, size: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None or self._size != size:
                if self._executor is not None:
                    self._executor.shutdown(wait=False)
                self._executor = ThreadPoolExecutor(size, thread_name_prefix="cusparge")
                self._size = size
            return self._executor


_blas = _Blas()
_pool = _Pool()


def _forget_parent() -> None:
    # Threads do not survive a fork, and a lock may have been held by one of them.
    global _blas, _pool
    _blas, _pool = _Blas(), _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold BLAS to one thread, in the whole process, while any call is inside."""
    blas = _blas
    blas.enter()
    try:
        yield
    finally:
        blas.leave()


def run(tasks: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """Run `tasks` on that many threads and return their results in order.

    The first exception stops what has not started yet, and is raised once the rest has ended: no
    thread writes into the caller's arrays after that.
    """
    if threads == 1 or len(tasks) <= 1:
        return [task() for task in tasks]
    while True:
        executor = _pool.executor(threads)
        try:
            futures = []
            for task in tasks:
                futures.append(executor.submit(task))
            break
        except RuntimeError:
            # Another call changed the number of threads between the two lines above.
            for future in futures:
                future.cancel()
            wait(futures)
            if executor is _pool.executor(threads):
                raise
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    return [future.result() for future in futures]
