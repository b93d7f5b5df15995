"""What tests on a GPU share: whether there is one, arrays in its memory, and scripts of their own.

``CUSPARGE_TEST_GPU=stand-in`` lets the tests run where there is no GPU, on `dry_gpu.DryGpu`: that
proves nothing about GPUs, but the tests' own text is executed.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

#: What chooses the stand-in.
VARIABLE = "CUSPARGE_TEST_GPU"
DRY = os.environ.get(VARIABLE) == "stand-in"

# JAX would take three quarters of the GPU's memory, which torch and CuPy need beside it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

#: Long enough for any call here to be queued meanwhile, in cycles of a GPU: a second or two.
LONG = 3_000_000_000
#: Long enough to show who does not wait.
SHORT = LONG // 10

SHAPE = (2, 3, 150, 64)
OPTIONS = [
    {"block": 128},
    {"smooth": True},
    {"smooth": True, "layout": "NHD"},
    {"smooth": True, "seqlens": [150, 65]},
]
FIELDS = ("mean", "similarity", "token_mean")

_SPIN = """
extern "C" __global__ void spin(long long cycles) {
  const long long begin = clock64();
  while (clock64() - begin < cycles) {}
}
extern "C" __global__ void fault(int* nowhere) { *nowhere = 1; }
"""


def why_not():
    """Return why there are no tests on a GPU here, or None; it imports cusparge."""
    if DRY:
        return None
    if importlib.util.find_spec("cupy") is None:
        return "needs cupy"
    from cusparge._cuda import devices

    if not devices.list_gpus():
        return "needs an NVIDIA GPU (the driver lists none)"
    return None


def marks():
    """Return the marks of a file of tests on a GPU.

    Warnings of other libraries are theirs; those of NumPy and ours stay errors.
    """
    missing = why_not()
    theirs = ("Deprecation", "PendingDeprecation", "Future", "Import", "Resource", "User")
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(missing is not None, reason=str(missing)),
        *(pytest.mark.filterwarnings(f"default::{name}Warning") for name in theirs),
    ]


class Gpu:
    """The GPUs of this machine."""

    dry = False
    #: Elements that 32 bits cannot count.
    large = 2**31

    def __init__(self):
        import cupy

        self.cupy = cupy
        self.count = cupy.cuda.runtime.getDeviceCount()
        self._kernels = None

    def tensor(self, values, dtype="float32", device=0):
        """Return a torch tensor on a device."""
        import torch

        made = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
        return made.to(torch.device("cuda", device))

    def array(self, values, dtype="float32", device=0):
        """Return a CuPy array on a device; the conversion takes place on the host."""
        with self.cupy.cuda.Device(device):
            return self.cupy.asarray(np.asarray(values).astype(numpy_dtype(dtype)))

    def jax_array(self, values, dtype="float32"):
        """Return a JAX array on the first GPU."""
        import jax

        try:
            (device, *_) = jax.devices("gpu")
        except RuntimeError as error:
            pytest.skip(f"JAX sees no GPU: {str(error).splitlines()[0]}")
        return jax.device_put(np.asarray(values).astype(numpy_dtype(dtype)), device)

    def host(self, array):
        """Return the values of an array of any framework as float32, once they are there."""
        if hasattr(array, "cpu"):
            return array.detach().cpu().float().numpy()
        if type(array).__module__.partition(".")[0] == "cupy":
            self.cupy.cuda.get_current_stream().synchronize()
            array = array.get()
        return np.asarray(array).astype(np.float32)

    def assign(self, array, values):
        """Write a NumPy array into a CuPy array, on CuPy's current stream."""
        array.set(values)

    def copy(self, array, source):
        """Copy one contiguous CuPy array to another, on CuPy's current stream."""
        stream = self.cupy.cuda.get_current_stream()
        array.data.copy_from_device_async(source.data, source.nbytes, stream)

    def capsule(self, array, stream):
        """Return a DLPack capsule over a CuPy array."""
        return array.__dlpack__(stream=stream)

    def stream(self):
        """Return the handle of CuPy's current stream."""
        return self.cupy.cuda.get_current_stream().ptr

    def wait(self):
        """Wait for all that was queued on the current device."""
        self.cupy.cuda.runtime.deviceSynchronize()

    def free_bytes(self):
        """Return how much memory of the first GPU is free."""
        return self.cupy.cuda.runtime.memGetInfo()[0]

    def allocate(self, num_bytes):
        """Return (owner, address) of memory straight from the driver, not from a pool."""
        memory = self.cupy.cuda.Memory(max(num_bytes, 1))
        return memory, memory.ptr

    def write(self, address, values):
        """Copy a NumPy array to the device."""
        values = np.ascontiguousarray(values)
        self.cupy.cuda.runtime.memcpy(address, values.ctypes.data, values.nbytes, 1)

    def read(self, address, num_bytes):
        """Copy from the device, after everything that was queued."""
        self.wait()
        out = np.empty(num_bytes, np.uint8)
        self.cupy.cuda.runtime.memcpy(out.ctypes.data, address, num_bytes, 2)
        return out

    def _kernel(self, name):
        if self._kernels is None:
            self._kernels = self.cupy.RawModule(code=_SPIN)
        return self._kernels.get_function(name)

    def spin(self, cycles):
        """Keep CuPy's current stream busy."""
        self._kernel("spin")((1,), (1,), (np.int64(cycles),))

    def fault(self):
        """Break this process's context: the error stays for good."""
        self._kernel("fault")((1,), (1,), (np.uint64(8),))
        with contextlib.suppress(Exception):
            self.wait()


