"""From a variant to a file of machine code: found in the cache, or compiled."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cusparge._cuda import lifecycle, nvrtc, sources, storage
from cusparge._cuda.cache import FORMAT, Info, Key
from cusparge._cuda.failures import compile_failure, unwanted_warning
from cusparge._cuda.notices import LOG
from cusparge._cuda.progress import Progress
from cusparge._cuda.variants import Variant
from cusparge._version import __version__
from cusparge.errors import CompileError

__all__ = ["Binary", "build", "build_all", "forget", "key_of", "peek", "try_all"]

#: Compiling takes memory as well as a core, and more threads gain little.
_MAX_JOBS = 4


@dataclass(frozen=True)
class Binary:
    """Machine code of one variant for one architecture."""

    path: Path
    lowered: str  #: the function's name in it
    arch: str
    variant: Variant
    info: Info


def options_for(arch: str) -> tuple[str, ...]:
    """Return NVRTC's options; ``CUSPARGE_LINEINFO=1`` adds line numbers for profilers."""
    options: tuple[str, ...] = (
        f"--gpu-architecture={arch}",
        "-std=c++20",
        "--ptxas-options=-v",
    )
    if os.environ.get("CUSPARGE_LINEINFO", "") not in ("", "0"):
        options += ("-lineinfo",)
    return options


def key_of(variant: Variant, arch: str, version: tuple[int, int] | None) -> Key:
    """Return what the cache is searched by; without `version` only the sources' part counts."""
    text = sources.load()
    if variant.file not in text.files:
        raise CompileError(
            f"{text.folder} holds no {variant.file}: it belongs to another version of cusparge. "
            "Install cusparge again, or unset CUSPARGE_KERNELS."
        )
    parts = [str(FORMAT).encode(), variant.file.encode(), text.files[variant.file]]
    for name, data in text.headers.items():
        parts += [name.encode(), data]
    parts += [option.encode() for option in options_for(arch)]
    parts += [variant.expression.encode(), arch.encode()]
    compiler = "" if version is None else f"{version[0]}.{version[1]}"
    return Key(
        variant.file,
        arch,
        sources.digest([*parts, compiler.encode()]),
        sources.digest(parts),
    )


_guard = threading.Lock()
_locks: dict[tuple[Variant, str], threading.Lock] = {}


def _lock_of(variant: Variant, arch: str) -> threading.Lock:
    with _guard:
        return _locks.setdefault((variant, arch), threading.Lock())


def peek(
    variant: Variant, arch: str, *, exact: bool = True, without: Collection[Path] = ()
) -> Binary | None:
    """Return machine code that exists already, in the cache or a seed; never compile.

    Without `exact`, code that another version of NVRTC made will do. So it will where there is no
    NVRTC. The files in `without` are passed over.
    """
    try:
        version = nvrtc.load().version
    except CompileError:
        version, exact = None, False
    entry = storage.lookup(key_of(variant, arch, version), exact=exact, without=without)
    if entry is None:
        return None
    return Binary(entry.path, entry.info.lowered, arch, variant, entry.info)


def forget(binary: Binary) -> None:
    """Drop machine code that could not be loaded, so that it is compiled again."""
    storage.drop(binary.path)


def build(variant: Variant, arch: str) -> Binary:
    """Return machine code of a variant, compiling it where neither the cache nor a seed has it.

    Parameters
    ----------
    variant : Variant
        The kernel.
    arch : str
        Such as "sm_90a".

    Raises
    ------
    CompileError
        If it cannot be compiled; `log`, `command`, `options` and `source` are its attributes where
        the compiler refused the text.
    """
    found = peek(variant, arch)
    if found is not None:
        return found
    with Progress([variant.file], arch):
        return _build(variant, arch)


def _build(variant: Variant, arch: str) -> Binary:
    # One compilation of a kernel in a process: the others wait, and then find it in the cache.
    with _lock_of(variant, arch):
        found = peek(variant, arch)
        if found is not None:
            return found
        while True:
            with lifecycle.compiling():
                made = _compile(variant, arch)
            if made is not None:
                return made


