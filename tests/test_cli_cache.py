"""`cusparge cache`: path, list, clear, export, import."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
from cache_tools import entry, filled
from cli_tools import refused, run_json

from cusparge._cuda.cache import Cache
from cusparge.cli import cache as command
from cusparge.cli import main

ACTIONS = ("path", "list", "clear", "export", "import")


@pytest.fixture
def root(monkeypatch, tmp_path):
    """The folder of an empty cache."""
    for name in ("CUSPARGE_CACHE_LIMIT", "CUSPARGE_CACHE_SEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def text(capsys, *words):
    """Run a command that should succeed; return what it shows."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_help(capsys):
    words = text(capsys, "cache", "--help")
    for action in ACTIONS:
        assert action in words
        assert "--json" in text(capsys, "cache", action, "--help")


@pytest.mark.parametrize(
    "words",
    [[], ["frobnicate"], ["export"], ["import"], ["list", "x"], ["clear", "--yes"], ["path", "-x"]],
    ids=" ".join,
)
def test_wrong_usage(capsys, root, words):
    assert "usage" in refused(capsys, "cache", *words, code=2)


def test_path_is_printed_alone(capsys, root):
    assert text(capsys, "cache", "path") == f"{root / 'v1'}\n"
    assert run_json(capsys, "cache", "path")["path"] == str(root / "v1")
    assert run_json(capsys, "cache", "--json", "path")["path"] == str(root / "v1")
    assert not root.exists()


def test_a_long_path_stays_one_line(capsys, root, monkeypatch):
    long = root / ("a" * 200) / ("b" * 200)
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(long))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert text(capsys, "cache", "path") == f"{long / 'v1'}\n"


def test_every_kernel_lies_under_the_path(capsys, root, rng):
    filled(root, rng, 5)
    folder = text(capsys, "cache", "path").rstrip("\n")
    assert len([name for name in os.listdir(folder) if name.endswith(".cubin")]) == 5


def test_list(capsys, root, rng):
    cache = Cache(root)
    ages = {"sm_80": 30, "sm_90a": 3 * 3600 + 5, "sm_120a": 49 * 3600}
    for arch, age in ages.items():
        written = cache.put(*entry(rng, arch=arch, size=5000))
        when = written.metadata.stat().st_mtime - age
        os.utime(written.metadata, (when, when))
    record = run_json(capsys, "cache", "list")
    assert sorted(record["architectures"]) == sorted(ages)
    assert record["bytes"] == cache.size()
    assert record["limit_bytes"] == 256 << 20
    for row in record["kernels"]:
        assert row["kernel"] == "pool"
        assert row["expression"] == "cusparge::pool<cusparge::Config{64, true}>"
        assert (row["nvrtc"], row["bytes"], row["registers"]) == ("13.5", 5000, 96)
        assert ages[row["arch"]] <= row["age_seconds"] < ages[row["arch"]] + 60
        assert (root / "v1" / row["file"]).is_file()
    shown = text(capsys, "cache", "list")
    for word in ("pool", "sm_80", "sm_90a", "sm_120a", "13.5", "4.9 KiB", "just now", "3 h ago"):
        assert word in shown
    assert "2 d ago" in shown
    assert "3 kernels" in shown


def test_registers_that_are_not_known(capsys, root, rng):
    Cache(root).put(*entry(rng, registers=-1, spill_bytes=-1))
    (row,) = run_json(capsys, "cache", "list")["kernels"]
    assert (row["registers"], row["spill_bytes"]) == (None, None)
    assert " - " in text(capsys, "cache", "list")


def test_list_of_nothing(capsys, root):
    assert "no compiled kernels" in text(capsys, "cache", "list")
    assert run_json(capsys, "cache", "list")["kernels"] == []
    assert not root.exists()


def test_names_cannot_steer_the_terminal(capsys, root, rng):
    Cache(root).put(*entry(rng, expression="\x1b[2Jpool"))
    shown = text(capsys, "cache", "list")
    assert "\x1b" not in shown
    assert "\\x1b[2Jpool" in shown


