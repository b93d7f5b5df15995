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
import numpy.typing as npt

from cusparge._arrays.view import HostArray
from cusparge.errors import InvalidArgumentError

__all__ = ["CPU", "CUDA", "device_of", "read_capsule", "read_host"]

CPU = 1  # kDLCPU
CUDA = 2  # kDLCUDA
_HOST_KINDS = (CPU, 3)  # kDLCUDAHost: pinned memory is host memory

_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_TYPESTR = {"bfloat16": "<u2", "bool8": "|b1"}


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
    kind, index = array.__dlpack_device__()
    return int(kind), int(index)


def is_host(kind: int) -> bool:
    """Tell whether DLPack's device kind is memory that the CPU can read."""
    return kind in _HOST_KINDS


def read_host(array: Any, name: str) -> HostArray:
    """View the memory of a host array that speaks DLPack; the view keeps it alive."""
    try:
        try:
            capsule = array.__dlpack__(max_version=(1, 0))
        except TypeError:  # an exporter from before DLPack 1.0
            capsule = array.__dlpack__()
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"{name} cannot be exported through DLPack: its {type(array).__name__} says "
            f"{str(error)!r}. Pass an ordinary strided array of float16, bfloat16, float32 or "
            "float64."
        ) from error
    return read_capsule(capsule, name)


def read_capsule(capsule: Any, name: str) -> HostArray:
    """Take a DLPack capsule over host memory and view it as a `HostArray`."""
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


def _view(tensor: _DLTensor, owner: _Owner, read_only: bool, name: str) -> HostArray:
    code, bits, lanes = tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes
    kind = _CODES.get(code)
    if kind is None or lanes != 1 or bits % 8:
        raise InvalidArgumentError(
            f"{name} has a dtype that is not understood: DLPack code {code}, {bits} bits, "
            f"{lanes} lanes; allowed float16, bfloat16, float32 and float64."
        )
    if not is_host(tensor.device.kind):
        raise InvalidArgumentError(f"{name} is not in host memory (DLPack {tensor.device.kind}).")
    dtype = f"{kind}{bits}"
    size = bits // 8
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[i] * size for i in range(tensor.ndim))
    else:  # row-major
        strides = tuple(size * math.prod(shape[i + 1 :]) for i in range(tensor.ndim))
    public_dtype = "bool" if kind == "bool" else dtype
    if math.prod(shape) == 0:
        empty: npt.NDArray[Any] = np.empty(shape, np.dtype(_TYPESTR.get(dtype, dtype)))
        return HostArray(empty, public_dtype)
    if not tensor.data:
        raise InvalidArgumentError(
            f"{name} has shape {shape} but no memory: it may have been freed, or be a stand-in "
            "that holds no data. Pass an array with values."
        )
    owner.__array_interface__ = {
        "version": 3,
        "shape": shape,
        "strides": strides,
        "typestr": np.dtype(_TYPESTR.get(dtype, dtype)).str,
        "data": (tensor.data + tensor.byte_offset, read_only),
    }
    return HostArray(np.asarray(owner), public_dtype)
