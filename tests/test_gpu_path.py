"""From arrays of a framework to kernels and back, on a stand-in for the GPU (host-emulated)."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from compare import assert_close, assert_refused
from host_cuda import emu
from stand_in_gpu import StandInGpu, numpy_of
from test_dlpack import Exporter

from cusparge import DeviceError, InvalidArgumentError, UnsupportedError
from cusparge._arrays import cupy as cupy_arrays
from cusparge._arrays import foreign
from cusparge._arrays.torch import TorchAdapter
from cusparge._cuda import launch, module
from cusparge.stage1 import pool_blocks

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emu.MISSING is not None, reason=str(emu.MISSING)),
]


@pytest.fixture
def gpu(monkeypatch):
    return StandInGpu(monkeypatch)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch")


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="needs cupy")


def inputs(rng, shape=(2, 2, 150, 64)):
    return rng.standard_normal(shape).astype(np.float32) + 1


def assert_pooled(got, x, to_numpy, **options):
    """Compare with the CPU backend, whose own tests compare it with the oracle."""
    want = pool_blocks(x, **options)
    # Both sum some 128 numbers of magnitude near 1 in float32.
    assert_close(to_numpy(got.mean), want.mean, atol=1e-5)
    assert_close(to_numpy(got.similarity), want.similarity, atol=1e-5)
    if options.get("smooth"):
        assert_close(to_numpy(got.token_mean), want.token_mean, atol=1e-5)
    else:
        assert got.token_mean is None


OPTIONS = [
    {"block": 128},
    {"block": 64, "smooth": True},
    {"block": 64, "smooth": True, "layout": "NHD"},
    {"block": 64, "smooth": True, "seqlens": [150, 65]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_torch_tensors(gpu, torch, rng, options):
    x = inputs(rng)
    given = x.swapaxes(1, 2).copy() if options.get("layout") == "NHD" else x
    tensor = torch.from_numpy(given.copy())
    settings = dict(options)
    if "seqlens" in options:
        settings["seqlens"] = torch.tensor(options["seqlens"], dtype=torch.int32)
    got = pool_blocks(tensor, **settings)
    assert isinstance(got.mean, torch.Tensor)
    assert got.mean.is_contiguous()
    assert {record[4] for record in gpu.launches} == {0x70}, "the framework's own stream"
    assert gpu.synchronised == 0
    assert_pooled(got, given, torch.Tensor.numpy, **options)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_cupy_arrays(gpu, cupy, rng, options):
    x = inputs(rng)
    given = x.swapaxes(1, 2).copy() if options.get("layout") == "NHD" else x
    got = pool_blocks(gpu.cupy_array(given), **options)
    assert isinstance(got.mean, cupy.ndarray)
    assert_pooled(got, given, numpy_of, **options)


def test_strides_are_followed_without_a_copy(gpu, cupy, torch, rng):
    fused = rng.standard_normal((1, 150, 3, 2, 64)).astype(np.float32)
    tensor = torch.from_numpy(fused.copy())[:, :, 1].transpose(1, 2)
    got = pool_blocks(tensor, smooth=True)
    assert_pooled(got, fused[:, :, 1].swapaxes(1, 2), torch.Tensor.numpy, smooth=True)
    memory = rng.standard_normal((1, 2, 150, 64)).astype(np.float32)
    backwards = memory[:, ::-1, ::-2]
    view = gpu.cupy_array(memory)[:, ::-1, ::-2]
    assert_pooled(pool_blocks(view), backwards, numpy_of)


def test_a_call_that_was_checked_before_takes_the_short_way(gpu, torch, rng, monkeypatch):
    """Its results are those of the long way, and another array or option never takes it."""
    monkeypatch.setattr(TorchAdapter, "signature", lambda _, x: (x.shape, x.stride(), x.dtype))
    looked = []
    view = TorchAdapter.view
    monkeypatch.setattr(
        TorchAdapter, "view", lambda self, x, name: looked.append(1) or view(self, x, name)
    )
    for _ in range(3):
        x = inputs(rng)
        tensor = torch.from_numpy(x.copy())
        gpu.know(tensor.data_ptr(), x.nbytes, tensor)
        assert_pooled(pool_blocks(tensor, smooth=True), x, torch.Tensor.numpy, smooth=True)
    assert len(looked) == 1
    for options in ({}, {"block": 128}, {"smooth": True, "layout": "NHD"}):
        assert_pooled(pool_blocks(tensor, **options), x, torch.Tensor.numpy, **options)
    assert len(looked) == 4
    assert_refused(InvalidArgumentError, lambda: pool_blocks(tensor, smooth=1), "smooth")
    assert_refused(InvalidArgumentError, lambda: pool_blocks(tensor, block=[64]), "block")


def test_bfloat16_tensors(gpu, torch, rng):
    x = torch.from_numpy(inputs(rng)).to(torch.bfloat16)
    got = pool_blocks(x, smooth=True)
    assert got.mean.dtype == torch.float32
    assert_pooled(got, x.float().numpy(), torch.Tensor.numpy, smooth=True)


def test_the_other_device_is_made_current_and_the_callers_restored(gpu, torch, rng):
    x = torch.from_numpy(inputs(rng))
    gpu.second = {x.data_ptr()}
    pool_blocks(x, smooth=True)
    assert {record[5] for record in gpu.launches} == {1}
    assert {record[4] for record in gpu.launches} == {0x71}
    assert gpu.current == 0
    gpu.fail = RuntimeError("CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(DeviceError):
        pool_blocks(x)
    assert gpu.current == 0, "restored after a failure too"


def test_a_failed_launch_names_the_kernel_and_its_shape(gpu, torch, rng):
    gpu.fail = RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
    assert_refused(
        DeviceError,
        lambda: pool_blocks(torch.from_numpy(inputs(rng))),
        *("pool_blocks", "pool.cu", "grid (12, 1, 1)", "CUDA_ERROR_ILLEGAL_ADDRESS", "GPU 0"),
        "CUSPARGE_DEBUG=1",
    )


def test_debugging_waits_after_each_launch(gpu, torch, rng, monkeypatch):
    monkeypatch.setattr(launch, "_DEBUG", True)
    pool_blocks(torch.from_numpy(inputs(rng)), smooth=True)
    assert gpu.synchronised == len(gpu.launches) == 3


def test_nothing_is_launched_for_no_elements(gpu, torch):
    for shape in ((0, 2, 150, 64), (2, 0, 150, 64)):
        got = pool_blocks(torch.zeros(shape), smooth=True)
        assert got.mean.shape == (*shape[:2], 3, 64)
        assert got.token_mean.shape == (*shape[:2], 64)
    assert not gpu.launches
    got = pool_blocks(torch.zeros(2, 2, 0, 64), smooth=True)
    assert got.mean.shape == (2, 2, 0, 64)
    assert torch.equal(got.token_mean, torch.zeros(2, 2, 64))


def test_arguments_are_refused_before_anything_is_launched(gpu, torch, cupy, rng):
    x = torch.from_numpy(inputs(rng))
    lengths = torch.tensor([150, 65], dtype=torch.int32)

    def refused(kind, call, *words):
        assert_refused(kind, call, *words)
        assert not gpu.launches

    refused(InvalidArgumentError, lambda: pool_blocks(x, block=32), "block", "64 and 128")
    refused(InvalidArgumentError, lambda: pool_blocks(x.double()), "float64", "GPU", "float32")
    refused(InvalidArgumentError, lambda: pool_blocks(x[0]), "x has 3 dimensions")
    wide = torch.zeros(1, 1, 2, 300)
    refused(InvalidArgumentError, lambda: pool_blocks(wide), "head_dim", "300", "x.shape")
    narrow = x[:, :, :32].transpose(2, 3)
    refused(InvalidArgumentError, lambda: pool_blocks(narrow), "x's last dimension", "contiguous")
    refused(InvalidArgumentError, lambda: pool_blocks(x, seqlens=[1]), "seqlens has 1 lengths")
    refused(InvalidArgumentError, lambda: pool_blocks(x, seqlens=[1, 151]), "seqlens[1]", "150")
    refused(InvalidArgumentError, lambda: pool_blocks(x, seqlens=lengths.long()), "int64", "int32")
    refused(InvalidArgumentError, lambda: pool_blocks(x, seqlens=lengths[:1]), "(1,)", "(2,)")
    every_other = torch.tensor([150, 0, 65, 0], dtype=torch.int32)[::2]
    refused(InvalidArgumentError, lambda: pool_blocks(x, seqlens=every_other), "contiguous")
    foreign_lengths = gpu.cupy_array(np.array([150, 65], np.int32))
    refused(InvalidArgumentError, lambda: pool_blocks(x, seqlens=foreign_lengths), "cupy", "torch")
    gpu.second = {lengths.data_ptr()}
    refused(InvalidArgumentError, lambda: pool_blocks(x, seqlens=lengths), "cuda:1", "cuda:0")


def test_a_misaligned_array_is_refused(gpu, cupy, torch, rng):
    """A GPU faults on it for good, and takes the process's context along."""
    for dtype in (np.float32, np.float16):
        raw = np.zeros(2 * 64 * 64 * 4 + 1, np.uint8)[1:]
        odd = raw[: 64 * 64 * np.dtype(dtype).itemsize].view(dtype).reshape(1, 1, 64, 64)
        array = gpu.cupy_array(odd)
        assert_refused(InvalidArgumentError, lambda x=array: pool_blocks(x), "x is not aligned")
    assert not gpu.launches


