"""NVRTC: how it is found, what is said where it is missing or too old, and what it compiles."""

import importlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_tools import ARCHS, HEADER, KERNEL, need_nvrtc

from cusparge._cuda import nvrtc
from cusparge.errors import CompileError

#: Just enough of a library to be opened, with a version and architectures of our choosing.
FAKE = """
int nvrtcVersion(int* major, int* minor) { *major = MAJOR; *minor = MINOR; return 0; }
#if MAJOR * 100 + MINOR >= 1208
static const int archs[] = {80, 90, 100, 120};
int nvrtcGetNumSupportedArchs(int* n) { *n = 4; return 0; }
int nvrtcGetSupportedArchs(int* out) { for (int i = 0; i < 4; i++) out[i] = archs[i]; return 0; }
const char* nvrtcGetErrorString(int status) { return status ? "BROKEN" : "OK"; }
#define NONE(name) int name(void) { return 7; }
NONE(nvrtcCreateProgram) NONE(nvrtcAddNameExpression) NONE(nvrtcCompileProgram)
NONE(nvrtcSetFlowCallback) NONE(nvrtcGetProgramLogSize) NONE(nvrtcGetProgramLog)
NONE(nvrtcGetCUBINSize) NONE(nvrtcGetCUBIN) NONE(nvrtcGetLoweredName) NONE(nvrtcDestroyProgram)
#endif
"""

EXPRESSION = "cusparge::small<cusparge::Config{3, false}>"
HEADERS = {"cusparge/small.cuh": HEADER.encode()}


def options(arch):
    return [f"--gpu-architecture={arch}", "-std=c++20", "--ptxas-options=-v"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(nvrtc, "_loaded", {})


@pytest.fixture
def fake(tmp_path):
    """Return a function that makes a library of a version."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform == "win32":
        pytest.skip("needs a C compiler")

    def make(major, minor, folder=tmp_path / "made"):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"libnvrtc.so.{major}.{minor}"
        flags = [f"-DMAJOR={major}", f"-DMINOR={minor}", "-shared", "-fPIC", "-x", "c", "-"]
        subprocess.run([compiler, *flags, "-o", path], input=FAKE.encode(), check=True)
        return path

    return make


@pytest.fixture
def nothing_installed(monkeypatch):
    """No package, no toolkit, nothing on the loader's path."""

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.delenv("CUSPARGE_NVRTC", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(nvrtc, "_LOADER_NAMES", ("libnvrtc-of-nobody.so",))


def test_the_variable_comes_first(fake, monkeypatch):
    path = fake(12, 9)
    monkeypatch.setenv("CUSPARGE_NVRTC", str(path))
    found = nvrtc.load()
    assert (found.path, found.version) == (str(path), (12, 9))
    assert found.supported_archs() == (80, 90, 100, 120)
    assert nvrtc.load() is found


@pytest.mark.parametrize("what", ["missing", "another library", "text"])
def test_a_wrong_variable_is_an_error_and_not_passed_over(tmp_path, monkeypatch, what):
    path = tmp_path / "libnvrtc.so"
    if what == "text":
        path.write_text("not a library")
    if what == "another library":
        compiler = shutil.which("cc") or pytest.skip("needs a C compiler")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=b"int x;", check=True
        )
    monkeypatch.setenv("CUSPARGE_NVRTC", str(path))
    with pytest.raises(CompileError, match=r"CUSPARGE_NVRTC=.*cannot be used") as caught:
        nvrtc.load()
    assert "unset CUSPARGE_NVRTC" in str(caught.value)


def test_an_old_one_is_refused_by_name(fake, monkeypatch):
    path = fake(12, 4)
    monkeypatch.setenv("CUSPARGE_NVRTC", str(path))
    with pytest.raises(CompileError, match=r"NVRTC 12\.4; cusparge needs 12\.8") as caught:
        nvrtc.load()
    assert str(path) in str(caught.value)


@pytest.mark.usefixtures("nothing_installed")
def test_without_any_the_error_names_packages():
    with pytest.raises(CompileError, match="was not found") as caught:
        nvrtc.load()
    text = str(caught.value)
    for part in ("cusparge[cuda13]", "cusparge[cuda12]", "CUSPARGE_CACHE_SEED", "CUSPARGE_NVRTC"):
        assert part in text
    assert "cuda-pathfinder is not installed" in text
    assert "libnvrtc-of-nobody.so" in text


@pytest.mark.usefixtures("nothing_installed")
def test_a_toolkit_is_found_after_an_older_one(fake, monkeypatch, tmp_path):
    fake(12, 1, tmp_path / "old" / "lib64")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    with pytest.raises(CompileError, match=r"too old.*12\.8 or later, found 12\.1"):
        nvrtc.load()
    new = fake(13, 1, tmp_path / "new" / "lib64")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "new"))
    assert nvrtc.load().path == str(new)