def _compile(variant: Variant, arch: str) -> Binary | None:
    """Compile and store; None where it was cancelled, which a fork does and the process's end."""
    compiler = nvrtc.load()
    compiler.require_arch(arch)
    key = key_of(variant, arch, compiler.version)
    text = sources.load()
    options = options_for(arch)
    begin = time.perf_counter()
    result = compiler.compile(
        text.files[variant.file], variant.file, text.headers, variant.expression, options
    )
    spent = 1e3 * (time.perf_counter() - begin)
    if result.error == lifecycle.CANCELLED:
        return None
    error = result.error or unwanted_warning(result.log)
    if error is None and not result.cubin.startswith(b"\x7fELF"):
        error = "the compiler returned something else than machine code"
    if error is None and not result.lowered:
        # NVRTC takes bytes that are no UTF-8 for the end of the text, and does not complain.
        error = "the compiler returned code without the kernel: is its source no UTF-8?"
    if error is not None:
        raise compile_failure(error, result.log, variant, key, text, options, compiler)
    info = Info(
        kernel=variant.file,
        expression=variant.expression,
        lowered=result.lowered,
        arch=arch,
        options=options,
        nvrtc=f"{compiler.version[0]}.{compiler.version[1]}",
        cusparge=__version__,
        key=key.digest,
        source_key=key.source_digest,
        sha256=sha256(result.cubin).hexdigest(),
        size=len(result.cubin),
        compile_ms=round(spent, 1),
        **resources(result.log, result.lowered),
    )
    LOG.debug("compiled %s for %s in %.0f ms", variant.expression, arch, spent)
    entry = storage.store(result.cubin, info)
    return Binary(entry.path, info.lowered, arch, variant, info)


def resources(log: str, lowered: str) -> dict[str, int]:
    """Return what ptxas says about one function; -1 where it says nothing."""
    found = {"registers": -1, "spill_bytes": -1, "stack_bytes": -1}
    about = re.compile(r"(?:Compiling entry function '|Function properties for )([\w$]+)")
    current = None
    for line in log.splitlines():
        if name := about.search(line):
            current = name[1]
        if current != lowered:
            continue
        if used := re.search(r"Used (\d+) registers", line):
            found["registers"] = int(used[1])
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        )
        if spills:
            found["stack_bytes"] = int(spills[1])
            found["spill_bytes"] = int(spills[2]) + int(spills[3])
    return found


def build_all(variants: Sequence[Variant], arch: str, *, jobs: int | None = None) -> list[Binary]:
    """Build several variants in parallel; return them in the same order.

    All of them are tried before the first error is raised.
    """
    built: list[Binary] = []
    failed: list[CompileError] = []
    for result in try_all(variants, arch, jobs=jobs):
        if isinstance(result, CompileError):
            failed.append(result)
        else:
            built.append(result)
    if failed:
        raise failed[0]
    return built


def try_all(
    variants: Sequence[Variant],
    arch: str,
    *,
    jobs: int | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> list[Binary | CompileError]:
    """Build several variants in parallel; return for each what came of it.

    Parameters
    ----------
    variants : sequence of Variant
        What to build.
    arch : str
        Such as "sm_90a".
    jobs : int, optional
        Threads; by default one for each core, up to four.
    on_done : callable, optional
        Called with the number of variants that are done, and of all; replaces the progress line.

    Raises
    ------
    CuspargeError
        What is wrong for all of them alike, such as an invalid ``CUSPARGE_CACHE_LIMIT``.
    """
    results: list[Binary | BaseException | None] = [peek(variant, arch) for variant in variants]
    missing = [index for index, result in enumerate(results) if result is None]
    total = len(results)
    if on_done is not None:
        on_done(total - len(missing), total)
    queue = iter(missing)
    taking, changed = threading.Lock(), threading.Condition()
    done = total - len(missing)

    def take() -> int | None:
        with taking:
            return next(queue, None)

    def work() -> None:
        nonlocal done
        while (index := take()) is not None:
            try:
                result: Binary | BaseException = _build(variants[index], arch)
            except BaseException as error:  # handed to the caller's thread
                result = error
            with changed:
                results[index] = result
                done += 1
                changed.notify_all()

    def work_here() -> None:
        """Take one: no thread could be started."""
        nonlocal done
        if (index := take()) is not None:
            try:
                results[index] = _build(variants[index], arch)
            except Exception as error:
                results[index] = error
            done += 1

    with Progress([variants[index].file for index in missing], arch, shown=on_done is None) as line:
        wanted = max(1, min(jobs or min(_MAX_JOBS, os.cpu_count() or 1), len(missing)))
        started = _start(work, wanted) if missing else 0
        seen = total - len(missing)
        try:
            while seen < total:
                if not started:
                    work_here()
                with changed:
                    while done == seen:
                        changed.wait()
                    seen = done
                line.update(seen - total + len(missing))
                if on_done is not None:
                    on_done(seen, total)
        finally:
            with taking:  # where the caller gave up, no further one is begun
                for _ in queue:
                    continue
    ready: list[Binary | CompileError] = []
    for result in results:
        if isinstance(result, (Binary, CompileError)):
            ready.append(result)
        elif result is not None:
            raise result
    return ready


def _start(work: Callable[[], None], count: int) -> int:
    """Start so many threads, or as many as the system grants; return how many that were."""
    for number in range(count):
        # Daemon threads: a program may end without waiting for a compiler.
        thread = threading.Thread(target=work, name="cusparge-compile", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # a limit of processes or memory, or the interpreter ends
            LOG.info("%d threads compile, %d were wanted: %s", number, count, error)
            return number
    return count


def _reset() -> None:
    """Replace the locks in a forked child: threads that held them are not there."""
    global _guard
    _guard = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
