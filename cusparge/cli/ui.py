"""Where words go: results to standard output, messages and progress to standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

import numpy as np
from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Ui", "UsageError", "plain", "printable", "table"]


class UsageError(Exception):
    """The command was used wrongly.

    Attributes
    ----------
    usage : str
        The usage line to show below, or empty.
    """

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__(message)
        self.usage = usage


def printable(text: object) -> str:
    r"""Return text that cannot steer a terminal: control characters as escapes.

    Names come from files and from the command line, and either may hold anything.

    Examples
    --------
    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1]
        for letter in str(text)
    )


def plain(value: Any) -> Any:
    """Return what JSON can hold: NumPy values as Python's, NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1
) -> Table:
    """Return a table whose first `words` columns are left-aligned and the others right-aligned."""
    result = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        result.add_column(Text(column), justify="left" if index < words else "right")
    for row in rows:
        result.add_row(*(Text(printable(cell)) for cell in row))
    return result


class _Encodable:
    """A stream that writes characters its encoding lacks as escapes, instead of failing."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        encoding = self._file.encoding or "utf-8"
        return self._file.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _console(file: TextIO) -> Console:
    # Off a terminal there is no width to respect; 100 columns hold every table of ours.
    width = None if file.isatty() or "COLUMNS" in os.environ else 100
    colour: Any = None if os.environ.get("NO_COLOR") else "auto"
    return Console(
        file=cast(TextIO, _Encodable(file)),
        width=width,
        color_system=colour,
        highlight=False,
        markup=False,
        emoji=False,
    )


class Ui:
    """The two streams of one command.

    Parameters
    ----------
    as_json : bool
        Standard output holds one JSON object, given to `result`, and nothing else.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)

    @property
    def ascii_only(self) -> bool:
        """True where the output's encoding cannot show block characters."""
        return not (self._out.encoding or "").lower().replace("-", "").startswith("utf")

    @property
    def width(self) -> int:
        """How many columns the output has."""
        return self._out.width

    def show(self, *parts: RenderableType) -> None:
        """Print for people; silent with ``--json``."""
        if self.as_json:
            return
        for part in parts:
            if isinstance(part, str):
                # Off a terminal a message stays one line, whatever its length, to be searched for.
                self._out.print(Text(printable(part)), soft_wrap=not self._out.is_terminal)
            else:
                self._out.print(part)

    def result(self, record: dict[str, Any]) -> None:
        """Print the JSON object; silent without ``--json``."""
        if self.as_json:
            sys.stdout.write(json.dumps(plain(record), allow_nan=False) + "\n")

    def note(self, text: str) -> None:
        """Print a message to standard error."""
        self._err.print(Text(printable(text)), soft_wrap=True)

    def fail(self, error: object, *, code: int, hint: str = "") -> int:
        """Say what went wrong, in JSON as well, and return the exit status."""
        message = _describe(error)
        if hint:
            self.note(hint.rstrip())
        self.note(f"cusparge: error: {message}")
        kind = type(error).__name__ if isinstance(error, Exception) else "Interrupted"
        self.result({"error": {"type": kind, "message": message}, "exit_status": code})
        return code

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Any]:
        """Show a bar on standard error where it is a terminal; yields a function that advances."""
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._err,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        with bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)


def _describe(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{error.filename}: "
        return f"{name}{error.strerror}"
    return str(error) or type(error).__name__
