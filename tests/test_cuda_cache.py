"""The cache on disk: what is written is read back, and what is damaged never is."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cuda_tools import code_of, info_of, isolate, key_of, leftovers, put

from cusparge._cuda import cache, notices, storage
from cusparge._cuda.cache import Cache, Info
from cusparge._cuda.entries import read_file
from cusparge.errors import InvalidArgumentError


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(storage, "_private", None)
    monkeypatch.setattr(storage, "_rejected", set())


# ---- one entry -----------------------------------------------------------------------------------


def test_what_is_put_is_found_again(tmp_path):
    store = Cache(tmp_path / "c")
    info = info_of()
    assert store.get(key_of(info)) is None
    entry = put(store)
    assert entry.info == info
    assert entry.path.read_bytes() == code_of("a")
    assert entry.path.parent == tmp_path / "c" / "v1"
    assert entry.path.name == f"small-sm_90a-{info.key[:20]}.cubin"
    assert {p.suffix for p in store.folder.iterdir()} == {".cubin", ".json"}
    assert Cache(tmp_path / "c").get(key_of(info)) == entry
    assert store.entries() == [entry]
    assert store.size() == sum(p.stat().st_size for p in store.folder.iterdir())
    assert store.corrupt == 0
    assert Info.parse(entry.metadata.read_bytes()) == info


def test_files_can_be_read_by_whom_the_folder_is_shared_with(tmp_path):
    before = os.umask(0o022)
    try:
        entry = put(Cache(tmp_path))
    finally:
        os.umask(before)
    if sys.platform != "win32":
        assert entry.path.stat().st_mode & 0o777 == 0o644


def test_metadata_of_another_cubin_is_refused(tmp_path):
    with pytest.raises(ValueError, match="another cubin"):
        Cache(tmp_path).put(code_of("b"), info_of("a"))


DAMAGE = {
    "cubin cut": lambda e: e.path.write_bytes(e.path.read_bytes()[:-1]),
    "cubin empty": lambda e: e.path.write_bytes(b""),
    "cubin changed": lambda e: e.path.write_bytes(b"\x7fELG" + e.path.read_bytes()[4:]),
    "cubin gone": lambda e: e.path.unlink(),
    "json cut": lambda e: e.metadata.write_bytes(e.metadata.read_bytes()[:-5]),
    "json empty": lambda e: e.metadata.write_bytes(b""),
    "json not UTF-8": lambda e: e.metadata.write_bytes(b"\xff\xfe{}"),
    "json of another": lambda e: e.metadata.write_bytes(info_of("b").dump()),
    "json nested": lambda e: e.metadata.write_bytes(b"[" * 100_000),
    "json huge": lambda e: enlarge(e.metadata),
    "json a pipe": lambda e: replace(e.metadata, os.mkfifo),
    "json a device": lambda e: replace(e.metadata, link_to_zeros),
    "cubin huge": lambda e: enlarge(e.path),
    "cubin a pipe": lambda e: replace(e.path, os.mkfifo),
    "cubin a device": lambda e: replace(e.path, link_to_zeros),
}


def enlarge(path):
    """A file with a hole of more bytes than any memory holds."""
    try:
        os.truncate(path, 1 << 42)
    except OSError as error:
        pytest.skip(f"no such file can be made here: {error}")


def replace(path, make):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names, and no devices")
    path.unlink()
    make(path)


def link_to_zeros(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_removed_and_counted(tmp_path, damage):
    store = Cache(tmp_path)
    entry = put(store)
    DAMAGE[damage](entry)
    assert store.get(key_of(entry.info)) is None
    assert store.corrupt == 1
    assert list(store.folder.iterdir()) == []
    put(store)
    assert store.get(key_of(entry.info)) == entry


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_seed_is_never_changed(tmp_path, damage):
    entry = put(Cache(tmp_path))
    seed = Cache(tmp_path, read_only=True)
    before = {p: p.stat().st_mtime_ns for p in entry.path.parent.iterdir()}
    assert seed.get(key_of(entry.info)) == entry
    assert {p: p.stat().st_mtime_ns for p in entry.path.parent.iterdir()} == before
    DAMAGE[damage](entry)
    left = sorted(entry.path.parent.iterdir())
    assert seed.get(key_of(entry.info)) is None
    assert sorted(entry.path.parent.iterdir()) == left
    seed.drop(entry)
    assert sorted(entry.path.parent.iterdir()) == left
    with pytest.raises(PermissionError):
        put(seed)


def test_what_is_no_file_of_an_entry_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ValueError, match="it has 5 bytes; allowed are 4"):
        read_file(path, 4)
    for make in (os.mkfifo, link_to_zeros) if hasattr(os, "mkfifo") else ():
        replace(path, make)
        with pytest.raises(ValueError, match="no regular file"):
            read_file(path, 100)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_listed_without_harm(tmp_path, damage):
    store = Cache(tmp_path)
    entry, other = put(store), put(store, "z")
    DAMAGE[damage](entry)
    before = sorted(store.folder.iterdir())
    assert other in store.entries()
    assert sorted(store.folder.iterdir()) == before, "looking removes nothing"


WRONG = {
    "size": ["1", -2, 65 << 20, 1 << 60, True, None, 1.5],
    "registers": ["many", None],
    "compile_ms": ["1", -1, float("inf"), float("nan"), None],
    "options": ["-x", [1], None, {}, ["\ud800"]],
    "kernel": ["", None, 3, "a-b.cu", "x" * 200 + ".cu", "é.cu"],
    "arch": ["sm_90a/../x", "sm_9", "compute_90", "", None],
    "lowered": ["", 5, "\ud800", "_Z1a\n", "a b", "1a", "\u00e9"],
    "nvrtc": ["", 13.0, "abc", "13", "13.0.1", "13.x", "\u0661.\u0662", "9" * 5000 + ".0"],
    "expression": ["", None, "\ud800"],
    "key": ["ab", "G" * 64, "A" * 64, None],
    "source_key": ["", None],
    "sha256": ["0" * 63, ["0"] * 64],
    "format": [0, 2, "1", None],
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_metadata_is_a_value_error(field):
    raw = json.loads(info_of().dump())
    Info.parse(json.dumps(raw).encode())
    for value in WRONG[field]:
        with pytest.raises(ValueError, match=r"\w"):
            Info.parse(json.dumps(raw | {field: value}).encode())
    del raw[field]
    with pytest.raises(ValueError, match=r"\w"):
        Info.parse(json.dumps(raw).encode())


# ---- many entries --------------------------------------------------------------------------------


def test_entries_are_listed_without_what_is_no_entry(tmp_path):
    store = Cache(tmp_path)
    entries = [put(store, name) for name in "abc"]
    (store.folder / "notes.txt").write_text("")
    (store.folder / "small-sm_90a-00000000000000000000.cubin").write_bytes(b"alone")
    (store.folder / "x.json").write_bytes(entries[0].info.dump())
    assert store.entries() == sorted(entries, key=lambda entry: entry.path.name)
    store.drop(entries[0])
    store.drop(entries[0])
    assert len(store.entries()) == 2


def test_clear_counts_what_it_removes(tmp_path):
    folder = tmp_path / "own"
    store = Cache(folder)
    assert store.clear() == (0, 0)
    for name in "abc":
        put(store, name)
    (folder / "v1" / "mine.txt").write_text("stays")
    (store.failure_folder(key_of(info_of())) / "log.txt").write_text("x")
    total = store.size()
    assert store.clear() == (3, total)
    assert [p.name for p in folder.rglob("*")] == ["v1", "mine.txt"]


OTHERS = (
    "thesis.txt",
    "failed/thesis",
    "failed/small-sm_90a-0123/part",
    "v1/film.mkv.part",
    "v1/.film.cubin-0123456789abcdef.part",
    "v1/other.cubin",
    "v1/other.json",
    "v1/small-sm_90a-notes.json",
    "v1/small-sm_90a-notes.cubin",
    "v1/archive/small-sm_90a-00000000000000000000.cubin",
)


@pytest.mark.parametrize("action", ["clear", "put", "look"])
def test_the_users_own_files_stay(tmp_path, action):
    """The folder is one that the user names, and may hold anything."""
    own = tmp_path / "own"
    store = Cache(own)
    for name in OTHERS:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(name)
        os.utime(own / name, (1, 1))
    if action == "clear":
        store.failure_folder(key_of(info_of()))
        assert store.clear() == (0, 0)
    elif action == "put":
        put(store)
        store.failure_folder(key_of(info_of()))
    assert store.get_source(key_of(info_of("b"))) is None
    assert [name for name in OTHERS if (own / name).read_text() != name] == []
    if action == "clear":
        assert len([path for path in own.rglob("*") if path.is_file()]) == len(OTHERS)


def test_only_the_newest_failures_are_kept(tmp_path):
    store, key = Cache(tmp_path), key_of(info_of())
    made = [store.failure_folder(key) for _ in range(12)]
    assert all(path.exists() for path in made), "others may be writing theirs"
    for number, path in enumerate(made):
        (path / "log.txt").write_text("x")
        os.utime(path, (1000 + number, 1000 + number))
    newest = store.failure_folder(key)
    assert sorted((tmp_path / "failed").iterdir()) == sorted([*made[-7:], newest])


@pytest.mark.skipif(sys.platform == "win32", reason="other errors there")
def test_a_folder_that_nobody_can_look_into(tmp_path, monkeypatch):
    assert Cache(tmp_path / "absent").blocked() is None
    put(Cache(tmp_path))
    assert Cache(tmp_path).blocked() is None
    (tmp_path / "file").write_text("in the way")
    assert isinstance(Cache(tmp_path / "file").blocked(), NotADirectoryError)
    if os.geteuid() == 0:  # who may do anything
        monkeypatch.setattr(os, "scandir", raising_permission_error)
    else:
        Cache(tmp_path).folder.chmod(0)
    assert isinstance(Cache(tmp_path).blocked(), PermissionError)
    assert Cache(tmp_path).entries() == []


def raising_permission_error(place):
    raise PermissionError(13, "Permission denied", place)


def age(entry, seconds):
    then = time.time() - seconds
    os.utime(entry.metadata, (then, then))


def test_the_limit_removes_what_was_not_used_for_longest(tmp_path, monkeypatch):
    store = Cache(tmp_path)
    entries = {name: put(store, name) for name in "abcd"}
    for place, name in enumerate("dcba"):
        age(entries[name], 100 * (place + 1))  # a is the oldest
    assert store.get(key_of(entries["a"].info)) is not None  # and is used now
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", str(store.size()))
    put(store, "e")
    left = {entry.info.expression for entry in store.entries()}
    assert left == {"a", "c", "d", "e"}
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", "1")
    put(store, "f")
    assert {entry.info.expression for entry in store.entries()} == {"f"}, "the newest one stays"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, 256 << 20),
        ("", 256 << 20),
        ("0", 0),
        ("1000", 1000),
        ("2k", 2048),
        ("3M", 3 << 20),
        ("1 GiB", 1 << 30),
        (" 5 MB ", 5 << 20),
    ],
)
def test_limits(monkeypatch, text, expected):
    if text is not None:
        monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", text)
    assert cache.limit() == expected


@pytest.mark.parametrize("text", ["much", "-1", "1.5G", "1T", "K", "9" * 30, "٣"])
def test_a_wrong_limit_is_an_error(tmp_path, monkeypatch, text):
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", text)
    with pytest.raises(InvalidArgumentError, match=r"CUSPARGE_CACHE_LIMIT=.* such as 512M"):
        put(Cache(tmp_path))
    assert not list(tmp_path.glob("v1/*"))


def test_what_dead_writers_left_is_removed_after_a_while(tmp_path):
    store = Cache(tmp_path)
    put(store, "a")
    old, new = (
        [
            store.folder / f".small-sm_80-{digit * 20}.cubin-{digit * 16}.part",
            store.folder / f".small-sm_80-{digit * 20}.json-{digit * 16}.part",
            store.folder / f"small-sm_80-{digit * 20}.cubin",
        ]
        for digit in "01"
    )
    for path in old + new:
        path.write_bytes(b"half")
    for path in old:
        os.utime(path, (1, 1))
    put(store, "b")
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in new), "its writer may be at work"


# ---- writing under difficulties ------------------------------------------------------------------


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    store = Cache(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        put(store)
    assert caught.value.filename == str(store.folder / f"{info_of().stem}.cubin")
    assert list(store.folder.iterdir()) == []
    monkeypatch.undo()
    replace, seen = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(paths[0]), replace(*paths)))
    put(store)
    assert all(cache._TEMPORARY_NAME.fullmatch(Path(path).name) for path in seen), (
        "or none is swept"
    )
    assert len(seen) == 2


def test_a_folder_that_vanishes_is_made_again(tmp_path, monkeypatch):
    store = Cache(tmp_path)
    replace, calls = os.replace, []

    def vanish(source, target):
        calls.append(target)
        if len(calls) == 1:
            Path(source).unlink()
        replace(source, target)

    monkeypatch.setattr(os, "replace", vanish)
    entry = put(store)
    assert store.get(key_of(entry.info)) == entry
    assert len(calls) == 3


@pytest.mark.parametrize("is_there", [True, False])
def test_an_open_target_on_windows(tmp_path, monkeypatch, is_there):
    store = Cache(tmp_path)
    if is_there:
        put(store)
    replace, calls = os.replace, []

    def in_use(source, target):
        calls.append(target)
        if len(calls) <= 2:
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", in_use)
    monkeypatch.setattr(cache, "_WINDOWS", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    entry = put(store)
    assert store.get(key_of(entry.info)) == entry
    # An entry that is whole is as good as ours; else it is tried until the other one closes.
    assert len(calls) == (2 if is_there else 4)
    assert leftovers(tmp_path) == []


# ---- at the same time ----------------------------------------------------------------------------


def test_a_vandal_never_makes_wrong_bytes_readable(tmp_path, rng):
    names = [f"n{i}" for i in range(6)]
    wrong, stop = [], threading.Event()

    def vandal():
        while not stop.is_set():
            for path in list((tmp_path / "v1").glob("*")):
                action = int(rng.integers(12))
                try:
                    if action == 0:
                        path.unlink()
                    elif action == 1:
                        path.write_bytes(path.read_bytes()[: int(rng.integers(600))])
                    elif action == 2:
                        path.write_bytes(bytes(rng.integers(0, 256, 300, dtype="u1")))
                except OSError:
                    continue

    def user(store):
        for turn in range(60):
            name = names[turn % len(names)]
            entry = store.get(key_of(info_of(name)))
            if entry is None:
                try:
                    put(store, name)
                except FileNotFoundError:  # three times in a row: the private folder's case
                    continue
                except OSError as error:
                    wrong.append(error)
            elif entry.info != info_of(name):
                wrong.append(entry)

    vandals = threading.Thread(target=vandal)
    vandals.start()
    stores = [Cache(tmp_path) for _ in range(4)]
    users = [threading.Thread(target=user, args=[store]) for store in stores]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    stop.set()
    vandals.join()
    assert wrong == []
    assert sum(store.corrupt for store in stores) > 0


def test_a_full_file_system(tmp_path):
    """A file system of 64 KiB, where that can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True, text=True
    ) if hasattr(os, "geteuid") and os.geteuid() == 0 else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        store = Cache(small)
        big = code_of("a", 100_000)
        with pytest.raises(OSError, match="No space"):
            store.put(big, info_of("a", big))
        assert list(store.folder.iterdir()) == []
        put(store)
        assert len(store.entries()) == 1
    finally:
        subprocess.run(["umount", small], check=True)


def test_info_has_no_field_that_is_not_checked():
    assert {field.name for field in dataclasses.fields(Info)} - WRONG.keys() == {
        "cusparge",
        "spill_bytes",
        "stack_bytes",
    }, "the same loops check these"
