"""What the tests of the compile layer share: small kernels, and a stand-in for CuPy's loader."""

import contextlib
import os
import subprocess
import sys
import types
from hashlib import sha256
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")

HEADER = """#pragma once
__device__ inline float twice(float x) { return 2.0f * x; }
"""
KERNEL = """#include "cusparge/small.cuh"
namespace cusparge {
struct Config { int factor; bool negate; };
template <Config C> __global__ void small(float* x) {
  static_assert(C.factor != 13, "thirteen is refused");
  x[threadIdx.x] = twice(x[threadIdx.x]) * (C.negate ? -C.factor : C.factor);
}
}  // namespace cusparge
"""
#: A kernel that takes seconds to compile.
_BODY = "".join(f"  if (x > y) p[{i}] = sinf(x + {i}) + powf(x, y + {i});\n" for i in range(1, 30))
SLOW = f"""extern "C" __global__ void slow(float* p) {{
  float x = p[0], y = p[1];
{_BODY}}}
"""


def write_kernels(folder, kernel=KERNEL, header=HEADER, name="small.cu"):
    """Make a folder of sources; return it."""
    (folder / "cusparge").mkdir(parents=True, exist_ok=True)
    (folder / "cusparge/geometry.cuh").write_text("#pragma once\n")
    (folder / "cusparge/small.cuh").write_text(header)
    (folder / name).write_text(kernel)
    (folder / "slow.cu").write_text(SLOW)
    return folder


def small(factor=3, negate=False):
    """Return a variant of the small kernel; factor 13 does not compile."""
    from cusparge._cuda.variants import Variant

    text = f"cusparge::Config{{{factor}, {str(negate).lower()}}}"
    return Variant("small.cu", f"cusparge::small<{text}>")


