"""Read a DLPack capsule through ctypes, for any dtype that a framework exports.

``numpy.from_dlpack`` refuses bfloat16, so it cannot be the way in. The structures are those of the
DLPack specification (dlpack.h, version 1): an exporter hands out a capsule that holds a pointer to
a ``DLManagedTensor`` or, since 1.0, a ``DLManagedTensorVersioned``; whoever takes it renames the
capsule and calls the deleter once.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from cusparge._arrays.view import DeviceArray, HostArray, row_major
from cusparge.errors import InvalidArgumentError

__all__ = [
    "CPU",
    "CUDA",
    "device_of",
    "is_cuda",
    "is_host",
    "read_capsule",
    "read_device",
    "read_host",
]

CPU = 1  # kDLCPU
CUDA = 2  # kDLCUDA
_HOST_KINDS = (CPU, 3)  # kDLCUDAHost: pinned memory is host memory
_CUDA_KINDS = (CUDA, 13)  # kDLCUDAManaged

_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
#: fp8 formats have a code each; their names are those of ml_dtypes and torch.
_FP8_CODES = {
    7: "float8_e3m4",
    8: "float8_e4m3",
    9: "float8_e4m3b11fnuz",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
    14: "float8_e8m0fnu",
}
_BITS = {
    "int": (8, 16, 32, 64),
    "uint": (8, 16, 32, 64),
    "float": (16, 32, 64),
    "bfloat": (16,),
    "complex": (64, 128),
    "bool": (8,),
}
_MOST_DIMENSIONS = 32
_TYPESTR = {"bfloat16": "<u2", "bool": "|b1"}


class _DLDevice(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("index", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [
        ("tensor", _DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class _ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


_OLD, _NEW = b"dltensor", b"dltensor_versioned"
_USED_OLD, _USED_NEW = b"used_dltensor", b"used_dltensor_versioned"  # must outlive the capsules
_READ_ONLY = 1

_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.restype, _rename.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
# PYFUNCTYPE keeps the interpreter lock held, which a deleter written in Python needs.
_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class _Owner:
    """Keeps an exporter's memory alive, and gives it back once."""

    __slots__ = ("__array_interface__", "_address", "_deleter")

    def __init__(self, address: int, deleter: int | None) -> None:
        self._address = address
        self._deleter = _Deleter(deleter) if deleter else None
        self.__array_interface__: dict[str, Any] = {}

    def __del__(self) -> None:
        deleter, self._deleter = self._deleter, None
        if deleter is not None:
            deleter(self._address)


def device_of(array: Any) -> tuple[int, int]:
    """Return DLPack's device kind and index of an array that speaks DLPack."""
    try:
        kind, index = array.__dlpack_device__()
        return int(kind), int(index)
    except Exception as error:  # whatever a foreign object raises
        raise InvalidArgumentError(
            f"a {type(array).__name__} does not say where it lives: its __dlpack_device__ gives "
            f"{error!r}. Pass a NumPy, torch, JAX or CuPy array."
        ) from error


def is_host(kind: int) -> bool:
    """Tell whether DLPack's device kind is memory that the CPU can read."""
    return kind in _HOST_KINDS


def is_cuda(kind: int) -> bool:
    """Tell whether DLPack's device kind is memory of a CUDA device."""
    return kind in _CUDA_KINDS


def read_host(array: Any, name: str) -> HostArray:
    """View the memory of a host array that speaks DLPack; the view keeps it alive."""
    view = read_capsule(_export(array, name, {}), name)
    if not isinstance(view, HostArray):
        raise InvalidArgumentError(f"{name} is not in host memory (CUDA device {view.device}).")
    return view


def read_device(array: Any, name: str, *, stream: int | None = None) -> DeviceArray:
    """View the memory of a CUDA array that speaks DLPack; the view keeps it alive.

    `stream` is where the memory will be used, in DLPack's terms (1 is the legacy default stream):
    the exporter makes it wait for what is still being written. None leaves the order to a caller
    who knows that the memory is ready.
    """
    options = {} if stream is None else {"stream": stream}
    view = read_capsule(_export(array, name, options), name)
    if not isinstance(view, DeviceArray):
        raise InvalidArgumentError(
            f"{name} said that it lives on a CUDA device, and handed out host memory: its "
            f"{type(array).__name__} breaks DLPack's rules. Pass a torch, CuPy or JAX array."
        )
    return view


