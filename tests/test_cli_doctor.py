"""`cusparge doctor`: the CPU, GPUs and CuPy; the rest is in test_cli_toolchain.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_tools import run_json
from doctor_tools import Report, be_gpu_machine, be_plain_machine, problems
from fake_gpu import compile_nvml

import cusparge
from cusparge._cuda import devices
from cusparge.cli import checks, doctor, main


@pytest.fixture
def plain_machine(monkeypatch, tmp_path):
    be_plain_machine(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(plain_machine, library, monkeypatch):
    be_gpu_machine(monkeypatch, library)
    return monkeypatch


@pytest.fixture
def with_attention(monkeypatch):
    monkeypatch.setattr(checks, "GPU_ATTENTION", True)


@pytest.fixture
def report(capsys):
    return Report(capsys)


# --- The CPU -------------------------------------------------------------------------------------


def test_doctor(capsys, plain_machine):
    record = run_json(capsys, "doctor")
    assert record["ok"] is True
    assert record["would_run"] == "cpu"
    assert record["warnings"] == []
    assert record["packages"]["numpy"] == np.__version__
    assert set(record["self_check"]["errors"]) == {"dense", "sparse"}
    assert record["gpu"]["devices"] == []
    assert record["cupy"] is None
    assert record["kernels"] == []
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "self-check passed" in text
    assert "no attention kernel for GPUs yet" in text
    assert "gpu       none found" in text
    assert "no NVIDIA driver loaded" in text


def test_doctor_fails_when_the_numbers_are_wrong(capsys, plain_machine, monkeypatch):
    real = cusparge.attention
    for factor in (1.01, np.nan):

        def wrong(*arrays, factor=factor, **options):
            out = real(*arrays, **options)
            return out if options.get("backend") == "reference" else out * np.float32(factor)

        monkeypatch.setattr(cusparge, "attention", wrong)
        assert main(["doctor", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["self_check"]["ok"] is False
    assert main(["doctor"]) == 1
    assert "self-check FAILED" in capsys.readouterr().out


def test_doctor_warns(report, plain_machine, monkeypatch):
    monkeypatch.setenv("CUSPARGE_NUM_THREADS", "many")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    versions = {"cupy-cuda12x": "13.6", "cupy-cuda13x": "14.0"}
    monkeypatch.setattr(devices, "cupy_packages", lambda: versions)
    record = report(1)  # every call fails with such a number of threads
    for word in ("cupy", "threadpoolctl", "OPENBLAS_NUM_THREADS=1", "CUSPARGE_NUM_THREADS=many"):
        assert word in problems(record)
    mends = " ".join(warning["mend"] for warning in record["warnings"])
    assert "pip uninstall cupy-cuda12x cupy-cuda13x" in mends
    assert "CUSPARGE_NUM_THREADS" in record["self_check"]["message"]
    assert record["packages"]["cupy"] == versions


def test_paths_are_told_without_the_home_folder(report, plain_machine, monkeypatch):
    package = Path(os.path.abspath(cusparge.__file__)).parent
    monkeypatch.setenv("HOME", str(package.parent))
    monkeypatch.setenv("USERPROFILE", str(package.parent))
    assert report()["location"] == os.path.join("~", package.name)
    assert str(package) not in report.text


# --- GPUs ----------------------------------------------------------------------------------------


def test_a_gpu_cannot_be_used_by_this_version(machine, report):
    machine.setenv("CUDA_VISIBLE_DEVICES", "1")
    record = report(1)
    (device,) = record["gpu"]["devices"]
    assert device == {
        "index": 0,
        "name": "NVIDIA H200",
        "capability": "9.0",
        "memory_bytes": 141 << 30,
        "arch": "sm_90a",
        "family": "wgmma_e4m3",
        "usable": False,
        "problems": ["no attention kernel yet"],
    }
    assert "attention on CUDA arrays is refused" in problems(record)
    assert record["gpu"]["driver"] == "580.65.06"
    assert record["gpu"]["driver_cuda"] == "13.0"
    assert record["gpu"]["hidden"] == 2
    assert (record["would_run"], record["backends"]["cuda"]) == ("cpu", False)
    assert "0: NVIDIA H200, compute capability 9.0, sm_90a" in report.text
    assert "2 hidden by CUDA_VISIBLE_DEVICES" in report.text


def test_a_version_with_attention_uses_the_gpu(machine, report, with_attention):
    machine.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    record = report(0)
    assert record["warnings"] == []
    assert [device["usable"] for device in record["gpu"]["devices"]] == [True, True]
    assert (record["would_run"], record["backends"]["cuda"]) == ("cuda", True)
    assert "no attention kernel" not in report.text
    assert "14.2.0, built for CUDA 13.0" in report.text


def test_an_old_gpu(machine, report, with_attention):
    record = report(1)
    assert [device["usable"] for device in record["gpu"]["devices"]] == [True, True, False]
    assert record["gpu"]["devices"][2]["problems"] == ["compute capability 7.5 is not supported"]
    assert "Tesla T4" in problems(record)
    assert [row["arch"] for row in record["kernels"]] == ["sm_80", "sm_90a"]


def test_no_visible_gpu_is_no_failure(machine, report, with_attention):
    machine.setenv("CUDA_VISIBLE_DEVICES", "")
    record = report(0)
    assert (record["gpu"]["devices"], record["gpu"]["hidden"]) == ([], 3)
    assert "none found (3 hidden by CUDA_VISIBLE_DEVICES)" in report.text


def test_a_gpu_that_does_not_answer(machine, report, with_attention):
    machine.setenv("FAKE_NVML_FAIL", "nvmlDeviceGetCudaComputeCapability")
    record = report(1)
    assert [device["problems"] for device in record["gpu"]["devices"]] == 3 * [["does not answer"]]
    assert "/dev/nvidia" in record["warnings"][0]["mend"]


def test_a_gpu_without_the_drivers_library(plain_machine, report, tmp_path, monkeypatch):
    """As in a container that was started without its GPUs: the kernel's driver is there alone."""
    folder = tmp_path / "gpus" / "0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 7\n")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC\n"
    )
    monkeypatch.setattr(devices, "_PROC_VERSION", tmp_path / "version")
    monkeypatch.setattr(doctor, "import_cupy", lambda: {"version": "1", "cuda": "1", "error": None})
    assert [device["name"] for device in checks.find_gpu()["devices"]] == ["NVIDIA GPU"]
    monkeypatch.setattr(checks, "_PROC_GPUS", tmp_path / "gpus")
    record = report(1)
    assert record["gpu"]["driver"] == "580.65.06"
    assert [device["name"] for device in record["gpu"]["devices"]] == ["NVIDIA H200"]
    assert "docker run --gpus all" in report.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert report(0)["gpu"]["devices"] == []


