"""Where the CUDA sources are found, and what identifies them."""

import shutil
from pathlib import Path

import pytest
from cuda_tools import write_kernels

from cusparge._cuda import sources
from cusparge.errors import CompileError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("CUSPARGE_KERNELS", raising=False)


def test_the_bytes_are_those_on_disk():
    found = sources.load()
    on_disk = [p for p in found.folder.rglob("*") if p.suffix in (".cu", ".cuh")]
    assert len(on_disk) == len(found.files) >= 2
    for path in on_disk:
        assert found.files[path.relative_to(found.folder).as_posix()] == path.read_bytes()
    assert sources.MARKER in found.headers
    assert list(found.headers) == sorted(n for n in found.files if n.endswith(".cuh"))
    assert "README.md" not in found.files


def test_the_package_comes_before_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "somewhere" / "cusparge"
    (package / "_cuda").mkdir(parents=True)
    monkeypatch.setattr(sources, "__file__", str(package / "_cuda" / "sources.py"))
    with pytest.raises(CompileError, match="sources are missing") as caught:
        sources.find()
    for word in (str(package / "kernels_cu"), str(package.parent / "kernels_cu"), "Install"):
        assert word in str(caught.value)
    beside = write_kernels(package.parent / "kernels_cu")
    assert sources.find() == beside
    (package / "kernels_cu").mkdir()
    (package / "kernels_cu" / "other.cu").write_text("")
    assert sources.find() == beside, "a folder without the marker is somebody else's"
    inside = write_kernels(package / "kernels_cu")
    assert sources.find() == inside


def test_the_variable_comes_first_and_must_name_sources(tmp_path, monkeypatch):
    own = write_kernels(tmp_path / "own")
    monkeypatch.setenv("CUSPARGE_KERNELS", str(own))
    assert sources.load().folder == own
    (own / sources.MARKER).unlink()
    with pytest.raises(CompileError, match="CUSPARGE_KERNELS") as caught:
        sources.find()
    assert sources.MARKER in str(caught.value)
    assert "unset it" in str(caught.value)


@pytest.mark.parametrize("change", ["text", "header", "name", "new file"])
def test_the_id_changes_with_every_change(tmp_path, monkeypatch, change):
    own = write_kernels(tmp_path / "own")
    other = tmp_path / "other"
    shutil.copytree(own, other)
    monkeypatch.setenv("CUSPARGE_KERNELS", str(own))
    before = sources.load().source_id
    assert len(before) == 12
    monkeypatch.setenv("CUSPARGE_KERNELS", str(other))
    if change == "text":
        (other / "small.cu").write_text((other / "small.cu").read_text() + " ")
    elif change == "header":
        (other / "cusparge/small.cuh").write_text("")
    elif change == "name":
        (other / "small.cu").rename(other / "smaller.cu")
    else:
        (other / "more.cuh").write_text("")
    assert sources.load().source_id != before


def test_equal_sources_have_one_id_wherever_they_lie(tmp_path, monkeypatch):
    ids = set()
    for name in ("one", "two"):
        monkeypatch.setenv("CUSPARGE_KERNELS", str(write_kernels(tmp_path / name)))
        ids.add(sources.load().source_id)
    assert len(ids) == 1


def test_fields_of_a_digest_do_not_run_into_each_other():
    groups = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc")]
    assert len({sources.digest(group) for group in groups}) == len(groups)


def test_a_zero_byte_is_reported(tmp_path, monkeypatch):
    own = write_kernels(tmp_path / "own", kernel="int a;\0int b;")
    monkeypatch.setenv("CUSPARGE_KERNELS", str(own))
    with pytest.raises(CompileError, match="zero byte"):
        sources.load()