def _export(array: Any, name: str, options: dict[str, Any]) -> Any:
    try:
        try:
            return array.__dlpack__(max_version=(1, 0), **options)
        except TypeError:  # an exporter from before DLPack 1.0
            return array.__dlpack__(**options)
    except Exception as error:  # whatever a foreign object raises
        raise InvalidArgumentError(
            f"{name} cannot be exported through DLPack: its {type(array).__name__} says "
            f"{str(error)!r}. Pass an ordinary strided array of float16, bfloat16, float32 or "
            "float64."
        ) from error


def read_capsule(capsule: Any, name: str) -> HostArray | DeviceArray:
    """Take a DLPack capsule, versioned or not, and view its memory."""
    if _is_valid(capsule, _NEW):
        address = _pointer(capsule, _NEW)
        versioned = _ManagedVersioned.from_address(address)
        if versioned.major != 1:
            raise InvalidArgumentError(
                f"{name} speaks DLPack {versioned.major}.{versioned.minor}: versions before 2 are "
                "understood. Update cusparge, or pass the array as NumPy."
            )
        read_only = bool(versioned.flags & _READ_ONLY)
        tensor, owner = versioned.tensor, _Owner(address, versioned.deleter)
        _rename(capsule, _USED_NEW)
    elif _is_valid(capsule, _OLD):
        address = _pointer(capsule, _OLD)
        managed = _Managed.from_address(address)
        read_only = False
        tensor, owner = managed.tensor, _Owner(address, managed.deleter)
        _rename(capsule, _USED_OLD)
    else:
        raise InvalidArgumentError(
            f"{name} did not hand out a fresh DLPack capsule: got a {type(capsule).__name__}. "
            "Each capsule can be taken once; pass the array itself."
        )
    return _view(tensor, owner, read_only, name)


def _view(tensor: _DLTensor, owner: _Owner, read_only: bool, name: str) -> HostArray | DeviceArray:
    dtype, size = _element(tensor.dtype, name)
    if not 0 <= tensor.ndim <= _MOST_DIMENSIONS or (tensor.ndim and not tensor.shape):
        raise InvalidArgumentError(
            f"{name} has {tensor.ndim} dimensions in its DLPack capsule: allowed are 0 to "
            f"{_MOST_DIMENSIONS}. Its exporter is broken; pass the array as NumPy."
        )
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if any(not 0 <= extent < 2**62 for extent in shape) or math.prod(shape) >= 2**62:
        raise InvalidArgumentError(
            f"{name} has shape {shape} in its DLPack capsule, which no memory holds: its "
            "exporter is broken. Pass the array as NumPy."
        )
    if tensor.strides:
        steps = tuple(tensor.strides[i] for i in range(tensor.ndim))
    else:
        steps = row_major(shape)
    kind = tensor.device.kind
    empty = math.prod(shape) == 0
    if not empty and not tensor.data and (is_host(kind) or is_cuda(kind)):
        raise InvalidArgumentError(
            f"{name} has shape {shape} but no memory: it may have been freed, or be a stand-in "
            "that holds no data. Pass an array with values."
        )
    if is_cuda(kind):
        pointer = 0 if empty else tensor.data + tensor.byte_offset
        return DeviceArray(pointer, shape, steps, dtype, int(tensor.device.index), owner)
    if not is_host(kind):
        raise InvalidArgumentError(
            f"{name} is on a device that cannot be used: got DLPack's kind {kind}; allowed are the "
            "host and CUDA. Move it to one of these."
        )
    typestr = _TYPESTR.get(dtype, f"|u{size}" if dtype.startswith("float8") else dtype)
    if empty:
        return HostArray(np.empty(shape, np.dtype(typestr)), dtype)
    owner.__array_interface__ = {
        "version": 3,
        "shape": shape,
        "strides": tuple(step * size for step in steps),
        "typestr": np.dtype(typestr).str,
        "data": (tensor.data + tensor.byte_offset, read_only),
    }
    return HostArray(np.asarray(owner), dtype)


def _element(dtype: _DLDataType, name: str) -> tuple[str, int]:
    """Return the name of an element type, and its size in bytes."""
    code, bits, lanes = dtype.code, dtype.bits, dtype.lanes
    if lanes == 1 and bits == 8 and code in _FP8_CODES:
        return _FP8_CODES[code], 1
    kind = _CODES.get(code)
    if kind is None or lanes != 1 or bits not in _BITS[kind]:
        raise InvalidArgumentError(
            f"{name} has a dtype that is not understood: DLPack code {code}, {bits} bits, "
            f"{lanes} lanes; allowed float16, bfloat16, float32 and float64."
        )
    return "bool" if kind == "bool" else f"{kind}{bits}", bits // 8
