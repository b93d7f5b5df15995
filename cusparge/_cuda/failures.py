"""What to tell when a kernel does not compile, and how to reproduce it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from cusparge._cuda.cache import Key
from cusparge._cuda.nvrtc import Nvrtc
from cusparge._cuda.sources import Sources
from cusparge._cuda.storage import failures_folder
from cusparge._cuda.variants import Variant
from cusparge.errors import CompileError

__all__ = ["compile_failure", "unwanted_warning"]

_MAX_LINES = 60
_MAX_WIDTH = 500

#: "pool.cu(4): error: ..." of the C++ compiler; ptxas says "ptxas ..., line 25; error   : ...".
_FIRST_ERROR = re.compile(r"\b(?:catastrophic )?error\b|\bfatal\b", re.IGNORECASE)

#: ptxas C75xx: the code runs, but wgmma is serialised or setmaxnreg ignored, many times slower.
_SLOW_CODE = re.compile(r"^.*\(C75\d\d\).*$", re.MULTILINE)


def unwanted_warning(log: str) -> str | None:
    """Return the first warning that counts as an error, or None."""
    found = _SLOW_CODE.search(log)
    return found[0].strip() if found else None


def compile_failure(
    error: str,
    log: str,
    variant: Variant,
    key: Key,
    text: Sources,
    options: tuple[str, ...],
    compiler: Nvrtc,
) -> CompileError:
    """Return the exception for a kernel that the compiler refused."""
    folder = failures_folder(key.stem)
    command = _reproduction(folder, variant, text, options, log)
    lines = [line[:_MAX_WIDTH] for line in log.splitlines()]
    first = next((line for line in lines if _FIRST_ERROR.search(line)), error)
    shown = lines[:_MAX_LINES]
    if len(lines) > len(shown):
        shown.append(f"... {len(lines) - len(shown)} more lines in {folder / 'log.txt'}")
    version = f"NVRTC {compiler.version[0]}.{compiler.version[1]} ({compiler.path})"
    own = os.environ.get("CUSPARGE_KERNELS")
    advice = (
        f"The sources are those of CUSPARGE_KERNELS={own}: correct them, or unset it."
        if own
        else "This is a defect of cusparge: please report it with this text and the output of "
        '"cusparge doctor --json".'
    )
    failure = CompileError(
        f"{variant.file} does not compile for {key.arch}: {first.strip()}\n"
        f"kernel: {variant.expression}\n"
        f"compiler: {version}, {error.splitlines()[0]}\n"
        "log:\n" + "".join(f"    {line}\n" for line in shown or ["(empty)"]) + "To reproduce it:\n"
        f"    {command}\n{advice}"
    )
    # Read by programs; the message is for people.
    vars(failure).update(
        log=log, command=command, options=options, source=text.files[variant.file].decode()
    )
    return failure


def _reproduction(
    folder: Path, variant: Variant, text: Sources, options: tuple[str, ...], log: str
) -> str:
    """Write the sources and the log to `folder`; return the command that compiles them."""
    main = folder / "reproduce.cu"
    for name, data in text.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    # Taking a function's address instantiates it, whatever its parameters are.
    main.write_bytes(f'#include "{variant.file}"\nauto* kernel = &{variant.expression};\n'.encode())
    (folder / "log.txt").write_bytes(log.encode())
    flags = [option.replace("--gpu-architecture", "-arch") for option in options]
    words = ["nvcc", "-cubin", *flags, "-I", str(folder), str(main)]
    words += ["-o", str(folder / "reproduce.cubin")]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
