"""Check and measure cusparge on a machine with an NVIDIA GPU: one command, within a few minutes.

    python benchmarks/gpu_run.py                  # everything, nine minutes
    python benchmarks/gpu_run.py --minutes 5 --skip initcheck synccheck
    python benchmarks/gpu_run.py --only environment compile tests
    python benchmarks/gpu_run.py --list

It runs from the source tree, nothing is installed. Each part is a process of its own with a share
of the time: what fails, crashes or hangs is recorded, and the next part begins. ``gpu_run.json``,
rewritten after every part, and ``gpu_run.log`` go to ``--out``, else to the folder of the variable
OUT, else to ``benchmarks/results``. Settings of the GPU are read, never changed.

Where the tree is not a git checkout, the commit is read from a file ``.commit`` in its root:
``git describe --always --dirty=+changes > .commit`` makes one. This file needs the standard library
only; a part whose packages are missing says so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Part(NamedTuple):
    """One process: a script of this folder and its arguments.

    It gets ``-o FILE`` and writes a JSON object there: its result, of which "summary" (a list of
    lines) is printed, or {"skipped": reason}. "{seconds}" in a command is the time it has.
    """

    name: str
    command: str
    share: float  # of the whole time; what a part leaves over goes to those after it
    what: str


#: Most important first. A benchmark that is added needs a line here, and nothing else; kernels and
#: tests that are added are found by the parts "compile" and "tests".
PARTS = (
    Part("environment", "gpu_facts.py environment", 4, "GPU, driver, clocks, versions"),
    Part("compile", "gpu_facts.py compile", 10, "every kernel for this GPU: time, registers"),
    Part("tests", "gpu_tests.py --seconds {seconds}", 40, "pytest -m gpu"),
    Part("pool", "bench_pool.py --seconds {seconds}", 14, "speed and error of the pooling kernels"),
    Part("memcheck", "gpu_tests.py --sanitizer memcheck", 10, "compute-sanitizer: addresses"),
    Part("racecheck", "gpu_tests.py --sanitizer racecheck", 10, "compute-sanitizer: races"),
    Part(
        "runtime",
        "bench_runtime.py --repeats 3 --seconds {seconds}",
        14,
        "compiling, loading, host time",
    ),
    Part("initcheck", "gpu_tests.py --sanitizer initcheck", 8, "compute-sanitizer: unwritten"),
    Part("synccheck", "gpu_tests.py --sanitizer synccheck", 8, "compute-sanitizer: barriers"),
)

#: Seconds below which a part is not begun, and seconds kept for the end.
LEAST = 5.0
RESERVE = 3.0
#: Seconds to end in after SIGTERM: for a process, and for a part, which ends its own ones first.
PATIENCE = 2.0
PATIENCE_WITH_PARTS = 10.0
OUT_OF_TIME = "not run: out of time"
INTERRUPTED = "interrupted"


def count_gpus() -> int | str:
    """Return how many GPUs CUDA shows, or why it shows none; no context is created."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        return f"the NVIDIA driver's library {name} cannot be opened ({error})"
    count = ctypes.c_int()
    for status in (driver.cuInit(0), driver.cuDeviceGetCount(ctypes.byref(count))):
        if status:
            return f"the NVIDIA driver answers with error {status}"
    return count.value or "the NVIDIA driver shows no GPU"


def source_state() -> dict[str, Any]:
    """Return the commit of the tree, and whether the tree differs from it (None: unknown)."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
    text = ""
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
            )
            text = done.stdout.strip()
    source = "git"
    if not text:
        source = ".commit"
        with contextlib.suppress(OSError):
            text = (ROOT / ".commit").read_text(encoding="utf-8").strip()
    if not text:
        return {"commit": "unknown", "dirty": None, "source": None}
    clean = text.removesuffix("+changes")
    return {"commit": clean, "dirty": clean != text, "source": source}


def write_json(path: Path, value: Any) -> None:
    """Replace a file in one step: whoever is killed leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder, and remove it in the end."""
    folder = tempfile.TemporaryDirectory(prefix="cusparge-gpu-", ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


def start(command: list[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a process that leads a group of its own."""
    if sys.platform == "win32":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        options["start_new_session"] = True
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)


