"""Run the tests marked `gpu`, whatever they do to the process, for `gpu_run.py`.

    python benchmarks/gpu_tests.py -o tests.json --seconds 200
    python benchmarks/gpu_tests.py -o memcheck.json --sanitizer memcheck

A crash, a test that hangs and an error that breaks the process's CUDA context end one process of
pytest; another one goes on behind that test. With ``--sanitizer`` NVIDIA's compute-sanitizer
watches a few kernels instead. This file is also the plugin of pytest that keeps the record.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_run import ROOT, Interrupts, kill_group, outcome, start, temporary_folder, write_json

#: Names the file of records, one JSON object a line; set for pytest alone.
VARIABLE = "CUSPARGE_GPU_TESTS"
#: Seconds of one test, and processes at most.
EACH = 120
STARTS = 8
#: The fate of a process that has no fault of its own.
STOPPED = "out of time, or interrupted"

#: A test file with tests for a GPU.
_GPU_FILE = re.compile(r"\bmark\.gpu\b|\bgpu_tools\.marks\(")
#: After such an error nothing works in that process any more.
_BROKEN = re.compile(
    r"illegal memory access|ILLEGAL_ADDRESS|LAUNCH_FAILED|unspecified launch failure|"
    r"MISALIGNED_ADDRESS|misaligned address|device-side assert|HARDWARE_STACK_ERROR|"
    r"ILLEGAL_INSTRUCTION|LAUNCH_TIMEOUT|ECC_UNCORRECTABLE",
)
#: Warnings of other libraries are no failures of ours.
_WARNINGS = [
    word
    for name in ("Deprecation", "PendingDeprecation", "Future", "Import", "Resource", "User")
    for word in ("-W", f"default::{name}Warning")
]

# -- the plugin of pytest ----------------------------------------------------------------------


def _record(**entry: Any) -> None:
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what an earlier process has begun."""
    begun = set(read(Path(os.environ[VARIABLE]))["begun"])
    left_out = [item for item in items if item.nodeid in begun]
    items[:] = [item for item in items if item.nodeid not in begun]
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session: Any) -> None:
    """Tell how many there are."""
    _record(collected=[item.nodeid for item in session.items])


