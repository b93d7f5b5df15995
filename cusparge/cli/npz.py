"""Arrays of .npz files, read without trusting them: no pickle, no allocation on a file's word.

`numpy.load` allocates what an array's header claims before it reads the array. Here the claim must
agree with the size in the zip directory first, and that with the memory that is free.
"""

from __future__ import annotations

import errno
import io
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cusparge.errors import InvalidArgumentError

__all__ = ["read", "write"]

#: Far more than the header of any float array, whose length field allows 4 GiB.
_MAX_HEADER = 4096

_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OverflowError, ValueError, OSError,
)  # fmt: skip


def read(
    path: Path,
    *,
    check_names: Callable[[Sequence[str]], None],
    allow: Callable[[int], None],
) -> dict[str, npt.NDArray[Any]]:
    """Return q, k and v of an .npz file.

    Parameters
    ----------
    path : Path
        The file.
    check_names : callable
        Called with the names of all arrays; raises for those that do not fit.
    allow : callable
        Called with the bytes that q, k and v take, before any of them is read; raises if too many.

    Raises
    ------
    InvalidArgumentError
        The file is damaged, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {entry.filename: entry for entry in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise InvalidArgumentError("holds two arrays of one name.")
            check_names([name.removesuffix(".npy") for name in members])
            wanted = {name: members[f"{name}.npy"] for name in "qkv" if f"{name}.npy" in members}
            if any(
                entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                for entry in wanted.values()
            ):
                raise InvalidArgumentError("is packed in a way that numpy.savez never uses.")
            if len(wanted) != 3:
                raise InvalidArgumentError("q, k and v must be .npy members, as numpy.savez does.")
            allow(sum(entry.file_size for entry in wanted.values()))
            found = {}
            for name, entry in wanted.items():
                with archive.open(entry) as member:
                    found[name] = _read_array(member, name, entry.file_size)
            return found
    except InvalidArgumentError:
        raise
    except (RuntimeError, NotImplementedError) as error:  # encrypted; made by a newer zip
        raise InvalidArgumentError(f"cannot be read: {error}.") from error
    except _DAMAGED as error:
        # Seeking to where a damaged directory points is an invalid argument of the system's.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise InvalidArgumentError(
            f"is not a readable .npz file ({error or type(error).__name__}). It may be cut short "
            "or damaged; write it again with numpy.savez."
        ) from error


def _read_array(member: IO[bytes], name: str, size: int) -> npt.NDArray[Any]:
    shape, fortran_order, dtype = _read_header(member, name)
    if dtype.hasobject:
        raise InvalidArgumentError(
            f"{name} holds Python objects, which only a pickle can bring back, and a pickle can "
            "run any program: it was not loaded. Save an array of floats."
        )
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        hint = ""
        if dtype.kind == "V" and dtype.itemsize == 2:
            hint = " An .npz file cannot hold bfloat16: save it as .safetensors."
        raise InvalidArgumentError(
            f"{name} is {dtype}: allowed float16, float32 and float64.{hint}"
        )
    count = math.prod(shape)
    held = size - member.tell()
    if count * dtype.itemsize != held:
        raise InvalidArgumentError(
            f"{name} is damaged: shape {shape} of {dtype} takes {count * dtype.itemsize:,} bytes, "
            f"and the file holds {held:,}."
        )
    content = bytearray(held)
    view, position = memoryview(content), 0
    while position < held:
        piece = member.read(min(held - position, 1 << 24))
        if not piece:
            raise EOFError(f"{name} ends early")
        view[position : position + len(piece)] = piece
        position += len(piece)
    if member.read(1):  # also lets zipfile compare the checksum
        raise InvalidArgumentError(f"{name} is damaged: it holds more than its size.")
    flat = np.frombuffer(content, dtype)
    array = flat.reshape(shape, order="F" if fortran_order else "C")
    return np.ascontiguousarray(array, dtype=dtype.newbyteorder("="))


def _read_header(member: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and dtype of an .npy member."""
    try:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version}")
        parse: Any = np.lib.format.read_array_header_1_0
        if version == (2, 0):
            parse = np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files of Python 2
            shape, fortran_order, dtype = parse(member, max_header_size=_MAX_HEADER)
    except (
        ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError,
    ) as error:  # fmt: skip
        raise InvalidArgumentError(
            f"{name} has no readable .npy header ({str(error).splitlines()[0][:200]})."
        ) from error
    if any(extent < 0 for extent in shape) or len(shape) > 32:
        raise InvalidArgumentError(f"{name} has an impossible shape: {shape}.")
    return tuple(int(extent) for extent in shape), bool(fortran_order), dtype


def write(arrays: Mapping[str, npt.NDArray[Any]]) -> memoryview:
    """Return the bytes of an .npz file."""
    buffer = io.BytesIO()
    save: Any = np.savez  # whose annotations take every array for allow_pickle
    save(buffer, **arrays)
    return buffer.getbuffer()
