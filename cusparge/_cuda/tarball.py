"""Files in and out of a plain tar file with a manifest, for readers who trust nothing in it.

Only what `write` makes is read: regular files with short names, one block of header each. tarfile
would follow extensions of the format whose sizes and names come from the file itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import stat
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from cusparge._version import __version__
from cusparge.errors import InvalidArgumentError, shown

__all__ = ["MOST_BYTES", "MOST_FILES", "parse_json", "read", "refused", "write"]

MANIFEST = "manifest.json"
_FORMAT = "cusparge kernels"
_VERSION = 1

#: Bounds on what is read, far above a full cache.
MOST_FILES = 20_000
MOST_BYTES = 1 << 30

_BLOCK = 512
_NAME_BYTES = 100  # what one header block holds
_DIGEST = re.compile(r"[0-9a-f]{64}")


# --- Writing -------------------------------------------------------------------------------------


def write(target: Path, files: Mapping[str, bytes]) -> int:
    """Write a tar file, whole or not at all, and return its size.

    The same files give the same bytes: order, times and owners are fixed.
    """
    total = sum(map(len, files.values()))
    if len(files) > MOST_FILES or total > MOST_BYTES:
        raise InvalidArgumentError(
            f"too much for one archive: {len(files)} files of {total} bytes together; allowed are "
            f"{MOST_FILES} files and {MOST_BYTES} bytes. Clear the cache, then compile what is "
            "wanted."
        )
    if long := [name for name in files if len(name) > _NAME_BYTES]:
        raise InvalidArgumentError(f"a name is too long for an archive: {long[0]}")
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "cusparge": __version__,
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for name, data in sorted(files.items())
        },
    }
    text = json.dumps(manifest, indent=1).encode("ascii") + b"\n"
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for name, data in [(MANIFEST, text), *sorted(files.items())]:
                    member = tarfile.TarInfo(name)  # time, owner and group are 0
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            stream.flush()
            os.fsync(stream.fileno())
            size = os.fstat(stream.fileno()).st_size
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(target)  # a full disk names none
        raise
    return size


# --- Reading -------------------------------------------------------------------------------------


def read(path: Path, *, limits: Mapping[str, int]) -> dict[str, bytes]:
    """Return the files of an archive, every one of them checked against the manifest.

    Parameters
    ----------
    path : Path
        The archive.
    limits : mapping of str to int
        Which names are allowed, as regular expressions, and how many bytes each may have.

    Raises
    ------
    InvalidArgumentError
        Anything is not as `write` makes it.
    OSError
        The system does not let us read it.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise InvalidArgumentError(f"{path}: is {kind}, not a file.")
    try:
        with open(path, "rb") as stream:
            files = _members(stream, {re.escape(MANIFEST): 16 << 20, **limits})
        if MANIFEST not in files:
            _refuse(f"holds no {MANIFEST}")
        _check_manifest(files.pop(MANIFEST), files)
    except InvalidArgumentError as error:
        raise refused(path, error) from None
    except OSError as error:
        error.filename = str(path)
        raise
    return files


def refused(path: Path, reason: object) -> InvalidArgumentError:
    """Return the error that says why an archive is not taken."""
    return InvalidArgumentError(
        f"{path}: not an archive of compiled kernels: {reason}. Nothing was imported. Make one "
        'with "cusparge cache export FILE", and copy it unchanged.'
    )


def _refuse(reason: str) -> NoReturn:
    raise InvalidArgumentError(reason)


def _members(stream: BinaryIO, limits: Mapping[str, int]) -> dict[str, bytes]:
    patterns = {re.compile(name): most for name, most in limits.items()}
    files: dict[str, bytes] = {}
    folded: set[str] = set()
    total = 0
    while True:
        header = stream.read(_BLOCK)
        if len(header) < _BLOCK:
            if not files and header[:2] == b"\x1f\x8b":
                _refuse("it is compressed")
            _refuse("it ends too early" if files else "it is no tar file")
        if header == bytes(_BLOCK):
            break
        name, size = _header(header, first=not files)
        most = next((most for pattern, most in patterns.items() if pattern.fullmatch(name)), None)
        if most is None:
            _refuse(f"{shown(name)} is no name of a compiled kernel")
        if name.casefold() in folded:
            _refuse(f"it holds {shown(name)} twice")
        folded.add(name.casefold())
        if not 0 <= size <= most:
            _refuse(f"{name} has a size of {size} bytes; allowed 0 to {most}")
        total += size
        if len(folded) > MOST_FILES + 1 or total > MOST_BYTES + (32 << 20):
            _refuse(f"it is too large: allowed {MOST_FILES} files and {MOST_BYTES} bytes")
        padded = -(-size // _BLOCK) * _BLOCK
        files[name] = stream.read(padded)[:size]  # where it ends early, no header follows
    # The end is marked by two empty blocks; writers fill up to their record's size.
    rest = stream.read(1 << 20)
    if len(rest) < _BLOCK:
        _refuse("it ends too early")
    if any(rest) or stream.read(1):
        _refuse("something follows its end")
    return files


def _header(block: bytes, *, first: bool) -> tuple[str, int]:
    try:
        member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.TarError, ValueError, OverflowError):
        if first and block[:2] == b"\x1f\x8b":
            _refuse("it is compressed")
        _refuse("it is no tar file" if first else "a header is damaged")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        _refuse(f"{shown(member.name)} is no regular file")
    return member.name, member.size


def _check_manifest(text: bytes, files: Mapping[str, bytes]) -> None:
    manifest = parse_json(text, MANIFEST)
    if manifest.get("format") != _FORMAT:
        _refuse(f'{MANIFEST} has the format {shown(manifest.get("format"))}, not "{_FORMAT}"')
    version = manifest.get("version")
    if type(version) is not int or version != _VERSION:
        _refuse(
            f"{MANIFEST} has version {shown(version)}; this version of cusparge reads {_VERSION}"
        )
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        _refuse(f'"files" in {MANIFEST} is no object')
    for name in listed:
        if name not in files:
            _refuse(f"{shown(name)} is in {MANIFEST} and not in the archive")
    for name, data in files.items():
        entry = listed.get(name)
        if entry is None:
            _refuse(f"{name} is in the archive and not in {MANIFEST}")
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        size = entry.get("size") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or type(size) is not int:
            _refuse(f"{MANIFEST} does not tell size and sha256 of {name}")
        if size != len(data):
            _refuse(f"{name} has {len(data)} bytes, and {size} in {MANIFEST}")
        if digest != hashlib.sha256(data).hexdigest():
            _refuse(f"{name} does not have the sha256 that {MANIFEST} tells")


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object of a file that may hold anything, or refuse it."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            raise ValueError("a name occurs twice")
        return found

    def whole(digits: str) -> int:
        if len(digits) > 20:  # Python takes quadratic time for the digits
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")

    try:
        found = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_int=whole,
            parse_constant=constant,
        )
    except RecursionError:
        _refuse(f"{name} is nested too deeply")
    except ValueError as error:  # not UTF-8, not JSON
        _refuse(f"{name} cannot be read: {str(error)[:200]}")
    if not isinstance(found, dict):
        _refuse(f"{name} is no JSON object")
    return found
