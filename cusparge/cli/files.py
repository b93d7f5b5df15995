"""Arrays q, k and v out of files that may hold anything, and results into files, all or nothing.

Nothing read here is ever unpickled, and nothing is loaded before its size is compared with the
memory that is free.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cusparge.cli import npz, tensors
from cusparge.errors import InvalidArgumentError

__all__ = ["Inputs", "check_output", "demo_inputs", "read_inputs", "write_arrays", "write_atomic"]

SUFFIXES = (".npz", ".safetensors")

#: What `run` writes: allowed beside q, k and v, so that a file can hold both.
_RESULTS = frozenset({"out", "lse"})

_DEMO_FILE = "whisper_tiny_en.safetensors"
DEMO_SOURCE = (
    "q, k and v of a real self-attention layer: Whisper tiny.en, encoder layer 3, heads 2, 3 and "
    "4 of 6, while it listens to 30 seconds of speech made by espeak-ng"
)


@dataclass(frozen=True)
class Inputs:
    """The three arrays of a file.

    Attributes
    ----------
    q, k, v : numpy.ndarray
        float16, float32 or float64; bfloat16 was widened to float32, which is exact.
    dtypes : dict of str to str
        What the file holds, by name of the array.
    """

    q: npt.NDArray[Any]
    k: npt.NDArray[Any]
    v: npt.NDArray[Any]
    dtypes: dict[str, str]

    def heads_first(self, layout: str) -> Inputs:
        """Return the arrays as (batch, heads, tokens, head_dim), whatever `layout` they are in."""
        for name in "qkv":
            array = getattr(self, name)
            if array.ndim != 4:
                raise InvalidArgumentError(
                    f"{name} must have 4 dimensions: got shape {array.shape}; "
                    "expected (batch, heads, tokens, head_dim), or --layout NHD."
                )
        if layout == "HND":
            return self
        q, k, v = (getattr(self, name).swapaxes(1, 2) for name in "qkv")
        return Inputs(q, k, v, self.dtypes)

    def in_float32(self) -> Inputs:
        """Return float16 arrays as float32, which is exact, and others as they are."""
        q, k, v = (
            array.astype(np.float32) if array.dtype == np.float16 else array
            for array in (self.q, self.k, self.v)
        )
        return Inputs(q, k, v, self.dtypes)


def read_inputs(path: str | os.PathLike[str]) -> Inputs:
    """Read q, k and v of an .npz or .safetensors file.

    Raises
    ------
    InvalidArgumentError
        The file is not what it should be; the message says in which way.
    OSError
        The system does not let us read it.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidArgumentError(
            f"{file}: the name must end in .npz or .safetensors; got "
            f"{suffix or 'no suffix'}. numpy.savez(FILE, q=q, k=k, v=v) and "
            "safetensors.numpy.save_file write such files."
        )
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise InvalidArgumentError(f"{file}: is {kind}, not a file.")
    if os.path.getsize(file) == 0:
        raise InvalidArgumentError(f"{file}: the file is empty.")

    def allow(needed: int) -> None:
        _check_memory(file, needed)

    try:
        if suffix == ".npz":
            found = npz.read(file, check_names=_check_names, allow=allow)
            dtypes = {name: str(array.dtype) for name, array in found.items()}
            return _one_dtype(Inputs(found["q"], found["k"], found["v"], dtypes))
        # once as the file's bytes, once as arrays
        allow(2 * os.path.getsize(file))
        return _one_dtype(_from_safetensors(file.read_bytes()))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{file}: {error}") from error


def demo_inputs() -> Inputs:
    """Return the data that ships with the package."""
    from importlib import resources

    return _from_safetensors((resources.files("cusparge") / "data" / _DEMO_FILE).read_bytes())


def _one_dtype(inputs: Inputs) -> Inputs:
    # Checked here because bfloat16 is float32 by the time that the library sees it.
    if len(set(inputs.dtypes.values())) > 1:
        got = ", ".join(f"{name} {dtype}" for name, dtype in inputs.dtypes.items())
        raise InvalidArgumentError(f"q, k and v must have one dtype: got {got}.")
    return inputs


def _from_safetensors(content: bytes) -> Inputs:
    found, dtypes = tensors.read(content, check_names=_check_names)
    return Inputs(found["q"], found["k"], found["v"], dtypes)


def _check_names(names: Sequence[str]) -> None:
    missing = [name for name in "qkv" if name not in names]
    unknown = sorted(set(names) - {"q", "k", "v"} - _RESULTS)
    held = ", ".join(repr(name) for name in sorted(names)[:12]) or "nothing"
    if missing:
        raise InvalidArgumentError(
            f"holds no array called {' or '.join(missing)}: got {held}. "
            "Save the arrays under the names q, k and v."
        )
    if unknown:
        raise InvalidArgumentError(
            f"holds arrays that are not understood, and leaving them out could change the result: "
            f"got {held}; allowed q, k and v. Save these three alone."
        )


def free_memory() -> int | None:
    """Return how many bytes this process may still take, or None where nobody says."""
    limits = []
    try:
        with open("/proc/meminfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    limits.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    try:  # a container's own limit, where it has one
        used, most = (
            Path("/sys/fs/cgroup", name).read_text(encoding="ascii")
            for name in ("memory.current", "memory.max")
        )
        limits.append(max(0, int(most) - int(used)))
    except (OSError, ValueError):  # ValueError: "max", no limit
        pass
    return min(limits, default=None)


def check_free(needed: int, what: str) -> None:
    """Raise `InvalidArgumentError` where `needed` bytes are more than what is free."""
    free = free_memory()
    if free is not None and needed > free:
        raise InvalidArgumentError(
            f"{what} needs about {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are "
            "free. Use a smaller size, or a machine with more memory."
        )


def _check_memory(file: Path, needed: int) -> None:
    # half as much again: the output, and what the computation itself needs
    check_free(needed + needed // 2, "loading it")


def check_output(path: str | os.PathLike[str], *, inputs: Sequence[str | os.PathLike[str]]) -> Path:
    """Return where to write, or say why nothing can be written there, before any work is done."""
    given = Path(path)
    target = Path(os.path.realpath(given))  # a link is written through, not replaced
    if not target.parent.is_dir():
        raise InvalidArgumentError(f"{given}: the folder to write to does not exist.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InvalidArgumentError(
            f"{given}: the folder {target.parent} cannot be written to. Choose another place, for "
            "`run` with -o."
        )
    if target.exists():
        if not target.is_file():
            raise InvalidArgumentError(f"{given}: exists and is not an ordinary file.")
        for source in inputs:
            if os.path.exists(source) and os.path.samefile(source, target):
                raise InvalidArgumentError(
                    f"{given}: is the input itself, which is not overwritten. Choose another name."
                )
    return target


def write_atomic(target: Path, content: bytes | bytearray | memoryview) -> None:
    """Write a whole file or leave what was there: under another name first, then renamed."""
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_arrays(target: Path, arrays: Mapping[str, npt.NDArray[Any]], *, bfloat16: bool) -> None:
    """Write arrays in the format that the name asks for.

    Parameters
    ----------
    target : Path
        As `check_output` returned it.
    arrays : mapping of str to numpy.ndarray
        What to write.
    bfloat16 : bool
        Round ``out`` from float32 to bfloat16; not for .npz, which has no such type.
    """
    if target.suffix.lower() == ".npz":
        write_atomic(target, npz.write(arrays))
    else:
        write_atomic(target, tensors.write(arrays, bfloat16={"out"} if bfloat16 else set()))
