"""What a compiled kernel is found by, what is known about it, and how its files are called."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "MOST_CUBIN", "MOST_JSON", "STEM", "Entry", "Info", "Key", "read_file"]

#: Version of the layout and of the metadata; part of every key.
FORMAT = 1

#: Name of an entry's files without the suffix. Files of other names are not ours.
STEM = re.compile(r"[A-Za-z0-9_]{1,100}-sm_[0-9]{2,3}[af]?-[0-9a-f]{20}")

#: Bytes that no file of an entry has more of: what is larger is not read.
MOST_CUBIN = 64 << 20
MOST_JSON = 1 << 20

_HEX = re.compile(r"[0-9a-f]{64}")
_LOWERED = re.compile(r"[A-Za-z_$][A-Za-z0-9_$.]*")
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")


@dataclass(frozen=True)
class Key:
    """What an entry is found by.

    `digest` covers everything; `source_digest` leaves the version of the compiler out. Both are
    SHA-256 in hexadecimal digits.
    """

    kernel: str
    arch: str
    digest: str
    source_digest: str

    @property
    def stem(self) -> str:
        """The files' name without its suffix."""
        return f"{Path(self.kernel).stem}-{self.arch}-{self.digest[:20]}"


@dataclass(frozen=True)
class Info:
    """What is known about one compiled kernel; the json file holds these fields."""

    kernel: str  #: file of kernels_cu
    expression: str  #: C++ name
    lowered: str  #: name in the machine code
    arch: str
    options: tuple[str, ...]
    nvrtc: str  #: "13.0"
    cusparge: str  #: version of this package
    key: str
    source_key: str  #: the key without NVRTC's version
    sha256: str  #: of the cubin
    size: int  #: bytes of the cubin
    registers: int  #: of one thread; -1 where the compiler did not say
    spill_bytes: int  #: stores and loads of registers that did not fit
    stack_bytes: int
    compile_ms: float

    @classmethod
    def parse(cls, data: bytes) -> Info:
        """Read what `dump` wrote; ValueError for anything else."""
        try:
            raw = json.loads(data)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError("not the metadata of a compiled kernel")
        values: dict[str, Any] = {field.name: raw.get(field.name) for field in fields(cls)}
        for name in ("size", "registers", "spill_bytes", "stack_bytes"):
            if type(values[name]) is not int or not -1 <= values[name] <= MOST_CUBIN:
                raise ValueError(f"{name} is no number of this size")
        if type(values["compile_ms"]) not in (int, float) or not 0 <= values["compile_ms"] < 1e9:
            raise ValueError("compile_ms is no duration")
        options = values["options"]
        if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
            raise ValueError("options is no list of texts")
        values["options"] = tuple(options)
        for name in ("kernel", "expression", "lowered", "arch", "nvrtc", "cusparge"):
            if not isinstance(values[name], str) or not values[name]:
                raise ValueError(f"{name} is no text")
        if not _LOWERED.fullmatch(values["lowered"]):
            raise ValueError("lowered is no name of a function")
        if not _VERSION.fullmatch(values["nvrtc"]):
            raise ValueError("nvrtc is no version")
        for text in (values["kernel"], values["expression"], values["cusparge"], *options):
            text.encode()  # half a surrogate pair is a ValueError: it could not be printed
        for name in ("key", "source_key", "sha256"):
            if not isinstance(values[name], str) or not _HEX.fullmatch(values[name]):
                raise ValueError(f"{name} is no SHA-256")
        info = cls(**values)
        if not STEM.fullmatch(info.stem):
            raise ValueError("kernel or arch is no name of one")
        return info

    def dump(self) -> bytes:
        """Return the json file's bytes."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1, sort_keys=True).encode()

    @property
    def stem(self) -> str:
        """The files' name without its suffix."""
        return Key(self.kernel, self.arch, self.key, self.source_key).stem


@dataclass(frozen=True)
class Entry:
    """One compiled kernel on disk."""

    path: Path  #: the cubin
    info: Info

    @property
    def metadata(self) -> Path:
        """The json file."""
        return self.path.with_suffix(".json")


def read_file(path: Path, most: int) -> bytes:
    """Return a file's bytes, of which there may be so many; OSError or ValueError else.

    Whatever lies under the name, this neither waits nor takes more memory than allowed: a pipe
    and a device are refused, and a file that is too large is not read.
    """
    _check_kind(os.stat(path), most)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        _check_kind(os.fstat(file.fileno()), most)  # it may have been exchanged since
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError("it grows while it is read")
    return data


def _check_kind(status: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if status.st_size > most:
        raise ValueError(f"it has {status.st_size} bytes; allowed are {most}")