def isolate(monkeypatch, tmp_path):
    """Use a fresh cache and the small kernels, and no setting of the machine's."""
    for name in list(os.environ):
        if name.startswith("CUSPARGE_") and name not in ("CUSPARGE_NVRTC", "CUSPARGE_TEST_SEED"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUSPARGE_COMPILE", "lazy")
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CUSPARGE_KERNELS", str(write_kernels(tmp_path / "kernels")))


def code_of(name, size=500):
    """Return bytes that could be machine code."""
    return b"\x7fELF" + sha256(name.encode()).digest() * (size // 32)


def info_of(name="a", cubin=None, nvrtc="13.0", arch="sm_90a"):
    """Return metadata that goes with `code_of(name)`."""
    from cusparge._cuda.cache import Info

    cubin = code_of(name) if cubin is None else cubin
    return Info(
        kernel="small.cu",
        expression=name,
        lowered=f"_Z{name}",
        arch=arch,
        options=("-std=c++20",),
        nvrtc=nvrtc,
        cusparge="0.1.0",
        key=sha256(f"{name} {nvrtc}".encode()).hexdigest(),
        source_key=sha256(name.encode()).hexdigest(),
        sha256=sha256(cubin).hexdigest(),
        size=len(cubin),
        registers=32,
        spill_bytes=0,
        stack_bytes=0,
        compile_ms=12.5,
    )


def key_of(info):
    """Return what finds the entry."""
    from cusparge._cuda.cache import Key

    return Key(info.kernel, info.arch, info.key, info.source_key)


def put(store, name="a", **options):
    """Write an entry to a cache."""
    return store.put(code_of(name), info_of(name, **options))


def need_nvrtc():
    """Return NVRTC, or skip the test."""
    from cusparge._cuda import nvrtc
    from cusparge.errors import CompileError

    try:
        return nvrtc.load()
    except CompileError as error:
        pytest.skip(str(error).splitlines()[0])


class DriverError(RuntimeError):
    """As CuPy's CUDADriverError: a text that names the status."""


class FakeCupy:
    """CuPy as far as loading goes: opens the file, and finds a function's name in it."""

    def __init__(self):
        self.loads = []
        self.before_load = lambda path: None
        self.error = None
        self.current = None
        outer = self

        class RawModule:
            def __init__(self, *, path):
                self.path = path

            def get_function(self, name):
                outer.before_load(self.path)
                if outer.error is not None:
                    raise outer.error
                try:
                    data = Path(self.path).read_bytes()
                except OSError:
                    raise DriverError("CUDA_ERROR_FILE_NOT_FOUND: file not found") from None
                if not data.startswith(b"\x7fELF") or len(data) < 1000:
                    raise DriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
                if name.encode() not in data:
                    raise DriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
                outer.loads.append((self.path, name, outer.current))
                raw = types.SimpleNamespace(name=name, max_dynamic_shared_size_bytes=0)
                raw.kernel = raw
                return raw

        @contextlib.contextmanager
        def device(index):
            before, outer.current = outer.current, index
            yield
            outer.current = before

        self.RawModule = RawModule
        self.cuda = types.SimpleNamespace(Device=device)


def use_fake_cupy(monkeypatch, capability=(9, 0)):
    """Let kernels be loaded by a stand-in for CuPy on GPUs of one capability; return it."""
    from cusparge._cuda import devices, module

    fake = FakeCupy()
    monkeypatch.setattr(devices, "require_cupy", lambda: fake)
    monkeypatch.setattr(devices, "require_device", lambda index: capability)
    monkeypatch.setattr(module, "_functions", {})
    return fake


#: Begins a script: GPUs that the management library would list, kernels, and time to compile them.
SCRIPT = """
import os, sys, threading, time
sys.path.insert(0, {tests!r})
import cuda_tools, cusparge
from cusparge._cuda import (
    background, build, cache, devices, lifecycle, module, notices, nvrtc, storage, variants,
)
from cusparge._cuda.variants import Variant
def gpus(*capabilities):
    devices.list_gpus = lambda: [
        devices.Gpu(i, "stand-in", c, 1 << 34, "GPU-" + str(i)) for i, c in enumerate(capabilities)
    ]
def declare(*wanted):
    variants._OWNERS = ()
    variants._declared.clear()
    for number, one in enumerate(wanted):
        variants.declare(str(number), file=one.file, expressions=lambda *_, e=one: [e.expression])
""".format(tests=str(ROOT / "tests"))


def script_environment(tmp_path, **variables):
    """Return an environment with a fresh cache, the small kernels and a package named cupy."""
    kernels = tmp_path / "kernels"
    if not kernels.exists():
        write_kernels(kernels)
    stub = tmp_path / "stub"
    stub.mkdir(exist_ok=True)
    (stub / "cupy.py").write_text("print('cupy was imported')\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUSPARGE_")}
    if "CUSPARGE_NVRTC" in os.environ:
        kept["CUSPARGE_NVRTC"] = os.environ["CUSPARGE_NVRTC"]
    return kept | {
        "CUSPARGE_COMPILE": "lazy",
        "CUSPARGE_CACHE_DIR": str(tmp_path / "cache"),
        "CUSPARGE_KERNELS": str(kernels),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(stub), str(ROOT)]),
        **variables,
    }


def start_script(text, tmp_path, first="", **variables):
    """Start Python with that text after `SCRIPT`, and `first` before it."""
    return subprocess.Popen(
        [sys.executable, "-c", first + SCRIPT + text],
        env=script_environment(tmp_path, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes, timeout=120):
    """Wait for scripts; return what each printed and complained."""
    done = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=timeout)
            done.append((process.returncode, out, error))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert {code for code, _, _ in done} == {0}, done
    return [(out, error) for _, out, error in done]


def run_script(text, tmp_path, **options):
    """Run a script to its end."""
    return finish([start_script(text, tmp_path, **options)])[0]


def leftovers(cache_dir):
    """Return files of a cache that belong to no whole entry."""
    found = []
    for path in Path(cache_dir, "v1").glob("*"):
        twin = path.with_suffix(".json" if path.suffix == ".cubin" else ".cubin")
        if path.suffix not in (".json", ".cubin") or not twin.exists():
            found.append(path.name)
    return found
