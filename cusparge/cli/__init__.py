"""The commands ``demo``, ``run``, ``inspect``, ``bench``, ``doctor``, ``compile`` and ``cache``.

Results go to standard output, for people or, with ``--json``, as one JSON object; messages and
progress go to standard error. `main` returns 0 for success, 1 when the work failed and 2 when the
command was used wrongly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cusparge.errors import CuspargeError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The words after the program's name; those of the process by default.

    Returns
    -------
    int
        0 success, 1 failure of the work, 2 wrong usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone (`cusparge ... | head`), which is nobody's mistake. The
        # interpreter flushes once more at exit and must not complain then.
        _drop_stdout()
        return 1
    except OSError as error:  # a full disk
        sys.stderr.write(f"cusparge: error: cannot write the result: {error.strerror}\n")
        _drop_stdout()
        return 1
    return code


def _run(words: list[str]) -> int:
    as_json = "--json" in words
    try:
        from cusparge.cli.parser import build_parser
        from cusparge.cli.ui import Ui, UsageError
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("rich", "safetensors"):
            raise
        sys.stderr.write(
            f"cusparge: error: the command line needs the package {error.name}, which is not "
            f"installed: pip install {error.name}\n"
        )
        return 1
    ui = Ui(as_json=as_json)
    parser = build_parser()
    try:
        args = parser.parse_args(words)
        result = args.execute(args, ui)
    except SystemExit as stop:  # argparse has printed the help or the version
        return stop.code if isinstance(stop.code, int) else 0
    except UsageError as error:
        return ui.fail(error, code=2, hint=error.usage)
    except KeyboardInterrupt:
        return ui.fail("interrupted", code=130)
    except BrokenPipeError:
        raise
    except MemoryError as error:
        return ui.fail(f"not enough memory: {error}" if str(error) else "not enough memory", code=1)
    except (CuspargeError, OSError) as error:
        return ui.fail(error, code=1)
    return int(result)


def _drop_stdout() -> None:
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
