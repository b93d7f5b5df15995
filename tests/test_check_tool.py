"""`tools/check.py` can fail: each of its own checks is shown a planted mistake."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check", ROOT / "tools" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "text",
    [
        "x = 1  # TO" + "DO: more",
        "a fix" + "me in prose",
        "cd /ho" + "me/someone/cusparge",
        'open("/tm' + 'p/x")',
        "see /wo" + "rk/notes",
        "pip install --index" + "-url x",
        "https://py" + "pi.org/simple",
    ],
)
def test_a_forbidden_word_is_found(check, text):
    (problem,) = check.forbidden_words([("some/file.md", f"fine\n{text}\n")])
    assert problem.startswith("some/file.md:2: ")


@pytest.mark.parametrize(
    "text", ["https://example.org/work/x", "$HOME/work/x", "method", "tmp_path / 'home'", "work/"]
)
def test_an_ordinary_word_is_not(check, text):
    assert check.forbidden_words([("file.py", text)]) == []


def test_length_counts_lines_that_are_not_blank(check):
    longest = "x = 1\n\n" * check.MAX_LINES
    assert check.long_files([("a.py", longest)]) == []
    assert len(check.long_files([("a.py", longest + "x = 1\n")])) == 1
    assert check.long_files([("a.md", longest + "x = 1\n")]) == []


def test_an_exception_that_is_not_needed_is_reported(check):
    name = next(iter(check.LONG_FILES))
    assert len(check.long_files([(name, "x = 1\n")])) == 1
    assert check.long_files([(name, "x = 1\n" * (check.MAX_LINES + 1))]) == []


def test_the_tools_own_checks_see_the_repository(check):
    files = check.source_files()
    assert {"tools/check.py", "cusparge/attention.py", "README.md", ".ci/run"} <= set(files)
    assert not [name for name in files if "__pycache__" in name]
    texts = dict(check.texts(files))
    assert "tools/check.py" in texts
    assert "cusparge/data/whisper_tiny_en.safetensors" not in texts


def test_a_failed_tool_is_a_problem(check, tmp_path):
    (tmp_path / "bad.py").write_text("import os\n")
    assert check.tool("ruff", "check", "--isolated", str(tmp_path / "bad.py"))
    (problem,) = check.tool("no-such-tool")
    assert "not installed" in problem


def test_types_are_checked_against_one_version_of_numpy(check, monkeypatch):
    monkeypatch.setattr(check.metadata, "version", lambda name: "2.2.6")
    with pytest.raises(check.Skipped, match=r"not 2\.2\.6"):
        check.mypy()


def test_an_unknown_step_is_wrong_usage():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check.py", "nothing"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no such step: nothing" in done.stderr