def test_clear(capsys, root, rng):
    cache = filled(root, rng, 4)
    size = cache.size()
    record = run_json(capsys, "cache", "clear")
    assert (record["removed"], record["bytes"], record["bytes_left"]) == (4, size, 0)
    assert cache.entries() == []
    filled(root, rng, 1)
    assert "removed 1 kernel," in text(capsys, "cache", "clear")
    assert "removed 0 kernels, 0 B" in text(capsys, "cache", "clear")


def test_what_cannot_be_cleared_is_told(capsys, root, rng, monkeypatch):
    filled(root, rng, 2)
    monkeypatch.setattr(Cache, "clear", lambda self: (0, 0))
    capsys.readouterr()
    assert main(["cache", "clear", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["bytes_left"] > 6000
    assert "could not be removed" in captured.err


def test_export_and_import(capsys, root, rng, tmp_path, monkeypatch):
    filled(root, rng, 3)
    file = tmp_path / "kernels.tar"
    record = run_json(capsys, "cache", "export", file)
    assert (record["kernels"], record["bytes"]) == (3, file.stat().st_size)
    assert record["architectures"] == ["sm_80", "sm_90a", "sm_120a"]
    assert "wrote 3 kernels for sm_80, sm_90a, sm_120a" in text(capsys, "cache", "export", file)
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "other"))
    assert run_json(capsys, "cache", "import", file)["skipped"] == []
    first, second = (Cache(place).entries() for place in (root, tmp_path / "other"))
    assert [found.info for found in first] == [found.info for found in second]
    assert "3 of them here already" in text(capsys, "cache", "import", file)
    assert len(run_json(capsys, "cache", "list")["kernels"]) == 3


def test_a_damaged_entry_is_told_on_export(capsys, root, rng, tmp_path):
    damaged = filled(root, rng, 3).entries()[1]
    damaged.path.write_bytes(b"")
    assert main(["cache", "export", str(tmp_path / "a.tar")]) == 0
    captured = capsys.readouterr()
    assert damaged.path.stem in captured.err
    assert "wrote 2 kernels" in captured.out


