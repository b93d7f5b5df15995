"""Archives of compiled kernels, good and bad ones, made by other means than the package's."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import pytest
from cache_tools import filled

from cusparge._cuda import archive
from cusparge._cuda.cache import Cache
from cusparge.errors import InvalidArgumentError

__all__ = ["bundle", "check_refused", "good_files", "manifest", "tar_of"]


def bundle(path):
    """Return the files of an archive as tarfile sees them."""
    with tarfile.open(path, "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def manifest(files):
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in files.items()
    }
    record = {"format": "cusparge kernels", "version": 1, "cusparge": "0.1.0", "files": listed}
    return json.dumps(record).encode()


def tar_of(path, files, *, format=tarfile.USTAR_FORMAT):
    """Write a tar file of anything: values are bytes, or TarInfo for what holds no data."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def good_files(folder, rng):
    """Return the files of a good archive, without its manifest."""
    archive.export(filled(folder / "source", rng), folder / "good.tar")
    files = bundle(folder / "good.tar")
    del files["manifest.json"]
    return files


def check_refused(path, words=""):
    """Import what must be refused: the error names the file, and nothing is written."""
    cache = Cache(path.parent / "target of refusals")
    with pytest.raises(InvalidArgumentError) as caught:
        archive.import_(path, cache)
    assert not cache.root.exists()
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert words in text
    assert len(text) < 1500
    return text