def test_a_capture_takes_lengths_from_the_device_only(gpu, torch, rng):
    x = torch.from_numpy(inputs(rng))
    gpu.capturing = True
    assert_refused(
        DeviceError, lambda: pool_blocks(x, seqlens=[150, 65]), "CUDA graph", "int32 array"
    )
    pool_blocks(x, seqlens=torch.tensor([150, 65], dtype=torch.int32))
    assert len(gpu.launches) == 1


def test_kernels_are_there_before_anything_is_allocated(gpu, torch, rng, monkeypatch):
    """What keeps kernels from loading keeps frameworks from allocating, and ours says why."""

    def kernel(variant, device, **options):
        raise DeviceError("started CUDA before fork")

    def allocate(*arguments):
        raise AssertionError("allocated first")

    monkeypatch.setattr(module, "kernel", kernel)
    monkeypatch.setattr(TorchAdapter, "empty", allocate)
    tensor = torch.from_numpy(inputs(rng))
    assert_refused(DeviceError, lambda: pool_blocks(tensor, smooth=True), "before fork")


def test_a_captured_graph_of_cupy_keeps_its_workspace(gpu, cupy, rng, monkeypatch):
    """CuPy's pool would hand it to somebody else, and a replay would write there."""
    kept = []
    monkeypatch.setattr(cupy_arrays, "_captured", kept)
    x = gpu.cupy_array(inputs(rng))
    pool_blocks(x, smooth=True)
    assert not kept
    gpu.capturing = True
    pool_blocks(x)
    assert not kept, "there is no workspace without a mean"
    pool_blocks(x, smooth=True)
    assert len(kept) == 1


