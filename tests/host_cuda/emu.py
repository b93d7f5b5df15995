"""Run CUDA kernels on the host: build them with g++, launch them on NumPy arrays.

::

    from host_cuda import emu

    emu.launch("kernels_cu/x.cu", "cusparge::scale<float>", grid=4, block=128,
               args=[emu.In(x), emu.Out(y), np.int32(n)], smem_bytes=1024)

`runtime.cpp` says how the emulation works and what it checks. A launch that breaks a rule raises
`EmuError` with a report; values are for the caller to compare. Everything that comes from here is
host-emulated: it says something about correctness, nothing about speed, and nothing about hardware
that the emulation does not model.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels_cu"
COMPILER = shutil.which("g++")
BACKEND = "host-emulated"  # the label of every number that comes from here
SCHEDULES = ("eager", "lazy", "random")


def _missing():
    if not sys.platform.startswith("linux"):
        return "the emulation of CUDA kernels runs on Linux only"
    if COMPILER is None:
        return "no g++ to compile the emulation of CUDA kernels with"
    if shutil.which("addr2line") is None:
        return "no addr2line (binutils), which names the lines in the emulation's reports"
    return None


#: Why nothing can be emulated here, or None: for pytest.mark.skipif.
MISSING = _missing()


class EmuError(Exception):
    """A kernel broke a rule; the text is the report."""


class BuildError(Exception):
    """g++ refused the kernel; the text is what it said."""


class In:
    """An array that the kernel may only read. Non-contiguous views keep their strides."""

    mode = 0

    def __init__(self, array):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"a NumPy array is needed; got {type(array).__name__}")
        self.array = array


class InOut(In):
    """An array that the kernel may read and write."""

    mode = 1


class Out(In):
    """An array that the kernel must write in full; it starts as 0xff, and reading that fails."""

    mode = 2


# ---- building ------------------------------------------------------------------------------------
# -g: reports name lines; DWARF 5 of GCC 12 confuses addr2line. The sanitizers' calls are answered
# by the runtime, so the link does not name them. Jump threading would merge the places of checks.
KERNEL_FLAGS = (
    "-O1 -gdwarf-4 -std=c++20 -fPIC -fno-gnu-unique -fno-thread-jumps -ffp-contract=off -w "
    "-fsanitize=thread "
    "-fsanitize=signed-integer-overflow,integer-divide-by-zero,shift-exponent,bounds"
).split()
# Unique symbols would share the state of all kernel files that one process loads.
RUNTIME_FLAGS = "-O3 -march=native -std=c++20 -fPIC -fno-gnu-unique -Wall -Wextra".split()


KEPT_DAYS = 7  # builds that nobody used for so long are deleted


@functools.cache
def cache_folder():
    """Return the folder of this user's builds, below the one for temporary files."""
    folder = Path(tempfile.gettempdir()) / f"cusparge-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; set TMPDIR to a folder of yours")
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may have deleted it
            if path.is_file() and time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                path.unlink()
    return folder


def _digest(*parts):
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:24]


