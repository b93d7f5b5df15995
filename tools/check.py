#!/usr/bin/env python3
"""Run every lint, type and format step with one command, and say what failed.

::

    python tools/check.py                 # everything
    python tools/check.py ruff words      # some steps only
    python tools/check.py --list

Needs what ``pip install ".[test]"`` installs, and nothing else. Exit status 1 if a step failed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Longest Python file, in lines that are not blank: what one reading takes in.
MAX_LINES = 400
#: Files that may be longer, and why.
LONG_FILES = {
    "cusparge/reference.py": "the whole algorithm in one place, to be read beside the paper",
    "tests/test_reference.py": "states every rule of the oracle a second time, independently",
    "tools/make_demo_data.py": "one self-contained chain from text to file, run once a release",
}

#: NumPy's annotations change between its versions: types are checked against those of this one on.
TYPED_NUMPY = (2, 4)

# Written in pieces, so that this file passes its own check.
_MARKERS = ("TO" + "DO", "FIX" + "ME")
_FOLDERS = ("home", "tmp", "work", "root", "Users")
_HOSTS = ("py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "index" + "-url")
FORBIDDEN = {
    "a marker for unfinished work": re.compile(rf"\b({'|'.join(_MARKERS)})\b", re.IGNORECASE),
    "a path of one machine": re.compile(rf"(?<![\w.$}}*~/-])/({'|'.join(_FOLDERS)})/"),
    "a document that is not in the repository": re.compile(
        r"\b(api|algorithm|house|emulation)[.]md\b"
    ),
    "a registry's host name": re.compile("|".join(map(re.escape, _HOSTS)), re.IGNORECASE),
}


def source_files() -> list[str]:
    """Return the repository's files: what git tracks or would track, else all but caches."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names: Iterable[str] = filter(None, done.stdout.split("\0"))
    else:
        names = (
            path.relative_to(ROOT).as_posix()
            for path in ROOT.rglob("*")
            if not _is_generated(path.relative_to(ROOT).parts)
        )
    return sorted({name for name in names if (ROOT / name).is_file()})


def _is_generated(parts: tuple[str, ...]) -> bool:
    kept = {".ci", ".clang-format", ".gitignore"}
    return any(
        part in ("build", "dist", "__pycache__")
        or part.endswith(".egg-info")
        or (part.startswith(".") and part not in kept)
        for part in parts
    )


def texts(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of every file that is text."""
    for name in names:
        data = (ROOT / name).read_bytes()
        if b"\0" in data[:8192]:
            continue
        try:
            yield name, data.decode()
        except UnicodeDecodeError:
            continue


def forbidden_words(files: Iterable[tuple[str, str]]) -> list[str]:
    """Return where a text holds something that the repository must not hold."""
    return [
        f"{name}:{number}: {what}: {found[0]!r}"
        for name, text in files
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in FORBIDDEN.items()
        if (found := pattern.search(line))
    ]


def long_files(files: Iterable[tuple[str, str]]) -> list[str]:
    """Return the Python files that are too long, and exceptions that are none any more."""
    problems = []
    for name, text in files:
        if not name.endswith(".py"):
            continue
        length = sum(bool(line.strip()) for line in text.splitlines())
        if length > MAX_LINES and name not in LONG_FILES:
            problems.append(f"{name}: {length} lines that are not blank; allowed {MAX_LINES}")
        if length <= MAX_LINES and name in LONG_FILES:
            problems.append(f"{name}: {length} lines, and needs no exception any more")
    return problems


def tool(name: str, *arguments: str) -> list[str]:
    """Run a command line tool of this Python's environment; return what it complains about."""
    beside = Path(sysconfig.get_path("scripts")) / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        return [f'{name} is not installed: pip install ".[test]"']
    done = subprocess.run(
        [path, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 0:
        return []
    return done.stdout.splitlines() or [f"{name} ended with status {done.returncode}"]


class Skipped(Exception):
    """A step cannot say anything here; the message says why."""


def mypy() -> list[str]:
    """Check types, strictly."""
    version = metadata.version("numpy")
    if tuple(int(part) for part in version.split(".")[:2]) < TYPED_NUMPY:
        wanted = ".".join(map(str, TYPED_NUMPY))
        raise Skipped(f"checked against the annotations of NumPy {wanted} or later, not {version}")
    return tool("mypy", "--strict")


def clang_format() -> list[str]:
    """Check the layout of the CUDA sources."""
    names = [
        name
        for name in source_files()
        if name.startswith("kernels_cu/") and name.endswith((".cuh", ".cu", ".h", ".cpp"))
    ]
    return tool("clang-format", "--dry-run", "-Werror", *names) if names else ["no CUDA sources"]


STEPS: dict[str, Callable[[], list[str]]] = {
    "ruff": lambda: tool("ruff", "check", "--quiet", "."),
    "ruff-format": lambda: tool("ruff", "format", "--check", "--quiet", "."),
    "mypy": mypy,
    "clang-format": clang_format,
    "words": lambda: forbidden_words(texts(source_files())),
    "length": lambda: long_files(texts(source_files())),
}


def main() -> int:
    """Run the steps that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help="all steps by default")
    parser.add_argument("--list", action="store_true", help="print the steps' names and end")
    options = parser.parse_args()
    if options.list:
        print(*STEPS, sep="\n")
        return 0
    if unknown := [name for name in options.steps if name not in STEPS]:
        parser.error(f"no such step: {', '.join(unknown)}; there are {', '.join(STEPS)}")
    failed = []
    for name in options.steps or STEPS:
        try:
            problems = STEPS[name]()
        except Skipped as reason:
            print(f"{name:14}skipped: {reason}", flush=True)
            continue
        print(f"{name:14}{'failed' if problems else 'ok'}", flush=True)
        if problems:
            failed.append(name)
            print(*(f"    {line}" for line in problems), sep="\n", flush=True)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
