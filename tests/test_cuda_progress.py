"""What people see on standard error while kernels are compiled."""

import os
import re
import sys
import threading

import pytest
from cuda_tools import isolate, need_nvrtc, small

from cusparge._cuda import build, notices, progress


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    need_nvrtc()
    isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(notices, "_said", set())


class Terminal:
    """Standard error of a person."""

    def __init__(self, is_terminal):
        self.text, self.is_terminal = "", is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        return None

    def isatty(self):
        return self.is_terminal


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_shown", False)


def shown_while(monkeypatch, work, is_terminal):
    error = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stderr", error)
    work()
    return error.text


@pytest.mark.usefixtures("impatient")
def test_one_line_a_process(monkeypatch, tmp_path):
    text = shown_while(monkeypatch, lambda: build.build(small(), "sm_90a"), False)
    where = tmp_path / "cache"
    assert text == f"cusparge: compiling small.cu for sm_90a (once; cached in {where}) ...\n"
    assert shown_while(monkeypatch, lambda: build.build(small(4), "sm_90a"), False) == ""


@pytest.mark.usefixtures("impatient")
def test_a_terminal_sees_the_count(monkeypatch):
    wanted = [small(n) for n in range(1, 5)]
    text = shown_while(monkeypatch, lambda: build.build_all(wanted, "sm_90a", jobs=1), True)
    assert text.startswith("cusparge: compiling 4 kernels for sm_90a (once; cached in ")
    assert re.search(r"\r[^\r]* \.\.\. 4/4 \d+\.\d s\n$", text)
    assert text.count("\n") == 1
    assert "1/4" in text


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("why", ["quiet", "a hit", "the background", "own display"])
def test_when_nothing_is_shown(monkeypatch, caplog, why):
    caplog.set_level("INFO", logger="cusparge")
    if why == "quiet":
        monkeypatch.setenv("CUSPARGE_QUIET", "1")
    if why == "a hit":
        build.build(small(), "sm_90a")
        monkeypatch.setattr(progress, "_shown", False)
        caplog.clear()

    def work():
        if why == "own display":
            build.try_all([small()], "sm_90a", on_done=lambda done, total: None)
        elif why == "the background":
            thread = threading.Thread(
                target=build.build, args=(small(), "sm_90a"), name="cusparge-background"
            )
            thread.start()
            thread.join()
        else:
            build.build(small(), "sm_90a")

    assert shown_while(monkeypatch, work, True) == ""
    assert ("compiling" in caplog.text) is (why != "a hit")


def test_a_closed_standard_error_is_no_failure(monkeypatch):
    for broken in (None, open(os.devnull)):
        if broken is not None:
            broken.close()
        monkeypatch.setattr(sys, "stderr", broken)
        notices.say("text")
    monkeypatch.undo()


def test_the_home_folder_is_shortened(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert notices.short(tmp_path / "a" / "b") == os.path.join("~", "a", "b")
    assert notices.short(tmp_path.parent / "c") == str(tmp_path.parent / "c")
