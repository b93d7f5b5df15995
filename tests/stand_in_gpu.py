"""A GPU that is not there: host memory presented as a CUDA device's, kernels run in emulation.

What is real: plans, addresses, structs, the adapters' allocation and description of arrays, the
order of launches and what they compute (host-emulated). What is not: the driver, its streams and
its errors; tests marked `gpu` have those.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
from host_cuda import emu

from cusparge import stage1
from cusparge._arrays import Device, DeviceArray
from cusparge._arrays import cupy as cupy_arrays
from cusparge._arrays.cupy import CupyAdapter
from cusparge._arrays.foreign import DlpackAdapter
from cusparge._arrays.torch import TorchAdapter
from cusparge._cuda import devices, launch, module, sources


class StandInGpu:
    """Two devices; records what a driver would be told."""

    def __init__(self, monkeypatch, *, run=True):
        self.run = run
        self.launches = []  # (expression, grid, block, shared bytes, stream, current device)
        self.current = 0
        self.capturing = False
        self.fail = None  # an exception for the next launch
        self.owners = []  # of known memory, which must not be freed and used for something else
        self.memory = {}  # address -> uint8 array over a whole allocation
        self.streams = {0: 0x70, 1: 0x71}
        self.synchronised = 0
        self.events = []
        self._patch(monkeypatch)

    # -- memory ------------------------------------------------------------------------------

    def know(self, address, num_bytes, owner):
        """Take note of an allocation, so that addresses within it can be run on."""
        self.owners.append(owner)
        if num_bytes:
            raw = (ctypes.c_uint8 * num_bytes).from_address(address)
            self.memory[address] = np.frombuffer(raw, np.uint8)

    def _find(self, address):
        for start, block in self.memory.items():
            if start <= address < start + block.size:
                return start, block
        return None

    # -- the driver --------------------------------------------------------------------------

    def kernel(self, variant, device, *, capturing=None, max_dynamic_shared_bytes=0):
        """Stand for `module.kernel`."""

        def function(grid, block, args, shared_bytes, stream):
            if self.fail is not None:
                error, self.fail = self.fail, None
                raise error
            (params,) = args
            assert isinstance(params, np.ndarray)
            assert params.size == 1
            record = (variant.expression, grid, block, shared_bytes, stream.ptr, self.current)
            self.launches.append(record)
            if self.run:
                self._emulate(variant, grid, block, bytes(params), shared_bytes)

        return function

    def _emulate(self, variant, grid, block, params, shared_bytes):
        buffers, pointers = {}, {}
        for offset in range(0, len(params) - 7, 8):
            found = self._find(int.from_bytes(params[offset : offset + 8], "little"))
            if found is not None:
                start, memory = found
                if start not in buffers:
                    buffers[start] = emu.InOut(memory)
                address = int.from_bytes(params[offset : offset + 8], "little")
                pointers[offset] = (buffers[start], address - start)
        file = sources.load().folder / variant.file
        emu.launch_params(
            file, variant.expression, grid, block, params, pointers, smem_bytes=shared_bytes
        )

    # -- what the package sees of it ---------------------------------------------------------

    def _patch(self, monkeypatch):
        def set_device(index):
            self.current = index

        def synchronize(stream):
            self.synchronised += 1

        runtime = SimpleNamespace(
            getDevice=lambda: self.current, setDevice=set_device, streamSynchronize=synchronize
        )
        stub = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
        monkeypatch.setattr(devices, "require_cupy", lambda: stub)
        monkeypatch.setattr(stage1, "require_device", lambda index: (9, 0))
        monkeypatch.setattr(module, "kernel", self.kernel)
        monkeypatch.setattr(launch, "_DEBUG", False)
        for adapter in (TorchAdapter, CupyAdapter, DlpackAdapter):
            monkeypatch.setattr(adapter, "stream", lambda _, device: self.streams[device])
            monkeypatch.setattr(adapter, "is_capturing", lambda _, device: self.capturing)
        self._patch_torch(monkeypatch)
        self._patch_cupy(monkeypatch)

    def _patch_torch(self, monkeypatch):
        def on_device(adapter, array):
            storage = array.untyped_storage()
            self.know(storage.data_ptr(), storage.nbytes(), array)
            name = str(array.dtype).rpartition(".")[2]
            index = self.device_of(array)
            return DeviceArray(
                array.data_ptr(), tuple(array.shape), array.stride(), name, index, array
            )

        monkeypatch.setattr(TorchAdapter, "_on_device", on_device)
        monkeypatch.setattr(TorchAdapter, "view", lambda self, array, name: on_device(self, array))
        monkeypatch.setattr(
            TorchAdapter, "device", lambda _, array: Device("cuda", self.device_of(array))
        )

        def empty(adapter, shapes, array):
            import torch

            made = [torch.full(shape, 7, dtype=torch.float32) for shape in shapes]
            for one in made:
                self.know(one.data_ptr(), one.untyped_storage().nbytes(), one)
            return made, [one.data_ptr() for one in made]

        monkeypatch.setattr(TorchAdapter, "empty", empty)

    #: Addresses of tensors that are said to live on the second device.
    second = ()

    def device_of(self, array):
        return int(array.data_ptr() in self.second)

    def _patch_cupy(self, monkeypatch):
        def allocate(shape, dtype, device):
            made = self.cupy_array(np.full(shape, 7, dtype), device)
            return made

        monkeypatch.setattr(cupy_arrays, "allocate", allocate)
        monkeypatch.setattr("cusparge._arrays.foreign.allocate", allocate)

    def cupy_array(self, array, device=0):
        """Return a CuPy array over the memory of a NumPy array."""
        import cupy

        base = array if array.base is None else array.base
        self.know(base.ctypes.data, base.nbytes, base)
        memory = cupy.cuda.UnownedMemory(array.ctypes.data, max(array.nbytes, 1), array, device)
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        return cupy.ndarray(array.shape, array.dtype, pointer, strides=array.strides)


def numpy_of(array):
    """View a CuPy array over host memory as NumPy."""
    interface = {
        "version": 3,
        "shape": array.shape,
        "strides": array.strides,
        "typestr": array.dtype.str,
        "data": (array.data.ptr, False),
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface, owner=array))