def test_architectures_that_it_does_not_know(fake, monkeypatch):
    monkeypatch.setenv("CUSPARGE_NVRTC", str(fake(12, 8)))
    compiler = nvrtc.load()
    compiler.require_arch("sm_90a")
    with pytest.raises(CompileError, match=r"sm_103a needs NVRTC >= 12\.9, found 12\.8"):
        compiler.require_arch("sm_103a")
    with pytest.raises(CompileError, match=r"sm_110a needs NVRTC >= 13\.0, found 12\.8"):
        compiler.require_arch("sm_110a")
    for arch in ("sm_89", "sm_75", "compute_90", "sm_90x"):
        with pytest.raises(CompileError, match="it knows sm_80, sm_90, sm_100, sm_120"):
            compiler.require_arch(arch)


@pytest.mark.parametrize(
    ("arch", "version", "packages"),
    [
        ("sm_103a", "12.9", ["nvidia-cuda-nvrtc>=13,<14", "nvidia-cuda-nvrtc-cu12>=12.9"]),
        ("sm_110a", "13.0", ["nvidia-cuda-nvrtc>=13.0,<14"]),
    ],
)
def test_what_helps_has_the_version_that_is_needed(fake, monkeypatch, arch, version, packages):
    path = fake(12, 8)
    monkeypatch.delenv("CUSPARGE_NVRTC", raising=False)
    compiler = nvrtc.Nvrtc(str(path))
    with pytest.raises(CompileError) as caught:
        compiler.require_arch(arch)
    text = str(caught.value)
    assert re.findall(r'"(nvidia[^"]*)"', text) == packages
    assert text.count("12.8") == text.count("found 12.8") + str(path).count("12.8")
    # What is installed does not count where the variable names another one.
    monkeypatch.setenv("CUSPARGE_NVRTC", str(path))
    with pytest.raises(
        CompileError, match=rf"version {version} or later in CUSPARGE_NVRTC"
    ) as caught:
        compiler.require_arch(arch)
    assert "pip install" not in str(caught.value)


def test_a_broken_installation_is_an_error(fake, monkeypatch):
    monkeypatch.setenv("CUSPARGE_NVRTC", str(fake(12, 8)))
    with pytest.raises(CompileError, match="BROKEN"):
        nvrtc.load().compile(b"", "a.cu", {}, "a", [])


def test_the_table_of_versions_agrees_with_this_one():
    compiler = need_nvrtc()
    for number, since in nvrtc._SINCE.items():
        if number in compiler.supported_archs():
            assert compiler.version >= since
        elif number != 101:  # the first name of 110, dropped in 13.0
            assert compiler.version < since


def test_the_builtins_are_opened_from_its_own_folder():
    compiler = need_nvrtc()
    if compiler._builtins is None:
        pytest.skip(f"{compiler.path} has no builtins beside it")
    assert "builtins" in compiler._builtins._name


@pytest.mark.parametrize("arch", ARCHS)
def test_it_compiles_with_headers_from_memory(arch):
    compiler = need_nvrtc()
    compiler.require_arch(arch)
    done = compiler.compile(KERNEL.encode(), "small.cu", HEADERS, EXPRESSION, options(arch))
    assert done.error is None, done.log
    assert done.cubin.startswith(b"\x7fELF")
    assert done.lowered.encode() in done.cubin
    assert re.search(rf"Compiling entry function '{done.lowered}' for '{arch}'", done.log)


def test_threads_get_the_same_bytes():
    compiler = need_nvrtc()

    def compiled(_):
        return compiler.compile(
            KERNEL.encode(), "small.cu", HEADERS, EXPRESSION, options("sm_80")
        ).cubin

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(compiled, range(8)))) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("twice(x", "thrice(x"), 'small.cu(6): error: identifier "thrice" is undefined'),
        (("small.cuh", "absent.cuh"), "cannot open source file"),
        (("x[threadIdx.x] =", 'asm("bogus;"); x[0] ='), "Not a name of any known instruction"),
    ],
)
def test_a_wrong_text_gives_the_log(change, expected):
    compiler = need_nvrtc()
    text = KERNEL.replace(*change).encode()
    done = compiler.compile(text, "small.cu", HEADERS, EXPRESSION, options("sm_80"))
    assert done.error == "NVRTC_ERROR_COMPILATION"
    assert expected in done.log
    assert done.cubin == b""


def test_a_wrong_name_and_a_wrong_option_give_the_log():
    compiler = need_nvrtc()
    done = compiler.compile(KERNEL.encode(), "small.cu", HEADERS, "cusparge::no", options("sm_80"))
    assert 'has no member "no"' in done.log
    done = compiler.compile(KERNEL.encode(), "small.cu", HEADERS, EXPRESSION, ["--nonsense"])
    assert done.error == "NVRTC_ERROR_INVALID_OPTION"
