"""The folder of one process, where the cache cannot be written: it goes with its process."""

import os
import signal
import sys
from pathlib import Path

import pytest
from cuda_tools import isolate, run_script, start_script

from cusparge._cuda import private

OLD = private._AGE + 60


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)


@pytest.fixture
def temporary(tmp_path):
    """Where folders are made; the cache cannot be written."""
    (tmp_path / "cache").write_text("in the way")
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def run(text, tmp_path, **variables):
    return run_script(STORE + text, tmp_path, TMPDIR=str(tmp_path / "temporary"), **variables)


def age(folder):
    then = folder.stat().st_mtime - OLD
    os.utime(folder, (then, then))


STORE = """
import warnings
warnings.simplefilter("ignore")
notices.write = lambda text: None
from cuda_tools import code_of, info_of
def store(_=None):
    return str(storage.store(code_of("a"), info_of()).path.parents[1])
"""


def test_it_is_removed_once_nothing_compiles(tmp_path, monkeypatch):
    folder, seen = private.make(), []
    (folder / "v1").mkdir()
    monkeypatch.setattr(private.lifecycle, "end", lambda: seen.append(folder.exists()))
    private.remove(os.getpid() + 1, folder)
    assert folder.exists(), "a child must not take its parent's folder away"
    assert seen == []
    private.remove(os.getpid(), folder)
    assert not folder.exists()
    assert seen == [True], "or a compilation that still runs would write there once more"
    private.remove(os.getpid(), folder)


CHILDREN = {
    "Process": "p = context.Process(target=store); p.start(); p.join()",
    "Process below a Process": """
def middle():
    store()
    p = context.Process(target=store); p.start(); p.join()
p = context.Process(target=middle); p.start(); p.join()""",
    "Pool": "pool = context.Pool(2); print(len(set(pool.map(store, range(8), 1)))); "
    "pool.close(); pool.join()",
    "ProcessPoolExecutor": """
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2, mp_context=context) as pool:
    assert list(pool.map(store, range(8)))""",
    "fork": """
store()
child = os.fork()
if child == 0:
    store()
    sys.exit(0)
os.waitpid(child, 0)""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", CHILDREN)
def test_no_child_leaves_one(tmp_path, temporary, kind):
    text = "import multiprocessing\ncontext = multiprocessing.get_context('fork')\n"
    # Before the interpreter ends: what a child leaves would stay until then at least.
    seen = "\nprint('made', store() != '')\n"
    out, said = run(text + CHILDREN[kind] + seen, tmp_path)
    assert "made True" in out, said
    assert "Traceback" not in said
    assert list(temporary.iterdir()) == []


def killed(tmp_path):
    """Return the folder that a process leaves when it is killed."""
    text = "print(store(), flush=True)\nos.kill(os.getpid(), 9)\n"
    process = start_script(STORE + text, tmp_path, TMPDIR=str(tmp_path / "temporary"))
    out, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said
    return Path(out.strip())


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_the_next_one_removes_what_the_killed_leave(tmp_path, temporary):
    dead = killed(tmp_path)
    assert dead.exists()
    run("store()", tmp_path)
    assert dead.exists(), "a young one may not have its lock yet"
    age(dead)
    run("store()", tmp_path)
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes")
def test_nothing_else_is_removed(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(private.tempfile, "tempdir", str(temporary))
    living = private.make()
    names = [
        "cusparge-aaaaaaaa",
        "cusparge-failed-bbbbbbbb",
        "cusparge-pipe0000",
        "cusparge-cccccccc",
    ]
    others = [temporary / name for name in names]
    for path in others[:3]:
        path.mkdir()
    (others[1] / private._LOCK_FILE).write_text("")  # another name
    os.mkfifo(others[2] / private._LOCK_FILE)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / private._LOCK_FILE).write_text("")
    others[3].symlink_to(tmp_path / "elsewhere")
    for path in (living, *others, tmp_path / "elsewhere"):
        age(path)
    run("store()", tmp_path)
    assert sorted(temporary.iterdir()) == sorted([living, *others])
    assert (tmp_path / "elsewhere").exists()
    monkeypatch.setattr(private.lifecycle, "end", lambda: None)
    private.remove(os.getpid(), living)
    assert not living.exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users")
def test_the_folders_of_others_are_left_alone(tmp_path, temporary, monkeypatch):
    dead = killed(tmp_path)
    age(dead)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    private._sweep(temporary)
    assert dead.exists()
    monkeypatch.undo()
    private._sweep(temporary)
    assert not dead.exists()


def test_a_place_without_locks(monkeypatch):
    monkeypatch.setattr(private, "_lock", lambda number: False)
    folder = private.make()
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(private.lifecycle, "end", lambda: None)
    private.remove(os.getpid(), folder)
    assert not folder.exists()
