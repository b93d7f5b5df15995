"""`cusparge compile`, with small kernels and the real compiler where there is one."""

from __future__ import annotations

import json
import os

import pytest
from cli_tools import refused, run_json
from cuda_tools import isolate, need_nvrtc, small
from fake_gpu import compile_nvml, use_nvml

from cusparge._cuda import build, devices, nvml, nvrtc, variants
from cusparge._cuda.cache import Cache
from cusparge.cli import main
from cusparge.errors import CompileError

MAIN = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Two kernels in the default set and three in all; no GPU."""
    isolate(monkeypatch, tmp_path)
    declared = {}
    monkeypatch.setattr(variants, "_OWNERS", ())
    monkeypatch.setattr(variants, "_declared", declared)
    monkeypatch.setattr(nvml, "_library_names", lambda: [])
    monkeypatch.setattr(devices, "_PROC_VERSION", tmp_path / "no driver")

    def declare(*factors, more=()):
        def expressions(arch, dtypes, head_dims):
            chosen = factors if head_dims != variants.HEAD_DIMS else (*factors, *more)
            return [small(factor).expression for factor in chosen]

        variants.declare("small", file="small.cu", expressions=expressions)

    declare(3, 5, more=(7,))
    return declare


@pytest.fixture
def compiler(kernels):
    return need_nvrtc()


def cubins(folder):
    return sorted(path.name for path in folder.rglob("*.cubin"))


# --- Which architectures -------------------------------------------------------------------------


@pytest.fixture
def instead(monkeypatch):
    """Build nothing; return what would have been built."""
    wanted = []

    def try_all(kernels, arch, *, jobs, on_done):
        wanted.append((arch, tuple(kernels), jobs))
        return [CompileError("not now") for _ in kernels]

    monkeypatch.setattr(build, "try_all", try_all)
    monkeypatch.setattr(build, "peek", lambda kernel, arch: None)
    return wanted


def archs_of(wanted):
    return [arch for arch, _, _ in wanted]


def test_without_a_gpu_all_of_the_main_architectures(capsys, kernels, instead):
    assert main(["compile"]) == 1
    captured = capsys.readouterr()
    assert archs_of(instead) == MAIN
    assert "no GPU" in captured.err
    for arch in MAIN:
        assert arch in captured.out
        assert arch in captured.err


def test_those_of_the_gpus(capsys, kernels, instead, monkeypatch, tmp_path):
    use_nvml(monkeypatch, compile_nvml(tmp_path))
    assert main(["compile", "--json"]) == 1
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert [row["arch"] for row in record["architectures"]] == ["sm_80", "sm_90a"]
    assert record["chosen_by"] == "gpus"
    assert "left out: Tesla T4" in captured.err
    assert "7.5" in captured.err
    instead.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")  # nothing but a GPU that is too old
    assert main(["compile", "--json"]) == 1
    assert archs_of(instead) == MAIN
    instead.clear()
    assert main(["compile", "--arch", "12.0"]) == 1
    assert archs_of(instead) == ["sm_120a"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--arch", "sm_90a"], ["sm_90a"]),
        (["--arch", "SM_90", "8.9"], ["sm_90a", "sm_89"]),
        (["--arch", "90a", "--arch", "9.0", "80"], ["sm_90a", "sm_80"]),
        (["--arch", *devices.ARCHITECTURES], list(devices.ARCHITECTURES)),
    ],
)
def test_those_that_are_named(kernels, instead, words, expected):
    assert main(["compile", *words]) == 1
    assert archs_of(instead) == expected


def test_the_set_and_the_jobs(kernels, instead):
    assert main(["compile", "--arch", "80", "-j", "3"]) == 1
    assert main(["compile", "--arch", "80", "--set", "all", "--jobs", "1"]) == 1
    assert main(["compile", "--arch", "80"]) == 1
    assert [(len(chosen), jobs) for _, chosen, jobs in instead] == [(2, 3), (3, 1), (2, None)]


@pytest.mark.parametrize(
    "words",
    [
        ["--arch"],
        ["--arch", "sm_75"],
        ["--arch", "sm_90a", "hopper"],
        ["--arch", ""],
        ["--set", "some"],
        ["-j", "0"],
        ["-j", "many"],
        ["extra"],
        ["--out"],
        ["--ar", "80"],
    ],
    ids=" ".join,
)
def test_wrong_usage(capsys, kernels, instead, words):
    assert "usage: cusparge" in refused(capsys, "compile", *words, code=2)
    assert instead == []


def test_an_unknown_architecture_is_told_with_those_allowed(capsys, kernels):
    message = refused(capsys, "compile", "--arch", "sm_75", code=2)
    assert "'sm_75'" in message
    for arch in devices.ARCHITECTURES:
        assert arch in message


# --- Compiling -----------------------------------------------------------------------------------


def test_compile_then_find_in_the_cache(capsys, compiler, tmp_path):
    record = run_json(capsys, "compile", "--arch", "sm_80", "sm_90a")
    assert (record["ok"], record["set"], record["chosen_by"]) == (True, "default", "option")
    for row in record["architectures"]:
        assert (row["compiled"], row["cached"], row["failed"]) == (2, 0, 0)
        assert row["seconds"] > 0
        assert row["registers"] > 0
        assert row["spill_bytes"] == 0
        for kernel in row["kernels"]:
            assert kernel["nvrtc"] == "{}.{}".format(*compiler.version)
            assert kernel["error"] is None
            assert os.path.isfile(os.path.expanduser(kernel["path"]))
    assert len(cubins(tmp_path / "cache")) == 4
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.cubin")}
    record = run_json(capsys, "compile", "--arch", "sm_80", "sm_90a", "--set", "all")
    for row in record["architectures"]:
        assert (row["compiled"], row["cached"], row["failed"]) == (1, 2, 0)
        assert [kernel["cached"] for kernel in row["kernels"]] == [True, True, False]
        assert [kernel["seconds"] > 0 for kernel in row["kernels"]] == [False, False, True]
    assert len(cubins(tmp_path / "cache")) == 6
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_the_report_for_people(capsys, compiler):
    assert main(["compile", "--arch", "sm_86", "sm_100a"]) == 0
    captured = capsys.readouterr()
    lines = {words[0]: words for line in captured.out.splitlines() if (words := line.split())}
    assert lines["sm_86"][1:5] == ["2", "2", "0", "0"]
    assert lines["sm_100a"][1:5] == ["2", "2", "0", "0"]
    assert "kept in" in captured.out
    assert captured.err == ""


def test_out_is_a_seed(capsys, compiler, tmp_path, monkeypatch):
    out = tmp_path / "kernels for others"
    record = run_json(capsys, "compile", "--arch", "sm_90a", "--out", out)
    assert record["folder"].endswith("kernels for others")
    assert len(cubins(out)) == 2
    assert cubins(out) == cubins(tmp_path / "cache")
    assert all("kernels for others" in kernel["path"] for kernel in kernels_of(record))
    # A machine without a compiler and with an empty cache finds them there.
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("CUSPARGE_CACHE_SEED", str(out))
    monkeypatch.setattr(nvrtc, "load", no_nvrtc)
    record = run_json(capsys, "compile", "--arch", "sm_90a")
    assert [row["cached"] for row in record["architectures"]] == [2]
    assert cubins(tmp_path / "empty") == []
    # From there they go on to a third folder, and what is cached elsewhere counts as written.
    record = run_json(capsys, "compile", "--arch", "sm_90a", "--out", tmp_path / "third")
    assert cubins(tmp_path / "third") == cubins(out)
    assert len(Cache(tmp_path / "third").entries()) == 2


def kernels_of(record):
    return [kernel for row in record["architectures"] for kernel in row["kernels"]]


def no_nvrtc():
    raise CompileError('NVRTC was not found: pip install "cusparge[cuda13]".')


def test_a_failure_does_not_stop_the_others(capsys, compiler, kernels, tmp_path):
    kernels(3, 13, 5)  # thirteen is refused
    assert main(["compile", "--arch", "sm_80", "sm_89"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "thirteen is refused" in captured.err
    for arch in ("sm_80", "sm_89"):
        assert f"small.cu ({small(13).expression}) for {arch}" in captured.err
    assert len(cubins(tmp_path / "cache" / "v1")) == 4
    assert main(["compile", "--arch", "sm_80", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    (row,) = record["architectures"]
    assert record["ok"] is False
    assert (row["compiled"], row["cached"], row["failed"]) == (0, 2, 1)
    errors = [kernel["error"] for kernel in row["kernels"]]
    assert (errors[0], errors[2]) == (None, None)
    assert "thirteen is refused" in errors[1]


def test_without_a_compiler(capsys, kernels, monkeypatch):
    monkeypatch.setattr(nvrtc, "load", no_nvrtc)
    assert main(["compile", "--arch", "80", "90"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("NVRTC was not found") == 1  # once for all of them
    assert "cusparge[cuda13]" in captured.err


def test_an_architecture_that_the_compiler_does_not_know(capsys, compiler, monkeypatch):
    monkeypatch.setattr(nvrtc.Nvrtc, "supported_archs", lambda self: (80, 89))
    assert main(["compile", "--arch", "90", "80", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [row["failed"] for row in record["architectures"]] == [2, 0]
    assert "sm_90a" in record["architectures"][0]["kernels"][0]["error"]


def test_a_cache_that_cannot_be_written_is_a_failure(capsys, compiler, tmp_path, monkeypatch):
    """The kernels would go to a folder that vanishes with this process."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr("cusparge._cuda.storage._private", None)
    assert main(["compile", "--arch", "80"]) == 1
    captured = capsys.readouterr()
    assert "not kept" in captured.err
    (row,) = [words for line in captured.out.splitlines() if "sm_80" in (words := line.split())]
    assert row[1:5] == ["2", "0", "0", "2"]
    assert "CUSPARGE_CACHE_DIR" in captured.err
    out = tmp_path / "out"
    assert run_json(capsys, "compile", "--arch", "80", "--out", out)["ok"] is True
    assert len(cubins(out)) == 2