def test_a_capture_is_told_to_the_loader(gpu, torch, rng, monkeypatch):
    told = []

    def kernel(variant, device, *, capturing=None, max_dynamic_shared_bytes=0):
        told.append(capturing())
        return gpu.kernel(variant, device)

    monkeypatch.setattr(module, "kernel", kernel)
    gpu.capturing = True
    pool_blocks(torch.from_numpy(inputs(rng)))
    assert told == [True]


class TestForeignFrameworks:
    """Arrays that speak DLPack, of a framework that nobody has heard of."""

    @pytest.fixture
    def other(self, gpu, cupy, monkeypatch):
        """A module ``otherlib`` whose arrays are exporters of device memory."""
        events = []

        class Event:
            def __init__(self, disable_timing=False):
                self.done = False
                events.append(self)

            def record(self, stream):
                self.stream = stream

        class Guard:
            def __init__(self, index):
                self.index = index

            def __enter__(self):
                return self

            def __exit__(self, *error):
                return False

        stub = SimpleNamespace(
            cuda=SimpleNamespace(Event=Event, Device=Guard, get_current_stream=lambda: "current")
        )
        monkeypatch.setattr(foreign, "_cupy", lambda: stub)
        library = SimpleNamespace(from_dlpack=lambda made: ("handed over", made))
        monkeypatch.setitem(sys.modules, "otherlib", library)

        class Array(Exporter):
            streams = ()

            def __dlpack__(self, *, stream=None, max_version=None):
                self.streams = (*self.streams, stream)
                return self.capsule() if hasattr(self, "capsule") else super().__dlpack__()

            def __dlpack_device__(self):
                return (2, 0)

        Array.__module__ = "otherlib.arrays"
        library.Array = Array
        library.events = events
        foreign._in_use.clear()
        return library

    @pytest.mark.parametrize("versioned", [True, False])
    def test_in_out_and_kept_until_the_stream_is_done(self, gpu, other, rng, versioned):
        x = inputs(rng)
        gpu.know(x.ctypes.data, x.nbytes, x)
        array = other.Array(x, versioned=versioned, device_type=2)
        got = pool_blocks(array, smooth=True)
        assert set(array.streams) == {0x70}, "the exporter is told our stream"
        tag, mean = got.mean
        assert tag == "handed over"
        want = pool_blocks(x, smooth=True)
        assert_close(numpy_of(mean), want.mean, atol=1e-5)
        assert not array.deleted, "the memory was given back while a kernel may use it"
        other.events[-1].done = True
        second = other.Array(x, versioned=versioned, device_type=2)
        pool_blocks(second)
        assert len(array.deleted) == 1
        assert not second.deleted

    def test_the_legacy_default_stream_is_named_as_dlpack_does(self, gpu, other, rng):
        x = inputs(rng)
        gpu.know(x.ctypes.data, x.nbytes, x)
        gpu.streams[0] = 0
        array = other.Array(x, versioned=True, device_type=2)
        pool_blocks(array)
        assert set(array.streams) == {1}

    def test_a_capture_is_refused(self, gpu, other, rng):
        gpu.capturing = True
        array = other.Array(inputs(rng), versioned=True, device_type=2)
        assert_refused(UnsupportedError, lambda: pool_blocks(array), "otherlib", "CUDA graph")
        assert not gpu.launches

    def test_a_capsule_over_host_memory_is_refused(self, gpu, other, rng):
        array = other.Array(inputs(rng), versioned=True, device_type=1)
        assert_refused(InvalidArgumentError, lambda: pool_blocks(array), "x said", "host memory")
        assert len(array.deleted) == 1