def numpy_dtype(name):
    """Return NumPy's dtype of a name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy needs ml_dtypes")
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def begin(monkeypatch=None):
    """Return the GPUs, or their stand-in: until `monkeypatch` ends, or once for a process."""
    if not DRY:
        return Gpu()
    from dry_gpu import DryGpu

    if monkeypatch is not None:
        return DryGpu(monkeypatch)
    if not _stand_in:
        _stand_in.append(DryGpu(pytest.MonkeyPatch()))
    return _stand_in[0]


_stand_in = []


def import_cusparge(mode):
    """Import cusparge for the first time in this process, with that ``CUSPARGE_COMPILE``."""
    assert "cusparge" not in sys.modules
    os.environ["CUSPARGE_COMPILE"] = "lazy" if DRY else mode
    import cusparge

    if DRY:  # its GPUs cannot be listed before it is imported
        begin()
        os.environ["CUSPARGE_COMPILE"] = mode
        cusparge._background.start()
    return cusparge


def torch_with_cuda():
    """Return torch, or skip the test."""
    torch = pytest.importorskip("torch", reason="needs torch")
    if not DRY and not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


def inputs(rng, dtype="float32", shape=SHAPE, layout="HND"):
    """Return values that the dtype holds exactly, as float32."""
    x = rng.standard_normal(shape).astype(np.float32) + 1
    x = np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "NHD" else x
    if dtype == "bfloat16":  # by its bits, as not everybody has ml_dtypes
        return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return x.astype(dtype).astype(np.float32)


def assert_pooled(gpu, got, x, **options):
    """Compare with the CPU backend: both sum some 128 numbers of magnitude near 1 in float32."""
    from compare import assert_close

    from cusparge.stage1 import pool_blocks

    want = pool_blocks(np.ascontiguousarray(x), **options)
    for name in FIELDS:
        mine, other = getattr(got, name), getattr(want, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert_close(gpu.host(mine), other, atol=1e-5, label=name)


@contextlib.contextmanager
def no_waiting(torch):
    """Let torch raise where the host waits for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


#: Begins a script.
_HEAD = """
import os, sys, threading
sys.path.insert(0, {tests!r})
import numpy as np
import gpu_tools
"""


def run_script(text, cache, *, timeout=240, **variables):
    """Run a script in a fresh process with a cache of its own; return its output and messages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUSPARGE_")}
    environment = kept | {
        VARIABLE: os.environ.get(VARIABLE, ""),
        "CUSPARGE_COMPILE": "lazy",
        "CUSPARGE_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if "CUSPARGE_NVRTC" in os.environ:
        environment["CUSPARGE_NVRTC"] = os.environ["CUSPARGE_NVRTC"]
    done = subprocess.run(
        [sys.executable, "-c", _HEAD.format(tests=str(ROOT / "tests")) + text],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout, done.stderr
