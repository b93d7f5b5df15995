"""`cusparge doctor`: the compiler, the sources, the cache, and the settings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from cache_tools import filled
from doctor_tools import Report, be_gpu_machine, be_plain_machine, problems
from fake_gpu import compile_nvml

import cusparge
from cusparge._cuda import devices, nvrtc
from cusparge._cuda.cache import Cache
from cusparge.cli import checks, doctor, toolchain
from cusparge.errors import CompileError


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


# --- Compiler, sources, cache --------------------------------------------------------------------


def no_nvrtc():
    raise CompileError("NVRTC, the compiler of CUDA kernels, was not found.")


class OldNvrtc:
    version, path = (12, 8), "libnvrtc.so.12"

    def supported_archs(self):
        return (80, 90)

    def require_arch(self, arch):
        if arch == "sm_90a":
            raise CompileError("sm_90a needs NVRTC >= 99.9, found 12.8 (libnvrtc.so.12).")


def test_nvrtc_is_missing(machine, report, with_attention):
    machine.setattr(nvrtc, "load", no_nvrtc)
    machine.setenv("CUDA_VISIBLE_DEVICES", "0")
    record = report(1)
    assert "was not found" in problems(record)
    assert "CUSPARGE_CACHE_SEED" in report.text
    assert record["gpu"]["devices"][0]["problems"] == ["NVRTC is missing"]
    # Where all kernels are there already, nothing needs to be compiled.
    machine.setattr("cusparge._cuda.build.peek", lambda kernel, arch: object())
    record = report(0)
    assert "was not found" in problems(record)
    assert record["gpu"]["devices"][0]["usable"] is True


def test_nvrtc_is_not_needed_without_a_gpu(plain_machine, report, monkeypatch):
    monkeypatch.setattr(nvrtc, "load", no_nvrtc)
    record = report(0)
    assert record["warnings"] == []
    assert "not found" in record["nvrtc"]["error"]
    monkeypatch.setenv("CUSPARGE_NVRTC", "/nowhere")
    assert "not found" in problems(report(0))


def test_nvrtc_is_too_old_for_one_gpu(machine, report, with_attention):
    machine.setattr(nvrtc, "load", OldNvrtc)
    machine.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    record = report(1)
    assert [device["usable"] for device in record["gpu"]["devices"]] == [True, False]
    assert "sm_90a needs NVRTC >= 99.9" in problems(record)
    assert record["gpu"]["devices"][1]["problems"] == ["NVRTC is too old for it"]


def test_nvrtc_is_newer_than_the_driver(machine, report, with_attention):
    machine.setattr(nvrtc, "load", OldNvrtc)
    machine.setenv("CUDA_VISIBLE_DEVICES", "0")
    machine.setenv("FAKE_NVML_CUDA", "12040")
    works = {"version": "13.6", "cuda": "12.9", "error": None}
    machine.setattr(doctor, "import_cupy", lambda: works)
    assert report(0)["warnings"] == []
    machine.setattr(OldNvrtc, "version", (13, 0))
    assert "NVRTC 13.0 makes machine code that a driver for CUDA 12.4" in problems(report(0))


def test_the_builtins_beside_nvrtc(tmp_path, machine, report, with_attention):
    library = tmp_path / "libnvrtc.so.13"
    library.write_bytes(b"")
    assert toolchain.has_builtins(Path("libnvrtc.so.13")) is None
    assert toolchain.has_builtins(library) is False
    machine.setattr(OldNvrtc, "path", str(library))
    machine.setattr(nvrtc, "load", OldNvrtc)
    machine.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "nvrtc-builtins, is not beside" in problems(report(0))
    (tmp_path / "libnvrtc-builtins.so.13.0").write_bytes(b"")
    assert toolchain.has_builtins(library) is True
    assert report(0)["warnings"] == []


def test_the_sources(plain_machine, report, monkeypatch, tmp_path):
    record = report(0)
    assert record["sources"]["files"] >= 1
    assert len(record["sources"]["id"]) == 12
    monkeypatch.setenv("CUSPARGE_KERNELS", str(tmp_path))
    record = report(0)
    assert "CUSPARGE_KERNELS" in problems(record)
    assert record["sources"]["files"] == 0


def test_missing_sources_stop_a_gpu(machine, report, with_attention, tmp_path):
    machine.setenv("CUSPARGE_KERNELS", str(tmp_path))
    machine.setenv("CUDA_VISIBLE_DEVICES", "0")
    record = report(1)
    assert record["gpu"]["devices"][0]["problems"] == ["the CUDA sources are missing"]


def test_what_would_be_compiled(machine, report):
    """Some kernels are there: the others would be compiled. Doctor itself compiles nothing."""
    seen = []

    def peek(kernel, arch):
        seen.append((kernel, arch))
        return object() if len(seen) == 1 else None

    machine.setattr("cusparge._cuda.build.peek", peek)
    machine.setattr("cusparge._cuda.build._compile", lambda *words: pytest.fail("compiled"))
    machine.setenv("CUDA_VISIBLE_DEVICES", "1")
    (row,) = report(1)["kernels"]
    assert row["arch"] == "sm_90a"
    assert f"{row['needed']} kernels, 1 are there, {row['needed'] - 1} to compile" in report.text
    assert {arch for _, arch in seen} == {"sm_90a"}


def test_the_cache(plain_machine, report, monkeypatch, tmp_path, rng):
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "kernels"))
    assert report(0)["cache"]["kernels"] == 0
    assert not (tmp_path / "kernels").exists()  # looking writes nothing
    cache = filled(tmp_path / "kernels", rng, 4)
    record = report(0)
    assert (record["cache"]["kernels"], record["cache"]["bytes"]) == (4, cache.size())
    assert record["cache"]["writable"] is True
    assert record["warnings"] == []
    assert "4 kernels" in report.text


def test_a_cache_that_cannot_be_written(machine, report, with_attention, tmp_path):
    (tmp_path / "file").write_text("in the way")
    machine.setenv("CUDA_VISIBLE_DEVICES", "0")
    machine.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    record = report(0)
    assert record["cache"]["writable"] is False
    assert "private folder" in problems(record)
    assert "NOT writable" in report.text


def test_an_unwritable_default_folder_is_no_warning_without_a_gpu(
    plain_machine, report, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    record = report(0)
    assert record["cache"]["writable"] is False
    assert record["warnings"] == []


def test_no_home_folder(machine, report, with_attention):
    machine.setenv("CUDA_VISIBLE_DEVICES", "0")
    machine.setattr("cusparge._cuda.cache.root", no_home)
    record = report(0)
    assert "no home directory" in problems(record)
    assert "CUSPARGE_CACHE_DIR" in report.text


def no_home():
    raise RuntimeError("no home directory")


def test_where_files_can_be_written(tmp_path):
    assert toolchain.why_not_writable(tmp_path / "a" / "b" / "c") is None
    (tmp_path / "file").write_text("x")
    (tmp_path / "file").chmod(0o777)
    assert toolchain.why_not_writable(tmp_path / "file")
    assert toolchain.why_not_writable(tmp_path / "file" / "below")
    if sys.platform != "win32":
        (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
        assert toolchain.why_not_writable(tmp_path / "broken")
    assert sorted(path.name for path in tmp_path.iterdir()) in (["broken", "file"], ["file"])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system without files")
def test_a_place_where_nobody_can_make_files(plain_machine, report, monkeypatch):
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", "/proc/x")
    record = report(0)
    assert record["cache"]["writable"] is False
    assert "the cache cannot be written to (/proc/x/v1: " in problems(record)
    assert "NOT writable" in report.text


def test_a_full_disk(plain_machine, report, monkeypatch, tmp_path):
    written = []

    def full(descriptor):
        written.append(os.fstat(descriptor).st_size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "kernels"))
    record = report(0)
    assert record["cache"]["writable"] is False
    assert "No space left on device" in problems(record)
    assert "free some room" in record["warnings"][0]["mend"]
    assert set(written) == {toolchain._ROOM}


def test_a_variable_that_names_a_wrong_nvrtc(machine, report, with_attention, tmp_path):
    """Installing another one would not help while the variable is set."""
    machine.setenv("CUDA_VISIBLE_DEVICES", "1")
    machine.setenv("CUSPARGE_NVRTC", str(tmp_path / "nowhere.so"))
    record = report(1)
    mends = [w["mend"] for w in record["warnings"] if "CUSPARGE_NVRTC=" in w["problem"]]
    assert mends
    library = tmp_path / "libnvrtc.so.12"
    library.write_bytes(b"")
    machine.setattr(OldNvrtc, "path", str(library))
    machine.setattr(nvrtc, "load", OldNvrtc)
    record = report(1)
    mends += [w["mend"] for w in record["warnings"] if "NVRTC" in w["problem"]]
    assert len(mends) == 3, "too old for the GPU, and without its second library"
    for mend in mends:
        assert mend.startswith("unset CUSPARGE_NVRTC, or name in it")
        assert "pip install" not in mend


# --- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("CUSPARGE_COMPILE", "never", "background"),
        ("CUSPARGE_CACHE_LIMIT", "much", "512M"),
        ("CUSPARGE_LINEINFO", "false", "0 or 1"),
        ("CUSPARGE_QUIET", "no", "0 or 1"),
        ("CUSPARGE_DEBUG", "2", "0 or 1"),
        ("CUSPARGE_CACHE_DIRECTORY", "x", "did you mean CUSPARGE_CACHE_DIR?"),
        ("CUSPARGE_FAST", "1", "knows no such variable"),
    ],
)
def test_settings_that_mean_nothing(plain_machine, report, monkeypatch, name, value, word):
    monkeypatch.setenv(name, value)
    record = report(0)
    (warning,) = record["warnings"]
    assert name in warning["problem"]
    assert word in warning["problem"] + warning["mend"]


def test_settings_that_are_right(plain_machine, report, monkeypatch, tmp_path, rng):
    filled(tmp_path / "seed", rng)
    filled(tmp_path / "other", rng)
    seeds = os.pathsep.join([str(tmp_path / "seed"), str(tmp_path / "other" / "v1")])
    for name, value in {
        "CUSPARGE_COMPILE": "off",
        "CUSPARGE_CACHE_LIMIT": "1G",
        "CUSPARGE_LINEINFO": "1",
        "CUSPARGE_QUIET": "0",
        "CUSPARGE_CACHE_SEED": seeds,
        "CUSPARGE_TEST_SEED": "7",
    }.items():
        monkeypatch.setenv(name, value)
    assert report(0)["warnings"] == []


def test_seeds_without_kernels(plain_machine, report, monkeypatch, tmp_path, rng):
    filled(tmp_path / "seed", rng)
    Cache(tmp_path / "empty").folder.mkdir(parents=True)
    names = [str(tmp_path / name) for name in ("seed", "empty", "missing")]
    monkeypatch.setenv("CUSPARGE_CACHE_SEED", os.pathsep.join(names))
    record = report(0)
    assert [names[1] in w["problem"] for w in record["warnings"]] == [True, False]
    assert [names[2] in w["problem"] for w in record["warnings"]] == [False, True]


def test_every_variable_of_the_library_is_known():
    """What the sources read is what doctor knows, and the other way round."""
    package = Path(cusparge.__file__).parent
    used = set()
    for path in package.rglob("*.py"):
        if path.name != "checks.py":
            used |= set(re.findall(r"CUSPARGE_[A-Z_]+\b", path.read_text(encoding="utf-8")))
    assert used == set(checks._VARIABLES)


def test_the_documentation_names_all_of_them():
    page = Path(__file__).resolve().parents[1] / "docs" / "compiling.md"
    rows = re.findall(
        r"^\| `(CUSPARGE_[A-Z_]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {*rows, "CUSPARGE_NUM_THREADS"} == set(checks._VARIABLES)
    words = set(page.read_text(encoding="utf-8").replace("|", " ").split())
    assert set(devices.ARCHITECTURES) <= words
