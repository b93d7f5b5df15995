"""The command for a machine with a GPU, as a process of its own: signals, leftovers, no reader."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

SCRIPTS = {
    "fine": "write({'summary': ['all is well']})",
    "slow": "time.sleep(0.5); write({})",
    "marked": "write({'so far': 1}); mark(); time.sleep(600)",
    "marked_then_fine": "mark(); time.sleep(2); write({})",
}
HEAD = """
import json, os, sys, time
def write(value):
    with open(sys.argv[-1], "w") as file:
        json.dump(value, file)
def mark():
    with open(os.environ["MARK"], "w") as file:
        file.write(str(os.getpid()))
"""
START = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gpu_run
gpu_run.count_gpus = lambda: 1
if sys.argv[3] != "real":
    gpu_run.HERE = Path(sys.argv[2])
words = [word.partition("=") for word in sys.argv[4:]]
gpu_run.PARTS = tuple(gpu_run.Part(name, rest or name + ".py", 1, "") for name, _, rest in words)
sys.exit(gpu_run.main(["--out", sys.argv[2] + "/out"]))
"""


def start_run(tmp_path, *parts, scripts="stand-in", ignored=None, **options):
    """Start a run of some scripts, or of real parts, with a folder for its temporary files."""
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(HEAD + text)
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "MARK": str(tmp_path / "on")}
    start = START
    if ignored is not None:  # not preexec_fn: a fork disturbs threads that other tests have left
        start = f"import signal\nsignal.signal({int(ignored)}, signal.SIG_IGN)\n{START}"
    command = [sys.executable, "-c", start, BENCHMARKS, tmp_path, scripts, *parts]
    return subprocess.Popen(command, env=environment, text=True, **options)


def appears(path):
    """Wait for a file, and return what is in it."""
    for _ in range(1200):
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{path} does not appear")


def ended_by(process, number, tmp_path):
    """Send a signal; return the exit status, what was printed, the report, and what is left."""
    child = int(appears(tmp_path / "on"))
    try:
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
        left = [] if gone(child) else [child]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    report = json.loads((tmp_path / "out" / "gpu_run.json").read_text())
    left += (tmp_path / "temporary").iterdir()
    return process.returncode, printed, report, left


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


posix = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_an_interrupted_run_keeps_what_it_has(tmp_path, name):
    process = start_run(tmp_path, "fine", "marked", "slow", stdout=subprocess.PIPE)
    status, printed, report, left = ended_by(process, getattr(signal, name), tmp_path)
    assert status == 130
    found = {name: record["status"] for name, record in report["parts"].items()}
    assert found == {"fine": "ok", "marked": "interrupted", "slow": "not run: interrupted"}
    assert report["parts"]["marked"]["result"] == {"so far": 1}
    assert report["complete"] is False
    assert "marked" in printed
    assert left == []


@posix
def test_a_run_that_is_interrupted_in_its_last_part_is_not_complete(tmp_path):
    process = start_run(tmp_path, "fine", "marked", stdout=subprocess.PIPE)
    report = ended_by(process, signal.SIGTERM, tmp_path)[2]
    assert report["parts"]["marked"]["status"] == "interrupted"
    assert report["complete"] is False


@posix
def test_a_signal_that_was_to_be_ignored_is(tmp_path):
    process = start_run(
        tmp_path, "marked_then_fine", "fine", ignored=signal.SIGHUP, stdout=subprocess.PIPE
    )
    status, _, report, _ = ended_by(process, signal.SIGHUP, tmp_path)
    assert (status, report["complete"]) == (0, True), "as under nohup"


STUBBORN = """
import os, pathlib, signal, time
import pytest
@pytest.mark.gpu
def test_hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path(os.environ["MARK"]).write_text(str(os.getpid()))
    time.sleep(600)
"""


@posix
@pytest.mark.parametrize("sanitizer", [False, True])
def test_a_process_of_pytest_that_ignores_sigterm_is_ended(tmp_path, monkeypatch, sanitizer):
    (tmp_path / "test_stubborn.py").write_text(STUBBORN)
    part = f"tests=gpu_tests.py {tmp_path / 'test_stubborn.py'}"
    if sanitizer:  # a tool that ignores it, and what it runs
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(
            "#!/bin/sh\ntrap '' TERM\necho '========= Invalid __global__ read'\n"
            "sleep 600 & echo $! > $MARK\nwait\nwait\nsleep 600\n"
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        part = "tests=gpu_tests.py --sanitizer memcheck"
    process = start_run(tmp_path, part, scripts="real", stdout=subprocess.PIPE)
    status, _, report, left = ended_by(process, signal.SIGTERM, tmp_path)
    assert status == 130
    assert left == [], "processes and folders"
    record = report["parts"]["tests"]
    assert record["status"] == "interrupted"
    if sanitizer:
        wanted = ["stopped before its end", "========= Invalid __global__ read"]
        assert record["result"]["summary"] == wanted
    else:
        assert len(record["result"]["not_run"]) == 1


@posix
@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_goes_away_stops_nothing(tmp_path, both):
    reading, writing = os.pipe()
    os.close(reading)
    errors = writing if both else subprocess.PIPE
    process = start_run(tmp_path, "fine", "slow", "last=fine.py", stdout=writing, stderr=errors)
    os.close(writing)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert not said
    report = json.loads((tmp_path / "out" / "gpu_run.json").read_text())
    assert [record["status"] for record in report["parts"].values()] == ["ok"] * 3
    assert report["complete"]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("def test_one(): assert 1 == 2", "failed: exit status 1"),
        ("@pytest.mark.skip(reason='two GPUs')\ndef test_one(): pass", "ok"),
    ],
)
def test_a_failed_test_is_a_failed_part_whatever_else_is_skipped(tmp_path, text, status):
    """One passed, one skipped, and one more."""
    file = tmp_path / "test_some.py"
    two = "def test_two(): pass\n@pytest.mark.skip(reason='no NVLink')\ndef test_three(): pass\n"
    file.write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{two}{text}\n")
    process = start_run(tmp_path, f"tests=gpu_tests.py {file}", scripts="real", stdout=-3)
    assert process.wait(100) == (status != "ok")
    report = json.loads((tmp_path / "out" / "gpu_run.json").read_text())
    record = report["parts"]["tests"]
    assert record["status"] == status
    outcome = "skipped" if status == "ok" else "failed"
    wanted = {"passed": 1, "skipped": 1}
    assert record["result"]["counts"] == wanted | {outcome: wanted.get(outcome, 0) + 1}
