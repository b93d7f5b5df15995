"""What to tell when a kernel does not compile, and how to reproduce it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cusparge._cuda.cache import Key
from cusparge._cuda.nvrtc import HOW_TO_INSTALL, Nvrtc
from cusparge._cuda.sources import Sources
from cusparge._cuda.storage import failure_folders
from cusparge._cuda.variants import Variant
from cusparge.errors import CompileError

__all__ = ["compile_failure", "unwanted_warning"]

_MAX_LINES = 60
_MAX_WIDTH = 500
_MAIN = "reproduce.cu"

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
    if _lacks_builtins(error, log):
        return _no_builtins(compiler, log)
    folder, problem = _keep(key, variant, text, log)
    command = "" if folder is None else _command(folder, options)
    lines = [line[:_MAX_WIDTH] for line in log.splitlines()]
    first = next((line for line in lines if _FIRST_ERROR.search(line)), error)
    shown = lines[:_MAX_LINES]
    if len(lines) > len(shown):
        where = "the attribute log of this exception" if folder is None else folder / "log.txt"
        shown.append(f"... {len(lines) - len(shown)} more lines in {where}")
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
        "log:\n"
        + "".join(f"    {line}\n" for line in shown or ["(empty)"])
        + (f"To reproduce it:\n    {command}\n" if command else f"{problem}\n")
        + advice
    )
    # Read by programs; the message is for people.
    vars(failure).update(
        log=log,
        command=command,
        options=options,
        source=text.files[variant.file].decode(errors="replace"),
    )
    return failure


def _lacks_builtins(error: str, log: str) -> bool:
    """Return whether the compiler could not open its second library, which holds its headers."""
    return "BUILTIN_OPERATION_FAILURE" in error or ("failed to open" in log and "builtins" in log)


def _no_builtins(compiler: Nvrtc, log: str) -> CompileError:
    version = f"{compiler.version[0]}.{compiler.version[1]}"
    name = f"libnvrtc-builtins.so.{version}"
    if sys.platform == "win32":
        name = f"nvrtc-builtins64_{version.replace('.', '')}.dll"
    given = os.environ.get("CUSPARGE_NVRTC")
    mend = (
        f"Put it there, or name in CUSPARGE_NVRTC={given} a library that has it beside it, or "
        "unset CUSPARGE_NVRTC"
        if given
        else f"Install NVRTC again: {HOW_TO_INSTALL}"
    )
    failure = CompileError(
        f"NVRTC {version} ({compiler.path}) cannot open its second library, {name}, which belongs "
        f"into the same folder. {mend}. It said: {' '.join(log.split())[:_MAX_WIDTH] or 'nothing'}"
    )
    vars(failure).update(log=log)
    return failure


def _keep(key: Key, variant: Variant, text: Sources, log: str) -> tuple[Path | None, str]:
    """Write the sources and the log to a folder for the user; return it, or why there is none."""
    problem = "The sources could not be kept: there is no folder that can be written to."
    for folder in failure_folders(key):
        try:
            _write(folder, variant, text, log)
        except OSError as error:  # a full disk, or somebody who clears the cache
            problem = f"The sources could not be kept: {error}."
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder, ""
    return None, problem


def _write(folder: Path, variant: Variant, text: Sources, log: str) -> None:
    for name, data in text.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    # Taking a function's address instantiates it, whatever its parameters are.
    main = f'#include "{variant.file}"\nauto* kernel = &{variant.expression};\n'
    (folder / _MAIN).write_bytes(main.encode())
    (folder / "log.txt").write_bytes(log.encode())


def _command(folder: Path, options: tuple[str, ...]) -> str:
    """Return the command that compiles what `_write` wrote."""
    flags = [option.replace("--gpu-architecture", "-arch") for option in options]
    words = ["nvcc", "-cubin", *flags, "-I", str(folder), str(folder / _MAIN)]
    words += ["-o", str(folder / "reproduce.cubin")]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
