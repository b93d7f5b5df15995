"""Arrays of .safetensors files, with bfloat16 that needs no package beside NumPy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from cusparge.errors import InvalidArgumentError

__all__ = ["read", "round_to_bfloat16", "widen_bfloat16", "write"]

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_NAMES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}


def widen_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return bfloat16 numbers, given as their bits, as float32: exact, for NaN as well.

    Examples
    --------
    >>> widen_bfloat16(np.array([0x3F80, 0xC000], np.uint16)).tolist()
    [1.0, -2.0]
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return float32 numbers as the bits of the nearest bfloat16, ties to even.

    NaN stays NaN. Beyond the largest bfloat16 the result is infinity, as the rule has it.

    Examples
    --------
    >>> [hex(bits) for bits in round_to_bfloat16(np.array([1.0, 1.00390625, np.nan], "f4"))]
    ['0x3f80', '0x3f80', '0x7fc0']
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Adding just under half of the last place kept, plus its lowest bit, carries exactly when the
    # number must go up; a carry into the exponent is the right answer too.
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x0040).astype(np.uint16)  # a NaN must not carry into infinity
    return np.where(np.isnan(values), quiet, rounded)


def read(
    content: bytes, *, check_names: Callable[[Sequence[str]], None]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Return q, k and v of a .safetensors file, and the names of their dtypes in the file.

    Parameters
    ----------
    content : bytes
        The whole file.
    check_names : callable
        Called with the names of all arrays; raises for those that do not fit.

    Raises
    ------
    InvalidArgumentError
        The file is damaged, or holds something else.
    """
    try:
        parse: Any = deserialize
        entries = dict(parse(content))
    except (SafetensorError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(
            f"is not a readable .safetensors file ({error}). It may be cut short or damaged; "
            "write it again with safetensors."
        ) from error
    check_names(list(entries))
    found: dict[str, npt.NDArray[Any]] = {}
    dtypes: dict[str, str] = {}
    for name in "qkv":
        entry = entries[name]
        kind, shape, data = entry["dtype"], tuple(entry["shape"]), entry["data"]
        if kind not in _NAMES:
            raise InvalidArgumentError(
                f"{name} is {kind}: allowed are {', '.join(_NAMES)} (float16, float32, float64 "
                "and bfloat16)."
            )
        dtypes[name] = _NAMES[kind]
        if kind == "BF16":
            flat: npt.NDArray[Any] = widen_bfloat16(np.frombuffer(data, "<u2"))
        else:
            flat = np.frombuffer(data, _DTYPES[kind])
        if flat.size != math.prod(shape):
            raise InvalidArgumentError(f"{name} is damaged: {flat.size} numbers for {shape}.")
        found[name] = flat.reshape(shape)
    return found, dtypes


def write(arrays: Mapping[str, npt.NDArray[Any]], *, bfloat16: Collection[str] = ()) -> bytes:
    """Return the bytes of a .safetensors file.

    Written out here because the package's own function wants another kind of description in each
    of its versions. The format: the length of the header in 8 bytes, a JSON header that is padded
    with spaces to a multiple of 8, the arrays one after another.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        float16, float32 or float64.
    bfloat16 : collection of str
        Which of them, float32, to round to bfloat16.
    """
    header: dict[str, Any] = {}
    pieces: list[bytes] = []
    position = 0
    # Widest numbers first, so that each array lies on a multiple of its own size.
    for name in sorted(arrays, key=lambda name: (name in bfloat16, -arrays[name].itemsize)):
        array = arrays[name]
        if name in bfloat16:
            kind, raw = "BF16", round_to_bfloat16(array).astype("<u2")
        else:
            kind = f"F{8 * array.itemsize}"
            raw = array.astype(_DTYPES[kind])
        data = raw.tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [position, position + len(data)],
        }
        pieces.append(data)
        position += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *pieces))