def kill_group(process: subprocess.Popen[Any], patience: float = PATIENCE) -> None:
    """End a process and its group; a group that it has started itself is for it to end in time."""
    if sys.platform == "win32":
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        return
    for number, time_left in ((signal.SIGTERM, patience), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(time_left)


class Interrupts:
    """Signals that end this process, which looks for them where it waits for another one.

    An exception out of the handler could come where a process is being started or ended, and leave
    it running.
    """

    def __init__(self) -> None:
        self.told = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        """Take the signals, except those that this process was started to ignore."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._tell)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _tell(self, number: int, frame: object) -> None:
        self.told = True

    def wait(self, process: subprocess.Popen[Any], seconds: float) -> int | None:
        """Return the exit status, or None where there is none after that time or a signal."""
        end = time.monotonic() + seconds
        while not self.told and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(left, 0.2))
        return None


def say(text: str) -> None:
    """Print a text, unless nobody reads any more: the results are in the file."""
    try:
        print(text, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # what is in the buffer goes there as well
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def environment(cache: Path) -> dict[str, str]:
    """Return the parts' environment: the tree's package, and a cache of kernels of their own."""
    paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUSPARGE_CACHE_DIR": str(cache),
        "CUSPARGE_COMPILE": "lazy",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def outcome(code: int | None) -> str:
    """Say how a process ended; None: it was stopped at its limit."""
    if code is None:
        return "time limit"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"crashed: {signal.Signals(-code).name}"
        return f"crashed: signal {-code}"
    return "ok" if code == 0 else f"failed: exit status {code}"


def run_part(
    part: Part, seconds: float, folder: Path, log: Path, interrupts: Interrupts
) -> dict[str, Any]:
    """Run a part to its end, its limit or an interrupt; return what is to be recorded."""
    result = folder / f"{part.name}.json"
    words = part.command.replace("{seconds}", f"{max(seconds - 4, 1):.0f}").split()
    command = [sys.executable, str(HERE / words[0]), *words[1:], "-o", str(result)]
    begin = time.monotonic()
    with open(log, "ab") as file:
        file.write(f"\n==== {part.name}: {part.command}\n".encode())
        file.flush()
        begin_of_text = file.tell()
        process = start(
            command, cwd=ROOT, env=environment(folder / "kernels"), stdout=file, stderr=file
        )
        try:
            code = interrupts.wait(process, seconds)
        finally:  # what it left running is ended with it
            kill_group(process, PATIENCE_WITH_PARTS)
    record: dict[str, Any] = {
        "status": INTERRUPTED if code is None and interrupts.told else outcome(code),
        "seconds": round(time.monotonic() - begin, 1),
        "limit": round(seconds, 1),
        "command": part.command,
    }
    found = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(result.read_text(encoding="utf-8"))
    record["result"] = found if isinstance(found, dict) else None
    if isinstance(found, dict) and "skipped" in found and code in (0, 1):
        record["status"] = f"skipped: {found['skipped']}"
    if code != 0:
        text = log.read_bytes()[begin_of_text:].decode(errors="replace")
        record["log_tail"] = text.splitlines()[-30:]
    return record


def choose(only: list[str] | None, skip: list[str] | None) -> list[Part]:
    """Return the parts to run, most important first."""
    return [
        part
        for part in PARTS
        if (only is None or part.name in only) and part.name not in (skip or ())
    ]


def run(parts: list[Part], minutes: float, out: Path) -> int:
    """Run the parts; return the exit status."""
    begin = time.monotonic()
    end = begin + 60 * minutes - RESERVE
    path, log = out / "gpu_run.json", out / "gpu_run.log"
    out.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    records: dict[str, Any] = {}
    report: dict[str, Any] = {
        "benchmark": "gpu_run",
        **source_state(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "minutes": minutes,
        "complete": False,
        "parts": records,
    }
    write_json(path, report)
    with Interrupts() as interrupts, temporary_folder() as folder, contextlib.ExitStack() as last:
        last.callback(finish, path, report, parts, begin)
        for number, part in enumerate(parts):
            left = end - time.monotonic()
            share = part.share / sum(other.share for other in parts[number:])
            # Few parts: all get their share. Little time: the most important ones get enough.
            limit = min(left, max(left * share, LEAST))
            if interrupts.told:
                records[part.name] = {"status": f"not run: {INTERRUPTED}"}
            elif limit < min(LEAST, 60 * minutes / 4):
                records[part.name] = {"status": OUT_OF_TIME}
            else:
                records[part.name] = run_part(part, limit, folder, log, interrupts)
                say(line(part.name, records[part.name]))
            write_json(path, report)
    if interrupts.told:
        return 130
    fine = all(r["status"] == "ok" or r["status"].startswith("skipped") for r in records.values())
    return 0 if fine else 1


def finish(path: Path, report: dict[str, Any], parts: list[Part], begin: float) -> None:
    """Write and print how it ended."""
    ended = [report["parts"].get(part.name, {}).get("status", "not run") for part in parts]
    report["complete"] = not any(text.startswith(("not run", INTERRUPTED)) for text in ended)
    report["seconds"] = round(time.monotonic() - begin, 1)
    write_json(path, report)
    say(table(report))


def line(name: str, record: dict[str, Any]) -> str:
    """Return a part's line of the table."""
    spent = f"{record['seconds']:6.1f} s" if "seconds" in record else ""
    return f"{name:12} {spent:9} {record['status']}"


def table(report: dict[str, Any]) -> str:
    """Return what is printed last."""
    dirty = "+changes" if report["dirty"] else ""
    lines = ["", f"cusparge {report['commit']}{dirty}, {report['started']}"]
    for name, record in report["parts"].items():
        lines.append(line(name, record))
        summary = (record.get("result") or {}).get("summary", [])
        lines += [f"    {text}" for text in summary[:24]]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="in total (default: 9)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts only")
    parser.add_argument("--skip", nargs="+", metavar="PART", help="leave these parts out")
    parser.add_argument("--list", action="store_true", help="list the parts and end")
    options = parser.parse_args(words)
    names = [part.name for part in PARTS]
    unknown = [name for name in [*(options.only or ()), *(options.skip or ())] if name not in names]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(names)}")
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}: allowed is more than 0")
    parts = choose(options.only, options.skip)
    if options.list:
        total = sum(part.share for part in PARTS)
        for part in parts:
            print(f"{part.name:12} {100 * part.share / total:4.0f} %  {part.what}")
        return 0
    found = count_gpus()
    if isinstance(found, str):
        print(f"There is no GPU to run on: {found}. Nothing was run.", file=sys.stderr)
        return 1
    if not parts:
        parser.error("--skip leaves no part to run")
    results = os.environ.get("OUT") or HERE / "results"
    return run(parts, options.minutes, options.out or Path(results))


if __name__ == "__main__":
    sys.exit(main())