def test_export_refusals(capsys, root, rng, tmp_path, monkeypatch):
    file = tmp_path / "a.tar"
    assert "cusparge compile" in refused(capsys, "cache", "export", file)
    assert not file.exists()
    filled(root, rng)
    missing = tmp_path / "no" / "a.tar"
    assert "does not exist" in refused(capsys, "cache", "export", missing)
    assert "not an ordinary file" in refused(capsys, "cache", "export", tmp_path)
    assert "not an ordinary file" in refused(capsys, "cache", "export", "/")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    message = refused(capsys, "cache", "export", file)
    assert f"{tmp_path} cannot be written to" in message


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_export_writes_through_a_link(capsys, root, rng, tmp_path):
    filled(root, rng)
    (tmp_path / "link").symlink_to(tmp_path / "real.tar")
    text(capsys, "cache", "export", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real.tar").stat().st_size > 9000


def test_import_refusals(capsys, root, tmp_path, monkeypatch):
    bad = tmp_path / "bad.tar"
    message = refused(capsys, "cache", "import", bad)
    assert f"{bad}: No such file" in message
    assert "CUSPARGE_CACHE_DIR" not in message, "the cache is not at fault"
    bad.write_bytes(b"not an archive" * 100)
    assert "no tar file" in refused(capsys, "cache", "import", bad)
    assert "is a folder" in refused(capsys, "cache", "import", tmp_path)
    assert main(["cache", "import", str(bad), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["error"]["type"] == "InvalidArgumentError"
    assert not root.exists()


def test_import_into_a_folder_that_cannot_be_written(capsys, root, rng, tmp_path, monkeypatch):
    filled(root, rng)
    text(capsys, "cache", "export", tmp_path / "a.tar")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "file"))
    assert str(tmp_path / "file") in refused(capsys, "cache", "import", tmp_path / "a.tar")


class Full:
    """A disk without room: `full(n)` lets n files be written, and no more."""

    def __init__(self, monkeypatch):
        self.patch, self.real = monkeypatch, os.fsync

    def __call__(self, files):
        left = iter(range(files))

        def fsync(descriptor):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            self.real(descriptor)

        self.patch.setattr(os, "fsync", fsync)


def test_a_full_disk(capsys, root, rng, tmp_path, monkeypatch):
    filled(root, rng, 3)
    file = tmp_path / "a.tar"
    full = Full(monkeypatch)
    full(0)
    message = refused(capsys, "cache", "export", file)
    for part in (str(file), "No space left on device", "Free some room", "another folder"):
        assert part in message
    assert not file.exists()
    full(100)
    text(capsys, "cache", "export", file)
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", str(tmp_path / "other"))
    full(3)  # one kernel, and the machine code of another
    message = refused(capsys, "cache", "import", file)
    parts = (str(tmp_path / "other" / "v1"), "No space left on device", str(file))
    for part in (*parts, "Free some room", "CUSPARGE_CACHE_DIR"):
        assert part in message
    assert len(Cache(tmp_path / "other").entries()) == 1


@pytest.mark.parametrize("action", ["list", "clear", "export"])
def test_a_folder_that_nobody_may_look_into(capsys, root, rng, tmp_path, monkeypatch, action):
    filled(root, rng)
    real = os.scandir

    def scandir(place):
        if str(place) == str(root / "v1"):
            raise PermissionError(13, "Permission denied")
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    words = [tmp_path / "a.tar"] if action == "export" else []
    message = refused(capsys, "cache", action, *words)
    for part in (str(root / "v1"), "Permission denied", "CUSPARGE_CACHE_DIR"):
        assert part in message
    assert len(list(real(root / "v1"))) == 6


def test_clear_leaves_the_users_own_files(capsys, root):
    for name in ("failed/thesis", "v1/film.mkv.part", "v1/other.cubin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
        os.utime(root / name, (1, 1))
    assert "removed 0 kernels" in text(capsys, "cache", "clear")
    assert len([path for path in root.rglob("*") if path.is_file()]) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(capsys, root, rng):
    (found,) = filled(root, rng, 1).entries()
    found.metadata.unlink()
    os.mkfifo(found.metadata)
    os.mkfifo(root / "v1" / "x.json")
    assert "no compiled kernels" in text(capsys, "cache", "list")


def test_the_home_folder_of_an_unknown_user(capsys, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUSPARGE_CACHE_DIR", "~no such user/x")
    message = refused(capsys, "cache", "path")
    assert "CUSPARGE_CACHE_DIR=~no such user/x names the home folder of a user" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", ACTIONS)
def test_no_home_folder(capsys, root, tmp_path, monkeypatch, action):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("cusparge._cuda.cache.root", nowhere)
    (tmp_path / "a.tar").write_bytes(b"")
    words = [tmp_path / "a.tar"] if action in ("export", "import") else []
    message = refused(capsys, "cache", action, *words)
    assert "home directory. Name one in CUSPARGE_CACHE_DIR" in message


def test_a_limit_that_is_no_size(capsys, root, rng, tmp_path, monkeypatch):
    filled(root, rng)
    text(capsys, "cache", "export", tmp_path / "a.tar")
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", "plenty")
    for words in (["list"], ["import", tmp_path / "a.tar"]):
        assert "CUSPARGE_CACHE_LIMIT" in refused(capsys, "cache", *words)


def test_amounts_and_ages():
    sizes = (0, 1023, 1024, 1536, (1 << 20) - 1, 1 << 20, 5 << 30, 5 << 40)
    expected = "0 B|1023 B|1.0 KiB|1.5 KiB|1024.0 KiB|1.0 MiB|5.0 GiB|5120.0 GiB"
    assert "|".join(map(command.amount, sizes)) == expected
    ages = (0, 59, 60, 3599, 3600, 86399, 86400, 1e7)
    expected = "just now|just now|1 min ago|59 min ago|1 h ago|23 h ago|1 d ago|115 d ago"
    assert "|".join(map(command._age, ages)) == expected


def test_an_entry_that_vanishes_while_it_is_listed(root, rng):
    """Another process may clear the cache at any time."""
    _, info = entry(rng)
    gone = types.SimpleNamespace(info=info, metadata=root / "gone.json", path=root / "gone.cubin")
    assert command._row(gone, 1e9)["age_seconds"] == 0.0
