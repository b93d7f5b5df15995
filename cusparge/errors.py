"""The exceptions that cusparge raises.

Every message says what was wrong, what was received, what is allowed and how to mend it.
"""

from typing import Any

__all__ = [
    "CompileError",
    "CuspargeError",
    "DeviceError",
    "InvalidArgumentError",
    "UnsupportedError",
    "shown",
]


class CuspargeError(Exception):
    """Base of everything that cusparge raises on purpose."""


class InvalidArgumentError(CuspargeError, ValueError):
    """An argument is wrong: its type, shape, dtype, device, framework or value."""


class UnsupportedError(CuspargeError, NotImplementedError):
    """The request makes sense, but the library does not do it."""


class DeviceError(CuspargeError, RuntimeError):
    """A device is missing, or it cannot be used."""


class CompileError(CuspargeError, RuntimeError):
    """A CUDA kernel could not be compiled or loaded.

    Attributes
    ----------
    log : str
        What the compiler said, in full; empty where it did not run.
    command : str
        A command that reproduces the failure; empty where there is none.
    options : tuple of str
        The compiler's options.
    source : str
        The text that was compiled.
    """

    log: str = ""
    command: str = ""
    options: tuple[str, ...] = ()
    source: str = ""


def shown(value: Any) -> str:
    """Return what to print of a value that was received: short, whatever it is."""
    try:
        text = repr(value)
    except Exception as error:  # an int of many thousand digits, a tensor without memory
        return f"a {type(value).__name__} that cannot be printed ({type(error).__name__})"
    return text if len(text) <= 200 else f"{text[:200]}..."