def test_a_limit_that_is_too_small_is_a_failure(capsys, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", "1K")
    assert main(["compile", "--arch", "80", "--set", "all"]) == 1
    assert "CUSPARGE_CACHE_LIMIT" in capsys.readouterr().err
    # With a folder besides: the cache has lost what was to be copied there.
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", "1")
    words = ["compile", "--arch", "89", "--set", "all", "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 1
    (row,) = json.loads(capsys.readouterr().out)["architectures"]
    errors = [kernel["error"] for kernel in row["kernels"]]
    assert row["failed"] == sum(error is not None for error in errors) >= 2
    assert all("CUSPARGE_CACHE_LIMIT" in error for error in errors if error)
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", "plenty")
    assert "plenty" in refused(capsys, "compile", "--arch", "80", "--set", "all")


def test_an_out_that_cannot_be_written(capsys, kernels, instead, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(capsys, "compile", "--arch", "80", "--out", tmp_path / "file")
    assert "file" in refused(capsys, "compile", "--arch", "80", "--out", tmp_path / "file" / "sub")
    assert instead == []


def test_a_disk_that_fills_is_told_for_each_kernel(capsys, compiler, tmp_path, monkeypatch):
    real = Cache._write

    def write(self, target, data, entry):
        if self.root == tmp_path / "out":
            raise OSError(28, "No space left on device", str(target))
        real(self, target, data, entry)

    monkeypatch.setattr(Cache, "_write", write)
    assert main(["compile", "--arch", "80", "--out", str(tmp_path / "out"), "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["architectures"]
    assert (row["compiled"], row["failed"]) == (0, 2)
    for kernel in row["kernels"]:
        assert "No space left on device" in kernel["error"]
        assert "--out" in kernel["error"]


def test_a_folder_that_nobody_may_look_into(capsys, compiler, tmp_path, monkeypatch):
    """As one without any rights: to ask whether a file exists there is an error."""
    folder = str(tmp_path / "cache" / "v1")
    stat = os.stat

    def refuse(path, *words, **options):
        if os.fspath(path).startswith(folder + os.sep):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return stat(path, *words, **options)

    def write(self, target, data, entry, real=Cache._write):
        if self.root == tmp_path / "cache":
            raise PermissionError(13, "Permission denied", str(target))
        real(self, target, data, entry)

    monkeypatch.setattr("cusparge._cuda.storage._private", None)
    monkeypatch.setattr(Cache, "_write", write)
    monkeypatch.setattr(os, "stat", refuse)
    assert main(["compile", "--arch", "80", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["architectures"]
    assert row["failed"] == 2
    assert all("not kept" in kernel["error"] for kernel in row["kernels"])


def test_sources_that_are_missing(capsys, kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("CUSPARGE_KERNELS", str(tmp_path))
    assert "CUSPARGE_KERNELS" in refused(capsys, "compile", "--arch", "80")


def test_no_kernels_at_all(capsys, kernels):
    kernels()
    assert "no kernels" in refused(capsys, "compile", "--arch", "80")


def test_the_own_kernels_are_known():
    """The kernels of the package, not those of these tests: at least one for each architecture."""
    for arch in devices.ARCHITECTURES:
        chosen = variants.default_variants(arch)
        assert chosen
        assert set(chosen) <= set(variants.all_variants(arch))
