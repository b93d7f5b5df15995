"""Which GPUs there are and which can be used, against stand-ins for the driver and CuPy."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from importlib import metadata

import pytest
from fake_gpu import CudaError, Runtime, compile_nvml, use_cupy, use_nvml

from cusparge._cuda import devices, nvml
from cusparge.errors import DeviceError, InvalidArgumentError

# --- Architectures -------------------------------------------------------------------------------


def test_the_architecture_of_each_capability():
    expected = {
        (8, 0): "sm_80",
        (8, 6): "sm_86",
        (8, 7): "sm_87",
        (8, 8): "sm_88",
        (8, 9): "sm_89",
        (9, 0): "sm_90a",
        (10, 0): "sm_100a",
        (10, 3): "sm_103a",
        (11, 0): "sm_110a",
        (12, 0): "sm_120a",
        (12, 1): "sm_121a",
    }
    assert {capability: devices.arch_of(capability) for capability in expected} == expected
    assert set(devices.ARCHITECTURES) == set(expected.values())
    assert devices.MAIN_ARCHITECTURES == (
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90a",
        "sm_100a",
        "sm_120a",
    )


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (3, 5)])
def test_old_gpus_are_refused(capability):
    with pytest.raises(DeviceError) as caught:
        devices.arch_of(capability)
    version = "{}.{}".format(*capability)
    text = str(caught.value)
    assert f"Turing and older are not supported (compute capability {version})" in text
    assert "8.0" in text
    assert "host arrays" in text


@pytest.mark.parametrize("capability", [(8, 1), (9, 1), (10, 1), (13, 0)])
def test_unknown_gpus_are_refused(capability):
    with pytest.raises(DeviceError, match="newer version") as caught:
        devices.arch_of(capability)
    assert "{}.{}".format(*capability) in str(caught.value)
    assert "8.0, 8.6, 8.7, 8.8, 8.9, 9.0, 10.0" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "arch"),
    [
        ("sm_90a", "sm_90a"),
        ("sm_90", "sm_90a"),
        ("SM_90A", "sm_90a"),
        ("90a", "sm_90a"),
        ("90", "sm_90a"),
        ("9.0", "sm_90a"),
        (" 8.0 ", "sm_80"),
        ("sm_120", "sm_120a"),
        ("12.0", "sm_120a"),
        ("10.0", "sm_100a"),
        ("100", "sm_100a"),
        ("12.1", "sm_121a"),
        *((arch, arch) for arch in devices.ARCHITECTURES),
    ],
)
def test_spellings_of_an_architecture(text, arch):
    assert devices.check_arch(text) == arch


@pytest.mark.parametrize(
    "text", ["", "sm_", "sm_75", "7.5", "sm_80a", "sm_100f", "compute_90", "hopper", "٩٠", 90, None]
)
def test_unknown_architectures_are_refused(text):
    with pytest.raises(InvalidArgumentError, match="unknown architecture") as caught:
        devices.check_arch(text)
    assert repr(text) in str(caught.value)
    for arch in devices.ARCHITECTURES:
        assert arch in str(caught.value)


def test_every_architecture_has_a_kernel_of_attention():
    families = {arch: devices.family_of(arch) for arch in devices.ARCHITECTURES}
    assert families.pop("sm_90a") == "wgmma_e4m3"
    e4m3 = {arch for arch, family in families.items() if family == "mma_e4m3"}
    assert e4m3 == {"sm_89", "sm_120a", "sm_121a"}
    assert {families[arch] for arch in families.keys() - e4m3} == {"mma_f16"}
    with pytest.raises(InvalidArgumentError):
        devices.family_of("sm_75")


# --- NVML ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driver(library, monkeypatch):
    """Use the stand-in for NVML; check afterwards that each start was followed by its end."""
    loaded = use_nvml(monkeypatch, library)
    assert loaded.fake_started() == 0
    yield monkeypatch.setenv
    assert loaded.fake_started() == 0


def names():
    return [(gpu.index, gpu.name) for gpu in devices.list_gpus()]


A100, H200, T4 = "NVIDIA A100", "NVIDIA H200", "Tesla T4"
ALL = [(0, A100), (1, H200), (2, T4)]


def test_gpus_are_listed(driver):
    assert names() == ALL
    assert devices.list_gpus()[1] == devices.Gpu(
        index=1,
        name=H200,
        capability=(9, 0),
        memory_bytes=141 << 30,
        uuid="GPU-aaaa2222-0000",
    )
    assert devices.driver_version() == "580.65.06"
    assert devices.driver_cuda_version() == (13, 0)
    driver("FAKE_NVML_CUDA", "12080")
    assert devices.driver_cuda_version() == (12, 8)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,1,2", ALL),
        ("1", [(0, H200)]),
        (" 2 , 0 ", [(0, T4), (1, A100)]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [(0, A100)]),
        ("1,3,0", [(0, H200)]),
        ("1,99999999999999999999", [(0, H200)]),
        ("1," + "9" * 5000, [(0, H200)]),
        ("\u0660,1", []),
        ("NoDevFiles", []),
        ("0,0", []),
        ("0,GPU-aaaa1111", []),
        ("GPU-aaaa2222-0000", [(0, H200)]),
        ("GPU-b", [(0, T4)]),
        ("GPU-aaaa", []),
        ("GPU-", []),
        ("GPU-b,GPU-aaaa1", [(0, T4), (1, A100)]),
        ("gpu-b", []),
        ("MIG-cccc4444-0000", [(0, "NVIDIA H200 MIG 1g.18gb")]),
        ("MIG-dddd", []),
        ("MIG-\u00e9", []),
        ("GPU-aaaa2222-0000,MIG-cccc4444-0000", [(0, H200), (1, "NVIDIA H200 MIG 1g.18gb")]),
    ],
)
def test_the_visible_gpus_are_those_of_cuda(driver, visible, expected):
    driver("CUDA_VISIBLE_DEVICES", visible)
    assert names() == expected


def test_hidden_gpus_are_counted(driver):
    driver("CUDA_VISIBLE_DEVICES", "1")
    assert devices.count_gpus() == 3
    driver("FAKE_NVML_GPUS", "0")
    assert devices.count_gpus() == 0
    driver("FAKE_NVML_FAIL", "nvmlInit_v2")
    assert devices.count_gpus() is None


def test_a_mig_instance_has_the_capability_of_its_gpu(driver):
    driver("CUDA_VISIBLE_DEVICES", "MIG-cccc4444-0000")
    (gpu,) = devices.list_gpus()
    assert (gpu.capability, gpu.memory_bytes, gpu.uuid) == ((9, 0), 18 << 30, "MIG-cccc4444-0000")


@pytest.mark.parametrize(
    "function",
    [
        "nvmlInit_v2",
        "nvmlDeviceGetCount_v2",
        "nvmlDeviceGetHandleByIndex_v2",
        "nvmlDeviceGetCudaComputeCapability",
    ],
)
def test_what_nvml_cannot_tell_is_no_gpu(driver, function):
    driver("FAKE_NVML_FAIL", function)
    assert devices.list_gpus() == []


def test_what_nvml_leaves_open_stays_open(driver):
    driver("FAKE_NVML_FAIL", "nvmlDeviceGetMemoryInfo nvmlDeviceGetName nvmlDeviceGetUUID")
    assert devices.list_gpus() == [
        devices.Gpu(0, "NVIDIA GPU", (8, 0), None, ""),
        devices.Gpu(1, "NVIDIA GPU", (9, 0), None, ""),
        devices.Gpu(2, "NVIDIA GPU", (7, 5), None, ""),
    ]
    driver("CUDA_VISIBLE_DEVICES", "0,1")  # two devices without a UUID are two devices
    assert len(devices.list_gpus()) == 2


def test_a_broken_count_is_bounded(driver):
    driver("FAKE_NVML_GPUS", "4294967295")
    assert names() == ALL


def test_a_missing_library_is_no_gpu(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(nvml, "_library_names", lambda: [str(tmp_path / "missing"), str(broken)])
    monkeypatch.setattr(devices, "_PROC_VERSION", tmp_path / "missing")
    assert devices.list_gpus() == []
    assert devices.driver_version() is None
    assert devices.driver_cuda_version() is None


def test_a_library_without_the_functions_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(nvml, "_load", object)
    monkeypatch.setattr(devices, "_PROC_VERSION", tmp_path / "missing")
    assert devices.list_gpus() == []
    assert devices.driver_version() is None


def test_the_driver_version_without_nvml(monkeypatch, tmp_path):
    monkeypatch.setattr(nvml, "_library_names", lambda: [])
    monkeypatch.setattr(devices, "_PROC_VERSION", tmp_path / "version")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
        "GCC version:  gcc 12.3.0\n"
    )
    assert devices.driver_version() == "580.65.06"
    (tmp_path / "version").write_bytes(b"\xff nonsense\nGCC version 12.3.0\n")
    assert devices.driver_version() is None


def test_the_driver_is_found_by_its_own_name(library):
    """Without replacing anything: the loader finds the file, and no CUDA library is loaded."""
    code = (
        "import sys\n"
        "from cusparge._cuda import devices\n"
        "print([gpu.name for gpu in devices.list_gpus()])\n"
        "assert not {'cupy', 'torch', 'jax', 'cuda'} & set(sys.modules)\n"
        "maps = '/proc/self/maps'\n"
        "import os\n"
        "assert not os.path.exists(maps) or 'libcuda' not in open(maps).read()\n"
    )
    environment = {name: os.environ[name] for name in os.environ if "CUDA" not in name}
    environment |= {"LD_LIBRARY_PATH": str(library.parent), "CUDA_VISIBLE_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"['{H200}']\n"


def test_windows_loads_the_library_by_its_full_path(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("SystemRoot", "D:\\W")
    first, second = nvml._library_names()
    assert first.startswith("D:\\W")
    assert {first.endswith("nvml.dll"), second.endswith("nvml.dll")} == {True}


# --- CuPy ----------------------------------------------------------------------------------------


@pytest.fixture
def without_cupy(monkeypatch):
    """Start as a process does that has not asked for CuPy; installed are the given packages."""

    def prepare(packages, error):
        monkeypatch.setattr(devices, "_cupy", None)
        monkeypatch.setattr(devices, "cupy_packages", lambda: packages)
        monkeypatch.setattr(nvml, "_library_names", lambda: [])
        monkeypatch.setitem(sys.modules, "cupy", None)
        real = __import__

        def fake(name, *arguments, **keywords):
            if name == "cupy":
                raise error
            return real(name, *arguments, **keywords)

        monkeypatch.setattr("builtins.__import__", fake)

    return prepare


MISSING = ModuleNotFoundError("No module named 'cupy'", name="cupy")


def test_without_cupy(without_cupy):
    without_cupy({}, MISSING)
    with pytest.raises(DeviceError) as caught:
        devices.require_cupy()
    text = str(caught.value)
    assert "not installed" in text
    for word in ("cusparge[cuda13]", "580", "cusparge[cuda12]", "525"):
        assert word in text


def test_the_extra_fits_the_driver(driver):
    assert "cuda13" in devices.extra_advice()
    assert "cuda12" not in devices.extra_advice()
    driver("FAKE_NVML_CUDA", "12040")
    assert "cuda12" in devices.extra_advice()
    assert "cuda13" not in devices.extra_advice()
    driver("FAKE_NVML_CUDA", "11080")
    assert {"580", "525"} <= set(devices.extra_advice().split())


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.13: cannot open shared object file\n  lines of advice"),
        ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"),
        AttributeError("module 'numpy' has no attribute 'x'"),
        ImportError("x" * 5000),
    ],
)
def test_a_broken_cupy(without_cupy, error):
    without_cupy({"cupy-cuda13x": "14.2"}, error)
    with pytest.raises(DeviceError) as caught:
        devices.require_cupy()
    text = str(caught.value)
    assert "cupy-cuda13x 14.2" in text
    assert "cannot be imported" in text
    assert type(error).__name__ in text
    assert " ".join(str(error).split())[:400] in text
    assert "pip uninstall cupy-cuda13x" in text
    assert len(text) < 1200
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_home_that_cupy_cannot_write_to(without_cupy, number):
    without_cupy({"cupy-cuda13x": "14.2"}, OSError(number, "not allowed", "home/.cupy"))
    with pytest.raises(DeviceError, match=r"home/\.cupy") as caught:
        devices.require_cupy()
    assert "CUPY_CACHE_DIR" in str(caught.value)
    assert "uninstall" not in str(caught.value)


def test_two_packages_of_cupy(without_cupy):
    without_cupy({"cupy-cuda12x": "13.6", "cupy-cuda13x": "14.2"}, ImportError("broken"))
    with (
        pytest.warns(RuntimeWarning, match="cupy-cuda12x, cupy-cuda13x") as caught,
        pytest.raises(DeviceError),
    ):
        devices.require_cupy()
    assert "pip uninstall cupy-cuda12x cupy-cuda13x" in str(caught[0].message)


def test_cupy_is_imported_once(monkeypatch):
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(devices, "_cupy", None)
    assert devices.require_cupy() is cupy
    monkeypatch.setattr(devices, "cupy_packages", lambda: pytest.fail("asked twice"))
    assert devices.require_cupy() is cupy


def test_the_installed_packages_of_cupy(monkeypatch):
    def version(name):
        if name == "cupy-cuda12x":
            return "13.6"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert devices.cupy_packages() == {"cupy-cuda12x": "13.6"}


# --- Devices -------------------------------------------------------------------------------------


def refusal(monkeypatch, runtime, index=0):
    use_cupy(monkeypatch, runtime)
    with pytest.raises(DeviceError) as caught:
        devices.require_device(index)
    assert devices._usable == {}
    return str(caught.value)


@pytest.fixture
def no_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(nvml, "_library_names", lambda: [])
    monkeypatch.setattr(devices, "_PROC_VERSION", tmp_path / "missing")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_usable_device_is_asked_for_once(monkeypatch):
    runtime = Runtime((8, 0), (9, 0))
    use_cupy(monkeypatch, runtime)
    for _ in range(3):
        assert devices.require_device(1) == (9, 0)
    assert runtime.calls == 1
    assert devices.require_device(0) == (8, 0)
    assert runtime.calls == 2


def test_no_driver(monkeypatch, no_driver):
    insufficient = CudaError(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    text = refusal(monkeypatch, Runtime(driver=0, error=insufficient))
    assert "no NVIDIA driver was found" in text
    assert "too old" not in text
    assert {"580", "525"} <= set(text.split())
    assert "host arrays" in text


def test_no_driver_with_the_real_cupy(monkeypatch, no_driver):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.runtime.driverGetVersion() != 0:
        pytest.skip("has a driver")
    monkeypatch.setattr(devices, "_cupy", None)
    with pytest.raises(DeviceError, match="no NVIDIA driver was found"):
        devices.require_device(0)


@pytest.mark.parametrize(
    ("driver_cuda", "built_for", "words", "absent"),
    [
        (12040, 13000, ["CUDA 12.4", "CUDA 13.0", "580", "cusparge[cuda12]"], []),
        (11080, 12000, ["CUDA 11.8", "CUDA 12.0", "525"], ["cuda12]"]),
        (11080, 13020, ["CUDA 11.8", "CUDA 13.2", "580"], ["cuda12]"]),
    ],
)
def test_an_old_driver(monkeypatch, no_driver, driver_cuda, built_for, words, absent):
    insufficient = CudaError(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    runtime = Runtime(driver=driver_cuda, built_for=built_for, error=insufficient)
    text = refusal(monkeypatch, runtime)
    assert "too old" in text
    for word in words:
        assert word in text
    for word in absent:
        assert word not in text


def test_an_old_driver_is_told_with_its_version(monkeypatch, driver):
    driver("FAKE_NVML_DRIVER", "550.54.14")
    insufficient = CudaError(35, "cudaErrorInsufficientDriver")
    text = refusal(monkeypatch, Runtime(driver=12040, error=insufficient))
    assert "the NVIDIA driver 550.54.14 is too old" in text


@pytest.mark.parametrize("index", [1, 7, -1])
def test_an_index_out_of_range(monkeypatch, no_driver, index):
    text = refusal(monkeypatch, Runtime((9, 0)), index)
    assert f"no GPU with index {index}: CUDA shows 1, index 0" in text
    assert "CUDA_VISIBLE_DEVICES" not in text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    text = refusal(monkeypatch, Runtime((9, 0), (9, 0)), index + 2 if index > 0 else index)
    assert "CUDA shows 2, index 0 to 1" in text
    assert "CUDA_VISIBLE_DEVICES='2,3'" in text


def test_a_hidden_gpu(monkeypatch, no_driver):
    assert "nvidia-smi" in refusal(monkeypatch, Runtime())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = refusal(monkeypatch, Runtime())
    assert "CUDA shows no GPU" in text
    assert "CUDA_VISIBLE_DEVICES=''" in text


@pytest.mark.parametrize("status", [46, 304, 802])
def test_other_errors_keep_the_words_of_cuda(monkeypatch, status):
    error = CudaError(status, "cudaErrorOperatingSystem: OS call failed or is not permitted")
    text = refusal(monkeypatch, Runtime(error=error))
    assert str(error) in text
    assert "index 0" in text
    assert "host arrays" in text


def test_an_old_gpu(monkeypatch):
    text = refusal(monkeypatch, Runtime((9, 0), (7, 5)), 1)
    assert "index 1" in text
    assert "compute capability 7.5" in text
    assert "Turing and older are not supported" in text
