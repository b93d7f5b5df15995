"""The command for a machine with a GPU, where there is none: parts, time, crashes, files."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def gpu_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_run")


@pytest.fixture
def gpu_tests(monkeypatch, gpu_run):
    return importlib.import_module("gpu_tests")


SCRIPTS = {
    "fine": "write({'summary': ['all is well'], 'number': 1})",
    "other": "write({})",
    "wrong": "print('what went wrong'); sys.exit(1)",
    "absent": "write({'skipped': 'needs cupy'}); sys.exit(1)",
    "crash": "write({'summary': ['so far']}); os.kill(os.getpid(), signal.SIGSEGV)",
    "hang": "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "write({'child': child.pid}); time.sleep(600)",
    "nonsense": "open(sys.argv[-1], 'w').write('{')",
    "reader": "write({'before': json.load(open(os.environ['REPORT']))})",
    "list": "write(['no object'])",
    "says_run": "write({'skipped': 'there is nothing to run'}); sys.exit(1)",
    "crash_skipped": "write({'skipped': 'x'}); os.kill(os.getpid(), signal.SIGSEGV)",
}
HEAD = """
import json, os, signal, subprocess, sys, time
def write(value):
    with open(sys.argv[-1], "w") as file:
        json.dump(value, file)
"""


@pytest.fixture
def parts(gpu_run, monkeypatch, tmp_path):
    """Put scripts in the place of the parts; return how to run some of them."""
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(HEAD + text)
    monkeypatch.setattr(gpu_run, "HERE", tmp_path)
    monkeypatch.setattr(gpu_run, "LEAST", 1.0)
    monkeypatch.setattr(gpu_run, "RESERVE", 0.0)
    monkeypatch.setattr(gpu_run, "count_gpus", lambda: 1)
    monkeypatch.setenv("REPORT", str(tmp_path / "out/gpu_run.json"))

    def run(names, minutes=1.0, words=(), out=True):
        chosen = [gpu_run.Part(name, f"{name}.py", 10, f"it is {name}") for name in names]
        monkeypatch.setattr(gpu_run, "PARTS", tuple(chosen))
        where = ["--out", str(tmp_path / "out")] if out else []
        status = gpu_run.main(["--minutes", str(minutes), *where, *words])
        file = tmp_path / "out" / "gpu_run.json"
        return status, json.loads(file.read_text()) if file.exists() else None

    return run


def gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat")
            if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_each_part_is_recorded_whatever_it_does(parts, capsys):
    names = ["fine", "wrong", "absent", "crash", "nonsense", "other", "list", "says_run"]
    status, report = parts([*names, "crash_skipped"])
    assert status == 1
    assert report["complete"]
    found = {name: record["status"] for name, record in report["parts"].items()}
    assert found == {
        "fine": "ok",
        "wrong": "failed: exit status 1",
        "absent": "skipped: needs cupy",
        "crash": "crashed: SIGSEGV",
        "nonsense": "ok",
        "other": "ok",
        "list": "ok",
        "says_run": "skipped: there is nothing to run",
        "crash_skipped": "crashed: SIGSEGV",
    }
    assert report["parts"]["fine"]["result"]["number"] == 1
    assert report["parts"]["wrong"]["log_tail"] == ["what went wrong"]
    assert report["parts"]["crash"]["result"] == {"summary": ["so far"]}, "what it wrote before"
    assert report["parts"]["nonsense"]["result"] is None
    printed = capsys.readouterr().out
    last = printed.split("cusparge ")[-1]
    for words in ("all is well", "crashed: SIGSEGV", "skipped: needs cupy", "fine "):
        assert words in last


def test_success_is_status_0(parts):
    assert parts(["fine", "absent", "other"])[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="asks POSIX for processes")
def test_a_hanging_part_is_ended_with_all_that_it_started(parts):
    begin = time.monotonic()
    status, report = parts(["hang", "fine"], minutes=0.1)
    assert status == 1
    assert time.monotonic() - begin < 60
    assert report["parts"]["hang"]["status"] == "time limit"
    assert gone(report["parts"]["hang"]["result"]["child"])
    assert report["parts"]["fine"]["status"] == "ok"


def test_what_does_not_fit_is_said(parts, gpu_run, monkeypatch):
    monkeypatch.setattr(gpu_run, "LEAST", 2.5)
    status, report = parts(["hang", "fine", "other"], minutes=0.05)
    assert status == 1
    assert not report["complete"]
    assert report["parts"]["hang"]["limit"] >= 2.5, "the most important part has enough"
    assert report["parts"]["other"]["status"] == gpu_run.OUT_OF_TIME
    assert report["seconds"] < 30


def test_time_that_is_left_over_goes_to_later_parts(parts):
    _, report = parts(["fine", "other", "reader"], minutes=1)
    limits = [record["limit"] for record in report["parts"].values()]
    assert limits[0] == pytest.approx(20, abs=1)
    assert limits[1] > 25
    assert limits[2] > 50


def test_the_file_is_written_after_every_part(parts):
    _, report = parts(["fine", "wrong", "reader"])
    before = report["parts"]["reader"]["result"]["before"]
    assert before["parts"]["fine"]["status"] == "ok"
    assert before["parts"]["wrong"]["status"] == "failed: exit status 1"
    assert before["complete"] is False


def test_only_and_skip(parts):
    _, report = parts(["fine", "other", "reader"], words=["--only", "other", "fine"])
    assert list(report["parts"]) == ["fine", "other"], "most important first"
    _, report = parts(["fine", "other", "reader"], words=["--skip", "fine", "reader"])
    assert list(report["parts"]) == ["other"]


def test_the_variable_out_names_the_folder(parts, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    status, report = parts(["fine"], out=False)
    assert status == 0
    assert report["parts"]["fine"]["status"] == "ok"
    assert (tmp_path / "out" / "gpu_run.log").exists()


# ---- the command line ----------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(gpu_run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_run, "count_gpus", lambda: "the driver shows no GPU")
    assert gpu_run.main(["--out", str(tmp_path)]) == 1
    assert "There is no GPU to run on: the driver shows no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert gpu_run.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == [p.name for p in gpu_run.PARTS]


def test_the_driver_is_asked(gpu_run, monkeypatch):
    def library(status, count):
        class Driver:
            def cuInit(self, flags):
                return status

            def cuDeviceGetCount(self, place):
                place._obj.value = count
                return 0

        return lambda name: Driver()

    monkeypatch.setattr(gpu_run.ctypes, "CDLL", library(0, 2))
    assert gpu_run.count_gpus() == 2
    monkeypatch.setattr(gpu_run.ctypes, "CDLL", library(100, 0))
    assert "error 100" in gpu_run.count_gpus()
    monkeypatch.setattr(gpu_run.ctypes, "CDLL", library(0, 0))
    assert "no GPU" in gpu_run.count_gpus()

    def absent(name):
        raise OSError("no such file")

    monkeypatch.setattr(gpu_run.ctypes, "CDLL", absent)
    assert "no such file" in gpu_run.count_gpus()


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--skip", "x"], ["--minutes", "0"]])
def test_wrong_usage(gpu_run, words, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_run.main(words)
    assert ended.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_every_part_has_a_script_that_takes_its_arguments(gpu_run):
    assert [part.name for part in gpu_run.PARTS][:3] == ["environment", "compile", "tests"]
    scripts = {part.command.split()[0] for part in gpu_run.PARTS}
    benchmarks = {path.name for path in BENCHMARKS.glob("bench_*.py")}
    assert benchmarks - scripts == {"bench_cpu.py", "bench_blas_threads.py"}, "these need no GPU"
    for part in gpu_run.PARTS:
        script, *words = part.command.replace("{seconds}", "9").split()
        options = [word for word in words if word.startswith("--")]
        text = (BENCHMARKS / script).read_text()
        assert all(f'"{option}"' in text for option in [*options, "-o"]), part


def test_only_the_standard_library_is_needed():
    script = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu_run\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded <= set(sys.stdlib_module_names) | {"gpu_run", "__main__"}


def test_the_commit(gpu_run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    assert gpu_run.source_state() == {"commit": "unknown", "dirty": None, "source": None}
    (tmp_path / ".commit").write_text("0123456789ab+changes\n")
    found = gpu_run.source_state()
    assert found == {"commit": "0123456789ab", "dirty": True, "source": ".commit"}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except OSError:
        pytest.skip("needs git")
    subprocess.run([*git, "add", ".commit"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    found = gpu_run.source_state()
    assert (found["dirty"], found["source"]) == (False, "git")
    (tmp_path / ".commit").write_text("changed")
    assert gpu_run.source_state() == found | {"dirty": True}


# ---- the tests, in processes that may die --------------------------------------------------------

TESTS = """
import os, time, warnings
import pytest
pytestmark = pytest.mark.gpu
def test_fine(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="needs two GPUs")
def test_skipped(): pass
def test_crash(): os.abort()
def test_after_the_crash(): pass
def test_broken(): raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
def test_after_the_fault(): pass
def test_hang(): time.sleep(600)
def test_a_foreign_warning(): warnings.warn("old", DeprecationWarning)
@pytest.fixture
def bad(): raise OSError("no such device")
def test_fixture(bad): pass
"""


@pytest.mark.skipif(sys.platform == "win32", reason="os.abort opens a window there")
def test_one_test_does_not_take_the_others_along(gpu_tests, tmp_path, capfd):
    file, broken = tmp_path / "test_some.py", tmp_path / "test_unreadable.py"
    file.write_text(TESTS)
    broken.write_text("import a_module_that_nobody_has\n")
    words = [str(file), str(broken), "-c", str(ROOT / "pyproject.toml")]
    report = gpu_tests.run_tests(words, 120, tmp_path / "tests.json", each=4)
    assert json.loads((tmp_path / "tests.json").read_text()) == report
    counts = report["counts"]
    assert counts == {"passed": 4, "failed": 2, "skipped": 1, "crashed": 1, "hung": 1, "error": 2}
    assert report["not_run"] == []
    assert report["processes"] == 4
    assert report["skip_reasons"] == {"needs two GPUs": 1}
    assert "skipped" not in report, "the word that says that a whole part was"
    told = {entry["id"].rpartition("::")[2]: entry for entry in report["failures"]}
    assert "one is not two" in told["test_wrong"]["text"]
    assert told["test_crash"]["text"] == "crashed: SIGABRT"
    assert told["test_hang"]["outcome"] == "hung"
    assert "no such device" in told["test_fixture"]["text"]
    assert "a_module_that_nobody_has" in str(report["failures"])
    assert report["summary"][0].startswith("1 crashed, 2 error, 2 failed, 1 hung, 4 passed")


def test_tests_that_do_not_fit_are_named(gpu_tests, tmp_path, capfd):
    file = tmp_path / "test_some.py"
    text = "import pytest, time\n@pytest.mark.gpu\ndef test_slow(): time.sleep(600)\n"
    file.write_text(text + "@pytest.mark.gpu\ndef test_later(): pass\n")
    words = [str(file), "-c", str(ROOT / "pyproject.toml")]
    report = gpu_tests.run_tests(words, 3, tmp_path / "tests.json", each=100)
    assert [name.rpartition("::")[2] for name in report["not_run"]] == ["test_slow", "test_later"]
    assert report["counts"] == {}


def test_the_files_with_tests_for_a_gpu_are_found(gpu_tests):
    found = gpu_tests.test_files()
    assert {"tests/test_gpu_runtime.py", "tests/test_gpu_processes.py"} <= set(found)
    assert set(gpu_tests.WATCHED) <= set(found)
    assert found[-1] == "tests/test_gpu_processes.py", "the slowest"
    assert "tests/test_cpu.py" not in found


# ---- compute-sanitizer ---------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\n....\n4 passed in 9.1s\n========= ERROR SUMMARY: 0 errors\n"
WRONG = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at cusparge::pool_blocks+0x120 in pool.cu:77
4 passed in 9.1s
========= ERROR SUMMARY: 3 errors
"""