def pytest_collectreport(report: Any) -> None:
    """Keep what cannot be imported, and what is skipped as a whole file."""
    if report.outcome != "passed":
        _record(id=report.nodeid, **_told(report, "error"))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Keep which test is running."""
    _record(begun=nodeid, at=time.time())


def pytest_runtest_logreport(report: Any) -> None:
    """Keep how it went; the call, or a fixture that skipped or failed."""
    if report.when != "call" and report.outcome == "passed":
        return
    told = _told(report, "error" if report.when != "call" else "failed")
    _record(id=report.nodeid, seconds=round(report.duration, 2), **told)


def pytest_runtest_teardown(item: Any) -> None:
    """End this process after an error that breaks its context."""
    if _state.get("broken"):
        item.session.shouldstop = "the CUDA context is broken"


def pytest_sessionfinish(exitstatus: int) -> None:
    """Tell that all tests were run."""
    if not _state.get("broken"):
        _record(finished=int(exitstatus))


_state: dict[str, bool] = {}


def _told(report: Any, failed: str) -> dict[str, str]:
    if report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        return {"outcome": "skipped", "text": reason.removeprefix("Skipped: ")}
    if report.outcome == "passed":
        return {"outcome": "passed"}
    text = report.longreprtext
    _state["broken"] = _state.get("broken", False) or _BROKEN.search(text) is not None
    lines = [line for line in text.splitlines() if line.startswith("E  ")] or text.splitlines()
    return {"outcome": failed, "text": "\n".join(lines[:8])[:1500]}


# -- the process around it ---------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """Return what the records say: tests begun, how each ended, how many there are."""
    found: dict[str, Any] = {"begun": {}, "ended": {}, "collected": [], "finished": None}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            continue
        if "begun" in entry:
            found["begun"][entry["begun"]] = entry["at"]
        elif "id" in entry:
            old = found["ended"].get(entry["id"])
            if old is None or old["outcome"] == "passed":  # a failing teardown counts
                found["ended"][entry["id"]] = entry
        elif "collected" in entry:
            found["collected"] = found["collected"] or entry["collected"]
        else:
            found["finished"] = entry["finished"]
    return found


def running(found: dict[str, Any]) -> tuple[str, float] | None:
    """Return the test that has begun and not ended, and when it began."""
    for name, at in reversed(found["begun"].items()):
        return None if name in found["ended"] else (name, at)
    return None


def summarise(found: dict[str, Any], starts: int, seconds: float) -> dict[str, Any]:
    """Return the report."""
    ended = found["ended"].values()
    counts = collections.Counter(entry["outcome"] for entry in ended)
    skipped = collections.Counter(e["text"] for e in ended if e["outcome"] == "skipped")
    wrong = [entry for entry in ended if entry["outcome"] not in ("passed", "skipped")]
    left = [name for name in found["collected"] if name not in found["ended"]]
    numbers = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no tests"
    summary = [numbers + (f", {len(left)} not run" if left else "") + f"; {starts} processes"]
    summary += [f"{e['outcome'].upper()} {e['id']}: {first(e.get('text'))}" for e in wrong[:12]]
    summary += [f"skipped {count}: {reason[:100]}" for reason, count in skipped.items()]
    slow = sorted(ended, key=lambda entry: -entry.get("seconds", 0))[:10]
    return {
        "counts": dict(counts),
        "failures": wrong,
        "skip_reasons": dict(skipped),
        "not_run": left,
        "slowest": {entry["id"]: entry.get("seconds", 0) for entry in slow},
        "processes": starts,
        "seconds": round(seconds, 1),
        "summary": summary,
    }


def first(text: str | None) -> str:
    """Return the first line of a text, shortened."""
    return " ".join((text or "").split("\n")[0].split())[:160]


def test_files() -> list[str]:
    """Return the test files with tests for a GPU, those of slow scripts last.

    The others are left out: importing them takes a while.
    """
    paths = sorted((ROOT / "tests").glob("test_*.py"), key=lambda p: ("process" in p.name, p.name))
    return [
        str(path.relative_to(ROOT))
        for path in paths
        if _GPU_FILE.search(path.read_text(encoding="utf-8"))
    ]


def command_line(*words: str) -> list[str]:
    """Return the command line of pytest for the tests on a GPU."""
    return [
        *(sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"),
        *("--continue-on-collection-errors", *_WARNINGS, *words),
    ]


def run_tests(
    words: list[str], seconds: float, output: Path, each: float, log: Any = None
) -> dict[str, Any]:
    """Run the tests, in as many processes as it takes; the report is kept up to date."""
    begin = time.monotonic()
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    starts = 0
    with Interrupts() as interrupts, temporary_folder() as folder:
        records = folder / "records"
        environment = os.environ | {
            VARIABLE: str(records),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        while starts < STARTS and time.monotonic() - begin < seconds:
            starts += 1
            process = start(
                command_line("-p", "gpu_tests", *words), cwd=ROOT, env=environment, stdout=log
            )
            fate = None
            try:
                while fate is None:
                    code = interrupts.wait(process, 0.5)
                    fate = _fate(code, records, each)
                    if code is None and (interrupts.told or time.monotonic() - begin > seconds):
                        fate = STOPPED
                    report = summarise(read(records), starts, time.monotonic() - begin)
                    write_json(output, report)
            finally:
                kill_group(process)
            found = read(records)
            if fate not in ("ended", STOPPED):
                with open(records, "a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps(_blame(found, fate)) + "\n")
            if interrupts.told or fate == STOPPED:
                break
            if found["finished"] is not None or not found["collected"]:
                break
        report = summarise(read(records), starts, time.monotonic() - begin)
    write_json(output, report)
    return report


def _fate(code: int | None, records: Path, each: float) -> str | None:
    """Return how a process of pytest ended, or that it hangs; None: it goes on."""
    if code is not None:
        return "ended" if code in (0, 1, 2, 5) else outcome(code)
    current = running(read(records))
    hangs = current is not None and time.time() - current[1] > each
    return f"hung: more than {each:g} s" if hangs else None


def _blame(found: dict[str, Any], fate: str) -> dict[str, str]:
    """Return the record of the test that took its process along."""
    current = running(found)
    if current is None and found["begun"].keys() == found["ended"].keys():
        name = "the process of pytest" if not found["begun"] else "after the last test"
    else:
        name = current[0] if current else "between tests"
    return {"id": name, "outcome": fate.partition(":")[0], "text": fate}


# -- compute-sanitizer -------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer: on PATH, or in a CUDA toolkit."""
    name = "compute-sanitizer.exe" if sys.platform == "win32" else "compute-sanitizer"
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    roots = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(root) for root in roots if root]
    folders += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    folders += sorted(Path("/opt/cuda").glob("*"), reverse=True)
    for folder in folders:
        for inside in ("bin", "compute-sanitizer", "extras/compute-sanitizer"):
            if (folder / inside / name).is_file():
                return str(folder / inside / name)
    return None