def _compile(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def _build(target, make):
    """Make a file unless it exists; concurrent writers agree, and the last one wins."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            make(made)
            os.replace(made, target)
    else:
        os.utime(target)
    return target


def _runtime():
    sources = sorted([*HERE.glob("*.h"), HERE / "runtime.cpp"])
    version = _compile([COMPILER, "--version"])
    key = _digest(version, RUNTIME_FLAGS, *(path.read_bytes() for path in sources))
    command = [COMPILER, *RUNTIME_FLAGS, "-c", HERE / "runtime.cpp", "-o"]
    return _build(cache_folder() / f"runtime-{key}.o", lambda out: _compile([*command, out]))


class _Module:
    """A kernel file, built with some of its kernels as entry points."""

    built = {}  # noqa: RUF012 (one cache for the process)
    lock = threading.RLock()

    def __init__(self, file, expressions):
        self.entries = {name: f"emu_kernel_{i}" for i, name in enumerate(expressions)}
        lines = [f'#include "{file}"']
        lines += [
            f'extern "C" void {entry}(void** args) {{ emu::call(&{name}, args); }}'
            for name, entry in self.entries.items()
        ]
        thunk = "\n".join(lines) + "\n"
        folder = cache_folder()
        source = folder / f"thunk-{_digest(thunk)}.cpp"
        _build(source, lambda out: out.write_text(thunk))
        folders = [Path(file).parent, KERNELS, HERE]  # a changed copy before the original
        flags = [*KERNEL_FLAGS, "-include", HERE / "prelude.h", *(f"-I{one}" for one in folders)]
        text = _compile([COMPILER, *flags, "-E", source])
        names = {line.split('"')[1] for line in text.splitlines() if line.startswith("# ")}
        self.files = {path: path.read_bytes() for path in map(Path, names) if path.is_file()}
        key = _digest(text, flags)
        command = [COMPILER, *flags, "-c", source, "-o"]
        kernel = _build(folder / f"kernel-{key}.o", lambda out: _compile([*command, out]))
        runtime = _runtime()
        link = [COMPILER, "-shared", "-Wl,-Bsymbolic", kernel, runtime, "-o"]
        target = folder / f"kernel-{_digest(key, runtime)}.so"
        self.library = ctypes.CDLL(str(_build(target, lambda out: _compile([*link, out]))))
        self.library.emu_report.restype = ctypes.c_char_p
        self.launching = threading.Lock()  # its state is global

    def is_current(self):
        return all(p.is_file() and p.read_bytes() == data for p, data in self.files.items())

    def entry(self, expression):
        return ctypes.cast(self.library[self.entries[expression]], ctypes.c_void_p)


def build(file, *expressions):
    """Build kernels of one file together, which is quicker than one by one at their launches."""
    file = Path(file).resolve()
    with _Module.lock:
        old = _Module.built.get(file)
        if old is not None and not old.is_current():
            old = None
        if old is None or not set(expressions) <= set(old.entries):
            known = [] if old is None else list(old.entries)
            # Entry points that were there stay: a file's launches share one build.
            _Module.built[file] = old = _Module(file, dict.fromkeys([*known, *expressions]))
        return old


# ---- memory --------------------------------------------------------------------------------------
class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("valid", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
        ("mode", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("smem_bytes", ctypes.c_uint32),
        ("schedule", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("registers", ctypes.c_uint32),
        ("num_buffers", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(_Buffer)),
    )


CELL = 24  # bytes of a GlobalCell; its first word is the writer
GUARD = 1 << 20


class _Mapping:
    """Zero pages that cost nothing until they are touched."""

    libc = None

    def __init__(self, size):
        if _Mapping.libc is None:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = (
                ctypes.c_void_p,
                ctypes.c_size_t,
                *[ctypes.c_int] * 3,
                ctypes.c_long,
            )
            libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
            _Mapping.libc = libc
        # read and write; private, anonymous, not reserved
        self.size = size + 2 * GUARD
        self.start = self.libc.mmap(None, self.size, 3, 0x4022, -1, 0)
        if self.start in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"cannot map {self.size} bytes (errno {ctypes.get_errno()})")
        self.address = self.start + GUARD

    def view(self, shape, dtype, offset, strides):
        memory = (ctypes.c_uint8 * (self.size - GUARD)).from_address(self.address)
        return np.ndarray(shape, dtype, memory, offset, strides)

    def close(self):
        self.libc.munmap(self.start, self.size)


class _Argument:
    """An array's own copy in memory that the emulation watches."""

    def __init__(self, wrapped, index):
        self.wrapped, self.index = wrapped, index
        array = wrapped.array
        low, high = _bounds(array)
        # Alignment is that of the array inside the allocation it belongs to, which starts aligned.
        owner = array
        while isinstance(getattr(owner, "base", None), np.ndarray) or hasattr(owner.base, "base"):
            owner = owner.base
        start = _bounds(owner)[0] if isinstance(owner, np.ndarray) else low
        self.low = low - start if start <= low else 0
        self.origin = self.low + array.ctypes.data - low
        self.span = high - low
        self.maps = [_Mapping(self.low + self.span)]
        self.copy = self.maps[0].view(array.shape, array.dtype, self.origin, array.strides)
        self.pointer = self.maps[0].address + self.origin
        valid = cells = None
        if wrapped.mode == Out.mode:
            self._bytes(self.maps[0])[...] = 0xFF
        else:
            self.copy[...] = array
        if not (array.flags.c_contiguous or array.flags.f_contiguous):
            self.maps.append(_Mapping(self.low + self.span))
            self._bytes(self.maps[-1])[...] = 1
            valid = self.maps[-1].address + self.low
        if wrapped.mode != In.mode:
            self.maps.append(_Mapping(CELL * (self.low + self.span)))
            cells = self.maps[-1].address + CELL * self.low
        data = self.maps[0].address + self.low
        self.record = _Buffer(data, self.span, valid, cells, wrapped.mode, index)

    def _bytes(self, mapping):
        array = self.wrapped.array
        shape, strides = (*array.shape, array.itemsize), (*array.strides, 1)
        return mapping.view(shape, np.uint8, self.origin, strides)

    def check_written(self):
        if self.wrapped.mode != Out.mode:
            return
        array = self.wrapped.array
        shape = (*array.shape, array.itemsize)
        strides = tuple(CELL * s for s in (*array.strides, 1))
        writers = self.maps[-1].view(shape, np.uint32, CELL * self.origin, strides)
        unwritten = (writers == 0).any(axis=-1)
        if unwritten.any():
            first = tuple(map(int, np.argwhere(unwritten)[0]))
            raise EmuError(
                f"unwritten output: argument {self.index}, shape {array.shape}: "
                f"{np.count_nonzero(unwritten)} elements, the first one {first} [{BACKEND}]"
            )

    def write_back(self):
        if self.wrapped.mode != In.mode:
            self.wrapped.array[...] = self.copy

    def close(self):
        del self.copy
        for mapping in self.maps:
            mapping.close()


def _bounds(array):
    """Return the addresses of the first byte and of the one after the last."""
    low = high = array.ctypes.data
    if array.size == 0:
        return low, high
    for length, stride in zip(array.shape, array.strides, strict=True):
        low, high = low + min(0, (length - 1) * stride), high + max(0, (length - 1) * stride)
    return low, high + array.itemsize


# ---- launching -----------------------------------------------------------------------------------
def launch(
    file, expression, grid, block, args, *, smem_bytes=0, schedule="eager", seed=0, registers=0
):
    """Run ``expression`` (``name`` or ``name<arguments>``) of a kernel file; return nothing.

    Parameters
    ----------
    file : path
        The kernel file; headers are found beside it and in ``kernels_cu``.
    grid, block : int or tuple of up to three
        As in CUDA.
    args : sequence
        In, Out and InOut arrays for pointers, NumPy scalars, and bytes for a struct by value.
    schedule : {"eager", "lazy", "random"}
        When asynchronous work completes and which thread runs; ``seed`` replays "random".
    registers : int
        Registers a thread at launch, which `setmaxnreg` is checked against; 0 leaves that out.
    """
    buffers = {}
    words = []
    try:
        for arg in args:
            if isinstance(arg, In):
                pointer = _pointer(arg, buffers)
                words.append(np.frombuffer(pointer.to_bytes(8, "little"), np.uint8).copy())
            elif isinstance(arg, np.generic):
                words.append(np.frombuffer(arg.tobytes(), np.uint8).copy())
            elif isinstance(arg, bytes):
                words.append(np.frombuffer(arg, np.uint8).copy())
            else:
                kind = type(arg).__name__
                raise TypeError(f"In, Out, InOut, a NumPy scalar or bytes are needed; got {kind}")
        where = (file, expression, _three("grid", grid), _three("block", block))
        _run(where, words, buffers, smem_bytes, schedule, seed, registers)
    finally:
        for buffer in buffers.values():
            buffer.close()


def launch_params(file, expression, grid, block, params, pointers, **options):
    """Run a kernel that takes one struct by value.

    ``params`` is the struct; ``pointers`` maps byte offsets in it to In, Out or InOut arrays, or to
    (array, byte offset into it). An array that stands at two offsets is one buffer. ``options`` are
    those of `launch`.
    """
    buffers = {}
    struct = bytearray(params)
    try:
        for at, value in pointers.items():
            wrapped, offset = value if isinstance(value, tuple) else (value, 0)
            if not 0 <= at <= len(struct) - 8:
                raise ValueError(f"a pointer at byte {at} of a struct of {len(struct)} bytes")
            struct[at : at + 8] = (_pointer(wrapped, buffers) + offset).to_bytes(8, "little")
        options = {"smem_bytes": 0, "schedule": "eager", "seed": 0, "registers": 0} | options
        # Aligned as every struct wants it.
        words = [np.zeros(len(struct) // 16 + 1, np.complex128).view(np.uint8)]
        words[0][: len(struct)] = struct
        where = (file, expression, _three("grid", grid), _three("block", block))
        _run(where, words, buffers, **options)
    finally:
        for buffer in buffers.values():
            buffer.close()


def _pointer(wrapped, buffers):
    if id(wrapped) not in buffers:
        buffers[id(wrapped)] = _Argument(wrapped, len(buffers))
    return buffers[id(wrapped)].pointer


def _three(name, value):
    given = value if isinstance(value, tuple) else (value,)
    three = (*map(int, given), 1, 1)[: max(3, len(given))]
    if len(three) != 3 or min(three) < 1:
        raise ValueError(f"{name} takes one to three positive numbers; got {value!r}")
    return three


def _run(where, words, buffers, smem_bytes, schedule, seed, registers):
    file, expression, grid, block = where
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if math.prod(block) > 1024 or math.prod(grid) >= 1 << 21:
        raise ValueError(f"at most 1024 threads and 2^21 blocks; got {block} and {grid}")
    if not 0 <= smem_bytes <= 232448:
        raise ValueError(f"smem_bytes lies in 0 to 232448; got {smem_bytes}")
    module = build(file, expression)
    records = (_Buffer * max(1, len(buffers)))(*(b.record for b in buffers.values()))
    config = _Config(
        grid,
        block,
        smem_bytes,
        SCHEDULES.index(schedule),
        seed % 2**64,
        registers,
        len(buffers),
        records,
    )
    pointers = (ctypes.c_void_p * max(1, len(words)))(*(word.ctypes.data for word in words))
    with module.launching:
        failed = module.library.emu_launch(module.entry(expression), pointers, ctypes.byref(config))
        report = module.library.emu_report().decode(errors="replace") if failed else ""
    if failed:
        raise EmuError(f"{report} [{BACKEND}, {schedule}, seed {seed}: {expression}]")
    for buffer in buffers.values():
        buffer.check_written()
    for buffer in buffers.values():
        buffer.write_back()
