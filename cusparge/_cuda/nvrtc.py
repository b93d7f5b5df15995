"""NVIDIA's run-time compiler NVRTC, called through ctypes.

Called directly, because headers are then passed from memory and every option is ours. The library
is found in this order: the file that ``CUSPARGE_NVRTC`` names; what cuda.pathfinder finds, which
knows pip's, conda's and the system's places; the toolkit that ``CUDA_HOME`` or ``CUDA_PATH`` names;
the loader's own search path.

NVRTC opens a second library, its builtins, by a name that the loader may not find: it is opened
here beforehand, from the same folder. Compiling releases the interpreter lock and runs in parallel.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cusparge._cuda.lifecycle import compiling, flow_callback
from cusparge.errors import CompileError

__all__ = ["FLOOR", "HOW_TO_INSTALL", "Compiled", "Nvrtc", "load"]

#: The first version that knows every architecture of the default set.
FLOOR = (12, 8)

#: The version that brought an architecture, where that was after `FLOOR` or with it.
_SINCE = {
    88: (13, 0),
    100: (12, 8),
    101: (12, 8),
    103: (12, 9),
    107: (13, 5),
    110: (13, 0),
    120: (12, 8),
    121: (12, 9),
}

_VARIABLE = "CUSPARGE_NVRTC"

HOW_TO_INSTALL = (
    'pip install "cusparge[cuda13]" (driver 580 or later) or "cusparge[cuda12]", or set '
    f"{_VARIABLE} to the library of a CUDA toolkit of version {FLOOR[0]}.{FLOOR[1]} or later, or "
    "set CUSPARGE_CACHE_SEED to a folder of kernels that were compiled elsewhere"
)

_WINDOWS = sys.platform == "win32"
_LOADER_NAMES = (
    ("nvrtc64_130_0.dll", "nvrtc64_120_0.dll")
    if _WINDOWS
    else ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
)


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave: machine code and the function's name in it, or an error."""

    error: str | None
    log: str
    cubin: bytes
    lowered: str


