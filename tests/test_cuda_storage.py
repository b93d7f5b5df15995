"""Which folders are used: the cache's place, a private one where it fails, and seeds."""

import os
import sys
from pathlib import Path

import pytest
from cuda_tools import code_of, info_of, isolate, key_of, put, run_script

from cusparge._cuda import cache, notices, private, storage
from cusparge._cuda.cache import Cache
from cusparge.errors import CompileError


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(storage, "_private", None)
    monkeypatch.setattr(storage, "_rejected", set())


# ---- a cache that cannot be written -------------------------------------------------------------


def block_with_a_file(folder, monkeypatch):
    folder.write_text("a file")


def block_reading(folder, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", raising(30, "Read-only file system"))


def block_space(folder, monkeypatch):
    write, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(122, "Disk quota exceeded")
        write(descriptor)

    monkeypatch.setattr(os, "fsync", full)


def raising(number, text):
    real = Path.mkdir

    def mkdir(self, *arguments, **options):
        if "cache" in self.parts:
            raise OSError(number, text)
        return real(self, *arguments, **options)

    return mkdir


def forget(folder, monkeypatch):
    """Remove a private folder, and let this process go on compiling."""
    with monkeypatch.context() as patch:
        patch.setattr(private.lifecycle, "end", lambda: None)
        private.remove(os.getpid(), folder)
    assert not folder.exists()


@pytest.mark.parametrize("block", [block_with_a_file, block_reading, block_space])
def test_a_private_folder_where_the_cache_cannot_be_written(tmp_path, monkeypatch, capfd, block):
    block(tmp_path / "cache", monkeypatch)
    info = info_of()
    entry = storage.store(code_of("a"), info)
    folder = entry.path.parents[1]
    assert tmp_path not in entry.path.parents
    if sys.platform != "win32":
        assert folder.stat().st_mode & 0o777 == 0o700
    assert storage.lookup(key_of(info), exact=True) == entry
    again = storage.store(code_of("b"), info_of("b"))
    assert again.path.parent == entry.path.parent
    said = capfd.readouterr().err
    assert said.count("CUSPARGE_CACHE_DIR") == 1
    assert str(folder) in said
    storage.drop(entry.path)
    assert storage.lookup(key_of(info), exact=True) is None
    forget(folder, monkeypatch)


def test_no_folder_at_all_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")

    def nowhere(**options):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(storage.tempfile, "mkdtemp", lambda prefix: nowhere())
    with pytest.raises(CompileError, match="neither to the cache nor to a temporary folder"):
        storage.store(code_of("a"), info_of())


PRIVATE = """
if os.geteuid() == 0:
    os.makedirs(os.environ["CUSPARGE_CACHE_DIR"], mode=0o755, exist_ok=True)
    os.setgid(65534); os.setuid(65534)
else:
    os.makedirs(os.environ["CUSPARGE_CACHE_DIR"], mode=0o555, exist_ok=True)
entry = storage.store(*made)
print(entry.path.parents[1])
if (child := os.fork()) == 0:
    sys.exit(0)  # runs the exit handlers, in a process that does not own the folder
os.waitpid(child, 0)
print(entry.path.exists())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs users and fork")
def test_an_unprivileged_user_and_an_unwritable_folder(tmp_path):
    # Under a folder that any user may enter, unlike pytest's.
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        made = "from cuda_tools import code_of, info_of\nmade = code_of('a'), info_of()\n"
        out, said = run_script(made + PRIVATE, tmp_path, CUSPARGE_CACHE_DIR=f"{name}/cache")
        folder, still_there = out.split()
        assert still_there == "True"
        assert not Path(folder).exists(), "removed at exit"
        assert said.count("Permission denied") == 1
        assert list(Path(name, "cache").iterdir()) == []


# ---- entries that cannot be removed --------------------------------------------------------------


def refuse(error):
    def unlink(self, missing_ok=False):
        raise error

    return unlink


@pytest.mark.parametrize(
    "error", [OSError(30, "Read-only file system"), PermissionError(13, "in use")]
)
def test_an_entry_that_cannot_be_removed_is_passed_over(tmp_path, monkeypatch, error):
    made = storage.store(code_of("a"), info_of())
    older = storage.store(code_of("a"), info_of(nvrtc="12.8"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse(error))
        storage.drop(made.path)
    assert made.path.exists()
    assert storage.lookup(key_of(made.info), exact=True) is None
    assert storage.lookup(key_of(made.info), exact=False) == older
    # What is written in its place is another file.
    assert storage.store(code_of("a"), info_of()) == made
    assert storage.lookup(key_of(made.info), exact=True) == made


def test_a_folder_in_the_place_of_a_cubin(tmp_path, capfd, monkeypatch):
    made = storage.store(code_of("a"), info_of())
    made.path.unlink()
    made.path.mkdir()
    storage.drop(made.path)
    assert storage.lookup(key_of(made.info), exact=True) is None
    again = storage.store(code_of("a"), info_of())
    assert storage.lookup(key_of(made.info), exact=True) == again
    assert again.path.parent != made.path.parent
    assert "cannot be kept" in capfd.readouterr().err
    forget(again.path.parents[1], monkeypatch)


def test_what_the_caller_passes_over(tmp_path, monkeypatch):
    made = storage.store(code_of("a"), info_of())
    seeded = put(Cache(tmp_path / "seed"))
    seed_with(monkeypatch, tmp_path / "seed")
    key = key_of(info_of())
    assert storage.lookup(key, exact=True) == made
    assert storage.lookup(key, exact=True, without={made.path}) == seeded
    assert storage.lookup(key, exact=False, without={made.path, seeded.path}) is None


# ---- where ---------------------------------------------------------------------------------------


def test_the_root_of_the_cache(monkeypatch, tmp_path):
    assert cache.default().root == tmp_path / "cache"
    assert cache.folder() == tmp_path / "cache" / "v1"
    assert cache.default() is cache.default()
    monkeypatch.delenv("CUSPARGE_CACHE_DIR")
    if sys.platform == "win32":
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
        assert cache.root() == tmp_path / "cusparge"
        return
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "cusparge"
    for value in ("relative/path", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.root() == tmp_path / "home" / ".cache" / "cusparge"
    monkeypatch.setattr(cache, "_WINDOWS", True)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.root() == tmp_path / "local" / "cusparge"
    monkeypatch.delenv("LOCALAPPDATA")
    assert cache.root() == tmp_path / "home" / "AppData" / "Local" / "cusparge"


def test_a_user_without_a_home(monkeypatch, capfd):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CUSPARGE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    info = info_of()
    assert storage.lookup(key_of(info), exact=True) is None
    entry = storage.store(code_of("a"), info)
    assert storage.lookup(key_of(info), exact=True) == entry
    assert "home directory" in capfd.readouterr().err
    forget(entry.path.parents[1], monkeypatch)


def test_the_home_folder_of_an_unknown_user(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", "~nobody-of-this-name/x")
    monkeypatch.setattr(os.path, "expanduser", lambda text: text)
    with pytest.raises(RuntimeError, match="CUSPARGE_CACHE_DIR=~nobody-of-this-name/x names"):
        cache.root()
    entry = storage.store(code_of("a"), info_of())
    assert "CUSPARGE_CACHE_DIR=~nobody-of-this-name/x names" in capfd.readouterr().err
    assert not list(tmp_path.glob("~*"))
    forget(entry.path.parents[1], monkeypatch)


# ---- seeds ---------------------------------------------------------------------------------------
def seed_with(monkeypatch, *folders):
    monkeypatch.setenv("CUSPARGE_CACHE_SEED", os.pathsep.join(map(str, folders)))


@pytest.mark.parametrize("place", ["", "v1"])
def test_a_seed_is_read_wherever_its_entries_lie(tmp_path, monkeypatch, place):
    entry = put(Cache(tmp_path / "seed"))
    seed_with(monkeypatch, tmp_path / "empty", tmp_path / "seed" / place)
    (tmp_path / "empty").mkdir()
    assert storage.lookup(key_of(entry.info), exact=True) == entry
    assert not (tmp_path / "cache").exists()
    storage.drop(entry.path)
    assert entry.path.exists()
    assert storage.lookup(key_of(entry.info), exact=True) is None, "it could not be loaded"


def test_a_seed_may_come_from_another_compiler_and_the_cache_only_if_there_is_none(
    tmp_path, monkeypatch
):
    wanted = key_of(info_of(nvrtc="13.5"))
    older = put(Cache(tmp_path / "cache"), nvrtc="12.9")
    assert storage.lookup(wanted, exact=True) is None
    assert storage.lookup(wanted, exact=False) == older
    old = put(Cache(tmp_path / "seed"), nvrtc="12.8")
    put(Cache(tmp_path / "seed"), "b", nvrtc="13.5")
    put(Cache(tmp_path / "seed"), nvrtc="12.8", arch="sm_80")
    seed_with(monkeypatch, tmp_path / "seed")
    assert storage.lookup(wanted, exact=True) == old
    same = put(Cache(tmp_path / "seed"), nvrtc="13.5")
    assert storage.lookup(wanted, exact=True) == same
    own = put(Cache(tmp_path / "cache"), nvrtc="13.5")
    assert storage.lookup(wanted, exact=True) == own


def test_a_seed_that_is_no_folder_is_told_once(tmp_path, monkeypatch, capfd):
    seed_with(monkeypatch, tmp_path / "nowhere")
    for _ in range(2):
        assert storage.seeds() == []
    assert capfd.readouterr().err.count("is no folder") == 1
