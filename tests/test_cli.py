"""The command line as a whole, and `demo`, `inspect`, `bench` and `doctor` at work."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from cli_tools import example, hide, refused, run_json, save
from compare import relative_l1

import cusparge
import cusparge.cli
from cusparge.cli import doctor, files, main, measure

COMMANDS = ("demo", "run", "inspect", "bench", "doctor", "compile", "cache")
PNG = b"\x89PNG\r\n\x1a\n"


def python(*words, **environment):
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


# --- The program as a whole ----------------------------------------------------------------------


def test_importing_the_library_imports_no_command_line():
    code = (
        "import sys, cusparge; "
        "bad = {'rich', 'matplotlib', 'safetensors', 'cusparge.cli', 'cusparge.viz'}; "
        "assert 'numpy' in sys.modules; "
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_as_a_module():
    done = python("-m", "cusparge", "doctor", "--json", FORCE_COLOR="1")
    assert done.returncode == (1 if doctor.find_gpu()["devices"] else 0), done.stderr
    assert json.loads(done.stdout)["self_check"]["ok"] is True
    done = python("-m", "cusparge", "frobnicate")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "frobnicate" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_imports_no_framework():
    code = (
        "import sys; from cusparge.cli import main; main(['doctor', '--json']); "
        "bad = {'torch', 'jax', 'cupy', 'matplotlib'} & set(sys.modules); "
        "sys.exit(3 if bad else 0)"
    )
    assert python("-c", code).returncode == 0


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cusparge {cusparge.__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command in text
        assert main([command, "--help"]) == 0
        words = capsys.readouterr().out
        assert "examples:" in words
        assert "--json" in words


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["demo", "extra"],
        ["demo", "--js"],
        ["run"],
        ["run", "a.npz", "--dense", "--cdf", "0.9"],
        ["run", "a.npz", "--dense", "--keep", "0.9"],
        ["run", "a.npz", "--dense", "--sim", "0.9"],
        ["run", "a.npz", "--keep", "0.5", "--cdf", "0.9"],
        ["run", "a.npz", "--cdf", "1.5"],
        ["run", "a.npz", "--cdf", "nan"],
        ["run", "a.npz", "--cdf", "0.5,"],
        ["run", "a.npz", "--keep", "0"],
        ["run", "a.npz", "--sim", "-2"],
        ["run", "a.npz", "--sm-scale", "inf"],
        ["run", "a.npz", "--layout", "DHN"],
        ["inspect"],
        ["inspect", "a.npz", "--demo"],
        ["inspect", "a.npz", "--cdf", "0.5", "--keep", "0.5"],
        ["inspect", "a.npz", "--cdf", "7"],
        ["inspect", "--demo", "--max-error", "-1"],
        ["inspect", "--demo", "--heads", "3"],
        ["bench", "--sparsity", "1"],
        ["bench", "--tokens", "0"],
        ["bench", "--tokens", "64", "--sparsity", "0.9"],
        ["bench", "--threads", "9999999"],
        ["bench", "--head-dim", "300"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(capsys, words):
    refused(capsys, *words, code=2)


def test_failures_in_json(capsys, tmp_path):
    for words, code in ((["run", str(tmp_path / "no.npz")], 1), (["run"], 2)):
        assert main([*words, "--json"]) == code
        captured = capsys.readouterr()
        record = json.loads(captured.out)
        assert captured.out.count("\n") == 1
        assert record["error"]["message"] in captured.err
        assert record["exit_status"] == code


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt, 130), (MemoryError, 1), (BrokenPipeError, 1), (OSError(5, "bad disk"), 1)],
)
def test_what_ends_a_command_early(capsys, monkeypatch, error, code):
    def fail():
        raise error

    monkeypatch.setattr(doctor, "self_check", fail)
    monkeypatch.setattr(cusparge.cli, "_drop_stdout", lambda: None)  # pytest's own needs it
    assert main(["doctor"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_leaves_and_a_full_disk():
    words = [sys.executable, "-m", "cusparge", "doctor"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
    if os.path.exists("/dev/full"):
        for extra in ([], ["--json"]):
            with open("/dev/full", "w") as full:
                done = subprocess.run(
                    [*words, *extra], stdout=full, stderr=subprocess.PIPE, check=False
                )
            assert done.returncode == 1
            assert b"No space left" in done.stderr
            assert b"Traceback" not in done.stderr


def test_output_is_plain_off_a_terminal_and_fits_its_encoding(tmp_path, rng):
    source = save(tmp_path / "größe.npz", example(rng))
    done = python("-m", "cusparge", "inspect", str(source), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"gr\xf6\xdfe.npz" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.isascii()


def test_no_color_on_a_terminal(monkeypatch):
    from rich.table import Table

    from cusparge.cli.ui import Ui

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    seen = {}
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        monkeypatch.setattr(sys, "stdout", Terminal())
        table = Table("heading")
        table.add_row("cell")
        Ui().show(table)
        seen[value] = sys.stdout.getvalue()
    assert "\x1b" in seen[""]
    assert "\x1b" not in seen["1"]


# --- demo ----------------------------------------------------------------------------------------


@pytest.fixture
def three_rounds(monkeypatch):
    monkeypatch.setattr("cusparge.cli.demo._SECONDS", 0.0)


def test_demo(capsys, tmp_path, three_rounds):
    picture = tmp_path / "maps.png"
    drawn = ["--png", picture] if importlib.util.find_spec("matplotlib") else []
    record = run_json(capsys, "demo", *drawn)
    assert not drawn or picture.read_bytes().startswith(PNG)
    assert "espeak-ng" in record["data"]
    assert record["shape"] == [1, 3, 1500, 64]
    assert record["pairs"] >= 3
    names = [row["name"] for row in record["results"]]
    assert names == ["dense", "TopCdf(0.98, 0.3)", "TopCdf(0.95, -1)", "TopCdf(0.9, -1)"]
    for row in record["results"]:
        assert row["seconds"] > 0
        assert row["speedup"] > 0
    # The same numbers from the library, and what the data's own page says of them.
    inputs = files.demo_inputs()
    arrays = [array.astype(np.float32) for array in (inputs.q, inputs.k, inputs.v)]
    with measure.one_blas_thread():
        exact = cusparge.attention(*arrays, policy=cusparge.Dense(), backend="reference")
    out, stats = cusparge.attention(*arrays, return_stats=True)
    default = record["results"][1]
    np.testing.assert_allclose(default["error"], relative_l1(out, exact), rtol=1e-9)
    np.testing.assert_array_equal(default["sparsity_per_head"], stats.sparsity_per_head[0])
    np.testing.assert_allclose(default["sparsity_per_head"], [0.510, 0, 0.878], atol=5e-4)
    np.testing.assert_allclose(default["error_per_head"], [0.0136, 0, 0.0046], atol=6e-5)
    assert record["results"][0]["error"] < 1e-5


def test_demo_for_people(capsys, three_rounds):
    assert main(["demo"]) == 0
    captured = capsys.readouterr()
    for word in ("espeak-ng", "TopCdf(0.95, -1)", "local", "global", "NumPy", "speed-up"):
        assert word in captured.out
    assert re.search("[█#]{8}", captured.out)


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_numbers(capsys, tmp_path, rng):
    arrays = example(rng)
    source = save(tmp_path / "a.npz", {name: a.astype(np.float16) for name, a in arrays.items()})
    words = ["--cdf", "0.5", "0.8", "--sim", "-1", "0.1", "--causal", "--max-error", "0.6"]
    record = run_json(capsys, "inspect", source, *words)
    wide = [array.astype(np.float16).astype(np.float32) for array in arrays.values()]
    dense = cusparge.attention(*wide, policy=cusparge.Dense(), causal=True)
    grid = [(cdf, sim) for sim in (-1.0, 0.1) for cdf in (0.5, 0.8)]
    assert [(r["cdf_threshold"], r["sim_threshold"]) for r in record["results"]] == grid
    for result, thresholds in zip(record["results"], grid, strict=True):
        policy = cusparge.TopCdf(*thresholds)
        out, stats = cusparge.attention(*wide, policy=policy, causal=True, return_stats=True)
        np.testing.assert_array_equal(result["sparsity_per_head"], stats.sparsity_per_head)
        for where in np.ndindex(2, 4):
            error = result["error_per_head"][where[0]][where[1]]
            np.testing.assert_allclose(error, relative_l1(out[where], dense[where]), rtol=1e-9)
        np.testing.assert_allclose(result["error"], relative_l1(out, dense), rtol=1e-9)
    assert [(row["sequence"], row["head"]) for row in record["best"]] == list(np.ndindex(2, 4))
    for row in record["best"]:
        pairs = [
            (r["sparsity_per_head"][row["sequence"]][row["head"]], -error)
            for r in record["results"]
            if (error := r["error_per_head"][row["sequence"]][row["head"]]) <= 0.6
        ]
        assert (row["sparsity"], -row["error"]) == max(pairs, default=(0.0, 0.0))
    assert any(row["setting"] is not None for row in record["best"])


def test_inspect_layout_and_keep(capsys, tmp_path, rng):
    arrays = example(rng)
    hnd = save(tmp_path / "a.npz", arrays)
    nhd = save(tmp_path / "b.npz", {name: a.swapaxes(1, 2).copy() for name, a in arrays.items()})
    words = ["--keep", "0.2", "0.5"]
    one = run_json(capsys, "inspect", hnd, *words)
    other = run_json(capsys, "inspect", nhd, *words, "--layout", "NHD")
    assert one["results"] == other["results"]
    assert one["results"][0]["policy"] == "TopK"
    assert len(one["best"]) == 8


def test_report_is_one_safe_file(capsys, tmp_path, rng):
    pytest.importorskip("matplotlib")
    hostile = "<img src=x onerror=alert(1)>&\"'{file}.safetensors"
    source = save(tmp_path / hostile, example(rng, batch=1))
    report, picture = tmp_path / "report.html", tmp_path / "maps.png"
    words = ["--cdf", "0.5", "0.9", "--html", report, "--png", picture]
    record = run_json(capsys, "inspect", source, *words)
    page = report.read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&quot;" in page
    sources = re.findall(r'\bsrc="([^"]*)"', page)
    for address in sources:  # whose base64 may spell anything
        page = page.replace(address, "")
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|<iframe|url\(", page, re.I)
    assert len(sources) == 2
    for address in sources:
        prefix, _, content = address.partition(",")
        assert prefix == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(PNG)
    assert picture.read_bytes().startswith(PNG)
    for result in record["results"]:
        assert result["name"] in page
        assert f"{result['error']:.4f}" in page


def test_pictures_of_empty_and_unfit_heads(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    empty = np.zeros((1, 2, 0, 16), np.float32)
    source = save(tmp_path / "a.npz", {"q": empty, "k": empty, "v": empty})
    run_json(capsys, "inspect", source, "--html", tmp_path / "a.html")
    bad = np.full((1, 1, 300, 16), np.nan, np.float32)
    source = save(tmp_path / "b.npz", {"q": bad, "k": bad, "v": bad})
    run_json(capsys, "inspect", source, "--html", tmp_path / "b.html", "--causal")
    many = np.ones((2, 10, 64, 4), np.float32)
    source = save(tmp_path / "c.npz", {"q": many, "k": many, "v": many})
    assert main(["inspect", str(source), "--cdf", "0.5", "--png", str(tmp_path / "c.png")]) == 0
    assert "first 12 of 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["demo", "--png"], ["inspect", "--demo", "--png"], ["inspect", "--demo", "--html"]]
)
def test_pictures_without_matplotlib(capsys, tmp_path, monkeypatch, words):
    hide(monkeypatch, "matplotlib")
    message = refused(capsys, *words, tmp_path / "out.file")
    assert 'pip install "cusparge[plot]"' in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_run_says_that_a_name_is_no_file(name, capsys):
    assert main(["run", name, "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["exit_status"] == 1
    assert record["error"]
