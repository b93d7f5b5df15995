"""Archives of compiled kernels: what is written comes back, and nothing else gets in."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile

import pytest
from archive_tools import bundle, check_refused, good_files, manifest, tar_of
from cache_tools import entry, filled

from cusparge._cuda import archive, tarball
from cusparge._cuda.cache import Cache
from cusparge.errors import InvalidArgumentError


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("CUSPARGE_CACHE_LIMIT", raising=False)


@pytest.fixture
def archived(tmp_path, rng):
    return good_files(tmp_path, rng)


def content(cache):
    return {path.name: path.read_bytes() for path in sorted(cache.folder.glob("*"))}


# --- There and back ------------------------------------------------------------------------------


def test_there_and_back(tmp_path, rng):
    source = filled(tmp_path / "source", rng, 5)
    file = tmp_path / "kernels.tar"
    report = archive.export(source, file)
    assert report == archive.Report(5, ("sm_80", "sm_90a", "sm_120a"), file.stat().st_size, ())
    target = Cache(tmp_path / "target")
    assert archive.import_(file, target) == report
    assert content(target) == content(source)
    assert target.corrupt == 0
    assert [found.info for found in target.entries()] == [found.info for found in source.entries()]
    again = archive.import_(file, target)
    assert again.skipped == tuple(sorted(found.path.stem for found in source.entries()))
    assert content(target) == content(source)


def test_what_is_damaged_in_the_target_is_replaced(tmp_path, rng):
    source = filled(tmp_path / "source", rng)
    archive.export(source, tmp_path / "kernels.tar")
    target = Cache(tmp_path / "target")
    archive.import_(tmp_path / "kernels.tar", target)
    broken = target.entries()[1]
    broken.path.write_bytes(b"\x7fELF and no more")
    report = archive.import_(tmp_path / "kernels.tar", target)
    assert len(report.skipped) == 2
    assert broken.path.stem not in report.skipped
    assert content(target) == content(source)


def test_the_same_entries_give_the_same_bytes(tmp_path, rng):
    pairs = [entry(rng) for _ in range(4)]
    written = []
    for order in (pairs, pairs[::-1]):
        cache = Cache(tmp_path / str(len(written)))
        for cubin, info in order:
            cache.put(cubin, info)
        for number, path in enumerate(cache.folder.glob("*")):
            os.utime(path, (10_000 * number, 10_000 * number))
        file = tmp_path / f"{len(written)}.tar"
        archive.export(cache, file)
        written.append(file.read_bytes())
    assert written[0] == written[1]
    with tarfile.open(tmp_path / "0.tar", "r:") as tar:
        members = tar.getmembers()
    assert members[0].name == "manifest.json"
    assert [m.name for m in members[1:]] == sorted(m.name for m in members[1:])
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_the_order_of_the_files_does_not_matter(tmp_path, archived):
    backwards = dict(sorted(archived.items(), reverse=True))
    tarball.write(tmp_path / "a.tar", archived)
    tarball.write(tmp_path / "b.tar", backwards)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert list(bundle(tmp_path / "b.tar"))[1:] == sorted(archived)


def test_an_archive_packed_by_other_tools_is_taken(tmp_path, archived):
    """tarfile's own formats, any order of the files, padding as GNU tar writes it."""
    files = [*archived.items(), ("manifest.json", manifest(archived))]
    path = tar_of(tmp_path / "gnu.tar", files, format=tarfile.GNU_FORMAT)
    assert archive.import_(path, Cache(tmp_path / "target")).kernels == 3


def test_nothing_to_export(tmp_path):
    with pytest.raises(InvalidArgumentError, match="cusparge compile"):
        archive.export(Cache(tmp_path / "nothing"), tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def test_damaged_entries_are_left_out_and_told(tmp_path, rng):
    cache = filled(tmp_path / "source", rng)
    first, second, third = cache.entries()
    first.path.write_bytes(first.path.read_bytes()[:-1])
    report = archive.export(cache, tmp_path / "a.tar")
    assert report.skipped == (first.path.stem,)
    assert report.kernels == 2
    assert archive.import_(tmp_path / "a.tar", Cache(tmp_path / "target")).kernels == 2
    for damaged in (second, third):
        damaged.path.write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match="3 damaged"):
        archive.export(cache, tmp_path / "b.tar")


