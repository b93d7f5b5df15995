"""One-line messages for people: to standard error, unless ``CUSPARGE_QUIET=1``, and to logging."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

__all__ = ["LOG", "quiet", "say", "say_once", "short", "write"]

#: Programs that configure logging get everything; without that nothing is printed twice.
LOG = logging.getLogger("cusparge")
LOG.addHandler(logging.NullHandler())

_said: set[str] = set()


def quiet() -> bool:
    """Return whether standard error is to stay empty."""
    return os.environ.get("CUSPARGE_QUIET", "") not in ("", "0")


def write(text: str) -> None:
    """Write to standard error as it is, where there is one and it is open."""
    if quiet() or sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):  # closed, or a pipe that nobody reads
        return


def say(text: str, level: int = logging.INFO) -> None:
    """Print one line, and log it."""
    LOG.log(level, text)
    write(f"cusparge: {text}\n")


def say_once(text: str, level: int = logging.WARNING) -> None:
    """Print a line unless this process has printed it before."""
    if text not in _said:
        _said.add(text)
        say(text, level)


def short(path: str | os.PathLike[str]) -> str:
    """Return a path with the home folder as ~, for messages that are passed on."""
    text, home = str(path), os.path.expanduser("~").rstrip(os.sep)
    inside = home and (text == home or text.startswith(home + os.sep))
    return str(Path("~", os.path.relpath(text, home))) if inside else text
