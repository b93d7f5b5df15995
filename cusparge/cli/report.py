"""The report of ``cusparge inspect``: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

from cusparge.cli.measure import describe_machine
from cusparge.cli.ui import printable

__all__ = ["render"]

# The policy forbids the browser to load anything, should a name from the input ever slip through.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>cusparge inspect: {file}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto;
       padding: 0 1rem; color: #222; background: #fff; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
.over {{ color: #a00; }}
img {{ max-width: 100%; }}
details {{ overflow-x: auto; }}
code {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>What each head could skip</h1>
<p><code>{file}</code></p>
{inputs}
<p>{options}. Measured on {machine}.</p>
<p>Error is the relative L1 error sum |O &minus; O&prime;| / sum |O| against dense attention in
float32. Sparsity is the share of the block products Q&middot;K and P&middot;V that is not computed;
a block is 128 queries by 64 keys.</p>
<h2>Settings, all heads together</h2>
{settings}
<h2>Best setting of each head with an error of at most {limit}</h2>
{best}
<h2>Error over sparsity</h2>
<img alt="curves of error over sparsity, one for each head" src="{curves}">
<h2>Blocks computed, and where the attention is</h2>
<img alt="block maps and true attention mass of each head" src="{maps}">
<h2>Every head at every setting</h2>
<details><summary>sparsity / error; red where the error is above {limit}</summary>
{heads}
</details>
</body>
</html>
"""


def _text(value: object) -> str:
    return html.escape(printable(value), quote=True)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose cells are HTML already."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _image(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def render(record: dict[str, Any], *, curves: bytes, maps: bytes) -> bytes:
    """Return the report.

    Parameters
    ----------
    record : dict
        What ``cusparge inspect --json`` prints, before NumPy values become Python's.
    curves, maps : bytes
        The pictures, PNG.
    """
    results = record["results"]
    limit = record["max_error"]
    inputs = _table(
        ("array", "shape", "dtype"),
        (
            (name, "&times;".join(map(str, entry["shape"])), _text(entry["dtype"]))
            for name, entry in record["inputs"].items()
        ),
    )
    settings = _table(
        ("policy", "sparsity", "error", "worst head"),
        (
            (
                _text(result["name"]),
                f"{result['sparsity']:.3f}",
                f"{result['error']:.4f}",
                f"{result['worst_error']:.4f}",
            )
            for result in results
        ),
    )
    best = _table(
        ("policy", "sequence", "head", "sparsity", "error"),
        (
            (
                _text(row["name"]),
                str(row["sequence"]),
                str(row["head"]),
                f"{row['sparsity']:.3f}",
                f"{row['error']:.4f}",
            )
            for row in record["best"]
        ),
    )

    def cell(result: dict[str, Any], where: tuple[int, int]) -> str:
        error = float(result["error_per_head"][where])
        words = f"{result['sparsity_per_head'][where]:.3f} / {error:.4f}"
        return words if error <= limit else f'<span class="over">{words}</span>'

    heads = _table(
        ("sequence, head", *(_text(result["name"]) for result in results)),
        (
            (
                f"{row['sequence']}, {row['head']}",
                *(cell(result, (row["sequence"], row["head"])) for result in results),
            )
            for row in record["best"]
        ),
    )
    scale = "1 / sqrt(head_dim)" if record["sm_scale"] is None else f"{record['sm_scale']:g}"
    causal = f"causal ({record['causal_align']})" if record["causal"] else "not causal"
    page = _PAGE.format(
        file=_text(record["file"]),
        inputs=inputs,
        options=_text(f"layout {record['layout']}, {causal}, scale {scale}"),
        machine=_text(describe_machine(record["machine"])),
        settings=settings,
        best=best,
        limit=f"{limit:g}",
        curves=_image(curves),
        maps=_image(maps),
        heads=heads,
    )
    return page.encode("utf-8", "backslashreplace")
