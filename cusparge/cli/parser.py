"""The grammar of the command line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import cusparge
from cusparge.cli import bench, cache, compile, demo, doctor, inspection, run
from cusparge.cli.ui import UsageError

__all__ = ["build_parser"]

EXAMPLES = """\
examples:
  cusparge demo                      the main job on real data that ships with the package
  cusparge run layer.npz --cdf 0.95  attention over your own q, k and v
  cusparge inspect layer.npz --html report.html
  cusparge bench --tokens 4096 --sparsity 0.75
  cusparge doctor                    what is installed, and what is wrong
  cusparge compile --arch sm_90a     compile kernels ahead of time, no GPU needed

Results go to standard output, messages and progress to standard error. Exit status: 0 success,
1 failure of the work, 2 wrong usage.
"""


class _Parser(argparse.ArgumentParser):
    """Leaves the reporting of mistakes to `main`, which also knows how to do so in JSON."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; what it parses holds ``execute(args, ui)``."""
    parser = _Parser(
        prog="cusparge",
        description="Sparse, quantized attention (SpargeAttn) from the command line.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cusparge {cusparge.__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on standard output, and nothing else there",
    )
    commands: Any = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for command in (demo, run, inspection, bench, doctor, compile, cache):
        command.add_parser(commands, common)
    return parser