#: What is watched: allocations to the byte, one framework, a few dozen launches.
WATCHED = ("tests/test_gpu_exact_memory.py",)


def sanitize(tool: str) -> dict[str, Any]:
    """Run one tool of compute-sanitizer; return what it found."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return {"skipped": "compute-sanitizer is neither on PATH nor in a CUDA toolkit"}
    command = [sanitizer, "--tool", tool, "--target-processes", "all", "--print-limit", "20"]
    with tempfile.TemporaryFile() as file, Interrupts() as interrupts:
        process = start(
            [*command, *command_line(*WATCHED)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = interrupts.wait(process, math.inf)
        finally:
            kill_group(process)
        file.seek(0)
        text = file.read().decode(errors="replace")
    print(text)
    return judge(tool, text) if code is not None else unfinished(tool, text)


def unfinished(tool: str, text: str) -> dict[str, Any]:
    """Return what is known of a run that was stopped: its errors show in its text so far."""
    told = [line for line in text.splitlines() if line.startswith("=========")]
    summary = ["stopped before its end", *told[:8]]
    return {"tool": tool, "errors": None, "passed": 0, "text": told[:60], "summary": summary}


def judge(tool: str, text: str) -> dict[str, Any]:
    """Return what the output of compute-sanitizer and of pytest below it says."""
    told = [line.removeprefix("=========").strip() for line in text.splitlines() if "=====" in line]
    totals = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    passed = re.search(r"\b(\d+) passed", text)
    if "Device not supported" in text or not totals:
        reason = next((line for line in told if "not supported" in line), "it says no summary")
        return {"skipped": f"compute-sanitizer cannot be used: {reason}"}
    errors = max(map(int, totals))
    result: dict[str, Any] = {
        "tool": tool,
        "errors": errors,
        "passed": int(passed[1]) if passed else 0,
        "text": [line for line in told if line][:60] if errors else [],
    }
    complaint = "" if result["passed"] else "; the tests under it did not pass"
    result["summary"] = [f"{errors} errors in {result['passed']} tests{complaint}"]
    result["summary"] += result["text"][:8]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240, help="for all tests (default: 240)")
    parser.add_argument("--each", type=float, default=EACH, help=f"for one (default: {EACH})")
    parser.add_argument(
        "--sanitizer", choices=("memcheck", "racecheck", "initcheck", "synccheck"), metavar="TOOL"
    )
    parser.add_argument("words", nargs="*", help="files and options for pytest, behind --")
    options = parser.parse_args()
    if options.sanitizer:
        report = sanitize(options.sanitizer)
        write_json(options.output, report)
        fine = "skipped" in report or (report["errors"] == 0 and report["passed"] > 0)
    else:
        words = options.words or test_files()
        report = run_tests(words, options.seconds, options.output, options.each)
        fine = not report["failures"] and not report["not_run"] and "passed" in report["counts"]
    print(*report.get("summary", [report.get("skipped")]), sep="\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