def test_an_export_that_fails_leaves_what_was_there(tmp_path, rng, monkeypatch):
    cache = filled(tmp_path / "source", rng)
    target = tmp_path / "out" / "a.tar"
    target.parent.mkdir()
    target.write_bytes(b"before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            archive.export(cache, target)
    assert [path.name for path in target.parent.iterdir()] == ["a.tar"]
    assert target.read_bytes() == b"before"
    archive.export(cache, target)
    assert [path.name for path in target.parent.iterdir()] == ["a.tar"]
    assert archive.import_(target, Cache(tmp_path / "target")).kernels == 3


def test_what_cannot_be_imported_again_is_not_exported(tmp_path, rng, monkeypatch):
    cache = filled(tmp_path / "source", rng)
    monkeypatch.setattr(tarball, "MOST_BYTES", 1000)
    with pytest.raises(InvalidArgumentError, match="1000 bytes"):
        archive.export(cache, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def test_the_limit_of_the_cache(tmp_path, rng, monkeypatch):
    archive.export(filled(tmp_path / "source", rng), tmp_path / "a.tar")
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", "8K")
    target = Cache(tmp_path / "target")
    with pytest.raises(InvalidArgumentError, match="CUSPARGE_CACHE_LIMIT to 2M") as caught:
        archive.import_(tmp_path / "a.tar", target)
    assert "8192" in str(caught.value)
    assert not target.root.exists()
    monkeypatch.setenv("CUSPARGE_CACHE_LIMIT", "2M")
    assert archive.import_(tmp_path / "a.tar", target).kernels == 3


# --- Names ---------------------------------------------------------------------------------------

GOOD_STEM = "pool-sm_90a-0123456789abcdef0123"


@pytest.mark.parametrize(
    "name",
    [
        "/" + GOOD_STEM + ".cubin",
        "../" + GOOD_STEM + ".cubin",
        "v1/" + GOOD_STEM + ".cubin",
        "./" + GOOD_STEM + ".cubin",
        "..\\" + GOOD_STEM + ".cubin",
        "C:" + GOOD_STEM + ".cubin",
        "C:\\" + GOOD_STEM + ".cubin",
        "\\\\host\\" + GOOD_STEM + ".cubin",
        GOOD_STEM + ".cubin\n",
        GOOD_STEM + ".cubin ",
        GOOD_STEM + ".exe",
        GOOD_STEM,
        GOOD_STEM + ".CUBIN",
        GOOD_STEM[:-1] + ".cubin",
        GOOD_STEM + "4.cubin",
        "pool-sm_90a-0123456789ABCDEF0123.cubin",
        "pool-sm_9-0123456789abcdef0123.cubin",
        "po.ol-sm_90a-0123456789abcdef0123.cubin",
        "p\u00f6ol-sm_90a-0123456789abcdef0123.cubin",
        "-sm_90a-0123456789abcdef0123.cubin",
        ".bashrc",
        "con",
        "\x1b[2J.cubin",
        "a" * 300,
        "d/" * 60 + "x",
    ],
)
def test_strange_names(tmp_path, archived, name):
    files = {**archived, name: b"\x7fELF"}
    rows = [("manifest.json", manifest(files)), *files.items()]
    for layout in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        try:
            path = tar_of(tmp_path / "bad.tar", rows, format=layout)
        except (ValueError, UnicodeError):  # this format has no way to say it
            continue
        text = check_refused(path)
        assert "no name of" in text or "no regular file" in text or "damaged" in text
        assert "\x1b" not in text


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CONTTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.XGLTYPE,
        b"Z",
    ],
)
def test_what_is_no_regular_file(tmp_path, archived, kind):
    member = tarfile.TarInfo(GOOD_STEM + ".cubin")
    member.type = kind
    member.linkname = "/etc/passwd"
    files = [("manifest.json", manifest(archived)), *archived.items(), ("", member)]
    path = tmp_path / "bad.tar"
    with open(path, "wb") as stream:
        for name, data in files[:-1]:
            plain = tarfile.TarInfo(name)
            plain.size = len(data)
            stream.write(plain.tobuf(tarfile.USTAR_FORMAT))
            stream.write(data + bytes(-len(data) % 512))
        stream.write(member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    check_refused(path, "no regular file")


def test_duplicates(tmp_path, archived):
    name = next(iter(archived))
    rows = [("manifest.json", manifest(archived)), *archived.items()]
    check_refused(tar_of(tmp_path / "a.tar", [*rows, (name, archived[name])]), "twice")
    check_refused(tar_of(tmp_path / "b.tar", [*rows, rows[0]]), "twice")
    folded = name.replace("pool", "POOL")
    check_refused(tar_of(tmp_path / "c.tar", [*rows, (folded, archived[name])]), "twice")


# --- Sizes, hashes, completeness -----------------------------------------------------------------


def test_every_flipped_byte_of_an_entry_is_seen(tmp_path, archived, rng):
    text = manifest(archived)
    for name, data in archived.items():
        spoilt = bytearray(data)
        spoilt[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        rows = [("manifest.json", text), *{**archived, name: bytes(spoilt)}.items()]
        check_refused(tar_of(tmp_path / "bad.tar", rows), f"{name} does not have the sha256")


def test_sizes_and_missing_files(tmp_path, archived):
    name = sorted(archived)[0]
    record = json.loads(manifest(archived))
    record["files"][name]["size"] += 1
    rows = [("manifest.json", json.dumps(record).encode()), *archived.items()]
    check_refused(tar_of(tmp_path / "size.tar", rows), f"{name} has")
    without = {key: data for key, data in archived.items() if key != name}
    rows = [("manifest.json", manifest(archived)), *without.items()]
    check_refused(tar_of(tmp_path / "less.tar", rows), "not in the archive")
    rows = [("manifest.json", manifest(without)), *archived.items()]
    check_refused(tar_of(tmp_path / "more.tar", rows), "not in manifest.json")
    rows = [("manifest.json", manifest(without)), *without.items()]
    check_refused(tar_of(tmp_path / "half.tar", rows), "without")
    check_refused(tar_of(tmp_path / "none.tar", archived.items()), "holds no manifest.json")
    check_refused(tar_of(tmp_path / "empty.tar", [("manifest.json", manifest({}))]), "no kernels")


def test_truncated_anywhere(tmp_path, rng):
    cache = filled(tmp_path / "source", rng, 2)
    archive.export(cache, tmp_path / "good.tar")
    data = (tmp_path / "good.tar").read_bytes()
    path = tmp_path / "bad.tar"
    end = len(data.rstrip(b"\0"))
    cuts = {0, 1, 511, 512, 513, end, end + 511, *map(int, rng.integers(0, end, 60))}
    cuts |= set(range(512, end, 512))
    for cut in cuts:
        path.write_bytes(data[:cut])
        check_refused(path, "no tar file" if cut < 512 else "ends too early")
    path.write_bytes(data[: -(-end // 512) * 512 + 512])  # one of the two blocks at the end
    check_refused(path, "ends too early")


def test_any_flipped_bit_is_refused_or_changes_nothing(tmp_path, rng):
    source = filled(tmp_path / "source", rng, 2)
    archive.export(source, tmp_path / "good.tar")
    data = (tmp_path / "good.tar").read_bytes()
    wanted = content(source)
    path = tmp_path / "bad.tar"
    refusals = 0
    for number, place in enumerate(rng.integers(0, len(data), 300)):
        spoilt = bytearray(data)
        spoilt[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoilt)
        target = Cache(tmp_path / f"target{number}")
        try:
            archive.import_(path, target)
        except InvalidArgumentError:
            refusals += 1
            assert not target.root.exists()
        else:
            assert content(target) == wanted
    assert refusals > 200


def header(name, size_field, kind=b"0"):
    """Return a header block whose size field holds any 12 bytes."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size_field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",  # 8 GiB
        b"\x80" + b"\x7f" * 11,  # GNU's form of a number far beyond memory
        b"\xff" * 12,  # -1 in that form
        b"\xff" + bytes(11),
        b"-0000000512\0",
        b"4000000001\0\0",
        b"nonsense\0\0\0\0",
        b"\xc3\xa9" * 6,
    ],
)
def test_sizes_are_bounded_before_reading(tmp_path, archived, size):
    """The file ends behind the header: what would be read is not there, nor room for it."""
    path = tmp_path / "bad.tar"
    for name in (GOOD_STEM + ".cubin", GOOD_STEM + ".json", "manifest.json"):
        path.write_bytes(header(name, size) + bytes(1024))
        text = check_refused(path)
        is_number = not size.startswith((b"nonsense", b"\xc3"))
        assert ("has a size of" if is_number else "no tar file") in text


def test_too_many_files_and_bytes(tmp_path, archived, monkeypatch):
    path = tar_of(tmp_path / "a.tar", [("manifest.json", manifest(archived)), *archived.items()])
    monkeypatch.setattr(tarball, "MOST_FILES", 4)
    check_refused(path, "too large: allowed 4 files")
    monkeypatch.setattr(tarball, "MOST_FILES", 6)
    assert archive.import_(path, Cache(tmp_path / "six")).kernels == 3


def test_what_is_no_tar_file(tmp_path, archived, rng):
    path = tmp_path / "bad.tar"
    for data in (b"", b"PK\x03\x04" + bytes(600), rng.bytes(5000), b"\0" * 100, b"text\n" * 500):
        path.write_bytes(data)
        check_refused(path)
    path.write_bytes(bytes(10240))  # a tar file without members
    check_refused(path, "holds no manifest.json")
    rows = [("manifest.json", manifest(archived)), *archived.items()]
    for mode in ("gz", "bz2", "xz"):
        with tarfile.open(path, f"w:{mode}") as tar:
            for name, data in rows:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        check_refused(path, "compressed" if mode == "gz" else "no tar file")
    check_refused(tmp_path, "is a folder")
    good = tar_of(tmp_path / "good.tar", rows).read_bytes()
    for rest in (b"x", b"\0" * 20000 + b"x", bytes(2 << 20) + b"x", good):
        path.write_bytes(good + rest)
        check_refused(path, "follows its end")
    with pytest.raises(FileNotFoundError):
        archive.import_(tmp_path / "missing.tar", Cache(tmp_path / "target"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_refused(tmp_path / "pipe", "pipe")


# --- Around it ------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_told(tmp_path, rng):
    archive.export(filled(tmp_path / "source", rng), tmp_path / "a.tar")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        archive.import_(tmp_path / "a.tar", Cache(tmp_path / "file"))


def test_the_archive_needs_no_gpu_library():
    code = "import sys; from cusparge._cuda import archive"
    code += "; assert not {'cupy', 'torch', 'cuda', 'rich'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
