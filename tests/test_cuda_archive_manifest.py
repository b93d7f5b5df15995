"""Archives whose manifest or metadata holds anything at all: refused, and nothing is written."""

from __future__ import annotations

import hashlib
import json

import pytest
from archive_tools import check_refused, good_files, manifest, tar_of
from cache_tools import entry


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("CUSPARGE_CACHE_LIMIT", raising=False)


@pytest.fixture
def archived(tmp_path, rng):
    return good_files(tmp_path, rng)


#: What is hostile, and a word of the reason that is to be told.
HOSTILE_JSON = {
    "empty": (b"", "cannot be read"),
    "no object": (b"[]", "no JSON object"),
    "null": (b"null", "no JSON object"),
    "no json": (b"{", "cannot be read"),
    "not utf-8": (b'{"format": "\xff"}', "utf-8"),
    "utf-16": ('{"format": "cusparge kernels"}'.encode("utf-16"), "utf-8"),
    "bom": (b"\xef\xbb\xbf{}", "BOM"),
    "nan": (b'{"version": NaN}', "NaN is no JSON"),
    "infinity": (b'{"version": -Infinity}', "-Infinity is no JSON"),
    "deep lists": (b'{"files": ' + b"[" * 200_000, "nested too deeply"),
    "deep objects": (b'{"files": ' + b'{"a":' * 200_000, "nested too deeply"),
    "long number": (b'{"version": ' + b"9" * 1_000_000 + b"}", "a number of 1000000 digits"),
    "long fraction": (b'{"version": 1e999999999}', "manifest.json"),
    "twice": (b'{"version": 1, "version": 1}', "a name occurs twice"),
    "zero bytes": (bytes(1000), "cannot be read"),
    "another format": (b'{"format": "zip", "version": 1, "files": {}}', "manifest.json"),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_a_hostile_manifest(tmp_path, archived, name):
    data, words = HOSTILE_JSON[name]
    path = tar_of(tmp_path / "bad.tar", [("manifest.json", data), *archived.items()])
    assert "manifest.json" in check_refused(path, words)


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_metadata(tmp_path, archived, name):
    data, words = HOSTILE_JSON[name]
    stem = sorted(archived)[0].rpartition(".")[0]
    files = {**archived, f"{stem}.json": data}
    path = tar_of(tmp_path / "bad.tar", [("manifest.json", manifest(files)), *files.items()])
    text = check_refused(path, f"{stem}.json")
    assert (words in text) or name in ("long fraction", "another format")


@pytest.mark.parametrize("value", [None, True, False, 0, -1, 1.0, "1", [], {}, 10**19, "\ud800"])
@pytest.mark.parametrize(
    "place", ["format", "version", "files", "entry", "sha256", "size", "other entry"]
)
def test_wrong_types_in_the_manifest(tmp_path, archived, place, value):
    record = json.loads(manifest(archived))
    name = sorted(archived)[0]
    if place in record:
        record[place] = value
    elif place == "entry":
        record["files"][name] = value
    elif place == "other entry":
        record["files"]["../x"] = value
    else:
        record["files"][name][place] = value
    rows = [("manifest.json", json.dumps(record).encode()), *archived.items()]
    check_refused(tar_of(tmp_path / "bad.tar", rows))


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "../pool.cu"},
        {"kernel": "/etc/pool.cu"},
        {"kernel": "other.cu"},
        {"kernel": "pool"},
        {"arch": "sm_80"},
        {"arch": "../../x"},
        {"key": "0" * 64},
        {"key": "../" * 22},
        {"key": 7},
        {"sha256": "0" * 64},
        {"size": 17},
        {"size": -(10**15)},
        {"options": "-x"},
        {"options": [{}]},
        {"lowered": None},
        {"lowered": ""},
        {"lowered": "\ud800"},
        {"nvrtc": "abc"},
        {"registers": 1e300},
        {"compile_ms": "soon"},
        {"format": 99},
    ],
    ids=str,
)
def test_metadata_that_does_not_fit_its_entry(tmp_path, rng, changes):
    cubin, info = entry(rng)
    record = json.loads(info.dump()) | changes
    files = {f"{info.stem}.cubin": cubin, f"{info.stem}.json": json.dumps(record).encode()}
    rows = [("manifest.json", manifest(files)), *files.items()]
    check_refused(tar_of(tmp_path / "bad.tar", rows), info.stem)


def test_what_is_no_machine_code(tmp_path, rng):
    script = b"#!/bin/sh\nexit 0\n"
    changes = {"sha256": hashlib.sha256(script).hexdigest(), "size": len(script)}
    _, info = entry(rng, **changes)
    files = {f"{info.stem}.cubin": script, f"{info.stem}.json": info.dump()}
    rows = [("manifest.json", manifest(files)), *files.items()]
    check_refused(tar_of(tmp_path / "bad.tar", rows), "no machine code")


def test_one_bad_entry_keeps_all_out(tmp_path, rng):
    good = [entry(rng) for _ in range(3)]
    files = {}
    for cubin, info in good:
        files |= {f"{info.stem}.cubin": cubin, f"{info.stem}.json": info.dump()}
    last = sorted(files)[-1].rpartition(".")[0]
    files[f"{last}.json"] = b"{}"
    rows = [("manifest.json", manifest(files)), *files.items()]
    check_refused(tar_of(tmp_path / "bad.tar", rows), last)