def test_the_tool_without_a_driver(plain_machine, report, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"bin/{name}")
    assert "no NVIDIA driver is loaded" in problems(report(0))


# --- CuPy ----------------------------------------------------------------------------------------


def test_cupy_is_missing(machine, report, with_attention):
    machine.setattr(devices, "cupy_packages", dict)
    machine.setattr(doctor, "has_cupy", lambda: False)
    record = report(1)
    assert "CuPy is not installed" in problems(record)
    assert "cusparge[cuda13]" in record["warnings"][1]["mend"]
    assert all("CuPy is not installed" in gpu["problems"] for gpu in record["gpu"]["devices"])


def test_cupy_is_broken(machine, report, with_attention):
    broken = {"version": None, "cuda": None, "error": "ImportError: libcudart.so.13"}
    machine.setattr(doctor, "import_cupy", lambda: broken)
    record = report(1)
    assert "cannot be imported: ImportError: libcudart.so.13" in problems(record)
    assert "pip uninstall cupy-cuda13x" in record["warnings"][1]["mend"]
    for error in ("PermissionError: [Errno 13] .cupy", "OSError: [Errno 30] Read-only: .cupy"):
        broken["error"] = error
        assert "CUPY_CACHE_DIR" in report(1)["warnings"][1]["mend"]


@pytest.mark.parametrize(("built_for", "code"), [("13.2", 1), ("12.9", 0), ("12.0", 0)])
def test_a_driver_that_is_too_old_for_cupy(machine, report, with_attention, built_for, code):
    machine.setenv("FAKE_NVML_CUDA", "12040")
    machine.setenv("CUDA_VISIBLE_DEVICES", "0")
    state = {"version": "14.2.0", "cuda": built_for, "error": None}
    machine.setattr(doctor, "import_cupy", lambda: state)
    record = report(code)
    assert ("too old for CuPy" in problems(record)) is bool(code)
    if code:
        assert f"CUDA 12.4, and CuPy is built for CUDA {built_for}" in problems(record)
        assert "580" in report.text


def fake_package(folder, text):
    (folder / "cupy").mkdir()
    (folder / "cupy" / "__init__.py").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "print('chatter')\n__version__ = '9.1'\n"
            "class cuda:\n class runtime:\n  runtimeGetVersion = lambda: 12090\n",
            {"version": "9.1", "cuda": "12.9", "error": None},
        ),
        (
            "raise ImportError('libcudart.so.13: cannot open\\n\\npages of advice')",
            {"version": None, "cuda": None, "error": "ImportError: libcudart.so.13: cannot open"},
        ),
        (
            "import os; os._exit(3)",
            {"version": None, "cuda": None, "error": "ended with status 3"},
        ),
        (
            "raise SystemExit",
            {"version": None, "cuda": None, "error": "ended with status 0"},
        ),
    ],
    ids=["works", "raises", "dies", "leaves"],
)
def test_cupy_is_tried_in_another_process(tmp_path, monkeypatch, text, expected):
    monkeypatch.setenv("PYTHONPATH", fake_package(tmp_path, text))
    assert checks.import_cupy() == expected
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    assert "could not be tried" in checks.import_cupy()["error"]


def test_the_installed_cupy_is_found():
    cupy = pytest.importorskip("cupy")
    assert checks.has_cupy()
    tried = checks.import_cupy()
    assert (tried["version"], tried["error"]) == (cupy.__version__, None)


def test_doctor_starts_nothing(library):
    """With a GPU: no framework is imported, no CUDA library loaded, no thread started."""
    code = (
        "import sys, threading\n"
        "from cusparge.cli import main\n"
        "main(['doctor', '--json'])\n"
        "assert not {'torch', 'jax', 'cupy', 'matplotlib'} & set(sys.modules)\n"
        "names = [t.name for t in threading.enumerate()]\n"
        "assert 'cusparge-compile' not in names, names\n"
        "try:\n"
        "    maps = open('/proc/self/maps').read()\n"
        "except OSError:\n"
        "    maps = ''\n"
        "assert 'libcuda.so' not in maps and 'libcudart' not in maps\n"
    )
    environment = {name: value for name, value in os.environ.items() if "CUDA" not in name}
    environment |= {
        "LD_LIBRARY_PATH": str(library.parent),
        "CUDA_VISIBLE_DEVICES": "1",
        "CUSPARGE_COMPILE": "lazy",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpu"]["devices"][0]["name"] == "NVIDIA H200"
