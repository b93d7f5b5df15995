"""A dry run of the tests marked `gpu`: their text is executed where there is no GPU.

Host memory is presented as a device's and kernels run in emulation (`StandInGpu`). In front of it
stand stand-ins for what the tests ask of torch and CuPy: streams on which everything is done at
once, graphs that repeat what was launched, counters that stand still. Each stands for a name that
the real library must have. What comes from here says something about the tests' text only.
"""

import contextlib
import json
import threading
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from gpu_tools import Gpu, numpy_dtype
from host_cuda import emu
from stand_in_gpu import StandInGpu, numpy_of
from test_dlpack import Exporter

from cusparge._arrays import DeviceArray, foreign
from cusparge._arrays import cupy as cupy_arrays
from cusparge._arrays.cupy import CupyAdapter
from cusparge._arrays.foreign import DlpackAdapter
from cusparge._arrays.torch import TorchAdapter
from cusparge._cuda import build, devices, launch, module, nvrtc, storage
from cusparge._cuda.build import Binary
from cusparge._cuda.cache import Info
from cusparge._cuda.variants import Variant, all_variants
from cusparge._version import __version__
from cusparge.errors import CompileError

_kernel = module.kernel


class DryGpu(StandInGpu, Gpu):
    """Two GPUs of compute capability 9.0 that are not there."""

    dry = True
    large = 2**14
    count = 2

    def __init__(self, monkeypatch):
        self.broken = False
        self.local = threading.local()
        self.default = _Stream(self)
        kernels = [one.expression for one in all_variants("sm_90a") if one.file == "pool.cu"]
        emu.build(emu.KERNELS / "pool.cu", *kernels)  # together: it is quicker than one by one
        StandInGpu.__init__(self, monkeypatch)

    @property
    def streams_in_use(self):
        if not hasattr(self.local, "streams"):
            self.local.streams = [self.default]
        return self.local.streams

    @property
    def now(self):
        return self.streams_in_use[-1]

    # -- the driver, below cusparge's own table of functions ---------------------------------

    def _patch(self, monkeypatch):
        StandInGpu._patch(self, monkeypatch)
        monkeypatch.setattr(launch, "_DEBUG", launch._debug())
        monkeypatch.setattr(module, "kernel", _kernel)
        monkeypatch.setattr(module, "_functions", {})
        runtime = devices.require_cupy().cuda.runtime
        runtime.streamSynchronize = self.complain
        cuda = SimpleNamespace(Device=self.guard, runtime=runtime)
        stub = SimpleNamespace(cuda=cuda, RawModule=lambda path: _Module(self, path))
        monkeypatch.setattr(devices, "require_cupy", lambda: stub)
        monkeypatch.setattr(devices, "require_device", lambda index: (9, 0))
        monkeypatch.setattr(build, "_compile", _pretend_to_compile)
        listed = [devices.Gpu(i, "stand-in", (9, 0), 1 << 34, f"GPU-{i}") for i in range(2)]
        monkeypatch.setattr(devices, "list_gpus", lambda: listed)
        for adapter in (TorchAdapter, CupyAdapter, DlpackAdapter):
            monkeypatch.setattr(adapter, "stream", lambda _, device: self.now._handle)
            monkeypatch.setattr(
                adapter, "is_capturing", lambda _, device: self.now._graph is not None
            )

    def launch(self, variant, grid, block, params, shared_bytes):
        self.complain()
        first = int.from_bytes(params[:8], "little")
        if first and self._find(first) is None:
            self.broken = True  # as a GPU: the next one to wait or to launch is told
            return
        work = (variant, grid, block, params, shared_bytes)
        self.launches.append(work)
        if self.now._graph is not None:
            self.now._graph.append(work)
        else:
            self._emulate(*work)

    def complain(self, stream=None):
        if self.broken:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")

    @contextlib.contextmanager
    def guard(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    @contextlib.contextmanager
    def use(self, stream):
        self.streams_in_use.append(stream)
        try:
            yield stream
        finally:
            self.streams_in_use.pop()

    @contextlib.contextmanager
    def capture(self, graph, capture_error_mode="global"):
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        with self.use(_Stream(self)) as stream:
            stream._graph = graph._launches
            yield

    def fault(self):
        self.broken = True

    def spin(self, cycles):
        self.now._busy = True

    def wait(self):
        self.default._busy = False

    def free_bytes(self):
        return 1 << 40

    def stream(self):
        return self.now._handle

    # -- arrays ------------------------------------------------------------------------------

    def tensor(self, values, dtype="float32", device=0):
        import torch

        made = torch.from_numpy(np.array(values)).to(getattr(torch, dtype)).clone()
        if device:
            self.second = {*self.second, made.data_ptr()}
        return made

    def array(self, values, dtype="float32", device=0):
        return self.cupy_array(np.array(values).astype(numpy_dtype(dtype)), device)

    def jax_array(self, values, dtype="float32"):
        import jax

        return jax.device_put(np.asarray(values).astype(numpy_dtype(dtype)))

    def host(self, array):
        if type(array).__module__.partition(".")[0] == "cupy":
            array = numpy_of(array)
        return super().host(array)

    def assign(self, array, values):
        numpy_of(array)[...] = values

    def copy(self, array, source):
        numpy_of(array)[...] = numpy_of(source)

    def upload(self, values, device):
        made = self.cupy_array(values.copy(), device)
        return DeviceArray(made.data.ptr, made.shape, (1,), made.dtype.name, device, made)

    def capsule(self, array, stream):
        exporter = Exporter(numpy_of(array), versioned=True, device_type=2)
        self.owners.append(exporter)
        return exporter.capsule()

    def allocate(self, num_bytes):
        memory = np.empty(num_bytes + 256, np.uint8)
        self.know(memory.ctypes.data, memory.nbytes, memory)
        return memory, -(-memory.ctypes.data // 256) * 256

    def write(self, address, values):
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._bytes(address, flat.size)[...] = flat

    def read(self, address, num_bytes):
        return self._bytes(address, num_bytes).copy()

    def _bytes(self, address, num_bytes):
        start, block = self._find(address)
        return block[address - start :][:num_bytes]

    # -- names of torch and CuPy -------------------------------------------------------------

    def _patch_torch(self, monkeypatch):
        StandInGpu._patch_torch(self, monkeypatch)
        import torch

        def signature(adapter, x):
            if x.requires_grad or type(x) is not torch.Tensor:
                return None
            self.know(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes(), x)
            return x.shape, x.stride(), x.dtype, self.device_of(x)

        monkeypatch.setattr(TorchAdapter, "signature", signature)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
        _check_names(_Stream, torch.cuda.Stream)
        _check_names(_Event, torch.cuda.Event)
        _check_names(_Graph, torch.cuda.CUDAGraph)
        stand_ins = {
            "Stream": lambda: _Stream(self),
            "Event": lambda: _Event(self),
            "CUDAGraph": lambda: _Graph(self),
            "stream": self.use,
            "graph": self.capture,
            "current_stream": lambda: self.now,
            "synchronize": self.wait,
            "_sleep": self.spin,
            "set_sync_debug_mode": lambda mode: None,
            "memory_allocated": lambda: 0,
            "empty_cache": lambda: None,
            "current_device": lambda: self.current,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def _patch_cupy(self, monkeypatch):
        StandInGpu._patch_cupy(self, monkeypatch)
        import cupy

        self.cupy = cupy
        for file in (cupy_arrays, foreign):
            monkeypatch.setattr(file, "upload", self.upload)
        _check_names(_CupyStream, cupy.cuda.Stream)
        _check_names(_CupyEvent, cupy.cuda.Event)
        _check_names(_CupyGraph, cupy.cuda.Graph)
        _check_names(_Pool, cupy.cuda.MemoryPool)
        cuda = SimpleNamespace(
            Stream=lambda non_blocking: _CupyStream(self),
            Event=lambda disable_timing: _CupyEvent(self),
            Device=self.guard,
            get_current_stream=lambda: self.now,
        )
        monkeypatch.setattr(cupy.cuda, "Stream", cuda.Stream)
        monkeypatch.setattr(cupy.cuda, "Event", cuda.Event)
        monkeypatch.setattr(cupy, "get_default_memory_pool", _Pool)
        monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: self.current)
        monkeypatch.setattr(foreign, "_cupy", lambda: SimpleNamespace(cuda=cuda))


def _check_names(stand_in, real):
    """See that the real class has every public name of its stand-in."""
    missing = [name for name in dir(stand_in) if name[0] != "_" and not hasattr(real, name)]
    assert not missing, f"{real} has no {', '.join(missing)}"


def _pretend_to_compile(variant, arch):
    """Put something into the cache that is no machine code, for kernels that run in emulation."""
    try:
        version = nvrtc.load().version
    except CompileError:
        version = (13, 0)
    key = build.key_of(variant, arch, version)
    cubin = b"\x7fELF" + key.digest.encode() * 40
    info = Info(
        kernel=variant.file, expression=variant.expression, lowered=f"_{key.digest[:9]}",
        arch=arch, options=build.options_for(arch), nvrtc=f"{version[0]}.{version[1]}",
        cusparge=__version__, key=key.digest, source_key=key.source_digest,
        sha256=sha256(cubin).hexdigest(), size=len(cubin),
        registers=-1, spill_bytes=-1, stack_bytes=-1, compile_ms=0.0,
    )  # fmt: skip
    entry = storage.store(cubin, info)
    return Binary(entry.path, info.lowered, arch, variant, info)


class _Module:
    """As `cupy.RawModule` of a cubin; which kernel it holds stands in the file beside it."""

    def __init__(self, gpu, path):
        self._gpu, self._path = gpu, Path(path)

    def get_function(self, name):
        if len(self._path.read_bytes()) < 1000:
            raise RuntimeError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
        info = json.loads(self._path.with_suffix(".json").read_text())
        assert info["lowered"] == name
        variant = Variant(info["kernel"], info["expression"])
        device = self._gpu.current

        def function(grid, block, args, shared_bytes, stream):
            (params,) = args
            assert stream.ptr == self._gpu.now._handle
            if self._gpu.current != device:
                raise RuntimeError("CUDA_ERROR_INVALID_HANDLE: invalid resource handle")
            self._gpu.launch(variant, grid, block, bytes(params), shared_bytes)

        function.kernel = function
        return SimpleNamespace(kernel=function)


class _AnyStream:
    """Work is done when it is queued; only spinning lasts."""

    def __init__(self, gpu):
        self._gpu, self._busy, self._graph = gpu, False, None
        self._handle = id(self)

    def synchronize(self):
        self._busy = False


class _Stream(_AnyStream):
    def wait_stream(self, other):
        assert other is self._gpu.default


class _CupyStream(_AnyStream):
    def __enter__(self):
        self._gpu.streams_in_use.append(self)
        return self

    def __exit__(self, *error):
        self._gpu.streams_in_use.pop()

    def begin_capture(self):
        self._graph = []

    def end_capture(self):
        graph = _CupyGraph(self._gpu)
        graph._launches, self._graph = self._graph, None
        return graph


class _Marker:
    """An event: what was queued on the stream when it was recorded."""

    def __init__(self, gpu):
        self._gpu, self._stream = gpu, None

    def record(self, stream=None):
        self._stream = stream or self._gpu.now

    def synchronize(self):
        self._stream._busy = False


class _Event(_Marker):
    def query(self):
        return not self._stream._busy


class _CupyEvent(_Marker):
    @property
    def done(self):
        return not self._stream._busy


class _Work:
    """Launches that were captured."""

    def __init__(self, gpu):
        self._gpu, self._launches = gpu, []

    def _run(self):
        for work in self._launches:
            self._gpu._emulate(*work)


class _Graph(_Work):
    def replay(self):
        self._run()


class _CupyGraph(_Work):
    def launch(self, stream):
        self._run()


class _Pool:
    def used_bytes(self):
        return 0

    def total_bytes(self):
        return 0
