"""Compilations that fail where something else fails as well: always a CompileError that helps."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from cuda_tools import finish, isolate, need_nvrtc, run_script, small, start_script, write_kernels

from cusparge._cuda import build, failures, lifecycle, notices, nvrtc, storage
from cusparge.errors import CompileError


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    need_nvrtc()
    isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("CUSPARGE_QUIET", "1")
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(storage, "_private", None)
    monkeypatch.setattr(storage, "_rejected", set())


def failed():
    """Return the error of a kernel that does not compile."""
    with pytest.raises(CompileError, match="thirteen is refused") as caught:
        build.build(small(13), "sm_90a")
    assert "small.cu(5): error" in caught.value.log
    return caught.value


# ---- where the files of a failure go -------------------------------------------------------------


def test_every_failure_has_its_own_folder(tmp_path):
    commands = {failed().command for _ in range(3)}
    folders = list((tmp_path / "cache" / "failed").iterdir())
    assert len(commands) == len(folders) == 3
    for folder in folders:
        assert any(str(folder / "reproduce.cu") in command for command in commands)
        assert (folder / "log.txt").exists()


def fill(monkeypatch, *places):
    """Let no bytes be written below these folders."""
    real = Path.write_bytes

    def write_bytes(self, data):
        if any(place in self.parents for place in places):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_a_full_cache(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    fill(monkeypatch, tmp_path / "cache")
    error = failed()
    assert str(tmp_path / "temporary" / "cusparge-failed-") in error.command
    assert "reproduce.cu" in str(error)
    assert list((tmp_path / "cache" / "failed").iterdir()) == [], "nothing half written stays"


def test_no_room_anywhere(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    fill(monkeypatch, tmp_path / "cache", tmp_path / "temporary")
    monkeypatch.setattr(failures, "_MAX_LINES", 1)
    error = failed()
    assert error.command == ""
    assert "could not be kept: [Errno 28] No space left on device" in str(error)
    assert "To reproduce it" not in str(error)
    assert "more lines in the attribute log" in str(error)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_no_folder_anywhere(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("in the way")

    def nowhere(**options):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", nowhere)
    error = failed()
    assert error.command == ""
    assert "there is no folder that can be written to" in str(error)


def test_a_real_full_disk(tmp_path):
    """A file system of 8 KiB, where that can be mounted."""
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "none", tiny], capture_output=True
    ) if hasattr(os, "geteuid") and os.geteuid() == 0 else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    text = "try:\n    build.build(cuda_tools.small(13), 'sm_90a')\n"
    text += "except cusparge.CompileError as error:\n    print('thirteen' in str(error))\n"
    try:
        places = {"CUSPARGE_CACHE_DIR": str(tiny / "cache"), "TMPDIR": str(tiny)}
        assert run_script(text, tmp_path, **places)[0] == "True\n"
    finally:
        subprocess.run(["umount", tiny], check=True)


AT_ONCE = """
while time.time() < float(os.environ["BEGIN"]):
    time.sleep(0.001)
for _ in range(3):
    try:
        build.build(cuda_tools.small(13), "sm_90a")
    except cusparge.CompileError as error:
        print("thirteen" in str(error), os.path.exists(error.command.split()[-3]))
"""


def test_processes_that_fail_at_once(tmp_path):
    import time

    begin = str(time.time() + 2)
    running = [start_script(AT_ONCE, tmp_path, BEGIN=begin) for _ in range(4)]
    assert set(finish(running)) == {(3 * "True True\n", "")}


def test_sources_that_are_no_text(tmp_path, monkeypatch):
    kernels = write_kernels(tmp_path / "odd")
    (kernels / "small.cu").write_bytes(b"// \xff\xfe\n" + (kernels / "small.cu").read_bytes())
    monkeypatch.setenv("CUSPARGE_KERNELS", str(kernels))
    with pytest.raises(CompileError, match="without the kernel: is its source no UTF-8") as caught:
        build.build(small(), "sm_90a")
    assert "template" in caught.value.source
    assert build.peek(small(), "sm_90a") is None


# ---- a compiler without its second library -------------------------------------------------------

LOG = "nvrtc: error: failed to open libnvrtc-builtins.so.13.5.\n  Make sure that it is installed."


@pytest.mark.parametrize("given", [False, True])
def test_the_missing_library_is_named(monkeypatch, given):
    error = nvrtc.Compiled("NVRTC_ERROR_BUILTIN_OPERATION_FAILURE", LOG, b"", "")
    compiler = nvrtc.load()
    monkeypatch.setattr(nvrtc, "load", lambda: compiler)
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", lambda *words: error)
    monkeypatch.delenv("CUSPARGE_NVRTC", raising=False)
    monkeypatch.delenv("CUSPARGE_KERNELS")
    if given:
        monkeypatch.setenv("CUSPARGE_NVRTC", compiler.path)
    with pytest.raises(CompileError, match="cannot open its second library") as caught:
        build.build(build.Variant("pool.cu", "x"), "sm_90a")
    text = str(caught.value)
    assert "report" not in text
    assert "nvrtc-builtins" in text
    assert compiler.path in text
    assert ("unset CUSPARGE_NVRTC" in text) is given
    assert ('pip install "cusparge[cuda13]"' in text) is not given
    assert caught.value.log == LOG


@pytest.mark.skipif(sys.platform == "win32", reason="other names there")
def test_a_copy_of_the_compiler_alone(tmp_path):
    library = Path(need_nvrtc().path).resolve()
    if not library.is_file():
        pytest.skip("the loader does not tell where NVRTC lies")
    alone = tmp_path / library.name
    try:
        os.link(library, alone)
    except OSError:
        shutil.copy(library, alone)
    text = "try:\n    print(build.build(cuda_tools.small(), 'sm_90a').arch)\n"
    text += "except cusparge.CompileError as error:\n    print(error)\n"
    out, _ = run_script(text, tmp_path, CUSPARGE_NVRTC=str(alone), CUSPARGE_QUIET="1")
    if out == "sm_90a\n":
        pytest.skip("the loader finds the second library elsewhere")
    assert "cannot open its second library" in out
    assert "unset CUSPARGE_NVRTC" in out


# ---- no threads ----------------------------------------------------------------------------------


def allow_threads(monkeypatch, most):
    """Let so many be started that compile, and no others of ours."""
    real, count = threading.Thread.start, []

    def start(self):
        count.append(self.name)
        if len(count) > most:
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("most", [0, 1])
def test_without_threads_it_compiles_here(monkeypatch, most):
    wanted, seen = [small(1), small(13), small(2)], []
    allow_threads(monkeypatch, most)
    done = build.try_all(wanted, "sm_90a", jobs=3, on_done=lambda *counts: seen.append(counts))
    assert [isinstance(result, CompileError) for result in done] == [False, True, False]
    assert (seen[0], seen[-1]) == ((0, 3), (3, 3))
    if most == 0:
        assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_an_interrupt_while_it_compiles_here(monkeypatch):
    tried = []

    def interrupted(variant, arch):
        tried.append(variant)
        raise KeyboardInterrupt

    allow_threads(monkeypatch, 0)
    monkeypatch.setattr(build, "_build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.try_all([small(1), small(2)], "sm_90a")
    assert tried == [small(1)]


def test_without_a_thread_for_the_progress_line(monkeypatch):
    allow_threads(monkeypatch, 0)
    assert build.build(small(), "sm_90a").arch == "sm_90a"
    assert not lifecycle.is_ending()