def test_what_the_sanitizer_says(gpu_tests):
    clean = gpu_tests.judge("memcheck", CLEAN)
    assert (clean["errors"], clean["passed"]) == (0, 4)
    assert clean["summary"] == ["0 errors in 4 tests"]
    wrong = gpu_tests.judge("memcheck", WRONG)
    assert wrong["errors"] == 3
    assert any("Invalid __global__ read" in text for text in wrong["summary"])
    races = "1 passed\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    assert gpu_tests.judge("racecheck", races)["errors"] == 2
    idle = gpu_tests.judge("memcheck", "no tests ran\n========= ERROR SUMMARY: 0 errors\n")
    assert idle["passed"] == 0
    assert "did not pass" in idle["summary"][0]
    refused = gpu_tests.judge("memcheck", "========= Error: Device not supported. See manual\n")
    assert refused["skipped"].endswith("Error: Device not supported. See manual")
    assert "no summary" in gpu_tests.judge("memcheck", "bash: what?")["skipped"]


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_the_sanitizer_is_found_and_run(gpu_tests, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\necho "$@"\necho 2 passed\necho "========= ERROR SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    assert gpu_tests.find_sanitizer() == str(tool)
    report = gpu_tests.sanitize("initcheck")
    assert (report["errors"], report["passed"]) == (0, 2)
    printed = capfd.readouterr().out
    assert "--tool initcheck" in printed
    assert "-m gpu" in printed
    assert gpu_tests.WATCHED[0] in printed
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: None)
    assert "neither on PATH" in gpu_tests.sanitize("memcheck")["skipped"]
