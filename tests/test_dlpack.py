"""The door that arrays of any framework come through: DLPack capsules, made by hand here.

A capsule's deleter is counted: it has to run once, and not before the last reader is done.
"""

import ctypes
import gc
import math

import numpy as np
import pytest
from compare import assert_refused, assert_same_bits

from cusparge import DeviceError, InvalidArgumentError, UnsupportedError, attention
from cusparge._arrays import DeviceArray, dlpack

RNG = np.random.default_rng(7)  # what is computed does not matter here
Q, K, V = RNG.standard_normal((3, 1, 2, 140, 16), np.float32)

_int64s = ctypes.POINTER(ctypes.c_int64)


class Tensor(ctypes.Structure):
    """DLTensor, written from dlpack.h and not taken from the reader."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", _int64s),
        ("strides", _int64s),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [
        ("tensor", Tensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Exporter:
    """Hands out capsules over a NumPy array and counts how often each is given back."""

    def __init__(self, array, *, versioned, strides=True, deleter=True, **fields):
        self.array, self.versioned, self.deleted = array, versioned, []
        size = array.itemsize
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = (ctypes.c_int64 * array.ndim)(*(s // size for s in array.strides))
        self.record = (Versioned if versioned else Managed)()
        self.call = _Deleter(lambda address: self.deleted.append(address))
        if deleter:
            self.record.deleter = ctypes.cast(self.call, ctypes.c_void_p).value
        if versioned:
            self.record.major = fields.pop("major", 1)
            self.record.flags = fields.pop("flags", 0)
        tensor = self.record.tensor
        tensor.data, tensor.device_type, tensor.ndim = array.ctypes.data, 1, array.ndim
        tensor.code, tensor.bits, tensor.lanes = 2, 8 * size, 1
        tensor.shape = ctypes.cast(self.shape, _int64s)
        if strides:
            tensor.strides = ctypes.cast(self.strides, _int64s)
        for name, value in fields.items():
            setattr(tensor, name, value)
        self.name = b"dltensor_versioned" if versioned else b"dltensor"

    def capsule(self):
        return _new(ctypes.addressof(self.record), self.name, None)


both = pytest.mark.parametrize("versioned", [False, True])


@both
@pytest.mark.parametrize("order", ["C", "F", "negative", "offset", "no strides", "zero"])
def test_any_strides_are_viewed_without_a_copy(versioned, order):
    array, options = V[0].copy(), {}
    if order == "F":
        array = np.asfortranarray(array)
    elif order == "negative":
        array = array[:, ::-1]
    elif order == "zero":
        array = np.broadcast_to(array[:, :1], array.shape)
    elif order == "no strides":
        options = {"strides": False}
    exporter = Exporter(array, versioned=versioned, **options)
    if order == "offset":
        exporter.record.tensor.data -= 64
        exporter.record.tensor.byte_offset = 64
    view = dlpack.read_capsule(exporter.capsule(), "q")
    assert_same_bits(view.data, array)
    assert view.dtype == "float32"
    assert np.shares_memory(view.data, array)


@both
def test_the_deleter_runs_once_after_the_last_view(versioned):
    exporter = Exporter(Q, versioned=versioned)
    capsule = exporter.capsule()
    view = dlpack.read_capsule(capsule, "q")
    assert _name(capsule) == b"used_" + exporter.name
    part = view.data[0, 1, 5:9]
    del capsule, view
    gc.collect()
    assert exporter.deleted == [], "the memory was given back under a view's feet"
    assert_same_bits(part, Q[0, 1, 5:9])
    del part
    gc.collect()
    assert exporter.deleted == [ctypes.addressof(exporter.record)]


@both
def test_a_capsule_may_have_no_deleter(versioned):
    exporter = Exporter(Q, versioned=versioned, deleter=False)
    assert_same_bits(dlpack.read_capsule(exporter.capsule(), "q").data, Q)


@both
def test_a_used_capsule_is_refused(versioned):
    exporter = Exporter(Q, versioned=versioned)
    capsule = exporter.capsule()
    view = dlpack.read_capsule(capsule, "q")
    words = ["q did not hand out a fresh DLPack capsule", "once"]
    assert_refused(InvalidArgumentError, lambda: dlpack.read_capsule(capsule, "q"), *words)
    assert exporter.deleted == []
    del view
    assert len(exporter.deleted) == 1


@both
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"code": 15, "bits": 8}, ["dtype", "code 15"]),
        ({"code": 10, "bits": 16}, ["dtype", "code 10", "16 bits"]),
        ({"code": 10, "bits": 8, "lanes": 2}, ["dtype", "code 10", "2 lanes"]),
        ({"lanes": 4}, ["dtype", "4 lanes"]),
        ({"bits": 4}, ["dtype", "4 bits"]),
        ({"device_type": 10}, ["on a device that cannot be used", "kind 10"]),
        ({"data": None}, ["no memory"]),
        ({"data": None, "device_type": 2}, ["no memory"]),
    ],
)
def test_what_is_refused_is_given_back_once(versioned, fields, words):
    exporter = Exporter(Q, versioned=versioned, **fields)
    assert_refused(
        InvalidArgumentError, lambda: dlpack.read_capsule(exporter.capsule(), "k"), "k ", *words
    )
    gc.collect()
    assert len(exporter.deleted) == 1


@both
@pytest.mark.parametrize("kind", [2, 13])
def test_memory_of_a_gpu_is_described_and_not_read(versioned, kind):
    array = np.broadcast_to(V[0, :, ::-1], (3, *V[0].shape))
    exporter = Exporter(array, versioned=versioned, device_type=kind, device_id=3)
    exporter.record.tensor.data, exporter.record.tensor.byte_offset = 0x7000_0000_0000, 256
    view = dlpack.read_capsule(exporter.capsule(), "q")
    assert type(view) is DeviceArray
    assert view.pointer == 0x7000_0000_0100
    assert view.shape == array.shape
    assert view.strides == (0, 140 * 16, -16, 1)
    assert (view.dtype, view.device) == ("float32", 3)
    part = view.swapaxes(0, 1)
    del view
    gc.collect()
    assert exporter.deleted == [], "the memory was given back under a view's feet"
    del part
    gc.collect()
    assert len(exporter.deleted) == 1


def test_an_empty_array_of_a_gpu_has_no_address():
    exporter = Exporter(V[:0], versioned=True, device_type=2)
    exporter.record.tensor.data = None
    view = dlpack.read_capsule(exporter.capsule(), "q")
    assert (view.pointer, view.shape) == (0, (0, *V.shape[1:]))


class Export:
    """An array that hands out one capsule, and keeps what it was asked for."""

    def __init__(self, exporter):
        self.exporter, self.asked = exporter, {}

    def __dlpack__(self, **options):
        self.asked = options
        return self.exporter.capsule()


@both
def test_readers_refuse_memory_of_the_other_kind(versioned):
    there = Export(Exporter(Q, versioned=versioned, device_type=2, device_id=1))
    here = Export(Exporter(Q, versioned=versioned))
    refused = "q is not in host memory (CUDA device 1)"
    assert_refused(InvalidArgumentError, lambda: dlpack.read_host(there, "q"), refused)
    refused = "k said that it lives on a CUDA device, and handed out host memory"
    assert_refused(
        InvalidArgumentError, lambda: dlpack.read_device(here, "k", stream=7), refused, "Export"
    )
    assert here.asked == {"max_version": (1, 0), "stream": 7}
    gc.collect()
    for array in (there, here):
        assert len(array.exporter.deleted) == 1
    assert dlpack.read_device(Export(there.exporter), "q").pointer == Q.ctypes.data
    assert_same_bits(dlpack.read_host(Export(here.exporter), "q").data, Q)


def test_a_later_major_version_is_left_to_its_exporter():
    exporter = Exporter(Q, versioned=True, major=2)
    capsule = exporter.capsule()
    assert_refused(InvalidArgumentError, lambda: dlpack.read_capsule(capsule, "v"), "DLPack 2.0")
    assert _name(capsule) == b"dltensor_versioned"
    assert exporter.deleted == []


@pytest.mark.parametrize("junk", [None, 1, "dltensor", object()])
def test_what_is_no_capsule_is_refused(junk):
    assert_refused(InvalidArgumentError, lambda: dlpack.read_capsule(junk, "q"), "capsule")


def test_read_only_memory_stays_read_only():
    exporter = Exporter(Q, versioned=True, flags=1)
    assert not dlpack.read_capsule(exporter.capsule(), "q").data.flags.writeable


@both
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (1,), (1, 1, 1)])
def test_small_and_empty_shapes(versioned, shape):
    array = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    exporter = Exporter(array, versioned=versioned)
    if not array.size:
        exporter.record.tensor.data = None  # as several exporters do
    view = dlpack.read_capsule(exporter.capsule(), "q")
    assert_same_bits(view.data, array)
    del view
    gc.collect()
    assert len(exporter.deleted) == 1


@pytest.mark.parametrize(
    ("code", "bits", "dtype"),
    [(0, 64, "i8"), (1, 8, "u1"), (2, 16, "f2"), (2, 64, "f8"), (4, 16, "u2"), (6, 8, "?")]
    + [(code, 8, "u1") for code in range(7, 15)],
)
def test_dtypes(foreign, code, bits, dtype):
    array = np.array([0, 1, 0], dtype).reshape(1, 1, 1, 3)
    exporter = Exporter(array, versioned=True, code=code, bits=bits)
    view = dlpack.read_capsule(exporter.capsule(), "q")
    assert_same_bits(view.data, array)
    names = {0: "int64", 1: "uint8", 4: "bfloat16", 6: "bool", 10: "float8_e4m3fn"}
    assert view.dtype == names.get(code, view.dtype)
    if code in range(7, 15):  # understood, and no dtype of q, k or v
        array = Fresh(exporter)
        words = [f"q has dtype {view.dtype}", "allowed float16"]
        assert_refused(InvalidArgumentError, lambda: attention(array, array, array), *words)


class Fresh:
    """An array of a framework of its own, which hands out a capsule of `exporter` when asked."""

    __module__ = "somebodys_arrays"

    def __init__(self, exporter):
        self.exporter = exporter

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        return self.exporter.capsule()


class Old:
    """An array from before DLPack 1.0: `__dlpack__` takes no version. Each capsule is its own."""

    __module__ = "somebodys_arrays"

    def __init__(self, array):
        self.array, self.exporters = array, []

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, stream=None):
        self.exporters.append(Exporter(self.array, versioned=False))
        return self.exporters[-1].capsule()


def test_a_whole_call_on_hand_made_capsules(foreign):
    arrays = [Old(array) for array in (Q, K, V)]
    got = attention(*arrays)
    assert_same_bits(got.array, attention(Q, K, V))
    gc.collect()
    for array in arrays:
        assert array.exporters
        assert [len(exporter.deleted) for exporter in array.exporters] == [1] * len(array.exporters)


@pytest.mark.parametrize("error", [BufferError, RuntimeError, TypeError, ValueError])
def test_an_exporter_that_raises(foreign, monkeypatch, error):
    array = foreign(Q)

    def refuse(self, **options):
        raise error("not today")

    monkeypatch.setattr(type(array), "__dlpack__", refuse)
    words = ["q cannot be exported through DLPack", "not today"]
    assert_refused(InvalidArgumentError, lambda: attention(array, array, array), *words)


def test_results_come_back_in_the_callers_framework(foreign):
    want, want_lse = attention(Q, K, V, return_lse=True)
    out, lse = attention(*(foreign(array) for array in (Q, K, V)), return_lse=True)
    assert type(out) is type(foreign(Q))
    assert_same_bits(out.array, want)
    assert_same_bits(lse.array, want_lse)
    out = attention(*(foreign(array) for array in (Q[:0], K[:0], V[:0])))
    assert out.array.shape == (0, 2, 140, 16)


def test_bfloat16_that_could_not_be_handed_back(foreign):
    class Brain:
        __module__ = "somebodys_arrays"

        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **options):
            exporter = Exporter(Q.astype(np.uint16), versioned=True, code=4, bits=16)
            keep.append(exporter)
            return exporter.capsule()

    keep = []
    array = Brain()
    words = ["bfloat16", "somebodys_arrays", "float32"]
    assert_refused(UnsupportedError, lambda: attention(array, array, array), *words)


def test_devices_of_any_exporter(foreign):
    def on(kind, index=0):
        return [foreign(array, device=(kind, index)) for array in (Q, K, V)]

    assert_refused(
        DeviceError,
        lambda: attention(*on(2, 1)),
        "q is on cuda:1",
        "Move the arrays to host",
        ".cpu()",
    )
    assert_refused(
        DeviceError, lambda: attention(*on(10)), "q is on DLPack device 10", "host memory"
    )
    mixed = [on(2)[0], *on(1)[1:]]
    assert_refused(
        InvalidArgumentError, lambda: attention(*mixed), "different devices", "q: cuda:0", "k: cpu"
    )
    two = [on(2, 0)[0], *on(2, 1)[1:]]
    assert_refused(
        InvalidArgumentError, lambda: attention(*two), "different devices", "q: cuda:0", "k: cuda:1"
    )


def test_a_framework_that_cannot_take_results_back(foreign, monkeypatch):
    array = foreign(Q)
    monkeypatch.delattr(foreign.module, "from_dlpack")
    assert_refused(
        InvalidArgumentError, lambda: attention(array, array, array), "no from_dlpack", "NumPy"
    )