class Nvrtc:
    """One NVRTC library, opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version: tuple[int, int] = (major.value, minor.value)
        if self.version < FLOOR:  # it lacks functions, and its finder refuses it
            return
        self._declare()
        self._flow = flow_callback()
        # Kept, so that it stays open; without it the first compilation may fail, and says so.
        self._builtins = _open_builtins(path, self.version)

    def _declare(self) -> None:
        text, program = ctypes.c_char_p, ctypes.c_void_p
        texts, size = ctypes.POINTER(text), ctypes.POINTER(ctypes.c_size_t)
        number = ctypes.POINTER(ctypes.c_int)
        library = self._library
        library.nvrtcGetErrorString.restype = text
        library.nvrtcGetErrorString.argtypes = [ctypes.c_int]
        for name, arguments in {
            "nvrtcGetNumSupportedArchs": [number],
            "nvrtcGetSupportedArchs": [number],
            "nvrtcCreateProgram": [
                ctypes.POINTER(program), text, text, ctypes.c_int, texts, texts,
            ],
            "nvrtcAddNameExpression": [program, text],
            "nvrtcCompileProgram": [program, ctypes.c_int, texts],
            "nvrtcSetFlowCallback": [program, program, program],
            "nvrtcGetProgramLogSize": [program, size],
            "nvrtcGetProgramLog": [program, text],
            "nvrtcGetCUBINSize": [program, size],
            "nvrtcGetCUBIN": [program, text],
            "nvrtcGetLoweredName": [program, text, texts],
            "nvrtcDestroyProgram": [ctypes.POINTER(program)],
        }.items():  # fmt: skip
            function = getattr(library, name)
            function.restype, function.argtypes = ctypes.c_int, arguments

    def _check(self, status: int) -> None:
        if status:
            raise CompileError(
                f"NVRTC ({self.path}) failed: {self._error(status)}. Install it again: "
                f"{HOW_TO_INSTALL}."
            )

    def _error(self, status: int) -> str:
        return str(self._library.nvrtcGetErrorString(status).decode(errors="replace"))

    def supported_archs(self) -> tuple[int, ...]:
        """Return the architectures that can be compiled for: 80, 86, ..., without letters."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(numbers))
        return tuple(sorted(numbers))

    def require_arch(self, arch: str) -> None:
        """Raise unless this compiler knows `arch` ("sm_90a")."""
        found = re.fullmatch(r"sm_(\d+)([af]?)", arch)
        supported = self.supported_archs()
        if found and int(found[1]) in supported:
            return
        have = f"{self.version[0]}.{self.version[1]}"
        since = _SINCE.get(int(found[1])) if found else None
        if since is not None and since > self.version:
            raise CompileError(
                f"{arch} needs NVRTC >= {since[0]}.{since[1]}, found {have} ({self.path}). "
                f"To mend it: {_how_to_renew(since)}."
            )
        known = ", ".join(f"sm_{number}" for number in supported if number >= 80)
        raise CompileError(
            f"NVRTC {have} ({self.path}) does not compile for {arch}; it knows {known}. "
            f"Install another version: {HOW_TO_INSTALL}."
        )

    def compile(
        self,
        source: bytes,
        name: str,
        headers: Mapping[str, bytes],
        expression: str,
        options: Sequence[str],
    ) -> Compiled:
        """Compile the kernel that `expression` names.

        Parameters
        ----------
        source, name : bytes, str
            Text of the file, and what the log calls it.
        headers : mapping of str to bytes
            Each include directive must spell one of these names exactly.
        expression : str
            C++ name of a ``__global__`` function, with template arguments.
        options : sequence of str
            As NVRTC takes them, the architecture among them.
        """
        library, program = self._library, ctypes.c_void_p()
        names = _texts([header.encode() for header in headers])
        texts = _texts(list(headers.values()))
        flags = _texts([option.encode() for option in options])
        wanted = expression.encode()
        self._check(
            library.nvrtcCreateProgram(
                ctypes.byref(program), source, name.encode(), len(headers), texts, names
            )
        )
        try:
            self._check(library.nvrtcAddNameExpression(program, wanted))
            if self._flow is not None:
                self._check(library.nvrtcSetFlowCallback(program, *self._flow))
            status = library.nvrtcCompileProgram(program, len(options), flags)
            log = self._log(program)
            if status:
                return Compiled(self._error(status), log, b"", "")
            size = ctypes.c_size_t()
            self._check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
            cubin = ctypes.create_string_buffer(size.value)
            self._check(library.nvrtcGetCUBIN(program, cubin))
            lowered = ctypes.c_char_p()
            self._check(library.nvrtcGetLoweredName(program, wanted, ctypes.byref(lowered)))
            return Compiled(None, log, cubin.raw, (lowered.value or b"").decode())
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._check(self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(max(1, size.value))
        self._check(self._library.nvrtcGetProgramLog(program, text))
        return text.value.decode(errors="replace").strip()


def _how_to_renew(since: tuple[int, int]) -> str:
    """Return how to get at least that version."""
    version = f"{since[0]}.{since[1]}"
    seed = "set CUSPARGE_CACHE_SEED to a folder of kernels that were compiled elsewhere"
    if os.environ.get(_VARIABLE):
        return f"name one of version {version} or later in {_VARIABLE}, or unset it, or {seed}"
    ways = [f'pip install -U "nvidia-cuda-nvrtc>={version},<14" (driver 580 or later)']
    if since < (13, 0):
        ways = [
            'pip install -U "nvidia-cuda-nvrtc>=13,<14" (driver 580 or later)',
            f'pip install -U "nvidia-cuda-nvrtc-cu12>={version}"',
        ]
    ways.append(f"set {_VARIABLE} to the library of a CUDA toolkit of that version")
    return ", or ".join([*ways, seed])


def _texts(values: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * max(1, len(values)))(*values)


def _open_builtins(path: str, version: tuple[int, int]) -> ctypes.CDLL | None:
    """Open the library that NVRTC opens by name while it compiles, from NVRTC's own folder."""
    if _WINDOWS:
        name = f"nvrtc-builtins64_{version[0]}{version[1]}.dll"
    else:
        name = f"libnvrtc-builtins.so.{version[0]}.{version[1]}"
    for folder in _folders_of(path):
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError:
            continue
    return None


def _folders_of(path: str) -> list[Path]:
    """Return where a library lies; for a name that the loader resolved, where any NVRTC does."""
    if Path(path).name != path:
        return [Path(path).parent, Path(path).resolve().parent]
    try:
        text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [Path()]
    mapped = {line[line.index("/") :] for line in text.splitlines() if "/libnvrtc.so" in line}
    return [Path(file).parent for file in sorted(mapped)]


def _candidates(problems: list[str]) -> Iterator[str]:
    """Yield paths and names to open, best first; say in `problems` what was not found."""
    try:
        pathfinder = importlib.import_module("cuda.pathfinder")
    except ImportError:
        problems.append("the package cuda-pathfinder is not installed")
    else:
        try:
            found = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
            if found:
                yield found
        except Exception as error:  # it has exceptions of its own, and what a loader raises
            first = str(error).strip().splitlines() or [type(error).__name__]
            problems.append(f"cuda.pathfinder: {first[0]}")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        root = os.environ.get(variable)
        if not root:
            continue
        places = ("bin/x64", "bin") if _WINDOWS else ("lib64", "lib", "targets/x86_64-linux/lib")
        pattern = "nvrtc64_*_0.dll" if _WINDOWS else "libnvrtc.so*"
        files = [path for place in places for path in sorted(Path(root, place).glob(pattern))]
        if not files:
            problems.append(f"{variable}={root} holds no NVRTC")
        yield from map(str, files[:1])
    yield from _LOADER_NAMES


_lock = threading.Lock()
_loaded: dict[str, Nvrtc] = {}


def load() -> Nvrtc:
    """Return NVRTC, opened at the first call.

    Raises
    ------
    CompileError
        If none is found, or none that is new enough; the text says what to install.
    """
    given = os.environ.get(_VARIABLE) or ""
    found = _loaded.get(given)
    if found is None:
        # In this order, and a fork waits for both: no child finds half-opened libraries.
        with compiling(), _lock:
            found = _loaded.get(given)
            if found is None:
                found = _loaded[given] = _open_given(given) if given else _search()
    return found


def _open_given(path: str) -> Nvrtc:
    try:
        found = Nvrtc(os.path.abspath(os.path.expanduser(path)))
    except (OSError, AttributeError) as error:
        raise CompileError(
            f"{_VARIABLE}={path} cannot be used as NVRTC: {error}. Name the library itself, such "
            f"as {_LOADER_NAMES[0]} of a CUDA toolkit, or unset {_VARIABLE}."
        ) from error
    if found.version < FLOOR:
        raise CompileError(
            f"{_VARIABLE}={path} is NVRTC {found.version[0]}.{found.version[1]}; cusparge needs "
            f"{FLOOR[0]}.{FLOOR[1]} or later. Name a newer one, or unset {_VARIABLE}."
        )
    return found


def _search() -> Nvrtc:
    problems: list[str] = []
    old: list[Nvrtc] = []
    for candidate in _candidates(problems):
        try:
            found = Nvrtc(candidate)
        except (OSError, AttributeError) as error:
            problems.append(f"{candidate}: {error}")
            continue
        if found.version >= FLOOR:
            return found
        old.append(found)
    if old:
        have = ", ".join(f"{lib.version[0]}.{lib.version[1]} ({lib.path})" for lib in old)
        raise CompileError(
            f"NVRTC is too old: cusparge needs {FLOOR[0]}.{FLOOR[1]} or later, found {have}. To "
            f"mend it: {HOW_TO_INSTALL}."
        )
    looked = "; ".join(problems)
    raise CompileError(
        "NVRTC, the compiler of CUDA kernels, was not found. To mend it: "
        f"{HOW_TO_INSTALL}. Looked at: {looked}."
    )


def _reset() -> None:
    """Replace the lock in a forked child: the parent's thread that held it is not there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
